"""The offline loop: completion order, bounded feeding, failures that stay alone."""

from collections.abc import Iterable, Iterator
from itertools import count

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deployments.offline import Completed, OfflineGenerator
from deployments.prompt_file import Prompt
from deployments.text import TextModel
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.kv.pages import PagePool
from engine.limits import Limits
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from tests.engine.fakes import VOCAB, LedgerRunner, next_token

PAGES, PAGE_TOKENS, MAX_SEQUENCES = 64, 4, 4
POISON = VOCAB
"""Not a token that the fake model draws."""


@pytest.fixture
def engine() -> Engine:
    config = SchedulerConfig(max_sequences=MAX_SEQUENCES, max_batch_tokens=64)
    scheduler = Scheduler(config, PagePool(PAGES), PAGE_TOKENS)
    executor = LocalExecutor(LedgerRunner(PAGES, PAGE_TOKENS, poison=POISON))
    return Engine(scheduler, executor, Limits(max_model_len=100, vocab_size=VOCAB + 1))


@pytest.fixture
def text() -> TextModel:
    """Token i is the character 0x21 + i."""
    vocab = {chr(0x21 + i): i for i in range(94)} | {f"<{i}>": i for i in range(94, VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextModel(tokenizer)


def prompt(index: int, *token_ids: int, stop: tuple[str, ...] = (), **params: int | float) -> Prompt:
    sampling = SamplingParams.model_validate({"max_tokens": 6, "temperature": 0.0, "seed": 0} | params)
    return Prompt(index, f"p{index}", "f", token_ids or (1 + index % 50, 2), sampling, stop, False)


def expected(item: Prompt, sample: int = 0) -> list[int]:
    """The fake model's tokens for a prompt of token ids."""
    assert isinstance(item.content, tuple) and item.params.max_tokens is not None
    context = list(item.content)
    for _ in range(item.params.max_tokens):
        context.append(next_token(context, item.params.seed or 0, sample))
    return context[len(item.content) :]


def by_id(completed: Iterable[Completed]) -> dict[str, Completed]:
    return {result.prompt.id: result for result in completed}


def test_every_prompt_gets_its_own_tokens_and_text(engine: Engine, text: TextModel) -> None:
    prompts = [prompt(index, max_tokens=1 + index % 7) for index in range(20)]
    results = by_id(OfflineGenerator(engine, text, window=8).run(prompts))
    assert set(results) == {item.id for item in prompts}
    for item in prompts:
        [output] = results[item.id].outputs
        assert output.token_ids == expected(item)
        assert output.text == text.decode(expected(item))
        assert output.finish_reason == "length"
        assert results[item.id].num_prompt_tokens == 2
    assert engine.stats().num_free_pages == PAGES


def test_prompts_are_read_only_as_the_engine_takes_them(engine: Engine, text: TextModel) -> None:
    taken = 0

    def endless() -> Iterator[Prompt]:
        nonlocal taken
        for index in count():
            taken += 1
            yield prompt(index)

    results = OfflineGenerator(engine, text, window=6).run(endless())
    for finished in range(1, 30):
        next(results)
        assert taken <= finished + 6
    results.close()  # type: ignore[attr-defined]
    assert not engine.has_work()
    assert engine.stats().num_free_pages == PAGES


def test_the_engine_is_kept_full(engine: Engine, text: TextModel) -> None:
    results = OfflineGenerator(engine, text, window=2 * MAX_SEQUENCES).run(
        prompt(i, max_tokens=1 + i % 5) for i in range(40)
    )
    for _ in range(25):
        next(results)
        # The finished ones make room; whatever is free is taken in the next iteration.
        assert engine.stats().num_running + engine.stats().num_waiting >= MAX_SEQUENCES


def test_a_stop_string_ends_a_prompt_early(engine: Engine, text: TextModel) -> None:
    item = prompt(3, max_tokens=30)
    tokens = expected(item)
    stop = text.decode(tokens[3:5])
    cut = text.decode(tokens).index(stop)
    stopped = prompt(3, max_tokens=30, stop=(stop,))
    generator = OfflineGenerator(engine, text, window=4)
    [result] = generator.run([stopped])
    assert result.outputs[0].text == text.decode(tokens)[:cut]
    assert result.outputs[0].finish_reason == "stop"
    assert generator.num_output_tokens <= 6
    assert not engine.has_work()


def test_samples_of_one_prompt_come_together(engine: Engine, text: TextModel) -> None:
    item = prompt(1, n=3, temperature=1.0)
    [result] = OfflineGenerator(engine, text, window=4).run([item])
    assert [output.token_ids for output in result.outputs] == [expected(item, sample) for sample in range(3)]
    assert result.num_output_tokens == 18


def test_a_failing_prompt_does_not_disturb_the_others(engine: Engine, text: TextModel) -> None:
    good = [prompt(index) for index in range(1, 6)]
    numerics, too_long = prompt(7, 5, POISON), prompt(8, *([3] * 99), max_tokens=20)
    results = by_id(OfflineGenerator(engine, text, window=4).run([good[0], numerics, too_long, *good[1:]]))
    assert results["p7"].error == "poisoned"
    assert "maximum context length is 100" in (results["p8"].error or "")
    for item in good:
        assert results[item.id].error is None
        assert results[item.id].outputs[0].token_ids == expected(item)


def test_stop_ends_the_run_and_frees_the_engine(engine: Engine, text: TextModel) -> None:
    generator = OfflineGenerator(engine, text, window=4)
    finished = []
    for result in generator.run(prompt(index) for index in count()):
        finished.append(result)
        if len(finished) == 5:
            generator.stop()
    assert len(finished) < 5 + MAX_SEQUENCES
    assert not engine.has_work()
    assert engine.stats().num_free_pages == PAGES


def test_a_window_of_nothing_is_refused(engine: Engine, text: TextModel) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        OfflineGenerator(engine, text, window=0)
