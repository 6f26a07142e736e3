"""Which kernels a model runs on, told from its files before any of its weights is read. Imports no torch."""

from pathlib import Path

from engine.config import EngineConfig
from engine.kernels.cpu.features import ALL, Feature
from engine.models.directory import find_quantization, load_spec
from engine.quant.config import has_int4


def needed_features(config: EngineConfig, path: Path, *, is_rank: bool = False) -> frozenset[Feature]:
    """What an engine of `config` needs of its kernels, or a rank that shares the model in `path` with others.

    Raises ModelError.
    """
    layout = find_quantization(path)
    has = {
        # Next to weights of 4 bits there may be some of 8.
        "int8": layout is not None or config.quantization != "auto",
        "int4": has_int4(layout, config.quantization),
        "experts": load_spec(path).experts is not None,
        "ranks": is_rank,
    }
    return frozenset(feature for feature in ALL if has[feature])
