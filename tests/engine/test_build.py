"""The whole engine on a real, tiny, random model: what a caller sees, whatever happens in the page pool."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.build import assemble, build_engine
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import ModelError
from engine.quant.export import Exporter, Target
from engine.sampling_params import SamplingParams
from engine.sequence import FinishReason, Request
from tests.compiled import compiled_library
from tests.engine.fakes import Streams, run_to_end

PAGE_BYTES = 16 * 3 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, head_dim, float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def engine_of(model: Path, pages: int = 512, **settings: object) -> Engine:
    scheduler = SchedulerConfig(
        max_sequences=16, max_batch_tokens=64, admission=settings.pop("admission", "optimistic")
    )
    kv = KVConfig(memory=pages * PAGE_BYTES, dtype=settings.pop("kv_dtype", "auto"))
    return build_engine(
        EngineConfig(
            model=str(model),
            kv=kv,
            scheduler=scheduler,
            **{"device": "cpu", "dtype": "float32", "threads": 1, **settings},
        )
    )


def mixed_requests() -> list[Request]:
    """Every kind of sampling, prompts and lengths that straddle pages."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "n": 3},
        {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
        {"temperature": 1.0, "min_p": 0.05, "logit_bias": {7: 4.0}},
    ]
    return [
        Request(
            f"r{i}",
            tuple((i * 13 + j) % 298 + 2 for j in range(5 + 9 * i)),
            SamplingParams(**kind, max_tokens=40, seed=i, ignore_eos=True),
        )
        for i, kind in enumerate(kinds)
    ]


def run(engine: Engine, requests: list[Request]) -> Streams:
    for request in requests:
        engine.add(request)
    return run_to_end(engine)


def test_a_request_that_is_cut_goes_on_elsewhere_with_the_same_tokens(model: Path) -> None:
    whole = run(engine_of(model), mixed_requests())
    for cut in (0, 1, 17, 39):
        rest = [
            replace(
                request,
                given=tuple(tuple(whole.tokens[request.request_id, i][:cut]) for i in range(request.params.n)),
                num_scored=len(whole.prompt_logprobs[request.request_id, 0]),
            )
            for request in mixed_requests()
        ]
        successor = run(engine_of(model), rest)
        assert {key: whole.tokens[key][:cut] + tokens for key, tokens in successor.tokens.items()} == whole.tokens
        assert not any(successor.prompt_logprobs.values())


def test_tokens_and_logprobs_do_not_depend_on_company_chunking_or_preemption(model: Path) -> None:
    alone = Streams()
    for request in mixed_requests():
        single = run(engine_of(model), [request])
        alone.tokens |= single.tokens
        alone.prompt_logprobs |= single.prompt_logprobs
    together = run(engine_of(model), mixed_requests())
    tight_engine = engine_of(model, pages=8, max_model_len=128)
    tight = run(tight_engine, mixed_requests())
    reserved_engine = engine_of(model, pages=8, max_model_len=128, admission="reserve")
    reserved = run(reserved_engine, mixed_requests())
    assert tight_engine.stats().preemptions_total > 0
    assert reserved_engine.stats().preemptions_total == 0
    assert together.tokens == alone.tokens
    assert tight.tokens == alone.tokens
    assert reserved.tokens == alone.tokens
    for other in (together, tight, reserved):
        for key, logprobs in alone.prompt_logprobs.items():
            assert [p.token_id for p in other.prompt_logprobs[key]] == [p.token_id for p in logprobs]
            assert [p.logprob for p in other.prompt_logprobs[key]] == pytest.approx(
                [p.logprob for p in logprobs], abs=1e-3
            )
    for engine in (tight_engine, reserved_engine):
        assert engine.stats().num_free_pages == 8


def test_samples_of_one_request_differ_and_greedy_ones_do_not(model: Path) -> None:
    prompt = tuple(range(2, 40))
    random = run(engine_of(model), [Request("r", prompt, SamplingParams(n=4, temperature=1.0, max_tokens=12, seed=1))])
    greedy = run(engine_of(model), [Request("r", prompt, SamplingParams(n=4, temperature=0.0, max_tokens=12))])
    assert len({tuple(tokens) for tokens in random.tokens.values()}) == 4
    assert len({tuple(tokens) for tokens in greedy.tokens.values()}) == 1


def test_unseeded_requests_are_not_all_alike(model: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    streams = run(engine_of(model), [Request(f"r{i}", (2, 3, 4), params) for i in range(3)])
    assert len({tuple(tokens) for tokens in streams.tokens.values()}) == 3


def test_the_models_own_eos_stops_and_can_be_ignored(model: Path) -> None:
    bias = {1: 100.0}
    stopping = SamplingParams(temperature=0.0, logit_bias=bias, max_tokens=5)
    streams = run(
        engine_of(model),
        [
            Request("stops", (2, 3), stopping),
            Request("goes on", (2, 3), stopping.model_copy(update={"ignore_eos": True})),
            Request("at least", (2, 3), stopping.model_copy(update={"min_tokens": 3})),
        ],
    )
    assert streams.finished["stops", 0].finish_reason is FinishReason.STOP
    assert streams.tokens["stops", 0] == [1]
    assert streams.tokens["goes on", 0] == [1] * 5
    assert 1 not in streams.tokens["at least", 0][:3]
    assert streams.tokens["at least", 0][3] == 1


def test_every_auto_is_resolved_and_said_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="engine.build"):
        engine = build_engine(EngineConfig(model=str(model), device="cpu"))
    assert (engine.max_model_len, engine.vocab_size, engine.eos_token_ids) == (256, 300, (1,))
    (message,) = [record.getMessage() for record in caplog.records]
    for fact in ("float32", "threads", "KV", "pages of 16 tokens", "up to 256 tokens"):
        assert fact in message


