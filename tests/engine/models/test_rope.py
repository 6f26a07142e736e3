"""Frequencies against Hugging Face's, at the positions where a scaling makes a difference."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.families.rope_config import max_position, rope_spec
from engine.models.rope import Rope

SCALINGS: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "longrope": {
        "short_factor": [1.0 + i / 64 for i in range(64)],
        "long_factor": [1.0 + i for i in range(64)],
        "original_max_position_embeddings": 4096,
        "factor": 8.0,
    },
}
YARN_VARIANTS: list[dict[str, object]] = [
    {"attention_factor": 1.25},
    {"mscale": 1.0, "mscale_all_dim": 0.8},
    {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
]


def rotation(kind: str, parameters: dict[str, object], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and Hugging Face's [length, 128] cosines and sines for a sequence of `length`."""
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": kind, "rope_theta": 500000.0, **parameters},
    )
    positions = torch.arange(length)
    ours = Rope(rope_spec(config.to_dict(), 128)).cos_sin(positions, torch.full((length,), length))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return ours, torch.cat((cos[0, :, :64], sin[0, :, :64]), dim=1)


@pytest.mark.parametrize("length", [100, 5000, 9000])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotation_equals_hugging_face(kind: str, length: int) -> None:
    ours, theirs = rotation(kind, SCALINGS[kind], length)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("variant", YARN_VARIANTS, ids=lambda variant: next(iter(variant)))
def test_yarn_options(variant: dict[str, object]) -> None:
    ours, theirs = rotation("yarn", SCALINGS["yarn"] | variant, 5000)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("kind", "expected"), [("default", 8192), ("linear", 32768), ("dynamic", 32768), ("llama3", 8192), ("yarn", 131072)]
)
def test_max_position_counts_the_scaling_in(kind: str, expected: int) -> None:
    config = {
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **SCALINGS[kind]},
    }
    assert max_position(config, rope_spec(config, 128)) == expected
