"""What a model directory says about itself, read within milliseconds: imports neither torch nor transformers.

Owns config.json and generation_config.json. Whatever is wrong with them is a `ModelError` of one line naming the file.
"""

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.models.families import Family, UnsupportedConfig, family_of, supported_architectures
from engine.models.spec import ModelSpec
from engine.quant.config import CheckpointFormat, Scheme, UnsupportedQuantization, group_of, has_int4, read_quantization
from engine.quant.plan import unit_of

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


def find_family(path: Path) -> Family:
    """The family of the directory's architecture. Raises ModelError, naming those that are supported."""
    file = path / CONFIG
    raw = read_json(file)
    architectures = raw.get("architectures") or [raw.get("model_type")]
    family = family_of(str(architectures[0]))
    if family is None:
        supported = ", ".join(supported_architectures())
        raise ModelError(f"{file}: architecture {architectures[0]!r} is not supported; supported are {supported}")
    find_quantization(path)
    return family


def load_spec(path: Path) -> ModelSpec:
    """What the model is, before any weight is touched. Raises ModelError."""
    file = path / CONFIG
    family = find_family(path)
    try:
        return family.spec(read_json(file))
    except UnsupportedConfig as error:
        raise ModelError(f"{file}: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: not a valid configuration: {error!r}") from error


def find_quantization(path: Path) -> CheckpointFormat | None:
    """How the directory's weights are quantized, None if they are not. Raises ModelError, naming what is supported."""
    file = path / CONFIG
    try:
        return read_quantization(read_json(file))
    except UnsupportedQuantization as error:
        raise ModelError(f"{file}: {error}") from error


def load_eos_token_ids(path: Path) -> tuple[int, ...]:
    """The end-of-sequence tokens of generation_config.json, or of config.json where that does not say."""
    generation = path / GENERATION_CONFIG
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    if eos is None:
        eos = read_json(path / CONFIG).get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def read_json(file: Path) -> dict[str, Any]:
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


def channel_unit(path: Path, scheme: str | None, group: int) -> int:
    """Input channels that must stay together when a layer of the directory's model is cut. Full weights are turned into
    `scheme` with this `group`; no or any other name than a scheme's leaves them as they are. Raises ModelError."""
    layout = find_quantization(path)
    if layout is None:
        return unit_of("w4a16" if scheme == "w4a16" else None, group)
    return unit_of(None if layout.scheme == "w8a8" else "w4a16", group_of(read_json(path / CONFIG), layout))


def check_activations(path: Path, layout: CheckpointFormat | None, scheme: str | None) -> None:
    """Raises ModelError where activations of 8 bits are asked for, and no weights of 4 bits are there to meet them."""
    if not has_int4(layout, scheme):
        raise ModelError(
            f'{path / CONFIG}: activations "int8" meet weights of 4 bits, and this model would have none: choose '
            'quantization "w4a16", or a checkpoint in 4 bits; "w8a8" has such activations by itself'
        )


def check_scheme(path: Path, layout: CheckpointFormat | None, scheme: Scheme | None) -> None:
    """Raises ModelError where a checkpoint that is quantized already is asked for in another form."""
    if layout is not None and scheme is not None and layout.scheme != scheme:
        raise ModelError(
            f"{path / CONFIG}: the checkpoint is quantized already, to {layout.scheme}; it cannot be loaded as "
            f"{scheme}: leave quantization at auto, or use the full checkpoint"
        )
