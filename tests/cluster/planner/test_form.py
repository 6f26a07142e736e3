"""What the planner counts is what is held: weights and pages as the engine has them, to the byte, a step bounded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.planner import workspace
from cluster.planner.form import FP8_MULTIPLE, Choices, Form, form_of
from cluster.planner.kinds import A100, CPU
from cluster.planner.layout import Problem, Wishes
from cluster.planner.nodes import Node
from cluster.planner.plan import plan
from cluster.planner.shares import shares
from engine.build import assemble
from engine.config import EngineConfig
from engine.devices import CPU_PAGE_TOKENS
from engine.forward import ProgramForward
from engine.kernels.cuda import backend
from engine.kernels.cuda import linear as cuda_linear
from engine.kv.cache import PagedKVCache
from engine.models.directory import load_spec
from engine.models.loader import load_parameters
from engine.models.tiny import PATH
from engine.quant.config import Awq, Gptq, read_quantization
from engine.runner import LOGPROB_ROWS
from tests.cluster.planner.models import LLAMA2_7B
from tests.engine.models.harness import CONFIGS, make_model
from tests.engine.parallel.pool import Cut

MODEL = load_spec(PATH)


@pytest.mark.parametrize(
    ("form", "quantization"),
    [
        (Form("float32"), "auto"),
        (Form("bfloat16"), "auto"),
        (Form("bfloat16", "w8a8"), "w8a8"),
        (Form("bfloat16", "w4a16", group=32, head_group=32), "w4a16"),
    ],
)
def test_weights_are_as_large_as_those_that_are_loaded(form: Form, quantization: Any) -> None:
    loaded = load_parameters(PATH, form.dtype, quantization=quantization, group=form.group)
    for name in list(loaded.parameters):
        loaded.parameters.pop(name)
    (whole,) = shares(MODEL, form, 1, 1)
    assert whole.weight_bytes(MODEL.layers, first=True, last=True) == loaded.num_bytes


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("name", "tensor", "expert"),
    [("llama-mha-biased-tied", 2, 1), ("gpt2", 4, 1), ("opt-350m", 2, 1), ("neox", 2, 1), ("qwen2-moe", 4, 2)],
)
def test_ranks_are_as_large_as_those_that_are_loaded(
    name: str, tensor: int, expert: int, stages: int, tmp_path: Path
) -> None:
    """Biases that count once, tied tables at both ends, padded vocabularies, experts: rank by rank."""
    make_model(CONFIGS[name]).save_pretrained(tmp_path)
    spec = load_spec(tmp_path)
    found = shares(spec, Form("float32"), tensor, expert)
    for place in Cut(tensor, stages, expert).places(spec.layers):
        loaded = load_parameters(tmp_path, place=place)
        dict(loaded.parameters)
        counted = found[place.tensor.rank]
        num_bytes = counted.weight_bytes(len(place.layers), first=place.is_first, last=place.is_last)
        assert num_bytes == loaded.num_bytes, place


@pytest.mark.parametrize("int8_kv", [False, True])
def test_pages_are_as_large_as_those_of_a_cache(int8_kv: bool) -> None:
    problem = Problem(MODEL, Form("bfloat16", int8_kv=int8_kv), (Node("here", 1, 2**30),), CPU)
    found = plan(problem)
    dtype = torch.int8 if int8_kv else torch.bfloat16
    cache = PagedKVCache(MODEL, 1, CPU_PAGE_TOKENS, dtype)
    assert found.shards[0].kv_bytes == found.pages * cache.page_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_takes_no_more_than_its_workspace_and_not_much_less(dtype: Any) -> None:
    config = EngineConfig(model="manta-tiny", dtype=dtype, device="cpu")
    forward = assemble(config).forward
    if not isinstance(forward, ProgramForward):
        pytest.skip("there is no C compiler, and torch allocates as it goes")
    programs = (forward.program, forward.head)
    blocks = {id(memory): len(memory._block) for program in programs for memory in _memories(program)}
    limits = config.scheduler
    wishes = Wishes(sequences=limits.max_sequences, batch_tokens=limits.max_batch_tokens)
    found = plan(Problem(MODEL, Form(dtype), (Node("here", 1, 2**30),), CPU, wishes))
    assert sum(blocks.values()) <= found.shards[0].workspace_bytes <= 4 * sum(blocks.values())


def _memories(program: Any) -> list[Any]:
    return [part._memory for part in program._parts if hasattr(part, "_memory")]


def test_constants_are_those_of_the_engine() -> None:
    assert CPU.page_tokens == CPU_PAGE_TOKENS and CPU.spare_pages == 0
    assert A100.page_tokens == backend.PAGE_TOKENS and A100.spare_pages == backend.SPARE_PAGES
    assert workspace._LOGPROB_ROWS == LOGPROB_ROWS
    assert FP8_MULTIPLE == cuda_linear.FP8_MULTIPLE


def test_8_bit_floats_leave_head_and_embeddings_as_they_are() -> None:
    (whole,) = shares(LLAMA2_7B, Form("bfloat16", "fp8"), 1, 1)
    linear = 4096 * 4096 * 4 + 3 * 4096 * 11008
    rows = 3 * 4096 + 4096 + 2 * 11008 + 4096
    assert whole.layer.num_bytes == linear + 4 * rows + 2 * 2 * 4096
    assert whole.head.num_bytes == 2 * 32000 * 4096


@pytest.mark.parametrize(
    ("config", "choices", "expected"),
    [
        ({"torch_dtype": "float16"}, Choices("cuda"), Form("float16")),
        ({"torch_dtype": "float16"}, Choices("cpu"), Form("bfloat16")),
        ({"dtype": "bfloat16"}, Choices("cuda", kv="int8"), Form("bfloat16", int8_kv=True)),
        ({}, Choices("cuda"), Form("bfloat16")),
        ({}, Choices("cpu"), Form("float32")),
        ({}, Choices("cuda", dtype="bfloat16"), Form("bfloat16")),
        ({}, Choices("cpu", quantization="w8a8"), Form("float32", "w8a8", int8_kv=True)),
        ({}, Choices("cpu", quantization="w8a8", kv="model"), Form("float32", "w8a8")),
        ({}, Choices("cuda", quantization="w4a16", group=32), Form("bfloat16", "w4a16", group=32)),
        ({"torch_dtype": "float16"}, Choices("cuda", quantization="w4a16"), Form("bfloat16", "w4a16")),
        ({"torch_dtype": "float16"}, Choices("cuda", quantization="w8a8"), Form("float16", "w8a8")),
        (
            {"dtype": "bfloat16"},
            Choices("cpu", quantization="w4a16", group=32),
            Form("bfloat16", "w4a16", group=32, int8_kv=True, head_group=32),
        ),
    ],
)
def test_auto_is_resolved_as_the_engine_does(config: dict[str, Any], choices: Choices, expected: Form) -> None:
    assert form_of(config, None, choices) == expected


def test_checkpoints_in_4_bits_have_their_own_groups() -> None:
    config = {"dtype": "bfloat16"}
    gptq = form_of(config, Gptq(128, zero_offset=1), Choices("cuda"))
    assert (gptq.checkpoint, gptq.group, gptq.unit) == ("w4a16", 128, 128)
    assert form_of({"dtype": "float16"}, Gptq(128, zero_offset=1), Choices("cuda")).dtype == "bfloat16"
    asked = form_of(config, Gptq(128, zero_offset=1), Choices("cpu", quantization="w4a16", group=32))
    assert (asked.group, asked.head_group) == (128, 32), "the head is turned into the group that is asked for"
    whole = form_of(config, Awq(-1), Choices("cuda"))
    assert whole.unit == 32, "the channels that a kernel takes at once"
    assert whole.weight_bytes("layers.0.out.weight", (8, 64), LLAMA2_7B) == 8 * 32 + 8 * 5
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    found = {**config, "quantization_config": {**packed, "config_groups": {"group_0": {"weights": weights}}}}
    assert form_of(found, read_quantization(json.loads(json.dumps(found))), Choices("cuda")).group == 32


def test_dtypes_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'float8' cannot be run"):
        form_of({"dtype": "float8"}, None, Choices("cuda"))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        form_of({}, None, Choices("cpu", quantization="fp8"))
