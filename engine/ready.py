"""A model that is loaded and has no pages yet: all of one, or a rank's part. What an engine and a rank have in common.

Owns how "auto" is resolved where that takes the model's files. Knows no scheduler; devices are `engine.devices`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.devices import Device
from engine.forward import Backend
from engine.kv.cache import PagedKVCache, kv_bytes_per_token
from engine.kv.copies import DevicePages, HostPages
from engine.kv.keys import root_key
from engine.kv.tier import PageMemory
from engine.models.decoder import Decoder
from engine.models.directory import find_quantization
from engine.models.identity import model_identity
from engine.models.loader import load_parameters
from engine.parallel.group import TensorGroup
from engine.parallel.place import Place


@dataclass(frozen=True, slots=True, eq=False)
class ReadyModel:
    """A decoder on a device, and what its pages will be."""

    device: Device
    backend: Backend
    decoder: Decoder
    kv_dtype: torch.dtype
    weight_bytes: int
    """Of the parameters that are held here, in the form that they were loaded in."""
    namespace: bytes
    """Equal only where pages mean the same (32 bytes): all that one depends on besides its tokens."""

    @property
    def page_bytes(self) -> int:
        """Of the layers and heads that are held here."""
        return self.device.page_tokens * kv_bytes_per_token(self.decoder.spec, self.kv_dtype)

    def cache(self, num_pages: int) -> PagedKVCache:
        """Memory for so many pages, and for those that the device needs besides."""
        device = self.device
        pages, layout = num_pages + device.spare_pages, self.backend.kv_layout
        return PagedKVCache(self.decoder.spec, pages, device.page_tokens, self.kv_dtype, device.name, layout)

    def memory(self, cache: PagedKVCache) -> PageMemory:
        """The cache's pages, for a tier."""
        return HostPages(cache) if self.device.name == "cpu" else DevicePages(cache)


def load(
    config: EngineConfig, path: Path, device: Device, place: Place | None = None, group: TensorGroup | None = None
) -> ReadyModel:
    """All of a model, or what the rank at `place` has of it, whose layers it shares with `group`.

    Raises ModelError, and ValueError where the model cannot be cut so or the device cannot run it.
    """
    # Weights become fp8 in the kernels' own preparation, not on the way from the file.
    scheme = "auto" if config.quantization == "fp8" else config.quantization
    size = config.quantization_group
    loaded = load_parameters(
        path,
        config.dtype,
        device.name,
        quantization=scheme,
        group=size,
        int8_activations=config.activations == "int8",
        place=place,
    )
    backend = device.backend(loaded, group)
    decoder = Decoder(loaded.part, loaded.parameters, backend.operators, loaded.dtype)
    kv_dtype = _kv_dtype(config, path, device, loaded.dtype)
    # The bytes of the weights tell how they are held: another version of this code may quantize others of them.
    facts = (kv_dtype, backend.kv_layout, device.page_tokens, loaded.dtype, backend.name, loaded.num_bytes)
    namespace = _namespace(config, path, place, *map(str, facts))
    return ReadyModel(device, backend, decoder, kv_dtype, loaded.num_bytes, namespace)


def _kv_dtype(config: EngineConfig, path: Path, device: Device, dtype: torch.dtype) -> torch.dtype:
    if config.kv.dtype != "auto":
        return torch.int8 if config.kv.dtype == "int8" else dtype
    # A GPU's fastest attention does not read int8; on a CPU it costs less accuracy than any quantized weight.
    is_quantized = config.quantization != "auto" or find_quantization(path) is not None
    return torch.int8 if device.name == "cpu" and is_quantized else dtype


def _namespace(config: EngineConfig, path: Path, place: Place | None, *facts: str) -> bytes:
    choices = (config.quantization, config.quantization_group, config.activations, config.deterministic)
    shard = () if place is None or place.world == 1 else (place.stages, place.layers, place.tensor)
    return root_key(model_identity(path).hex(), *facts, *map(str, choices), *map(str, shard))
