"""Compiles the kernels at first use and keeps the result. Owns the compiler, its flags and the cache; knows no kernel.

The result is code that this process runs, so the cache is a folder that only this user can write, and a file in it is
used only if it is whole and this user's own.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

from engine.kernels.cpu.library import PORTABLE, SOURCE, Library
from engine.machine import available_cores

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Of one process of the compiler."""
WAIT_S = 300.0
"""For another process that compiles, at most: one that is stopped must not keep all others from starting."""
_POLL_S = 0.05
NUM_KEPT = 32
"""Libraries that stay in the cache. Not one: machines with other CPUs may share it, each with a version or two."""
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_INT4_FILES = frozenset({"linear_int4.c", "linear_int4_int8.c"})
_INT4_OPERATIONS = frozenset({"linear_int4", "gather_columns"})
_LEVELS = {"attention_product.c": "-O2"}
"""Where the source says itself what to unroll: as fast as -O3, and compiled in two thirds of the time."""
_DIGEST_BYTES = hashlib.sha256().digest_size
_MESSAGE_CHARACTERS = 1000
_KEPT_NAME = re.compile(r"[0-9a-f]{32}\.so")
_ASIDE_NAME = re.compile(r"\.[0-9a-f]{32}\.so\.\d+\.\d+")
_SETTLED_S = 3600.0
"""Age of a file that nobody is still writing, or has just written and is about to load."""
_OPENMP = re.compile(r"(/.*/lib(?:gomp|omp|iomp5)\b[^/]*\.so[^/]*)$", re.MULTILINE)


class CompileError(Exception):
    """There is no library: says what was tried and what came of it, with the end of the compiler's message."""


@cache
def load_library(*, int4: bool = True) -> Library | None:
    """The kernels for this machine; None, with one warning, where they cannot be had."""
    try:
        library = compile_library(int4=int4)
    except CompileError as error:
        log.warning("no compiled kernels: %s; the slower reference kernels run instead", error)
        return None
    log.info("the compiled kernels use %s", library.instruction_set)
    if library.instruction_set == PORTABLE:
        log.warning(
            "the compiled kernels are portable C, several times slower than vector instructions: the compiler finds "
            "neither AVX-512 nor AVX2 with FMA on this machine; a virtual machine may have to be given its host's CPU"
        )
    return library


def compile_library(
    march: str = "native", *, int4: bool = True, folder: Path | None = None, source: Path = SOURCE
) -> Library:
    """The C files of `source` for instruction set `march`, from the cache in `folder` or compiled now.

    `int4` is whether products with int4 weights are wanted, which take a quarter of the time. Raises CompileError.
    """
    recipe = _recipe(march, source, int4=int4)
    kept = (folder or _cache_folder()) / f"{recipe.key}.so"
    if (library := _load_kept(kept, recipe.left_out)) is not None:
        return library
    with _turn(kept.parent):
        # Another process may have compiled them in the meantime.
        return _load_kept(kept, recipe.left_out) or _compile(recipe, kept)


def _compile(recipe: "Recipe", kept: Path) -> Library:
    with tempfile.TemporaryDirectory(prefix="manta-kernels-") as made_in:
        began = time.monotonic()
        made = _build(recipe, Path(made_in))
        is_kept = _keep(made, kept)
        log.info("compiled the kernels in %.1f s: %s", time.monotonic() - began, kept if is_kept else made)
        library = _load_kept(kept, recipe.left_out) if is_kept else None
        if library is None:
            library = _load(made, recipe.left_out)
            if is_kept:
                log.warning("kernels cannot be loaded from %s, so every start compiles them again", kept.parent)
    if is_kept:
        _remove_old(kept.parent)
    return library


