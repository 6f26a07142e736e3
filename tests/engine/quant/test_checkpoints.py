"""Checkpoints that are quantized already: every format gives the weights it stands for, and bad ones are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ModelError
from engine.models.directory import find_family
from engine.models.loader import load_model, load_parameters
from engine.quant.weights import Int4Weight, Int8Weight
from tests.engine.quant.checkpoints import (
    GPT2,
    LLAMA,
    NEOX,
    PER_TOKEN,
    WEIGHTS_4,
    WEIGHTS_8,
    Quantized,
    Recipe,
    Tensors,
    awq,
    compressed,
    gptq,
    packed,
    save,
    write_pair,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
PACKED = compressed("pack-quantized", WEIGHTS_4)
INT8 = compressed("int-quantized", WEIGHTS_8, PER_TOKEN)


def gptq_v2(linear: Quantized) -> Tensors:
    return gptq(linear, version=2)


def packed_symmetric(linear: Quantized) -> Tensors:
    return packed(linear, symmetric=True)


def packed_asymmetric(linear: Quantized) -> Tensors:
    return packed(linear, symmetric=False)


def packed_in_order(linear: Quantized) -> Tensors:
    return packed(linear, symmetric=True, act_order=True)


def old_packed_asymmetric(linear: Quantized) -> Tensors:
    """Zero points as they were before writers packed them too."""
    return packed_symmetric(linear) | {"weight_zero_point": torch.from_numpy(linear.zero - 8).to(torch.int8)}


RECIPES: dict[str, Recipe] = {
    "gptq": Recipe(GPTQ, gptq),
    "gptq asymmetric": Recipe({**GPTQ, "sym": False}, gptq, symmetric=False),
    "gptq v2": Recipe({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq_v2, symmetric=False),
    "gptq act-order": Recipe({**GPTQ, "desc_act": True}, gptq, act_order=True),
    "gptq act-order asymmetric": Recipe({**GPTQ, "desc_act": True}, gptq, symmetric=False, act_order=True),
    "gptq one group": Recipe({**GPTQ, "group_size": -1}, gptq, group=-1),
    "gptq neox": Recipe(GPTQ, gptq, config=NEOX, symmetric=False),
    "gptq gpt2": Recipe(GPTQ, gptq, config=GPT2, symmetric=False),
    "gptq some layers": Recipe(GPTQ, gptq, ignored=("lm_head", "1.mlp.down_proj", "0.self_attn.o_proj")),
    "awq": Recipe(AWQ, awq, symmetric=False),
    "awq one group": Recipe({**AWQ, "group_size": -1}, awq, group=-1, symmetric=False),
    "awq old keys": Recipe(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}, awq, symmetric=False
    ),
    "packed": Recipe(PACKED, packed_symmetric),
    "packed asymmetric": Recipe(PACKED, packed_asymmetric, symmetric=False),
    "packed asymmetric, old": Recipe(PACKED, old_packed_asymmetric, symmetric=False),
    "packed by channel": Recipe(
        compressed("pack-quantized", {**WEIGHTS_4, "strategy": "channel"}), packed_asymmetric, group=-1, symmetric=False
    ),
    "packed in another order": Recipe(PACKED, packed_in_order, act_order=True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_exactly_what_the_checkpoint_means(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    quantized, dense = write_pair(recipe, tmp_path)
    found = load_parameters(quantized, "float32")
    expected = load_parameters(dense, "float32").parameters
    fours = [weight for weight in found.parameters.values() if isinstance(weight, Int4Weight)]
    assert len(fours) == 8 - (2 if name == "gptq some layers" else 0)
    assert {weight.zero is None for weight in fours} == {recipe.symmetric}
    assert {weight.order is None for weight in fours} == {not recipe.act_order}
    assert found.parameters.keys() == expected.keys()
    for parameter, weight in found.parameters.items():
        full = weight.dequantize() if isinstance(weight, Int4Weight) else weight
        assert isinstance(full, torch.Tensor)
        torch.testing.assert_close(full, expected[parameter], rtol=1e-6, atol=1e-7, msg=parameter)


def write_int8(folder: Path) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A checkpoint in 8 bits and what each of its layers holds."""
    held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    quantized, dense = write_pair(Recipe(INT8, lambda linear: {}), folder)
    tensors = load_file(quantized / "model.safetensors")
    for name, weight in load_file(dense / "model.safetensors").items():
        if name not in tensors:
            values = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
            scale = torch.rand(len(weight), 1, dtype=torch.float32).add(0.01).bfloat16()
            held[name.removesuffix(".weight")] = values, scale
            tensors |= {name: values, f"{name}_scale": scale}
    save(quantized, tensors)
    return quantized, held


