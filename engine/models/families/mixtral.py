"""Mixtral: Mistral with a mixture of experts in place of the MLP."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial

from engine.models.families.experts import ExpertNames, expert_pieces, experts_of
from engine.models.families.family import Config, Family
from engine.models.families.llama import LLAMA_LIKE_DEFAULTS, llama_like_pieces, llama_like_spec, window_everywhere
from engine.models.pieces import Piece
from engine.models.spec import ModelSpec

_NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def _spec(config: Config) -> ModelSpec:
    experts = experts_of(config, "intermediate_size", renormalised=True)
    return replace(llama_like_spec(config, window_everywhere(config)), experts=experts)


def _mixture(target: str, layer: str, spec: ModelSpec, names: Collection[str]) -> Iterator[Piece]:
    return expert_pieces(target, layer, spec, names, _NAMES)


_DEFAULTS: Config = {
    **LLAMA_LIKE_DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}

MIXTRAL = Family("MixtralForCausalLM", "mixtral", _spec, partial(llama_like_pieces, mlp=_mixture), _DEFAULTS)
