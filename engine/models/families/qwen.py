"""Qwen2 and Qwen2.5 (biased QKV), Qwen3 (normalised queries and keys); both may give some layers a sliding window."""

from dataclasses import replace

from engine.models.families.family import Config, Family, UnsupportedConfig, count
from engine.models.families.llama import LLAMA_LIKE_DEFAULTS, llama_like_pieces, llama_like_spec
from engine.models.spec import ModelSpec


def qwen_windows(config: Config) -> list[int | None]:
    """One entry per layer: `layer_types` says which layers slide, else those from `max_window_layers` on do."""
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return []
    layers, window = count(config, "num_hidden_layers"), count(config, "sliding_window")
    kinds = config.get("layer_types")
    if not kinds:
        first = config["max_window_layers"]
        return [window if layer >= first else None for layer in range(layers)]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedConfig(f"layer_types {sorted(unknown)} are not supported")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _qwen2_spec(config: Config) -> ModelSpec:
    return replace(llama_like_spec(config, qwen_windows(config)), qkv_bias=True)


def _qwen3_spec(config: Config) -> ModelSpec:
    bias = bool(config.get("attention_bias"))
    return replace(llama_like_spec(config, qwen_windows(config)), qkv_bias=bias, out_bias=bias, qk_norm=True)


_DEFAULTS = {
    **LLAMA_LIKE_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}

QWEN2 = Family("Qwen2ForCausalLM", "qwen2", _qwen2_spec, llama_like_pieces, _DEFAULTS)
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", _qwen3_spec, llama_like_pieces, {**_DEFAULTS, "head_dim": 128})
