"""Every family against Hugging Face's own modelling code, however the tokens are cut into batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from engine.batch import Samples
from engine.runner import layout_of, wanted_of
from tests.engine.models.harness import CONFIGS, KERNELS, Driver, Kernels, Pair, Stream, make_pair, random_tokens

TOLERANCE = 1e-4
CHUNKING_DEPENDENT = {"llama-dynamic", "llama-longrope"}
"""Past the original length their frequencies depend on the context at hand, see `Rope.cos_sin`."""


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    pairs: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in pairs:
            pairs[name] = make_pair(name, tmp_path_factory.mktemp(name))
        return pairs[name]

    return get


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found - expected).abs() < TOLERANCE * (1 + expected.abs())).all())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_prompts_give_the_same_logits(name: str, kernels: Kernels, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    for length in (1, 13, 100):
        tokens = random_tokens(length, seed=length)
        driver = Driver(pair.path, kernels)
        stream = driver.start(tokens)
        driver.step([(stream, length)])
        assert close(stream.logits[-1], pair.expected(tokens)[-1])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_chunking_gives_the_same_logits(name: str, kernels: Kernels, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    length = 60 if name in CHUNKING_DEPENDENT else 100
    tokens = random_tokens(length, seed=7)
    expected = pair.expected(tokens)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        driver = Driver(pair.path, kernels, seed=seed)
        stream = driver.start(tokens)
        while stream.computed < length:
            chunk = int(min(rng.choice([1, 2, 3, 5, 8, 16, 31]), length - stream.computed))
            driver.step([(stream, chunk)])
            assert close(stream.logits[-1], expected[stream.computed - 1])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_in_one_batch_do_not_see_each_other(
    name: str, kernels: Kernels, pair_of: Callable[[str], Pair]
) -> None:
    """Some decode, some are in the middle of their prompt, some begin; all end with the logits of running alone."""
    pair = pair_of(name)
    rng = np.random.default_rng(3)
    driver = Driver(pair.path, kernels, num_pages=200)
    prompts = [random_tokens(int(length), seed=i) for i, length in enumerate(rng.integers(1, 56, 7))]
    streams = [driver.start(prompt, max_len=72) for prompt in prompts]
    for _ in range(9):
        chosen = rng.permutation(len(streams))[: rng.integers(2, len(streams) + 1)]
        work: list[tuple[Stream, int]] = []
        for index in chosen:
            remaining = len(streams[index].tokens) - streams[index].computed
            work.append((streams[index], int(rng.integers(1, remaining + 1))))
        driver.step(work)
    for stream in streams:
        if stream.computed:
            expected = pair.expected(stream.tokens[: stream.computed])[-1]
            assert close(stream.logits[-1], expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_that_draw_nothing_leave_their_keys_and_values(
    name: str, kernels: Kernels, pair_of: Callable[[str], Pair]
) -> None:
    """The last layer runs no row of the first two steps, and one of the eleven of the last."""
    pair = pair_of(name)
    tokens = random_tokens(40, seed=6)
    driver = Driver(pair.path, kernels)
    stream = driver.start(tokens)
    for chunk in (20, 9):
        out = driver.runner.run(replace(driver.batch([(stream, chunk)]), samples=Samples.of([])))
        assert out.token_ids == []
        stream.computed += chunk
    driver.step([(stream, 11)])
    assert close(stream.logits[-1], pair.expected(tokens)[-1])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_wanted_rows_do_not_depend_on_the_others(name: str, kernels: Kernels, pair_of: Callable[[str], Pair]) -> None:
    driver = Driver(pair_of(name).path, kernels)
    streams = [driver.start(random_tokens(50, seed=seed), max_len=64) for seed in range(4)]
    driver.step([(stream, 18 + index) for index, stream in enumerate(streams)])
    batch = driver.batch([(streams[0], 1), (streams[1], 25), (streams[2], 3), (streams[3], 12)])
    layout = layout_of(batch, driver.cache.page_tokens, torch.device("cpu"))
    token_ids = torch.from_numpy(batch.token_ids)
    with torch.inference_mode():
        all_rows = driver.forward.hidden(token_ids, layout).clone()
        for counts in ([1, 1, 1, 1], [1, 0, 0, 1], [0, 25, 0, 7], [0, 0, 2, 0], [0, 0, 0, 0]):
            wanted = wanted_of(batch, np.array([0, *np.cumsum(counts)], np.int32), layout)
            assert wanted is not None
            some_rows = driver.forward.hidden(token_ids, layout, wanted)
            assert some_rows.shape == (sum(counts), all_rows.shape[1])
            assert close(some_rows, all_rows[wanted.rows])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_generate(name: str, kernels: Kernels, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(name)
    prompts = [random_tokens(11, seed=1), random_tokens(30, seed=2)]
    driver = Driver(pair.path, kernels)
    streams = [driver.start(prompt) for prompt in prompts]
    driver.step([(stream, len(stream.tokens)) for stream in streams])
    for _ in range(23):
        driver.step([(stream, 1) for stream in streams])
    for stream, prompt in zip(streams, prompts, strict=True):
        assert stream.tokens[len(prompt) :] == pair.generated(prompt, 24)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", sorted(CHUNKING_DEPENDENT))
def test_rope_that_stretches_with_the_context_follows_generate(name: str, kernels: Kernels, tmp_path: Path) -> None:
    """A prompt longer than the original length, then decodes that stretch the frequencies further."""
    # A model of its own: Hugging Face's remembers the longest context it has seen.
    pair = make_pair(name, tmp_path)
    prompt = random_tokens(135, seed=5)
    driver = Driver(pair.path, kernels)
    stream = driver.start(prompt)
    driver.step([(stream, len(prompt))])
    assert close(stream.logits[-1], pair.expected(prompt)[-1])
    for _ in range(15):
        driver.step([(stream, 1)])
    assert stream.tokens[len(prompt) :] == pair.generated(prompt, 16)


def test_sharded_checkpoint_is_the_same_model(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pair_of("llama")
    pair.theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = random_tokens(20)
    driver = Driver(tmp_path)
    stream = driver.start(tokens)
    driver.step([(stream, 20)])
    assert close(stream.logits[-1], pair.expected(tokens)[-1])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_in_one_tensor_are_the_same_model(
    name: str, kernels: Kernels, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    """As transformers holds them in memory, and writes them if it is told not to write them expert by expert."""
    pair = pair_of(name)
    pair.theirs.save_pretrained(tmp_path, save_original_format=False)
    merged, apart = (safe_open(str(path / "model.safetensors"), "pt").keys() for path in (tmp_path, pair.path))
    assert len(list(merged)) < len(list(apart))
    tokens = random_tokens(30)
    driver = Driver(tmp_path, kernels)
    stream = driver.start(tokens)
    for chunk in (9, 20, 1):
        driver.step([(stream, chunk)])
        assert close(stream.logits[-1], pair.expected(tokens)[stream.computed - 1])


@pytest.mark.parametrize("name", ["llama-llama3", "gpt2", "neox", "qwen3", "mixtral-every-expert"])
@pytest.mark.parametrize(
    ("kernels", "dtype"), [("C", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float16)]
)
def test_half_precision_stays_near_single(
    name: str, kernels: Kernels, dtype: torch.dtype, pair_of: Callable[[str], Pair]
) -> None:
    """Prompts in chunks, then decodes; within rounding of the float32 logits, which span several units."""
    pair = pair_of(name)
    tokens = random_tokens(40, seed=4)
    driver = Driver(pair.path, kernels, dtype=dtype)
    stream = driver.start(tokens)
    for chunk in (17, 20, 1, 1, 1):
        driver.step([(stream, chunk)])
    expected = pair.expected(tokens)[-1]
    spread = float(expected.std())
    assert float((stream.logits[-1] - expected).abs().max()) < 0.15 * spread
