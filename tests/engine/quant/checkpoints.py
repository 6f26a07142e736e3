"""Tiny quantized checkpoints, packed value by value as their formats define it, beside the weights they stand for.

Written from the formats' definitions and kept apart from what reads them: loops over single values, no shared code.
"""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2MoeConfig,
)
from transformers.configuration_utils import PretrainedConfig

LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
NEOX = GPTNeoXConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
)
MIXTRAL = MixtralConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    num_local_experts=4,
    num_experts_per_tok=2,
)
QWEN_MOE = Qwen2MoeConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=96,
)
GPT2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128)
NARROW_ENDS = OPTConfig(
    vocab_size=96,
    hidden_size=64,
    ffn_dim=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    word_embed_proj_dim=48,
    do_layer_norm_before=False,
)
"""As OPT-350m: embeddings, and the head that is tied to them, have fewer channels than layers."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight output channels each nibble of an AWQ word holds, lowest first."""

Codes = NDArray[np.int64]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Quantized:
    """What a quantizer decided for one linear layer of [out, in]; column i belongs to group group_of[i]."""

    codes: Codes
    """[out, in] in [0, 15]."""
    scale: Tensor
    """[out, groups]."""
    zero: Codes
    """[out, groups] in [0, 15]."""
    group_of: Codes

    def dense(self) -> Tensor:
        centred = torch.from_numpy(self.codes - self.zero[:, self.group_of]).float()
        return centred * self.scale.float()[:, torch.from_numpy(self.group_of)]


def random_quantized(
    shape: tuple[int, int], group: int, rng: np.random.Generator, *, symmetric: bool, order: Codes | None = None
) -> Quantized:
    """`order` gives the channels in the order in which a quantizer with act-order took them."""
    out, columns = shape
    groups = 1 if group == -1 else columns // group
    group_of = np.arange(columns) // (columns // groups)
    if order is not None:
        group_of = group_of[np.argsort(order)]
    return Quantized(
        codes=rng.integers(0, 16, (out, columns)),
        scale=torch.from_numpy(rng.uniform(0.01, 0.05, (out, groups))).half(),
        zero=np.full((out, groups), 8) if symmetric else rng.integers(0, 16, (out, groups)),
        group_of=group_of,
    )


def words(rows: Iterable[Iterable[int]]) -> Tensor:
    """Each row's nibbles, eight to a word, the first lowest; zeros fill the last word."""
    packed = []
    for row in rows:
        nibbles = list(row)
        nibbles += [0] * (-len(nibbles) % 8)
        packed.append(
            [sum(int(nibbles[at + i]) << 4 * i for i in range(8)) for at in range(0, len(nibbles), 8)],
        )
    return torch.from_numpy(np.array(packed, np.uint32).view(np.int32))


def awq_words(rows: Codes) -> Tensor:
    shuffled = [row[at + i] for row in rows for at in range(0, len(row), 8) for i in AWQ_ORDER]
    return words(np.array(shuffled).reshape(rows.shape))


def gptq(linear: Quantized, *, version: int = 1) -> Tensors:
    """AutoGPTQ: nibbles of a word run along the inputs, those of the zero points along the outputs."""
    # The first version takes 1 from every zero point of a word at once, borrows and all.
    zeros = words(linear.zero.T) - (0x11111111 if version == 1 else 0)
    return {
        "qweight": words(linear.codes).T.contiguous(),
        "qzeros": zeros,
        "scales": linear.scale.T.contiguous(),
        "g_idx": torch.from_numpy(linear.group_of.astype(np.int32)),
    }


def awq(linear: Quantized) -> Tensors:
    """AutoAWQ, version "gemm": nibbles of a word run along the outputs, shuffled."""
    return {
        "qweight": awq_words(linear.codes.T),
        "qzeros": awq_words(linear.zero.T),
        "scales": linear.scale.T.contiguous(),
    }


def packed(linear: Quantized, *, symmetric: bool, act_order: bool = False) -> Tensors:
    """compressed-tensors "pack-quantized": nibbles along the inputs; of the zero points, down the outputs."""
    tensors = {
        "weight_packed": words(linear.codes),
        "weight_scale": linear.scale,
        "weight_shape": torch.tensor(linear.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(linear.zero.T).T.contiguous()
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(linear.group_of.astype(np.int32))
    return tensors


Pack = Callable[[Quantized], Tensors]
WEIGHTS_4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
WEIGHTS_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


@dataclass(frozen=True)
class Recipe:
    """How to make one checkpoint."""

    declared: dict[str, Any]
    """quantization_config."""
    pack: Pack
    group: int = 32
    symmetric: bool = True
    act_order: bool = False
    config: PretrainedConfig = field(default_factory=lambda: LLAMA)
    ignored: tuple[str, ...] = ("lm_head", "embed_out")
    """Ends of the names of modules that stay dense."""

    def with_(self, **changes: Any) -> "Recipe":
        return replace(self, **changes)


def random_model(config: PretrainedConfig, seed: int = 0) -> Any:
    """A float32 model whose every parameter matters: biases and norms are drawn too, not left at 0 and 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def write_pair(recipe: Recipe, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Directories of a quantized checkpoint and of the dense one, in float32, that it stands for."""
    model = random_model(recipe.config, seed)
    quantized, dense = folder / "quantized", folder / "dense"
    model.save_pretrained(dense)
    tensors = {name: tensor.float().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    full, rng = dict(tensors), np.random.default_rng(seed)
    for module in linear_modules(model):
        if module.endswith(recipe.ignored):
            continue
        weight = tensors.pop(f"{module}.weight")
        transposed = module_is_transposed(model, module)
        shape = tuple(weight.T.shape if transposed else weight.shape)
        order = np.random.default_rng(shape[1]).permutation(shape[1]) if recipe.act_order else None
        linear = random_quantized(shape, recipe.group, rng, symmetric=recipe.symmetric, order=order)
        full[f"{module}.weight"] = linear.dense().T.contiguous() if transposed else linear.dense()
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in recipe.pack(linear).items()}
    save(dense, full)
    quantized.mkdir()
    save(quantized, tensors)
    config = json.loads((dense / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": recipe.declared}))
    return quantized, dense


def save(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def linear_modules(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]


def module_is_transposed(model: Any, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"
