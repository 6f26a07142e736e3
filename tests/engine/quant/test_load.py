"""Quantizing as a model is loaded: which parameters, into what, and what a model that does not fit is told."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.configuration_utils import PretrainedConfig

from engine.errors import ModelError
from engine.models.directory import load_spec
from engine.models.loader import load_parameters
from engine.models.parameters import Form
from engine.models.tiny import PATH
from engine.quant.config import Scheme
from engine.quant.quantize import quantize_int4, quantize_int8
from engine.quant.weights import Int4Weight, Int8Weight, Weight
from tests.engine.quant.checkpoints import GPT2, LLAMA, MIXTRAL, NARROW_ENDS, NEOX, QWEN_MOE, random_model

LINEARS = tuple(
    f".{name}.weight"
    for name in ("qkv", "out", "mlp_in", "mlp_out", "experts_in", "experts_out", "shared_in", "shared_out")
)


@pytest.fixture(params=["llama", "tied", "neox", "gpt2", "mixtral", "qwen-moe"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tied = type(LLAMA)(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    configs = {"llama": LLAMA, "tied": tied, "neox": NEOX, "gpt2": GPT2, "mixtral": MIXTRAL, "qwen-moe": QWEN_MOE}
    random_model(configs[request.param]).save_pretrained(tmp_path)
    return tmp_path


def same(found: Weight, expected: Weight) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, Int8Weight):
        return isinstance(found, Int8Weight) and torch.equal(found.dequantize(), expected.dequantize())
    return isinstance(found, Int4Weight) and torch.equal(found.dequantize(), expected.dequantize())


def test_8_bits_are_those_of_the_whole_parameter(model: Path) -> None:
    """Merged, interleaved or stored the other way round: the rows are quantized as the decoder will see them."""
    full, found = (load_parameters(model, quantization=scheme) for scheme in ("auto", "w8a8"))
    head = "head.weight" if "head.weight" in full.parameters else "embed.weight"
    for name, weight in full.parameters.items():
        assert isinstance(weight, Tensor)
        is_quantized = name.endswith(LINEARS) or name == head
        assert same(found.parameters[name], quantize_int8(weight) if is_quantized else weight), name
    assert found.num_bytes < 0.4 * full.num_bytes


def test_4_bits_are_those_of_the_whole_parameter(model: Path) -> None:
    full, found = load_parameters(model), load_parameters(model, quantization="w4a16", group=32)
    head = "head.weight" if "head.weight" in full.parameters else "embed.weight"
    for name, weight in full.parameters.items():
        assert isinstance(weight, Tensor)
        is_quantized = name.endswith(LINEARS) or name == head
        assert same(found.parameters[name], quantize_int4(weight, 32) if is_quantized else weight), name


def test_activations_of_8_bits_leave_the_weights_as_they_are(model: Path) -> None:
    plain, found = (
        load_parameters(model, quantization="w4a16", group=32, int8_activations=chosen).parameters
        for chosen in (False, True)
    )
    for name, weight in found.items():
        assert same(weight, plain[name])
        assert not isinstance(weight, Int4Weight) or (weight.int8_activations and not plain[name].int8_activations)
    assert any(isinstance(weight, Int4Weight) for weight in found.values())


def test_a_head_that_the_group_does_not_fit_is_in_8_bits(tmp_path: Path) -> None:
    """OPT's embeddings, which its head is tied to, can be narrower than its layers."""
    random_model(NARROW_ENDS).save_pretrained(tmp_path)
    found = load_parameters(tmp_path, quantization="w4a16", group=32)
    full = load_parameters(tmp_path).parameters["embed.weight"]
    assert isinstance(full, Tensor) and same(found.parameters["embed.weight"], quantize_int8(full))
    assert isinstance(found.parameters["layers.0.qkv.weight"], Int4Weight)


def test_heads_of_a_cuda_device_are_in_8_bits() -> None:
    """Its product of 4 bits rounds logits to bfloat16, and its packed form has no rows for a tied embedding."""
    for device, head in (("cpu", "int4"), ("cuda:0", "int8")):
        form = Form(torch.bfloat16, device, "w4a16", 32)
        assert form.kind("embed.weight", load_spec(PATH)) == head
        assert form.kind("layers.0.qkv.weight", load_spec(PATH)) == "int4"


def test_a_group_that_does_not_fit_is_told_which_would(tmp_path: Path) -> None:
    config = type(LLAMA)(**{**LLAMA.to_dict(), "intermediate_size": 96})
    random_model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as raised:
        load_parameters(tmp_path, quantization="w4a16", group=64)
    message = str(raised.value)
    for part in ("model.safetensors", "mlp.down_proj.weight", "(64, 96)", "group of 64", "a group of 32 fits"):
        assert part in message
    load_parameters(tmp_path, quantization="w4a16", group=32)
    load_parameters(tmp_path, quantization="w8a8")


def test_where_no_group_fits_8_bits_are_suggested(tmp_path: Path) -> None:
    config = type(LLAMA)(**{**LLAMA.to_dict(), "intermediate_size": 80})
    random_model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="use w8a8"):
        load_parameters(tmp_path, quantization="w4a16", group=32)


def test_a_dense_checkpoint_is_checked_before_anything_is_read(model: Path) -> None:
    """A wrong config must not cost the minutes of quantizing first."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 95}))
    with pytest.raises(ModelError, match="95"):
        load_parameters(model, quantization="w8a8")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("config", [MIXTRAL, QWEN_MOE], ids=["mixtral", "qwen-moe"])
def test_experts_in_one_tensor_are_quantized_as_those_apart(
    config: PretrainedConfig, scheme: Scheme, tmp_path: Path
) -> None:
    model = random_model(config)
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "merged", save_original_format=False)
    apart, merged = (load_parameters(tmp_path / name, quantization=scheme, group=32) for name in ("apart", "merged"))
    for name, weight in apart.parameters.items():
        assert same(merged.parameters[name], weight), name
