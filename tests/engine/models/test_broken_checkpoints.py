"""What each kind of broken directory is told, and that nothing of a configuration is ignored."""

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.kernels.reference import ReferenceOperators
from engine.models.decoder import Decoder
from engine.models.directory import load_spec
from engine.models.loader import load_parameters
from tests.engine.models.checkpoints import edit_config, edit_tensors
from tests.engine.models.harness import CONFIGS

Edit = Callable[[Path], object]


def shard(folder: Path) -> dict[str, str]:
    """Splits the single file in two and returns the index's weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_shard(folder: Path) -> None:
    shard(folder)
    (folder / "part-1.safetensors").unlink()


def misplace_tensor(folder: Path) -> None:
    weight_map = shard(folder)
    name = "model.norm.weight"
    weight_map[name] = "part-1.safetensors" if weight_map[name] == "part-0.safetensors" else "part-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def break_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def keep(folder: Path) -> None:
    """No damage."""


def poison(folder: Path, name: str, row: int, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[name][row].view(-1)[-1:].fill_(value))


BROKEN: dict[str, tuple[Edit, list[str]]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json", "missing"]),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), ["config.json", "expected a JSON object"]),
    "config of wrong types": (lambda p: edit_config(p, hidden_size="big"), ["config.json", "hidden_size"]),
    "other architecture": (
        lambda p: edit_config(p, architectures=["MambaForCausalLM"]),
        ["config.json", "MambaForCausalLM", "LlamaForCausalLM", "GPTNeoXForCausalLM"],
    ),
    "quantized": (lambda p: edit_config(p, quantization_config={"bits": 4}), ["config.json", "quantization_config"]),
    "odd dtype": (lambda p: edit_config(p, dtype="float64"), ["config.json", "float64", "bfloat16"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["no weights found", "model.safetensors"]),
    "pickled weights": (pickle_instead, ["pytorch_model.bin", "not supported", "save_pretrained"]),
    "truncated": (truncate, ["model.safetensors", "truncated"]),
    "missing shard": (drop_shard, ["part-1.safetensors", "missing"]),
    "misplaced tensor": (misplace_tensor, ["model.norm.weight", "missing", "part-"]),
    "index without map": (break_index, ["model.safetensors.index.json", "weight_map"]),
    "missing tensor": (
        lambda p: edit_tensors(p, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight")),
        ["model.safetensors", "model.layers.1.self_attn.k_proj.weight", "missing"],
    ),
    "wrong shape": (
        lambda p: edit_tensors(p, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        ["model.safetensors", "model.norm.weight", "(31,)", "(32,)"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory_gets_one_line_that_names_the_file(case: str, model: Path) -> None:
    """Before anything is read: parameters are not asked for here."""
    damage, expected = BROKEN[case]
    damage(model)
    with pytest.raises(ModelError) as raised:
        load_parameters(model)
    assert_names_the_file(str(raised.value), model, expected)


def shrink_later(folder: Path) -> None:
    """As a copy that another process begins anew, after the headers were read."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)


POISONED: dict[str, tuple[Edit, Edit, list[str]]] = {
    "NaN": (lambda p: poison(p, "model.layers.1.mlp.down_proj.weight", 5, torch.nan), keep, ["down_proj", "row 5"]),
    "infinity": (lambda p: poison(p, "model.layers.0.mlp.up_proj.weight", 7, -torch.inf), keep, ["up_proj", "row 7"]),
    "NaN in a vector": (lambda p: poison(p, "model.norm.weight", 3, torch.nan), keep, ["model.norm.weight", "row 3"]),
    "shorter by now": (keep, shrink_later, ["model.safetensors", "cut off"]),
    "gone by now": (keep, lambda p: (p / "model.safetensors").unlink(), ["model.safetensors", "cannot be read"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", POISONED)
def test_values_that_cannot_be_read_are_named_when_a_decoder_takes_them(
    case: str, dtype: torch.dtype, model: Path
) -> None:
    before, after, expected = POISONED[case]
    before(model)
    loaded = load_parameters(model, dtype)
    after(model)
    with pytest.raises(ModelError) as raised:
        Decoder(loaded.part, loaded.parameters, ReferenceOperators(), loaded.dtype)
    assert_names_the_file(str(raised.value), model, expected)


def assert_names_the_file(message: str, folder: Path, expected: list[str]) -> None:
    assert "\n" not in message
    assert str(folder) in message
    for part in expected:
        assert part in message


UNSUPPORTED: dict[str, tuple[str, dict[str, object], str]] = {
    "activation": ("llama", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
    "rope type": ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral'"),
    "rope parameter": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor'"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    "norm without weights": ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    "layers without experts": ("qwen2-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
    "some layers without experts": ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers [1] is not supported"),
    "more experts than there are": ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than the 6"),
    "heads that do not divide": ("qwen3", {"num_key_value_heads": 3}, "kv_heads (3)"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unimplemented_options_are_refused_not_ignored(case: str, tmp_path: Path) -> None:
    name, changes, expected = UNSUPPORTED[case]
    config = copy.deepcopy(CONFIGS[name])
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    if name == "gpt2":
        config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=re.escape(expected)) as raised:
        load_spec(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such directory"):
        load_spec(tmp_path / "nowhere")
