"""The supported families: each maps a Hugging Face config to a `ModelSpec` and checkpoint tensors to parameters."""

from engine.models.families.family import Family, UnsupportedConfig
from engine.models.families.gpt2 import GPT2
from engine.models.families.gpt_neox import GPT_NEOX
from engine.models.families.llama import LLAMA
from engine.models.families.mistral import MISTRAL
from engine.models.families.mixtral import MIXTRAL
from engine.models.families.opt import OPT
from engine.models.families.qwen import QWEN2, QWEN3
from engine.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE

_FAMILIES = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, GPT2, OPT, GPT_NEOX)

__all__ = ["Family", "UnsupportedConfig", "family_of", "supported_architectures"]


def family_of(architecture: str) -> Family | None:
    """The family that declares this architecture (or model type), if any does."""
    return next((family for family in _FAMILIES if architecture in (family.architecture, family.model_type)), None)


def supported_architectures() -> list[str]:
    return sorted(family.architecture for family in _FAMILIES)
