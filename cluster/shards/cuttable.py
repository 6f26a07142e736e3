"""Reads what a model is and whether it can be cut as asked, before any rank is started. Knows files; starts nothing."""

from pathlib import Path

from cluster.config import ParallelConfig
from cluster.shards.cut import check_degrees
from engine.config import EngineConfig
from engine.models.directory import channel_unit, load_spec
from engine.models.spec import ModelSpec


def cuttable_spec(path: Path, config: EngineConfig, parallel: ParallelConfig) -> ModelSpec:
    """What the model in a directory is. Raises ModelError where it cannot be cut so."""
    spec = load_spec(path)
    check_degrees(spec, parallel, channel_unit(path, config.quantization, config.quantization_group))
    return spec
