"""Which cores the threads of the kernels keep to. Decides when that helps; team.c does it."""

import ctypes
import logging
import os

from engine.kernels.cpu.library import Library

log = logging.getLogger(__name__)


def bind_threads(library: Library, threads: int) -> bool:
    """Keeps each thread of the calling thread's programs on a core of its own; returns whether it does now.

    Only where the process may use exactly as many cores as there are threads: with more cores, several processes on one
    machine would all choose the same ones. Unbound, the system at times puts two threads of a team on one core for the
    length of many steps, and each of their barriers then takes a time slice. The calling thread is free between runs,
    and what it starts inherits nothing.
    """
    if threads < 2 or not hasattr(os, "sched_getaffinity"):
        return False
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) != threads:
        return False
    bind = library.function("bind_teams")
    bind.argtypes, bind.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    if error := bind((ctypes.c_int64 * threads)(*cores), threads):
        log.warning("threads stay unbound: cores %s: %s", cores, os.strerror(error))
        return False
    return True
