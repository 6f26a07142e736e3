"""Which cores the threads of the kernels keep to. Decides when that helps; team.c does it."""

import ctypes
import logging
import os

from engine.kernels.cpu.library import Library
from engine.machine import ALONE, CoreShare

log = logging.getLogger(__name__)


def bind_threads(library: Library, threads: int, share: CoreShare = ALONE) -> bool:
    """Keeps each thread of the calling thread's programs on a core of its own; returns whether it does now.

    Only where the processes that share the cores have exactly as many threads together: with more cores, several that
    know nothing of each other would all choose the same ones. Unbound, the system at times puts two threads of a team,
    or two processes that wait for each other, on one core for the length of many steps, and each of their barriers then
    takes a time slice. The calling thread is free between runs, and what it starts inherits nothing.
    """
    together = threads * share.count
    if together < 2 or not hasattr(os, "sched_getaffinity"):
        return False
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) != together:
        return False
    cores = cores[share.index * threads :][:threads]
    bind = library.function("bind_teams")
    bind.argtypes, bind.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    if error := bind((ctypes.c_int64 * threads)(*cores), threads):
        log.warning("threads stay unbound: cores %s: %s", cores, os.strerror(error))
        return False
    return True