def test_8_bits_keep_their_values_and_scales(tmp_path: Path) -> None:
    folder, held = write_int8(tmp_path)
    parameters = load_parameters(folder, "float32").parameters
    for target, sources in {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_out": ("mlp.down_proj",),
    }.items():
        for layer in range(2):
            weight = parameters[f"layers.{layer}.{target}.weight"]
            assert isinstance(weight, Int8Weight)
            parts = [held[f"model.layers.{layer}.{source}"] for source in sources]
            assert torch.equal(weight.values, torch.cat([values for values, _ in parts]))
            assert torch.equal(weight.scale, torch.cat([scale.float()[:, 0] for _, scale in parts]))


def test_mixed_schemes_load_when_every_one_is_supported(tmp_path: Path) -> None:
    folder, _ = write_int8(tmp_path / "eight")
    other, _ = write_pair(Recipe(PACKED, packed_symmetric), tmp_path / "four")
    eight, four = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    eight = {name: tensor for name, tensor in eight.items() if ".mlp." not in name}
    save(folder, eight | {name: tensor for name, tensor in four.items() if ".mlp." in name})
    mixed = {**INT8, "config_groups": {}}
    for name, config in (("group_0", INT8), ("group_1", PACKED)):
        mixed["config_groups"][name] = config["config_groups"]["group_0"] | {"format": config["format"]}
    declare(folder, mixed)
    parameters = load_parameters(folder).parameters
    assert isinstance(parameters["layers.0.qkv.weight"], Int8Weight)
    assert isinstance(parameters["layers.0.mlp_in.weight"], Int4Weight)


@pytest.mark.parametrize("name", ["gptq act-order", "awq"])
def test_a_checkpoint_of_4_bits_can_have_activations_of_8(name: str, tmp_path: Path) -> None:
    quantized, _ = write_pair(RECIPES[name], tmp_path)
    found = load_parameters(quantized, int8_activations=True).parameters
    fours = [weight for weight in found.values() if isinstance(weight, Int4Weight)]
    assert fours and all(weight.int8_activations for weight in fours)


def test_the_head_stays_dense_until_its_scheme_is_asked_for(tmp_path: Path) -> None:
    quantized, _ = write_pair(RECIPES["gptq"], tmp_path)
    assert isinstance(load_parameters(quantized).parameters["head.weight"], torch.Tensor)
    asked = load_parameters(quantized, quantization="w4a16").parameters
    assert isinstance(asked["head.weight"], Int4Weight)
    assert isinstance(asked["layers.0.qkv.weight"], Int4Weight)
    with pytest.raises(ModelError, match="quantized already, to w4a16; it cannot be loaded as w8a8"):
        load_parameters(quantized, quantization="w8a8")


def test_layers_left_alone_stay_dense_even_if_the_scheme_is_asked_for(tmp_path: Path) -> None:
    quantized, _ = write_pair(RECIPES["gptq some layers"], tmp_path)
    parameters = load_parameters(quantized, quantization="w4a16").parameters
    assert isinstance(parameters["layers.1.mlp_out.weight"], torch.Tensor)


def declare(folder: Path, declared: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))


