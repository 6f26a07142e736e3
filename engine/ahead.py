"""What a start begins before it imports torch, which keeps one core busy for a second and leaves the others idle.

Imports no torch.
"""

import logging
from pathlib import Path
from threading import Thread

from engine.config import EngineConfig
from engine.kernels.cpu.compiler import CompileError, compile_ahead
from engine.models.directory import needs_int4
from engine.models.source import resolve_model

log = logging.getLogger(__name__)

_GPUS = ("/dev/nvidiactl", "/dev/dxg")
"""What drivers put there: NVIDIA's on Linux, and Windows' for the Linux inside it."""


def begin_compiling(config: EngineConfig) -> Thread | None:
    """Begins to compile the kernels that an engine of `config` will run on; None if that is likely to be a GPU.

    A compiler that fails fails no start here: it does so again for the engine, which says what follows. Raises
    ModelError, as building the engine does.
    """
    if config.device == "cuda" or (config.device == "auto" and any(Path(gpu).exists() for gpu in _GPUS)):
        return None
    int4 = needs_int4(resolve_model(config.model, config.revision), config.quantization)
    thread = Thread(target=_compile, args=(int4,), name="compile-ahead", daemon=True)
    thread.start()
    return thread


def _compile(int4: bool) -> None:
    try:
        compile_ahead(int4=int4)
    except CompileError as error:
        log.debug("no kernels are compiled ahead: %s", error)
