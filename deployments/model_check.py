"""What can be told about a model within milliseconds, before anything is started: where it is and that it looks like
one. Architecture and weights are the replica's to check, which has torch at hand; this imports neither torch nor
transformers.
"""

import json
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.models.source import resolve_model


def check_model(config: EngineConfig) -> Path:
    """The model's directory, downloaded if `config.model` is a hub id. Raises ModelError: one line, naming the file."""
    path = resolve_model(config.model, config.revision)
    file = path / "config.json"
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: missing; a model directory holds config.json and safetensors weights") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from None
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no *.safetensors file; weights in other formats have to be converted first")
    return path