def test_what_cannot_be_built_is_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        engine_of(model, max_model_len=1000)
    with pytest.raises(ValueError, match=r"kv\.memory"):
        engine_of(model, pages=2, max_model_len=200)
    with pytest.raises(ModelError, match="no-such-model"):
        build_engine(EngineConfig(model=str(tmp_path / "no-such-model")))


def test_fp8_without_a_gpu_is_refused_at_start(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device: there is one")
    with pytest.raises(ValueError, match='"fp8" needs a CUDA device; on a CPU use "w8a8"'):
        engine_of(model, quantization="fp8")


def test_a_cuda_device_that_is_not_there_is_refused_at_start(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device: there is one")
    with pytest.raises((ValueError, RuntimeError), match="CUDA"):
        engine_of(model, device="cuda")


def test_a_model_that_the_kernels_do_not_know_runs_in_torch_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled_library()
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    assert [r.message for r in caplog.records if "kernels" in r.message and r.levelno == logging.WARNING] == [
        "heads of 12 values have no C kernels (multiples of 8 up to 256 have); the slower reference kernels run"
    ]
    run(engine, [Request("r", (5, 6, 7), SamplingParams(max_tokens=4, ignore_eos=True))])


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "held"),
    [("auto", "auto", torch.float32), ("w8a8", "auto", torch.int8), ("w4a16", "model", torch.float32)],
)
def test_keys_and_values_follow_the_weights_into_8_bits(
    model: Path, quantization: str, kv_dtype: str, held: torch.dtype
) -> None:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        dtype="float32",
        threads=1,
        quantization=quantization,
        quantization_group=32,
        kv=KVConfig(memory=64 * PAGE_BYTES, dtype=kv_dtype),
    )
    assert assemble(config).kv_dtype == held


@pytest.mark.parametrize(("quantization", "activations"), [("w8a8", "auto"), ("w4a16", "auto"), ("w4a16", "int8")])
def test_quantized_weights_and_cache_give_the_same_tokens_in_any_company(
    model: Path, quantization: str, activations: str
) -> None:
    """Quantization changes the model, once; batches, chunks and preemption still change nothing."""
    numbers = {"quantization": quantization, "quantization_group": 32, "activations": activations}
    settings = {**numbers, "kv_dtype": "int8"}
    alone = Streams()
    for request in mixed_requests():
        alone.tokens |= run(engine_of(model, **settings), [request]).tokens
    tight = engine_of(model, pages=4, max_model_len=128, **settings)
    assert run(tight, mixed_requests()).tokens == alone.tokens
    assert tight.stats().preemptions_total > 0


def test_a_checkpoint_of_4_bits_gives_the_same_tokens_in_any_company(model: Path, tmp_path: Path) -> None:
    """Nothing but its own config.json says that it has 4 bits."""
    Exporter(model, Target("w4a16", 32)).write(tmp_path / "q4")
    alone = Streams()
    for request in mixed_requests():
        alone.tokens |= run(engine_of(tmp_path / "q4"), [request]).tokens
    assert run(engine_of(tmp_path / "q4"), mixed_requests()).tokens == alone.tokens


def test_activations_of_8_bits_beside_weights_of_4_are_another_model_but_not_by_much(model: Path) -> None:
    prompt = tuple(i * 7 % 298 + 2 for i in range(150))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)

    def logprobs(**settings: object) -> list[float]:
        streams = run(engine_of(model, **settings), [Request("r", prompt, params)])
        return [each.logprob for each in streams.prompt_logprobs["r", 0]]

    whole = logprobs(quantization="w4a16", quantization_group=32)
    rounded = logprobs(quantization="w4a16", quantization_group=32, activations="int8")
    assert rounded != whole
    assert rounded == pytest.approx(whole, abs=0.05)


@pytest.mark.parametrize(
    ("dtype", "quantization", "activations", "tolerance"),
    [
        ("float32", "auto", "auto", 1e-5),
        ("bfloat16", "auto", "auto", 0.01),
        ("float32", "w8a8", "auto", 0.01),
        ("float32", "w4a16", "auto", 1e-4),
        ("float32", "w4a16", "int8", 0.01),
    ],
)
def test_the_compiled_kernels_and_torch_give_one_model(
    model: Path, dtype: str, quantization: str, activations: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine over the C kernels and one over the reference that runs where they cannot be compiled."""
    compiled_library()
    numbers = {"quantization": quantization, "quantization_group": 32, "activations": activations}
    settings = {"dtype": dtype, **numbers}
    prompt = tuple(i * 7 % 298 + 2 for i in range(150))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    compiled = run(engine_of(model, **settings), [Request("r", prompt, params)])
    monkeypatch.setattr("engine.devices.load_library", lambda features: None)
    plain = run(engine_of(model, **settings), [Request("r", prompt, params)])
    found, expected = ([each.logprob for each in s.prompt_logprobs["r", 0]] for s in (compiled, plain))
    assert len(found) == len(prompt) - 1 and max(expected) - min(expected) > 0.5
    assert found != expected, "it was one engine twice"
    assert found == pytest.approx(expected, abs=tolerance)
    if dtype == "float32" and quantization == "auto":
        assert compiled.tokens == plain.tokens
