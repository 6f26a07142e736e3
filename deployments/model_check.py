"""What can be told about a model before anything is started: where it is, and that it is one of a supported family.

Whether the weights are complete is the replica's to find out, which has torch at hand; this imports neither torch nor
transformers.
"""

from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.models.directory import find_family
from engine.models.source import resolve_model


def check_model(config: EngineConfig) -> Path:
    """The model's directory, downloaded if `config.model` is a hub id. Raises ModelError: one line, naming the file."""
    path = resolve_model(config.model, config.revision)
    find_family(path)
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no *.safetensors file; weights in other formats have to be converted first")
    return path
