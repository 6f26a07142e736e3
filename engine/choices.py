"""What follows from a configuration and a model's files, for all of a model as for a rank's part of it.

Owns how "auto" is resolved where that takes the model; knows no scheduler. Devices are `engine.devices`.
"""

from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.kv.cache import KVLayout
from engine.kv.keys import root_key
from engine.models.directory import find_quantization
from engine.models.identity import model_identity
from engine.models.loader import LoadedModel, load_parameters
from engine.parallel.place import Place


def has_int4(config: EngineConfig, path: Path) -> bool:
    """Whether any weights are of 4 bits."""
    layout = find_quantization(path)
    return config.quantization == "w4a16" or (layout is not None and layout.scheme != "w8a8")


def load_configured(config: EngineConfig, path: Path, device: str, place: Place | None = None) -> LoadedModel:
    """`load_parameters` as configured. Raises what that does."""
    # Weights become fp8 in the kernels' own preparation, not on the way from the file.
    scheme = "auto" if config.quantization == "fp8" else config.quantization
    group = config.quantization_group
    return load_parameters(path, config.dtype, device, quantization=scheme, group=group, place=place)


def choose_kv_dtype(config: EngineConfig, path: Path, device: str, dtype: torch.dtype) -> torch.dtype:
    """Of the cache, for activations of `dtype`."""
    if config.kv.dtype != "auto":
        return torch.int8 if config.kv.dtype == "int8" else dtype
    # A GPU's fastest attention does not read int8; on a CPU it costs less accuracy than any quantized weight.
    is_quantized = config.quantization != "auto" or find_quantization(path) is not None
    return torch.int8 if device == "cpu" and is_quantized else dtype


def page_namespace(
    config: EngineConfig,
    path: Path,
    kv_dtype: torch.dtype,
    layout: KVLayout,
    page_tokens: int,
    dtype: torch.dtype,
    kernels: str,
    place: Place | None = None,
) -> bytes:
    """Equal only for engines whose pages mean the same (32 bytes): all that a page depends on besides its tokens."""
    facts = (kv_dtype, layout, page_tokens, dtype, kernels)
    choices = (config.quantization, config.quantization_group, config.deterministic)
    shard = () if place is None or place.world == 1 else (place.stages, place.layers, place.tensor)
    return root_key(model_identity(path).hex(), *map(str, facts), *map(str, choices), *map(str, shard))
