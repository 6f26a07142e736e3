"""Compiles the kernels at first use. Owns the compiler and its flags; knows no kernel, and that libraries are kept,
not how.

Importing it imports no torch, so that `compile_ahead` can begin before torch is there.
"""

import hashlib
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from engine.kernels.cpu import kept_libraries
from engine.kernels.cpu.features import ALL, SOURCES, Feature
from engine.kernels.cpu.library import PORTABLE, SOURCE, Library
from engine.machine import available_cores

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Of one process of the compiler."""
_FLAGS = ("-O3", "-std=gnu11", "-D_GNU_SOURCE", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_LEVELS = {"attention_product.c": "-O2"}
"""Where the source says itself what to unroll: as fast as -O3, and compiled in two thirds of the time."""
_LONGEST = ("attention_product.c", "linear_int4.c", "linear_int4_int8.c", "linear_dense.c", "attention_write.c")
"""By the time that they take; of the others the size tells it."""
_COMMON_HEADER = "vector.h"
"""What nearly every file begins with. The intrinsics behind it take longer to read than most files to compile."""
_MESSAGE_CHARACTERS = 1000
_OPENMP = re.compile(r"(/.*/lib(?:gomp|omp|iomp5)\b[^/]*\.so[^/]*)$", re.MULTILINE)


class CompileError(Exception):
    """There is no library: says what was tried and what came of it, with the end of the compiler's message."""


@cache
def load_library(features: frozenset[Feature] = ALL) -> Library | None:
    """The kernels for this machine; None, with one warning, where they cannot be had."""
    try:
        library = compile_library(features=features)
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
    march: str = "native",
    *,
    features: frozenset[Feature] = ALL,
    folder: Path | None = None,
    source: Path = SOURCE,
) -> Library:
    """The C files of `source` for instruction set `march`, from the cache in `folder` or compiled now.

    Of what models can do without it has these `features`. Raises CompileError.
    """
    recipe = _recipe(march, source, features, _loaded_openmp())
    kept = recipe.kept_in(folder)
    if (library := kept_libraries.load(kept, recipe.left_out)) is not None:
        return library
    with kept_libraries.turn(kept.parent):
        # Somebody else may have compiled them in the meantime.
        return kept_libraries.load(kept, recipe.left_out) or _compile(recipe, kept)


def compile_ahead(features: frozenset[Feature] = ALL, *, folder: Path | None = None, source: Path = SOURCE) -> None:
    """Puts what `compile_library` would compile for this machine into the cache, if it is missing there.

    For the time in which torch is imported. Whoever wants the library meanwhile waits for its turn and then finds it.
    Nothing is compiled where it could not be kept, or where torch's folder does not tell which OpenMP runtime torch is
    going to load. Raises CompileError.
    """
    if (openmp := _bundled_openmp()) is None:
        return
    recipe = _recipe("native", source, features, openmp)
    kept = recipe.kept_in(folder)
    if kept_libraries.has(kept):
        return
    with kept_libraries.turn(kept.parent) as is_writable:
        if is_writable and not kept_libraries.has(kept):
            with tempfile.TemporaryDirectory(prefix="manta-kernels-") as made_in:
                _make(recipe, kept, Path(made_in))


def _compile(recipe: "Recipe", kept: Path) -> Library:
    with tempfile.TemporaryDirectory(prefix="manta-kernels-") as made_in:
        made, is_kept = _make(recipe, kept, Path(made_in))
        library = kept_libraries.load(kept, recipe.left_out) if is_kept else None
        if library is None:
            library = _load(made, recipe.left_out)
            if is_kept:
                log.warning("kernels cannot be loaded from %s, so every start compiles them again", kept.parent)
    return library


def _make(recipe: "Recipe", kept: Path, made_in: Path) -> tuple[Path, bool]:
    """Returns the library, and whether it is also in the cache."""
    began = time.monotonic()
    made = _build(recipe, made_in)
    is_kept = kept_libraries.keep(made, kept)
    log.info("compiled the kernels in %.1f s: %s", time.monotonic() - began, kept if is_kept else made)
    if is_kept:
        kept_libraries.remove_old(kept.parent)
    return made, is_kept


