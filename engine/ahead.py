"""What a start begins before it imports torch, which keeps one core busy for a second and leaves the others idle.

Imports no torch.
"""

import logging
from pathlib import Path
from threading import Thread

from engine.config import EngineConfig
from engine.kernels.cpu.compiler import CompileError, compile_ahead
from engine.kernels.cpu.features import Feature
from engine.models.source import resolve_model
from engine.needs import needed_features

log = logging.getLogger(__name__)

_GPUS = ("/dev/nvidiactl", "/dev/dxg")
"""What drivers put there: NVIDIA's on Linux, and Windows' for the Linux inside it."""


def begin_compiling(config: EngineConfig, *, is_rank: bool = False) -> Thread | None:
    """Begins to compile the kernels that an engine of `config`, or a rank of one, will run on.

    None if that is likely to be a GPU.

    A compiler that fails fails no start here: it does so again for the engine, which says what follows. Raises
    ModelError, as building the engine does.
    """
    if config.device == "cuda" or (config.device == "auto" and any(Path(gpu).exists() for gpu in _GPUS)):
        return None
    features = needed_features(config, resolve_model(config.model, config.revision), is_rank=is_rank)
    thread = Thread(target=_compile, args=(features,), name="compile-ahead", daemon=True)
    thread.start()
    return thread


def _compile(features: frozenset[Feature]) -> None:
    try:
        compile_ahead(features)
    except (CompileError, OSError) as error:
        log.debug("no kernels are compiled ahead: %s", error)
