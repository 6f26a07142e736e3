"""Every family on the CUDA path against Hugging Face's own modelling code: prompts, chunks, decodes, mixed batches.

Without a GPU the same code runs on the CPU over a flash attention in plain torch, with steps recorded by running them
again: what is proved there is all but the kernels.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.batch import SampleRow, Samples
from engine.config import Quantization
from engine.forward import EagerForward
from engine.kernels.cuda.backend import CudaBackend
from engine.kernels.cuda.forward import CudaForward, graph_obstacle
from engine.kernels.cuda.fused import TorchFused
from engine.kernels.cuda.graphs import Replay
from engine.kernels.cuda.operators import CudaOperators
from engine.kernels.reference import ReferenceOperators
from engine.kv.cache import PagedKVCache
from engine.kv.copies import DevicePages
from engine.models.decoder import Decoder
from engine.models.loader import load_parameters
from engine.runner import Runner, layout_of
from tests.engine.kernels.cuda.device import DEVICE, HAS_GPU, needs_gpu
from tests.engine.kernels.cuda.flash import flash_varlen
from tests.engine.models import harness
from tests.engine.models.harness import (
    CHOOSING,
    CONFIGS,
    GREEDY,
    NAN_BYTE,
    CountingForward,
    Pair,
    RecordingSampler,
    Stream,
    make_pair,
    random_tokens,
)

PAGE_TOKENS = 256
MAX_SEQUENCES = 6
TOLERANCE = 0.15
"""Of the spread of the logits: bfloat16 has 8 bits, and errors of two layers add up."""
W8A8_TOLERANCE = 0.5
"""Activations that differ in the last bit fall on either side of a step of a scale that only 32 values share."""
CHUNKING_DEPENDENT = {"llama-dynamic", "llama-longrope"}


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAGE_TOKENS", PAGE_TOKENS)
    if not HAS_GPU:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_varlen)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    pairs: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in pairs:
            pairs[name] = make_pair(name, tmp_path_factory.mktemp(name))
        return pairs[name]

    return get


class Driver(harness.Driver):
    """The harness's driver over the CUDA path; every page starts as NaN."""

    def __init__(
        self,
        path: Path,
        *,
        num_pages: int = 12,
        quantization: Quantization = "auto",
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        loaded = load_parameters(path, torch.bfloat16, DEVICE, quantization=quantization)
        self.replays = 0
        operators, make_forward = self._device() if HAS_GPU else self._stand_in()
        self.decoder = Decoder(loaded.part, loaded.parameters, operators, loaded.dtype)
        self.cache = PagedKVCache(loaded.spec, num_pages + 1, PAGE_TOKENS, kv_dtype, DEVICE)
        self.cache.pages.fill_(NAN_BYTE)
        self.sampler = RecordingSampler()
        self.forward = CountingForward(make_forward(self.decoder, self.cache))
        self.runner = Runner(self.forward, PAGE_TOKENS, self.sampler)
        self._free = np.random.default_rng(0).permutation(num_pages).tolist()
        self._step = 0

    def _device(self) -> tuple[CudaOperators, Callable[[Decoder, PagedKVCache], CudaForward]]:
        backend = CudaBackend(torch.bfloat16, max_sequences=MAX_SEQUENCES)
        return backend.operators, backend.forward

    def _stand_in(self) -> tuple[CudaOperators, Callable[[Decoder, PagedKVCache], CudaForward]]:
        def record(work: Callable[[], None]) -> Replay:
            def replay() -> None:
                self.replays += 1
                work()

            work()
            return replay

        def forward(decoder: Decoder, cache: PagedKVCache) -> CudaForward:
            return CudaForward(decoder, cache, (9, 0), max_sequences=MAX_SEQUENCES, record=record)

        return CudaOperators(torch.bfloat16, TorchFused(), (9, 0)), forward


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return float((found.cpu() - expected).abs().max()) < tolerance * float(expected.std())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CHOOSING])
def test_prompts_chunks_and_decodes_give_the_logits_of_the_whole(name: str, pair_of: Callable[[str], Pair]) -> None:
    pair, driver = pair_of(name), Driver(pair_of(name).path)
    tokens = random_tokens(60 if name in CHUNKING_DEPENDENT else 90, seed=7)
    expected = pair.expected(tokens)
    stream = driver.start(tokens)
    for chunk in (17, 1, 30, 1, 1, 1):
        driver.step([(stream, chunk)])
        assert near(stream.logits[-1], expected[stream.computed - 1])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CHOOSING])