def static(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "dynamic": False, "strategy": "tensor"}


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
    "fp8": ({"quant_method": "fp8"}, "quant_method 'fp8'"),
    "nameless": ({"bits": 4}, "quant_method 'unknown'"),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, "GPTQ with 3 bits"),
    "gptq marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "gptq by layer": ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "other settings for some layers"),
    "gptq odd group": ({**GPTQ, "group_size": 33}, "group_size 33"),
    "awq gemv": ({**AWQ, "version": "gemv"}, "AWQ version 'gemv'"),
    "awq 8 bits": ({**AWQ, "bits": 8}, "AWQ with 8 bits"),
    "awq without zero points": ({**AWQ, "zero_point": False}, "AWQ without zero points"),
    "float-quantized": (
        compressed("float-quantized", {**WEIGHTS_8, "type": "float"}, {**PER_TOKEN, "type": "float"}),
        "float-quantized with 8 bits (float, by channel)",
    ),
    "static activations": (compressed("int-quantized", WEIGHTS_8, static(PER_TOKEN)), "static"),
    "weights alone in 8 bits": (compressed("int-quantized", WEIGHTS_8), "activations that are not quantized"),
    "asymmetric 8 bits": (compressed("int-quantized", {**WEIGHTS_8, "symmetric": False}, PER_TOKEN), "asymmetric"),
    "packed 8 bits": (compressed("pack-quantized", {**WEIGHTS_4, "num_bits": 8}), "pack-quantized with 8 bits"),
    "w4a8": (compressed("pack-quantized", WEIGHTS_4, PER_TOKEN), "and activations in 8 bits"),
    "2:4": ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity 'sparse-24-bitmask'"),
    "transforms": ({**PACKED, "transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
    "no groups": ({**PACKED, "config_groups": {}}, "without config_groups"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_run_is_refused_by_config_alone(case: str, tmp_path: Path) -> None:
    declared, expected = UNSUPPORTED[case]
    LLAMA.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    with pytest.raises(ModelError) as raised:
        find_family(tmp_path)
    message = str(raised.value)
    assert expected in message
    assert str(tmp_path / "config.json") in message
    assert "\n" not in message


Q_PROJ = "model.layers.0.self_attn.q_proj"
Edit = Callable[[Tensors], object]
DAMAGED: dict[str, tuple[str, Edit, list[str]]] = {
    "no scales": ("gptq", lambda t: t.pop(f"{Q_PROJ}.scales"), [f"{Q_PROJ}.scales", "missing"]),
    "wrong shape": (
        "awq",
        lambda t: t.update({f"{Q_PROJ}.qzeros": torch.zeros(2, 9, dtype=torch.int32)}),
        [f"{Q_PROJ}.qzeros", "(2, 9)", "(2, 8)"],
    ),
    "other words": (
        "gptq",
        lambda t: t.update({f"{Q_PROJ}.qweight": t[f"{Q_PROJ}.qweight"].to(torch.int64)}),
        [f"{Q_PROJ}.qweight", "int64", "int32"],
    ),
    "NaN scale": ("packed", lambda t: t[f"{Q_PROJ}.weight_scale"].fill_(torch.nan), [f"{Q_PROJ}.weight_scale", "NaN"]),
    "groups of odd sizes": (
        "gptq act-order",
        lambda t: t[f"{Q_PROJ}.g_idx"].fill_(0),
        [f"{Q_PROJ}.g_idx", "32 input channels", "2 groups"],
    ),
    "scales of no groups": (
        "packed",
        lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(64, 3)}),
        [f"{Q_PROJ}.weight_scale", "(64, 3)"],
    ),
    "different orders": (
        "gptq act-order",
        lambda t: t.update({f"{Q_PROJ}.g_idx": t[f"{Q_PROJ}.g_idx"].flip(0)}),
        ["q_proj", "k_proj", "different orders"],
    ),
    "half of a layer": (
        "gptq",
        lambda t: (t.pop(f"{Q_PROJ}.qweight"), t.update({f"{Q_PROJ}.weight": torch.ones(64, 64)})),
        [f"{Q_PROJ}.weight", "is not quantized", "k_proj"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_names_the_tensor(case: str, tmp_path: Path) -> None:
    recipe, damage, expected = DAMAGED[case]
    quantized, _ = write_pair(RECIPES[recipe], tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    damage(tensors)
    save(quantized, tensors)
    with pytest.raises(ModelError) as raised:
        load_model(quantized)
    for part in (str(quantized), *expected):
        assert part in str(raised.value)


def test_groups_of_different_sizes_cannot_share_a_layer(tmp_path: Path) -> None:
    quantized, _ = write_pair(RECIPES["packed"], tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    tensors[f"{Q_PROJ}.weight_scale"] = torch.ones(64, 1)
    save(quantized, tensors)
    with pytest.raises(ModelError, match="groups of 64 and of 32 input channels"):
        load_model(quantized)


def test_8_bit_zero_points_must_be_zero(tmp_path: Path) -> None:
    folder, _ = write_int8(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = f"{Q_PROJ}.weight_zero_point"
    save(folder, tensors | {name: torch.zeros(64, 1, dtype=torch.int8)})
    load_model(folder)
    save(folder, tensors | {name: torch.ones(64, 1, dtype=torch.int8)})
    with pytest.raises(ModelError, match="must be symmetric"):
        load_model(folder)


def test_integers_without_a_declared_format_are_no_weights(tmp_path: Path) -> None:
    folder, _ = write_int8(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"holds I8, yet config.json does not declare it"):
        load_parameters(folder)
