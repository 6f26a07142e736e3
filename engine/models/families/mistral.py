"""Mistral: Llama with a sliding window on every layer."""

from engine.models.families.family import Config, Family, UnsupportedConfig
from engine.models.families.llama import LLAMA_LIKE_DEFAULTS, llama_like_pieces, llama_like_spec, window_everywhere
from engine.models.spec import ModelSpec


def _spec(config: Config) -> ModelSpec:
    if config.get("layer_types"):
        raise UnsupportedConfig("layer_types is not supported for Mistral, whose window is the same on every layer")
    return llama_like_spec(config, window_everywhere(config))


_DEFAULTS = {
    **LLAMA_LIKE_DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

MISTRAL = Family("MistralForCausalLM", "mistral", _spec, llama_like_pieces, _DEFAULTS)