def test_sequences_in_one_batch_do_not_see_each_other(name: str, pair_of: Callable[[str], Pair]) -> None:
    """Decodes and chunks in one step, then decodes of as many sequences as there are, and fewer."""
    pair, driver = pair_of(name), Driver(pair_of(name).path)
    rng = np.random.default_rng(3)
    prompts = [random_tokens(int(length), seed=i) for i, length in enumerate(rng.integers(8, 50, 5))]
    streams = [driver.start(prompt) for prompt in prompts]
    driver.step([(stream, 5) for stream in streams[:3]])
    driver.step([(stream, 1 if index < 2 else 3) for index, stream in enumerate(streams)])
    for chosen in (streams, streams[1:4], streams[4:]):
        driver.step([(stream, 1) for stream in chosen])
    for stream in streams:
        assert near(stream.logits[-1], pair.expected(stream.tokens[: stream.computed])[-1])


def test_decodes_are_replayed_and_everything_else_is_not(pair_of: Callable[[str], Pair]) -> None:
    if HAS_GPU:
        pytest.skip("a CUDA device counts no replays")
    driver = Driver(pair_of("llama").path)
    streams = [driver.start(random_tokens(9, seed=i)) for i in range(3)]
    driver.step([(stream, 6) for stream in streams])
    driver.step([(streams[0], 2), (streams[1], 1)])
    assert driver.replays == 0
    driver.step([(stream, 1) for stream in streams])
    driver.step([(streams[0], 1)])
    assert driver.replays == 2


def test_padding_writes_to_no_page_of_a_sequence(pair_of: Callable[[str], Pair]) -> None:
    """Three sequences run as four rows: of all pages, theirs and the spare one change."""
    driver = Driver(pair_of("llama").path)
    streams = [driver.start(random_tokens(9, seed=i)) for i in range(3)]
    driver.step([(stream, 8) for stream in streams])
    before = driver.cache.pages.clone()
    driver.step([(stream, 1) for stream in streams])
    changed = (driver.cache.pages != before).flatten(1).any(1).nonzero().flatten().tolist()
    spare = driver.cache.num_pages - 1
    assert set(changed) - {spare} == {stream.pages[0] for stream in streams}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CHOOSING])
def test_rows_that_nobody_samples_change_nothing(name: str, pair_of: Callable[[str], Pair]) -> None:
    """A step without a wanted row, one with some, and a recorded decode of which one of two rows is wanted."""
    pair, driver = pair_of(name), Driver(pair_of(name).path)
    streams = [driver.start(random_tokens(40, seed=seed)) for seed in range(3)]

    def step(work: list[tuple[Stream, int]], sampled: list[int]) -> None:
        rows = [SampleRow(row, GREEDY, 0, 0, work[row][0].computed + work[row][1]) for row in sampled]
        driver.runner.run(replace(driver.batch(work), samples=Samples.of(rows)))
        for stream, count in work:
            stream.computed += count
        for index, row in enumerate(sampled):
            stream = work[row][0]
            expected = pair.expected(stream.tokens[: stream.computed])[-1]
            assert near(driver.sampler.logits[-1][index], expected)

    step([(streams[0], 9), (streams[1], 20)], [])
    step([(streams[0], 1), (streams[1], 5), (streams[2], 12)], [0, 2])
    step([(streams[0], 1), (streams[2], 1)], [1])
    step([(streams[0], 1), (streams[1], 1), (streams[2], 1)], [0, 1, 2])


