"""From a model directory to a ready decoder. Owns config.json and generation_config.json.

Whatever is wrong with a directory is a `ModelError` of one line that names the file.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from engine.config import DType
from engine.errors import ModelError
from engine.models.decoder import Decoder
from engine.models.families import Family, UnsupportedConfig, family_of, supported_architectures
from engine.models.spec import ModelSpec
from engine.models.weights import Checkpoint, fill_parameters

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_spec(path: Path) -> ModelSpec:
    """Reads config.json alone: what the model is, before any weight is touched."""
    return _read_family(path)[1]


def load_model(path: Path, dtype: torch.dtype | DType = "auto", device: torch.device | str = "cpu") -> Decoder:
    """Loads a model directory to run in `dtype`; "auto" is the checkpoint's.

    Memory peaks at the weights in the run's dtype plus about 70 MiB of mapped file. Raises ModelError.
    """
    family, spec, config = _read_family(path)
    checkpoint = Checkpoint(path)
    pieces = family.pieces(spec, checkpoint.names)
    run_dtype = _run_dtype(dtype, config, path)
    return Decoder(spec, fill_parameters(checkpoint, spec.parameter_shapes(), pieces, run_dtype, device))


def load_eos_token_ids(path: Path) -> tuple[int, ...]:
    """The end-of-sequence tokens of generation_config.json, or of config.json where that does not say."""
    generation = path / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if eos is None:
        eos = _read_json(path / "config.json").get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _read_family(path: Path) -> tuple[Family, ModelSpec, dict[str, Any]]:
    file = path / "config.json"
    raw = _read_json(file)
    architectures = raw.get("architectures") or [raw.get("model_type")]
    family = family_of(str(architectures[0]))
    if family is None:
        supported = ", ".join(supported_architectures())
        raise ModelError(f"{file}: architecture {architectures[0]!r} is not supported; supported are {supported}")
    if raw.get("quantization_config") is not None:
        raise ModelError(f"{file}: quantized checkpoints (quantization_config) are not supported; use the original")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict()
        return family, family.spec(config), config
    except UnsupportedConfig as error:
        raise ModelError(f"{file}: {error}") from error
    except Exception as error:  # Validation in transformers raises many types, some of them over several lines.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{file}: not a valid configuration: {reason}") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise ModelError(f"{file.parent}: no such directory")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file}: missing; a model directory holds config.json and safetensors weights") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _run_dtype(dtype: torch.dtype | DType, config: dict[str, Any], path: Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return _DTYPES[dtype]
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"{path / 'config.json'}: dtype {name!r} cannot be run; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