@dataclass(frozen=True)
class Recipe:
    """Everything that the library depends on."""

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    openmp: Path
    cpu: str
    source: Path
    features: frozenset[Feature]

    @property
    def left_out(self) -> frozenset[str]:
        """Operations of the headers that the library lacks."""
        return frozenset().union(*(SOURCES[feature].operations for feature in ALL - self.features))

    @cached_property
    def files(self) -> list[Path]:
        """C files, those that take longest first."""
        left_out = frozenset().union(*(SOURCES[feature].files for feature in ALL - self.features))
        files = (path for path in self.source.glob("*.c") if path.name not in left_out)
        return sorted(files, key=lambda path: (*(path.name != name for name in _LONGEST), -path.stat().st_size))

    def command(self, path: Path, target: Path, header: Path | None = None) -> list[str]:
        """Compiles one of the files, in front of which `header` stands."""
        levels = [_LEVELS[path.name]] if path.name in _LEVELS else []
        included = [] if header is None else ["-include", str(header)]
        return [*self.compiler, *self.flags, *levels, *included, "-c", str(path), "-o", str(target)]

    def header_command(self, header: Path) -> list[str]:
        """Compiles a header, once for all files that are given it."""
        return [*self.compiler, *self.flags, "-x", "c-header", str(header), "-o", f"{header}.gch"]

    @cached_property
    def common_header(self) -> Path | None:
        """None where reading it each time is what works: clang refuses a header that it has compiled with any other
        flag, where gcc reads it anew."""
        header = self.source / _COMMON_HEADER
        return header if "Free Software Foundation" in self.version and header.exists() else None

    def kept_in(self, folder: Path | None) -> Path:
        """Its place in the cache, or in this folder."""
        return (folder or kept_libraries.folder()) / f"{self.key}.so"

    @cached_property
    def key(self) -> str:
        """A name for the result: other instructions, another compiler or other sources have another one."""
        tools = (self.compiler, self.version, self.flags, _LEVELS, str(self.openmp), self.cpu)
        digest = hashlib.sha256(repr(tools).encode())
        for path in sorted([*self.files, *self.source.glob("*.h")]):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:32]


def _recipe(march: str, source: Path, features: frozenset[Feature], openmp: Path) -> Recipe:
    compiler = _find_compiler()
    version = _call([*compiler, "--version"])
    # On Arm, clang takes the name of a CPU but not of an instruction set as "native"; gcc takes both.
    arm = platform.machine() in ("aarch64", "arm64")
    flags = (*_FLAGS, f"-{'mcpu' if arm else 'march'}={march}")
    return Recipe(compiler, version, flags, openmp, _cpu(), source, features)


def _find_compiler() -> tuple[str, ...]:
    if chosen := shlex.split(os.environ.get("CC", "")):
        return tuple(chosen)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    raise CompileError("no C compiler: $CC is not set, and neither cc, gcc nor clang is on the PATH")


def _loaded_openmp() -> Path:
    """The runtime that torch has loaded: with another one, this process would have two pools of threads."""
    import torch  # noqa: F401  Loads it, if nobody has imported it yet.

    try:
        loaded = _OPENMP.findall(Path("/proc/self/maps").read_text())
    except OSError as error:
        raise CompileError(f"cannot tell which OpenMP runtime torch has loaded: {error}") from error
    if not loaded:
        raise CompileError("torch has loaded no OpenMP runtime to share (libgomp, libomp or libiomp5)")
    # Other packages may have loaded theirs; torch's wheels bring their own.
    home = str(_torch_folder())
    return Path(min(loaded, key=lambda path: not path.startswith(home)))


def _bundled_openmp() -> Path | None:
    """The runtime that torch will load, if it has brought one."""
    home = _torch_folder()
    files = [path for folder in (home / "lib", home.with_name("torch.libs")) for path in folder.glob("lib*.so*")]
    bundled = {path.resolve() for path in files if _OPENMP.match(str(path))}
    return bundled.pop() if len(bundled) == 1 else None


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise CompileError("torch, whose OpenMP runtime the kernels share, is not installed")
    return Path(found.origin).resolve().parent


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
    with ThreadPoolExecutor(available_cores()) as pool:
        # Begun before all that wait for it, so it never waits for a thread of the pool.
        header = pool.submit(_compile_header, recipe, folder)
        objects = list(pool.map(lambda path: _compile_file(recipe, path, folder, header), recipe.files))
    library = folder / "kernels.so"
    _call([*recipe.compiler, "-shared", *objects, str(recipe.openmp), "-lm", "-o", str(library)])
    return library


def _compile_header(recipe: Recipe, folder: Path) -> Path | None:
    """What to include in front of a file; None where nothing is gained by it."""
    if recipe.common_header is None:
        return None
    began = time.monotonic()
    header = folder / recipe.common_header.name
    header.write_text(f'#include "{recipe.common_header}"\n')
    try:
        _call(recipe.header_command(header))
    except CompileError as error:
        log.debug("%s is not compiled ahead: %s", header.name, error)
        return None
    log.debug("%s: %.2f s", header.name, time.monotonic() - began)
    return header


def _compile_file(recipe: Recipe, path: Path, folder: Path, header: Future[Path | None]) -> str:
    # With another level of optimization a compiled header does not serve, so there is nothing to wait for.
    included = None if path.name in _LEVELS else header.result()
    began = time.monotonic()
    target = folder / f"{path.stem}.o"
    try:
        _call(recipe.command(path, target, included))
    except CompileError:
        if included is None:
            raise
        # Some systems cannot map it where the compiler wants it.
        _call(recipe.command(path, target))
    log.debug("%s: %.2f s", path.name, time.monotonic() - began)
    return str(target)


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


def _load(path: Path, left_out: frozenset[str]) -> Library:
    try:
        return Library(path, left_out)
    except (OSError, AttributeError) as error:
        raise CompileError(f"the compiled library cannot be loaded: {error}") from error
