"""Mistral: Llama with a sliding window on every layer."""

from engine.models.families.family import Config, Family, UnsupportedConfig
from engine.models.families.llama import llama_like_pieces, llama_like_spec
from engine.models.spec import ModelSpec


def _spec(config: Config) -> ModelSpec:
    if config.get("layer_types"):
        raise UnsupportedConfig("layer_types is not supported for Mistral, whose window is the same on every layer")
    window = config.get("sliding_window")
    return llama_like_spec(config, windows=[window] * int(config["num_hidden_layers"]) if window else ())


MISTRAL = Family("MistralForCausalLM", "mistral", _spec, llama_like_pieces)
