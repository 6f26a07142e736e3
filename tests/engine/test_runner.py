"""What the runner makes of a batch: which rows get logits, which pages are cleared, what comes back."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import runner as runner_module
from engine.batch import Batch, PromptLogprobRow, SampleRow, Samples
from engine.forward import opened_pages
from engine.kernels.operators import AttentionLayout, Wanted
from engine.runner import Runner, layout_of, slots, wanted_begins, wanted_of
from engine.sampler import Sampler
from tests.engine.models.harness import (
    GREEDY,
    KERNELS,
    NAN_BYTE,
    VOCAB,
    Driver,
    Kernels,
    Pair,
    make_pair,
    random_tokens,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("llama", Path(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("kernels", KERNELS)
def test_only_rows_that_sample_get_logits(pair: Pair, kernels: Kernels) -> None:
    driver = Driver(pair.path, kernels)
    prompts = [random_tokens(9, 1), random_tokens(20, 2), random_tokens(5, 3)]
    batch = driver.batch([(driver.start(prompt), len(prompt)) for prompt in prompts])
    out = driver.runner.run(replace(batch, samples=Samples.of([SampleRow(1, GREEDY, 0, 0, len(prompts[1]))])))
    assert driver.forward.rows == [1]
    assert out.token_ids == [int(pair.expected(prompts[1])[-1].argmax())]
    assert (out.stats.num_tokens, out.stats.num_sequences) == (34, 3)
    assert out.stats.seconds > 0


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_chunk_that_does_not_end_a_prompt_draws_nothing(pair: Pair, kernels: Kernels) -> None:
    driver = Driver(pair.path, kernels)
    batch = driver.batch([(driver.start(random_tokens(20)), 8)])
    out = driver.runner.run(replace(batch, samples=Samples.of([])))
    assert (out.token_ids, out.logprobs, out.failed) == ([], [], {})


@pytest.mark.parametrize("kernels", KERNELS)
def test_prompt_logprobs_are_computed_in_bounded_pieces(
    pair: Pair, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "LOGPROB_ROWS", 8)
    driver = Driver(pair.path, kernels)
    first, tokens = random_tokens(6, 8), random_tokens(30, 9)
    batch = driver.batch([(driver.start(first), 6), (driver.start(tokens), 30)])
    wanted = PromptLogprobRow(row=1, targets=tuple(tokens[1:]), top=2)
    out = driver.runner.run(replace(batch, prompt_logprobs=(wanted,)))
    expected = pair.expected(tokens).log_softmax(-1)
    (found,) = out.prompt_logprobs
    assert [entry.token_id for entry in found] == tokens[1:]
    for index, entry in enumerate(found):
        assert entry.logprob == pytest.approx(float(expected[index, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == expected[index].topk(2).indices.tolist()
    assert max(driver.forward.rows) == 8


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_sequence_with_broken_logits_fails_alone(pair: Pair, kernels: Kernels) -> None:
    """Its pages are then reused: what it left there must not reach the next owner."""
    driver = Driver(pair.path, kernels)
    sick, healthy = driver.start(random_tokens(10, 1), max_len=40), driver.start(random_tokens(21, 2))
    driver.step([(sick, 10), (healthy, 21)])
    driver.cache.pages[sick.pages[0]] = NAN_BYTE
    sick_out = driver.runner.run(driver.batch([(sick, 1), (healthy, 1)]))
    assert list(sick_out.failed) == [0]
    assert sick_out.token_ids[1] == int(pair.expected(healthy.tokens)[-1].argmax())
    heir = driver.start(random_tokens(14, 3))
    heir.pages = sick.pages
    driver.step([(heir, 7)])
    driver.step([(heir, 7), (healthy, 1)])
    assert heir.tokens[-1] == int(pair.expected(heir.tokens[:-1])[-1].argmax())


@pytest.mark.parametrize("kernels", KERNELS)
def test_prompt_logprobs_of_chunks_beside_a_decode_and_a_chunk_that_wants_nothing(pair: Pair, kernels: Kernels) -> None:
    driver = Driver(pair.path, kernels)
    scored, silent = driver.start(random_tokens(30, 1)), driver.start(random_tokens(20, 2))
    decoding = driver.start(random_tokens(7, 3))
    driver.step([(decoding, 7)])
    prompt, found = list(scored.tokens), []
    for chunk in (12, 1, 17):
        work = [(silent, 5), (decoding, 1), (scored, chunk)]
        begin, end = scored.computed, scored.computed + chunk
        drawing = [SampleRow(1, GREEDY, 0, 0, len(decoding.tokens))]
        if end == len(prompt):
            drawing.append(SampleRow(2, GREEDY, 0, 0, end))
        wanted = PromptLogprobRow(row=2, targets=tuple(prompt[begin + 1 : end + 1]), top=0)
        batch = replace(driver.batch(work), samples=Samples.of(drawing), prompt_logprobs=(wanted,))
        out = driver.runner.run(batch)
        for stream, count in work:
            stream.computed += count
        decoding.tokens.append(out.token_ids[0])
        found += [entry.logprob for entry in out.prompt_logprobs[0]]
    expected = pair.expected(prompt)
    logprobs = expected.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert found == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert out.token_ids[1] == int(expected[-1].argmax())
    assert decoding.tokens[7:] == pair.generated(decoding.tokens[:7], 4)


def make_batch(spans: list[tuple[int, int]], table: list[list[int]]) -> Batch:
    """`spans` are (first position, end) of each sequence."""
    counts = [end - first for first, end in spans]
    return Batch(
        step=0,
        sequence_ids=tuple(range(len(spans))),
        token_ids=np.full(sum(counts), VOCAB - 1, np.int64),
        positions=np.concatenate([np.arange(*span) for span in spans]).astype(np.int64),
        cu_seq_q=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=np.array([end for _, end in spans], np.int32),
        page_table=np.array(table, np.int32),
        samples=Samples.of([SampleRow(0, GREEDY, 0, 0, spans[0][1])]),
    )


class LateForward:
    """Computes in its own time, as a GPU does."""

    device = torch.device("cpu")
    seconds = 0.02

    def __init__(self) -> None:
        self.num_begun = 0

    def hidden(self, token_ids: torch.Tensor, layout: AttentionLayout, wanted: Wanted | None = None) -> torch.Tensor:
        self.num_begun += 1
        return torch.zeros(len(token_ids) if wanted is None else len(wanted.rows), 4)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.num_begun += 1
        return torch.zeros(len(rows), VOCAB)

    def wait(self) -> None:
        time.sleep(self.seconds)
        self.num_begun = 0


@pytest.mark.parametrize("draws", [False, True])
def test_a_step_is_over_when_all_of_it_is_computed_though_nothing_was_drawn(draws: bool) -> None:
    """Its pages are copied, or given to others, from then on."""
    forward = LateForward()
    batch = make_batch([(0, 6)], [[0, 1]])
    out = Runner(forward, 4, Sampler()).run(batch if draws else replace(batch, samples=Samples.of([])))
    assert forward.num_begun == 0
    assert out.stats.seconds >= forward.seconds


def test_slots_follow_the_page_table() -> None:
    batch = make_batch([(3, 6), (4, 5)], [[7, 2], [5, 9]])
    assert slots(batch, page_tokens=4).tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 9 * 4]


def test_opened_pages_are_those_begun_and_not_filled() -> None:
    spans = [(0, 6), (0, 8), (5, 7), (4, 5), (3, 5)]
    batch = make_batch(spans, [[10, 11], [20, 21], [30, 31], [40, 41], [50, 51]])
    assert opened_pages(layout_of(batch, 4, torch.device("cpu"))).tolist() == [11, 41, 51]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_wanted_are_the_last_tokens_of_who_samples_and_all_of_who_is_scored(
    sequences: list[tuple[int, int, bool, bool]],
) -> None:
    """Sequences by their tokens in the batch, those before it, and whether they sample and have prompt logprobs."""
    spans = [(past, past + count) for count, past, _, _ in sequences]
    page_tokens = 4
    columns = -(-max(end for _, end in spans) // page_tokens)
    table = [[columns * row + column for column in range(columns)] for row in range(len(spans))]
    batch = replace(
        make_batch(spans, table),
        samples=Samples.of(
            [SampleRow(row, GREEDY, 0, 0, 0) for row, (_, _, samples, _) in enumerate(sequences) if samples]
        ),
        prompt_logprobs=tuple(
            PromptLogprobRow(row, (1,) * count, 0) for row, (count, _, _, scored) in enumerate(sequences) if scored
        ),
    )
    expected, first = [], 0
    for count, _, samples, scored in sequences:
        chunk = list(range(first, first + count))
        expected.append(chunk if scored else chunk[-1:] if samples else [])
        first += count
    rows = [row for chunk in expected for row in chunk]
    begins = wanted_begins(batch)
    assert np.diff(begins).tolist() == [len(chunk) for chunk in expected]
    layout = layout_of(batch, page_tokens, torch.device("cpu"))
    wanted = wanted_of(batch, begins, layout)
    if wanted is None:
        assert rows == list(range(batch.num_tokens))
        return
    some = [index for index, chunk in enumerate(expected) if chunk]
    part = wanted.layout
    assert wanted.rows.tolist() == rows
    assert part.query_lens == tuple(torch.diff(part.cu_seq_q).tolist()) == tuple(len(expected[i]) for i in some)
    assert part.lens == tuple(part.context_lens.tolist()) == tuple(spans[i][1] for i in some)
    assert part.page_table.tolist() == [table[i] for i in some]
    for name in ("positions", "contexts", "slots"):
        assert torch.equal(getattr(part, name), getattr(layout, name)[rows])
