"""Qwen2 and Qwen2.5 (biased QKV), Qwen3 (normalised queries and keys); both may give some layers a sliding window."""

from dataclasses import replace

from engine.models.families.family import Config, Family, UnsupportedConfig
from engine.models.families.llama import llama_like_pieces, llama_like_spec
from engine.models.spec import ModelSpec


def _windows(config: Config) -> list[int | None]:
    """One entry per layer: `layer_types` says which layers slide, else those from `max_window_layers` on do."""
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if not config.get("use_sliding_window") or not window:
        return []
    kinds = config.get("layer_types")
    if not kinds:
        first = int(config["max_window_layers"])
        return [int(window) if layer >= first else None for layer in range(layers)]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedConfig(f"layer_types {sorted(unknown)} are not supported")
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def _qwen2_spec(config: Config) -> ModelSpec:
    return replace(llama_like_spec(config, _windows(config)), qkv_bias=True)


def _qwen3_spec(config: Config) -> ModelSpec:
    bias = bool(config.get("attention_bias"))
    return replace(llama_like_spec(config, _windows(config)), qkv_bias=bias, out_bias=bias, qk_norm=True)


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", _qwen2_spec, llama_like_pieces)
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", _qwen3_spec, llama_like_pieces)
