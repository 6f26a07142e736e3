"""Qwen with a mixture of experts in every layer: Qwen1.5-MoE and Qwen2 (with a shared expert), and Qwen3."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial

from engine.models.families.experts import ExpertNames, expert_pieces, experts_of
from engine.models.families.family import Config, Family, UnsupportedConfig, count, linear_pieces, require
from engine.models.families.llama import (
    LLAMA_LIKE_DEFAULTS,
    gated_mlp_pieces,
    llama_like_pieces,
    llama_like_spec,
    window_everywhere,
)
from engine.models.families.qwen import qwen_windows
from engine.models.pieces import Piece
from engine.models.spec import ExpertsSpec, ModelSpec

_NAMES = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def _experts(config: Config) -> ExpertsSpec:
    require(config, "decoder_sparse_step", 1)
    if dense := config.get("mlp_only_layers"):
        raise UnsupportedConfig(f"mlp_only_layers {dense!r} is not supported; every layer must have experts")
    return experts_of(config, "moe_intermediate_size", renormalised=bool(config["norm_topk_prob"]))


def _qwen2_spec(config: Config) -> ModelSpec:
    if not config.get("layer_types"):
        # As transformers has it for this family alone: every other one of the first layers slides.
        first = config["max_window_layers"]
        slides = [layer % 2 == 0 and layer < first for layer in range(count(config, "num_hidden_layers"))]
        config = {**config, "layer_types": ["sliding_attention" if each else "full_attention" for each in slides]}
    shared = count(config, "shared_expert_intermediate_size")
    return replace(
        llama_like_spec(config, qwen_windows(config)),
        qkv_bias=bool(config["qkv_bias"]),
        experts=replace(_experts(config), shared_intermediate=shared, shared_gate=True),
    )


def _qwen3_spec(config: Config) -> ModelSpec:
    windows = window_everywhere(config) if config.get("use_sliding_window") else []
    bias = bool(config.get("attention_bias"))
    return replace(
        llama_like_spec(config, windows), qkv_bias=bias, out_bias=bias, qk_norm=True, experts=_experts(config)
    )


def _mixture(target: str, layer: str, spec: ModelSpec, names: Collection[str]) -> Iterator[Piece]:
    yield from expert_pieces(target, layer, spec, names, _NAMES)
    assert spec.experts is not None
    if spec.experts.shared_intermediate:
        width = spec.experts.shared_intermediate
        yield from gated_mlp_pieces(f"{target}.shared", f"{layer}.mlp.shared_expert", spec.hidden, width, bias=False)
    if spec.experts.shared_gate:
        source = f"{layer}.mlp.shared_expert_gate"
        yield from linear_pieces(f"{target}.shared_gate", source, 1, spec.hidden, bias=False)


_DEFAULTS: Config = {
    **LLAMA_LIKE_DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN2_DEFAULTS: Config = {
    **_DEFAULTS,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_window_layers": 28,
    "qkv_bias": True,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
_QWEN3_DEFAULTS: Config = {
    **_DEFAULTS,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_PIECES = partial(llama_like_pieces, mlp=_mixture)

QWEN2_MOE = Family("Qwen2MoeForCausalLM", "qwen2_moe", _qwen2_spec, _PIECES, _QWEN2_DEFAULTS)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_spec, _PIECES, _QWEN3_DEFAULTS)