@dataclass(frozen=True)
class Recipe:
    """Everything that the library depends on."""

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    openmp: Path
    cpu: str
    source: Path
    int4: bool

    @property
    def left_out(self) -> frozenset[str]:
        """Operations of the headers that the library lacks."""
        return frozenset() if self.int4 else _INT4_OPERATIONS

    @cached_property
    def files(self) -> list[Path]:
        """C files, those that take longest first."""
        files = (path for path in self.source.glob("*.c") if self.int4 or path.name not in _INT4_FILES)
        return sorted(files, key=lambda path: -path.stat().st_size)

    def command(self, path: Path, target: Path) -> list[str]:
        """Compiles one of the files."""
        levels = [_LEVELS[path.name]] if path.name in _LEVELS else []
        return [*self.compiler, *self.flags, *levels, "-c", str(path), "-o", str(target)]

    @cached_property
    def key(self) -> str:
        """A name for the result: other instructions, another compiler or other sources have another one."""
        tools = (self.compiler, self.version, self.flags, _LEVELS, str(self.openmp), self.cpu)
        digest = hashlib.sha256(repr(tools).encode())
        for path in sorted([*self.files, *self.source.glob("*.h")]):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:32]


def _recipe(march: str, source: Path, *, int4: bool) -> Recipe:
    compiler = _find_compiler()
    version = _call([*compiler, "--version"])
    # On Arm, clang takes the name of a CPU but not of an instruction set as "native"; gcc takes both.
    arm = platform.machine() in ("aarch64", "arm64")
    flags = (*_FLAGS, f"-{'mcpu' if arm else 'march'}={march}")
    return Recipe(compiler, version, flags, _openmp_runtime(), _cpu(), source, int4)


def _find_compiler() -> tuple[str, ...]:
    if chosen := shlex.split(os.environ.get("CC", "")):
        return tuple(chosen)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    raise CompileError("no C compiler: $CC is not set, and neither cc, gcc nor clang is on the PATH")


def _openmp_runtime() -> Path:
    """The runtime that torch has loaded: with another one, this process would have two pools of threads."""
    try:
        loaded = _OPENMP.findall(Path("/proc/self/maps").read_text())
    except OSError as error:
        raise CompileError(f"cannot tell which OpenMP runtime torch has loaded: {error}") from error
    if not loaded:
        raise CompileError("torch has loaded no OpenMP runtime to share (libgomp, libomp or libiomp5)")
    # Other packages may have loaded theirs; torch's wheels bring their own.
    home = str(Path(torch.__file__).resolve().parent)
    return Path(min(loaded, key=lambda path: not path.startswith(home)))


def _cpu() -> str:
    """What tells CPUs with different instructions apart, which may share a home directory."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        instructions = ""
    return f"{platform.machine()} {instructions or platform.processor()}"


def _build(recipe: Recipe, folder: Path) -> Path:
    """Compiles each file in its own process, as many at once as there are cores, and links them."""

    def compile_file(path: Path) -> str:
        began = time.monotonic()
        target = folder / f"{path.stem}.o"
        _call(recipe.command(path, target))
        log.debug("%s: %.2f s", path.name, time.monotonic() - began)
        return str(target)

    with ThreadPoolExecutor(available_cores()) as pool:
        objects = list(pool.map(compile_file, recipe.files))
    library = folder / "kernels.so"
    _call([*recipe.compiler, "-shared", *objects, str(recipe.openmp), "-lm", "-o", str(library)])
    return library


def _call(command: Sequence[str]) -> str:
    """Runs one process of the compiler and returns what it printed."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise CompileError(f"the compiler {command[0]} cannot be run: {error}") from error
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # The compiler is a driver with processes of its own, which hold the pipe open.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise CompileError(f"{shlex.join(command)} took more than {TIMEOUT_S:.0f} s") from None
    if process.returncode != 0:
        message = output.strip()[-_MESSAGE_CHARACTERS:]
        raise CompileError(f"{shlex.join(command)} failed with status {process.returncode}: {message or 'no message'}")
    return output


