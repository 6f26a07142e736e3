"""Ranks that share a model draw what one rank draws, over real processes and connections.

In float32 the order of a sum is all that differs: logprobs agree within 1e-4, and greedy tokens are the same ones.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from engine.build import build_engine
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.engine import Engine
from engine.parallel.place import Place
from engine.parallel.rank import load_rank
from engine.sampling_params import SamplingParams
from engine.sequence import Request
from engine.stats import EngineStats
from tests.compiled import compiled_library
from tests.engine.fakes import Streams, run_to_end
from tests.engine.models.harness import CONFIGS, VOCAB, Driver, make_model, random_tokens
from tests.engine.parallel.pool import Cut, Pool, Ranks, free_port
from tests.engine.quant import checkpoints

TOLERANCE = 1e-4
SHAPES = [Cut(2), Cut(4), Cut(1, 2), Cut(2, 2), Cut(4, 2)]
SPECIMENS = ["llama-mha-biased-tied", "llama-mqa-wide-heads", "gpt2", "opt-350m", "neox", "qwen2-moe"]
"""With these every cut is tried: biases, tied and untied heads, one head of keys for all ranks, learned positions,
projected embeddings, blocks of each kind, and a shared expert."""


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compiled_library()


def config_of(path: Path, **changes: object) -> EngineConfig:
    """Prompts are cut into chunks of several steps; preemptions happen where there are few pages."""
    scheduler = SchedulerConfig(max_sequences=6, max_batch_tokens=24)
    kv = changes.pop("kv", KVConfig(memory="8MiB"))
    settings = {"dtype": "float32", "threads": 1, "device": "cpu", **changes}
    return EngineConfig(model=str(path), kv=kv, scheduler=scheduler, **settings)


def greedy_requests(vocabulary: int = VOCAB) -> list[Request]:
    """Some with logprobs, some without: their logits go different ways."""
    asks = [{}, {"logprobs": 20}, {"logprobs": 0, "prompt_logprobs": 3}, {}]
    return [
        Request(
            f"r{index}",
            tuple(token % vocabulary for token in random_tokens(5 + 13 * index, seed=index)),
            SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **ask),
        )
        for index, ask in enumerate(asks)
    ]


def answers(engine: Engine, requests: list[Request]) -> tuple[Streams, dict[str, list[float]]]:
    """The streams, and the logprobs of each request in order."""
    logprobs: dict[str, list[float]] = {}

    class Listening(Streams):
        def take(self, emissions: list) -> None:
            super().take(emissions)
            for each in emissions:
                found = logprobs.setdefault(each.request_id, [])
                for entry in (*each.prompt_logprobs, *(entry for entry in each.logprobs if entry is not None)):
                    found += [entry.logprob, *(value for _, value in entry.top)]

    for request in requests:
        engine.add(request)
    return run_to_end(engine, Listening()), logprobs


def assert_alike(
    ranks: Ranks, requests: list[Request], pages: int = 64, tolerance: float = TOLERANCE
) -> tuple[Streams, EngineStats]:
    """The engine over these ranks answers as one rank does; how, and what it counted."""
    alone, expected = answers(build_engine(ranks.config), requests)
    engine = ranks.engine(pages)
    together, found = answers(engine, requests)
    ranks.close()
    assert together.tokens == alone.tokens
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=tolerance), name
    return together, engine.stats()


@pytest.mark.parametrize("name", CONFIGS)
def test_two_stages_of_two_ranks_answer_as_one_rank(
    name: str, model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    assert_alike(load(config_of(model_of(name)), Cut(2, 2)), greedy_requests())


@pytest.mark.parametrize("cut", [cut for cut in SHAPES if cut != Cut(2, 2)], ids=str)
@pytest.mark.parametrize("name", SPECIMENS)
def test_every_cut_answers_as_one_rank(
    name: str, cut: Cut, model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    ranks = load(config_of(model_of(name)), cut)
    assert set(ranks.kernels) == {"C"} and set(ranks.shared) == {cut.tensor > 1}
    assert_alike(ranks, greedy_requests())


@pytest.mark.parametrize("cut", [Cut(2, 1, 2), Cut(4, 1, 2), Cut(2, 2, 2), Cut(4, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe-normed-tied", "qwen3-moe"])
def test_experts_that_are_dealt_out_answer_as_one_rank(
    name: str, cut: Cut, model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    assert_alike(load(config_of(model_of(name)), cut), greedy_requests())


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_that_no_token_is_left_for_answer_as_one_rank(
    tied: bool, tmp_path: Path, load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """40 token ids are two tiles: the last two of four ranks look nothing up, and score padding alone."""
    model = make_model(LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": 40, "tie_word_embeddings": tied}))
    model.save_pretrained(tmp_path)
    assert_alike(load(config_of(tmp_path), Cut(4)), greedy_requests(40))


def test_random_and_edited_rows_draw_what_one_rank_draws(
    model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    kinds = [
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
        {"temperature": 1.2, "top_k": 20, "n": 3},
        {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0.0, "logit_bias": {7: 3.0, 96: 2.0}},
        {"temperature": 0.0, "allowed_token_ids": [3, 40, 90]},
        {"temperature": 0.0},
    ]
    requests = [
        Request(
            f"r{index}",
            tuple(random_tokens(9 + 4 * index, seed=index)),
            SamplingParams(max_tokens=10, seed=index, ignore_eos=True, **kind),
        )
        for index, kind in enumerate(kinds)
    ]
    assert_alike(load(config_of(model_of("llama")), Cut(2, 2)), requests)


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 2), Cut(2, 2)], ids=str)
def test_pages_that_run_out_change_nothing(
    cut: Cut, model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """Streams grow until one has to give its pages up, and comes back later."""
    requests = [
        Request(
            f"r{index}",
            tuple(random_tokens(5 + 3 * index, seed=index)),
            SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
        )
        for index in range(4)
    ]
    together, stats = assert_alike(load(config_of(model_of("llama")), cut), requests, pages=6)
    assert len(together.finished) == 4
    assert stats.preemptions_total > 0


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 2), Cut(2, 2)], ids=str)
def test_pages_that_are_found_again_hold_the_part_of_each_rank(
    cut: Cut, model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """A prompt that goes on where another one was is answered as by one rank that computes all of it."""
    shared = random_tokens(40)
    first, second = (
        Request(name, tuple(shared + more), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3))
        for name, more in (("first", []), ("second", random_tokens(9, seed=1)))
    )
    ranks = load(config_of(model_of("llama")), cut)
    engine = ranks.engine()
    found = [answers(engine, [request]) for request in (first, second)]
    ranks.close()
    assert found[0][0].cached == {} and found[1][0].cached == {("second", 0): 32}, "two whole pages"
    assert engine.stats().prefix_hits_total == 32
    for request, (streams, logprobs) in zip((first, second), found, strict=True):
        alone, expected = answers(build_engine(ranks.config), [request])
        assert streams.tokens == alone.tokens
        assert logprobs[request.request_id] == pytest.approx(expected[request.request_id], abs=TOLERANCE)


def test_plain_torch_over_connections_answers_as_one_rank(
    model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """As where there is no compiler: pages of 8 tokens have no C kernels."""
    for name, cut in (("llama-mha-biased-tied", Cut(2, 2)), ("qwen2-moe", Cut(2, 1, 2))):
        ranks = load(config_of(model_of(name), kv=KVConfig(memory="8MiB", page_tokens=8)), cut)
        assert set(ranks.kernels) == {"torch"} and set(ranks.shared) == {False}
        assert_alike(ranks, greedy_requests())


@pytest.mark.parametrize(("scheme", "activations"), [("w8a8", "auto"), ("w4a16", "auto"), ("w4a16", "int8")])
@pytest.mark.parametrize("name", ["LLAMA", "NEOX", "GPT2", "QWEN_MOE"])
def test_quantized_weights_answer_as_on_one_rank(
    name: str, scheme: str, activations: str, tmp_path: Path, load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """In 4 bits ranks hold the same groups. In 8 bits each tensor rank has scales of its own channels, which are finer;
    stages have the same."""
    checkpoints.random_model(getattr(checkpoints, name)).save_pretrained(tmp_path)
    kv = KVConfig(memory="8MiB", dtype="model")
    config = config_of(tmp_path, quantization=scheme, quantization_group=32, activations=activations, kv=kv)
    assert_alike(load(config, Cut(1, 2)), greedy_requests(96))
    ranks = load(config, Cut(2, 2, 2 if name == "QWEN_MOE" else 1))
    if scheme == "w4a16":
        assert_alike(ranks, greedy_requests(96))
        return
    full, quantized, found = (
        answers(engine, greedy_requests(96))[1]["r2"][:40]
        for engine in (
            build_engine(config.model_copy(update={"quantization": "auto"})),
            build_engine(config),
            ranks.engine(),
        )
    )
    ranks.close()
    error = max(abs(a - b) for a, b in zip(quantized, full, strict=True))
    assert max(abs(a - b) for a, b in zip(found, full, strict=True)) <= 1.5 * error


def test_ranks_name_their_pages_apart_and_alike_where_they_mean_the_same(
    model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    config = config_of(model_of("llama"))
    seen = []
    for cut in (Cut(2, 2), Cut(2, 2), Cut(2, 1)):
        ranks = load(config, cut)
        seen.append([each.namespace for each in ranks.facts])
        ranks.close()
    assert seen[0] == seen[1]
    assert len({*seen[0], *seen[2]}) == 6


def test_memory_is_that_of_the_replica_however_it_is_cut(
    model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """Two heads of keys on two ranks: each has half of a page, in which it has half of the memory."""
    config = config_of(model_of("llama"))
    pages = []
    for cut in (Cut(1, 1), Cut(2, 2)):
        ranks = load(config, cut)
        pages.append({each.num_pages for each in ranks.facts})
        assert sum(each.page_bytes for each in ranks.facts) == 16 * 2 * 2 * 2 * 8 * 4
        ranks.close()
    assert pages[0] == pages[1] == {8 * 2**20 // (16 * 2 * 2 * 2 * 8 * 4)}


def test_results_do_not_depend_on_chunks_where_that_is_asked_for(
    model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """Sums over ranks have a fixed order: the same bits in one chunk, in two, and token by token."""
    ranks = load(config_of(model_of("llama"), deterministic=True), Cut(2))
    tokens, found = random_tokens(24), []
    for chunks in ([24], [9, 15], [1] * 24):
        executor = ranks.start(16)
        driver = Driver(model_of("llama"), "torch", num_pages=16)
        stream = driver.start(tokens)
        for count in chunks:
            batch = driver.batch([(stream, count)])
            stream.computed += count
            executor.submit(replace(batch, samples=replace(batch.samples, logprobs={0: 20})))
            output = executor.collect()
        found.append(output.logprobs)
    ranks.close()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_without_common_memory_add_up_over_connections(
    dtype: str, model_of: Callable[[str], Path], pool: Pool
) -> None:
    """As on two hosts: compiled programs with sums outside of them."""
    try:
        for process in pool.take(2):
            process.send("call", look_for_memory_in, "/nonexistent")
            process.answer()
        ranks = pool.load(config_of(model_of("llama"), dtype=dtype), Cut(2))
        assert set(ranks.kernels) == {"C"} and set(ranks.shared) == {False}
        if dtype == "float32":
            assert_alike(ranks, greedy_requests())
            return
        # In half precision the last digits differ, and a token that is nearly as probable may come instead.
        expected, found = (
            answers(engine, greedy_requests())[1]["r2"][:12] for engine in (build_engine(ranks.config), ranks.engine())
        )
        assert found == pytest.approx(expected, abs=0.25)
        ranks.close()
    finally:
        for process in pool.take(2):
            process.send("call", look_for_memory_in, "/proc")
            process.answer()


def look_for_memory_in(folder: str) -> None:
    """In a rank's process."""
    from engine.parallel import segment

    segment.PROCESSES = Path(folder)


def test_a_rank_alone_is_a_whole_model(model_of: Callable[[str], Path]) -> None:
    path = model_of("qwen2")
    rank = load_rank(config_of(path), Place.alone(2), f"tcp://127.0.0.1:{free_port()}")
    runner = rank.start(160)
    assert runner.memory.page_bytes == rank.facts.page_bytes
    driver = Driver(path, "C")
    batch = driver.batch([(driver.start(random_tokens(20)), 20)])
    output = runner.run(batch)
    assert output is not None and output.token_ids == driver.runner.run(batch).token_ids
    runner.close()
