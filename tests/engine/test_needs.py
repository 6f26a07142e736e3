"""What a model needs of the kernels is told from its files."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from engine.config import EngineConfig, Quantization
from engine.kernels.cpu.features import Feature
from engine.needs import needed_features

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def folder_of(config: PretrainedConfig, path: Path, architecture: str, **more: object) -> Path:
    path.mkdir()
    values = config.to_dict() | {"architectures": [architecture], **more}
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return folder_of(LlamaConfig(**_SIZES), tmp_path / "dense", "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("quantization", "features"), [("auto", set()), ("w8a8", {"int8"}), ("w4a16", {"int8", "int4"})]
)
def test_of_weights_that_are_quantized_as_they_are_read(
    quantization: Quantization, features: set[Feature], dense: Path
) -> None:
    assert needed_features(EngineConfig(quantization=quantization), dense) == features


def test_of_weights_that_are_quantized_already(tmp_path: Path) -> None:
    config = LlamaConfig(**_SIZES)
    path = folder_of(config, tmp_path / "gptq", "LlamaForCausalLM", quantization_config=_GPTQ)
    assert needed_features(EngineConfig(), path) == {"int8", "int4"}


def test_of_experts(tmp_path: Path) -> None:
    path = folder_of(MixtralConfig(**_SIZES, num_local_experts=4), tmp_path / "experts", "MixtralForCausalLM")
    assert needed_features(EngineConfig(), path) == {"experts"}


def test_of_ranks(dense: Path) -> None:
    assert needed_features(EngineConfig(), dense, is_rank=True) == {"ranks"}