def test_logits_of_some_rows_in_any_order(pair_of: Callable[[str], Pair]) -> None:
    pair, driver = pair_of("llama"), Driver(pair_of("llama").path)
    tokens = random_tokens(12, seed=1)
    expected = pair.expected(tokens)
    layout = layout_of(driver.batch([(driver.start(tokens), 12)]), PAGE_TOKENS, driver.forward.device)
    with torch.inference_mode():
        hidden = driver.forward.hidden(torch.tensor(tokens), layout)
        for rows in ([11, 0, 5], list(range(12))):
            logits = driver.forward.logits(hidden, torch.tensor(rows))
            assert logits.dtype == torch.float32 and near(logits, expected[rows])


@pytest.mark.parametrize("name", ["llama", "llama-mha-biased-tied", "gpt2"])
def test_8_bit_weights_are_those_of_the_reference(name: str, pair_of: Callable[[str], Pair]) -> None:
    path = pair_of(name).path
    tokens = random_tokens(40, seed=2)
    loaded = load_parameters(path, torch.bfloat16, quantization="w8a8")
    reference = Decoder(loaded.part, loaded.parameters, ReferenceOperators(), loaded.dtype)
    cache = PagedKVCache(loaded.spec, 2, PAGE_TOKENS, loaded.dtype)
    sampler = RecordingSampler()
    driver = Driver(path, quantization="w8a8")
    stream = driver.start(tokens)
    runner = Runner(EagerForward(reference, cache), PAGE_TOKENS, sampler)
    for chunk in (38, 1, 1):
        batch = driver.batch([(Stream(stream.tokens, [0], stream.computed), chunk)])
        runner.run(batch)
        driver.step([(stream, chunk)])
        assert near(stream.logits[-1], sampler.logits[-1][0], W8A8_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "words"),
    [
        ("llama", torch.bfloat16, []),
        ("llama", torch.int8, ["keys and values of int8", "gathered pages"]),
        ("llama-dynamic", torch.bfloat16, ["dynamic NTK"]),
    ],
)
def test_what_cannot_be_fast_is_right_and_said_at_start(
    name: str,
    kv_dtype: torch.dtype,
    words: list[str],
    pair_of: Callable[[str], Pair],
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = Driver(pair_of(name).path, kv_dtype=kv_dtype)
    said = [record.getMessage() for record in caplog.records if record.name == "engine.kernels.cuda.forward"]
    assert len(said) == len(words)
    assert all(word in line for word, line in zip(words, said, strict=True))
    tokens = random_tokens(40, seed=5)
    streams = [driver.start(tokens), driver.start(tokens[:20])]
    driver.step([(stream, 9) for stream in streams])
    driver.step([(streams[0], 30), (streams[1], 1)])
    driver.step([(stream, 1) for stream in streams])
    assert near(streams[0].logits[-1], pair_of(name).expected(tokens)[-1])
    assert near(streams[1].logits[-1], pair_of(name).expected(tokens)[10])


def test_recording_is_refused_with_a_reason(pair_of: Callable[[str], Pair]) -> None:
    spec = load_parameters(pair_of("llama").path, torch.bfloat16).spec
    assert graph_obstacle(spec, None) is None
    assert "lengths of each step" in (graph_obstacle(spec, "pages of 16 tokens") or "")


@needs_gpu
def test_a_chunk_that_draws_nothing_is_in_its_pages_when_the_step_is_over(pair_of: Callable[[str], Pair]) -> None:
    driver = Driver(pair_of("llama").path)
    stream = driver.start(random_tokens(40, seed=2))
    batch = replace(driver.batch([(stream, 30)]), samples=Samples.of([]))
    memory = DevicePages(driver.cache)
    copied = np.empty(memory.page_bytes, np.uint8)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # cycles: half a second in which the device does not get to the step
    out = driver.runner.run(batch)
    memory.read(stream.pages[0], copied)
    torch.cuda.synchronize()
    assert np.array_equal(copied, driver.cache.pages[stream.pages[0]].cpu().numpy().reshape(-1))
    assert not (copied == NAN_BYTE).all()
    assert out.stats.seconds > 0.1, "what the device takes, not what it takes to tell it"
