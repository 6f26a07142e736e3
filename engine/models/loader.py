"""From a model directory to a ready decoder. What is wrong with it is a `ModelError`: one line that names the file."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from engine.config import DType
from engine.errors import ModelError
from engine.models.decoder import Decoder
from engine.models.directory import CONFIG, find_family
from engine.models.families import Family, UnsupportedConfig
from engine.models.spec import ModelSpec
from engine.models.weights import Checkpoint, fill_parameters

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_spec(path: Path) -> ModelSpec:
    """Reads config.json alone: what the model is, before any weight is touched."""
    return _read_spec(path, find_family(path))[0]


def load_model(path: Path, dtype: torch.dtype | DType = "auto", device: torch.device | str = "cpu") -> Decoder:
    """Loads a model directory to run in `dtype`; "auto" is the checkpoint's.

    Memory peaks at the weights in the run's dtype plus about 70 MiB of mapped file. Raises ModelError.
    """
    family = find_family(path)
    spec, config = _read_spec(path, family)
    checkpoint = Checkpoint(path)
    pieces = family.pieces(spec, checkpoint.names)
    run_dtype = _run_dtype(dtype, config, path)
    return Decoder(spec, fill_parameters(checkpoint, spec.parameter_shapes(), pieces, run_dtype, device))


def _read_spec(path: Path, family: Family) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec, and the configuration with all defaults filled in."""
    file = path / CONFIG
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict()
        return family.spec(config), config
    except UnsupportedConfig as error:
        raise ModelError(f"{file}: {error}") from error
    except Exception as error:  # Validation in transformers raises many types, some of them over several lines.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{file}: not a valid configuration: {reason}") from error


def _run_dtype(dtype: torch.dtype | DType, config: dict[str, Any], path: Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return _DTYPES[dtype]
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"{path / CONFIG}: dtype {name!r} cannot be run; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