def _cache_folder() -> Path:
    if chosen := os.environ.get("MANTA_CACHE"):
        return Path(chosen) / "kernels"
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "manta" / "kernels"
    try:
        return Path.home() / ".cache" / "manta" / "kernels"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"manta-kernels-{os.geteuid()}"


def _is_ours(status: os.stat_result) -> bool:
    """Whether nobody but this user can have written what is there."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_our_folder(path: Path) -> bool:
    """A link is none: where /tmp is shared, others may have put it there and change where it leads."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and _is_ours(status)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Processes that share the cache compile one after the other; what the first has compiled the others load.

    The system ends a turn with its process. Without one goes who cannot have a turn here, or has waited for `WAIT_S`.
    """
    lock = None
    with contextlib.suppress(OSError):
        _make_folder(folder)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if lock is None:
        yield
        return
    try:
        _wait_for(lock)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int) -> None:
    until = time.monotonic() + WAIT_S
    is_said = False
    while time.monotonic() < until:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_said:
                log.info("waiting for another process that compiles kernels")
                is_said = True
            time.sleep(_POLL_S)
        except OSError:  # a file system without locks
            return
        else:
            return
    log.warning("another process has been compiling kernels for %.0f s; this one compiles its own", WAIT_S)


def _load_kept(path: Path, left_out: frozenset[str]) -> Library | None:
    """The library of an earlier compilation; None where it is missing, damaged or not ours, and to be made anew."""
    try:
        if not _is_our_folder(path.parent):
            return None
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if not (_is_ours(os.fstat(file)) and _is_whole(file)):
        os.close(file)
        return None
    # From here on it stays open: its number is a part of the name by which the loader tells libraries apart.
    try:
        library = _load(_opened(file, path), left_out)
    except CompileError:
        return None
    with contextlib.suppress(OSError):  # The time of the last use, which tells what to keep.
        os.utime(file)
    return library


def _is_whole(file: int) -> bool:
    """A damaged file could be loaded and crash later, so its digest is kept behind the part that the loader reads."""
    with open(file, "rb", closefd=False) as reader:
        content = reader.read()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _opened(file: int, path: Path) -> Path:
    """A name of the very file that is open, whatever has been put in its place since."""
    name = Path(f"/proc/self/fd/{file}")
    return name if name.exists() else path


def _make_folder(folder: Path) -> None:
    """Raises PermissionError where it is not this user's alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_our_folder(folder):
        raise PermissionError(
            f"others than this user can write to {folder}, or it is a link; it should be a folder of this user's, with "
            "mode 700"
        )


def _keep(made: Path, kept: Path) -> bool:
    """Puts the library into the cache in one step, if it can."""
    content = made.read_bytes()
    aside = kept.with_name(f".{kept.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        _make_folder(kept.parent)
        aside.write_bytes(content + hashlib.sha256(content).digest())
        aside.chmod(0o600)
        aside.replace(kept)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        log.warning("the compiled kernels cannot be kept, so every start compiles them again: %s", error)
        return False
    return True


def _remove_old(folder: Path) -> None:
    """Leaves the `NUM_KEPT` libraries that were used last, and nothing that an interrupted compilation has left.

    Harmless to other processes: what they have loaded stays until they end, and what they miss they compile again.
    """
    used: list[tuple[float, Path]] = []
    settled = time.time() - _SETTLED_S
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            last = _last_use(path)
            if _KEPT_NAME.fullmatch(path.name):
                used.append((last, path))
            elif _ASIDE_NAME.fullmatch(path.name) and last < settled:
                path.unlink(missing_ok=True)
        for last, path in sorted(used, reverse=True)[NUM_KEPT:]:
            if last < settled:
                path.unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    """Seconds since the epoch; 0 for a file that another process has removed."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _load(path: Path, left_out: frozenset[str]) -> Library:
    try:
        return Library(path, left_out)
    except (OSError, AttributeError) as error:
        raise CompileError(f"the compiled library cannot be loaded: {error}") from error
