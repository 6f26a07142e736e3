"""A start finds kernels or goes on without them, whatever the machine lacks; code of others is never run."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.config import EngineConfig, KVConfig
from engine.kernels.cpu import compiler
from engine.kernels.cpu.compiler import CompileError, compile_library, load_library
from engine.kernels.cpu.library import Library, argument_types
from engine.sampling_params import SamplingParams
from engine.sequence import Request

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

_WRAPPER = """#!/bin/sh
echo "$*" >> {log}
exec cc "$@"
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test starts with nothing compiled and nothing loaded."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Kernels that do nothing, and compile at once."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "kernels.c").write_text("".join(f"void {name}(void) {{}}\n" for name in argument_types()))
    (source / "program.c").write_text("void run_program(void) {}\n")
    return source


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each call of the compiler."""
    log, wrapper = tmp_path / "calls", tmp_path / "wrapper"
    wrapper.write_text(_WRAPPER.format(log=log))
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    return log


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def compilations(calls: Path) -> int:
    return sum("-c " in line for line in calls.read_text().splitlines())


def test_the_real_kernels_share_the_threads_of_torch(native_library: Library) -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


def test_a_second_start_compiles_nothing(source: Path, folder: Path, calls: Path) -> None:
    compile_library(source=source)
    assert compilations(calls) == 2
    compile_library(source=source)
    assert compilations(calls) == 2
    assert only_file(folder).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_products_of_4_bits_are_compiled_for_those_who_need_them(source: Path, folder: Path, calls: Path) -> None:
    operations = {"linear_int4", "gather_columns"}
    others = [name for name in argument_types() if name not in operations]
    (source / "kernels.c").write_text("".join(f"void {name}(void) {{}}\n" for name in others))
    (source / "linear_int4.c").write_text("".join(f"void {name}(void) {{}}\n" for name in operations))
    assert compile_library(int4=False, source=source).operations.keys() == set(others)
    assert compilations(calls) == 2
    assert compile_library(source=source).operations.keys() == argument_types().keys()
    assert compilations(calls) == 5
    assert compile_library(int4=False, source=source).operations.keys() == set(others)
    assert compilations(calls) == 5


def test_other_sources_flags_or_cpus_have_their_own_library(
    source: Path, folder: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_library(source=source)
    compile_library("x86-64" if os.uname().machine == "x86_64" else "generic", source=source)
    (source / "step.h").write_text("/* changed */")
    compile_library(source=source)
    monkeypatch.setattr(compiler, "_cpu", lambda: "x86_64 flags: fewer")
    compile_library(source=source)
    assert compilations(calls) == 8
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("/no/such/cc -pipe", r"the compiler /no/such/cc cannot be run: .*No such file or directory.*"),
        ("/bin/false", r"/bin/false --version failed with status 1: .*"),
    ],
)
def test_a_compiler_that_cannot_be_used_is_one_warning(
    chosen: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", chosen)
    assert load_library() is None
    assert load_library() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    expected = f"no compiled kernels: {reason}; the slower reference kernels run instead"
    assert re.fullmatch(expected, record.getMessage(), re.DOTALL)


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"no C compiler: \$CC is not set, and neither cc, gcc nor clang"):
        compile_library()


def test_the_flags_in_cc_are_passed_on(source: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{os.environ['CC']} -DCHOSEN='a b'")
    compile_library(source=source)
    assert all("-DCHOSEN=a b " in line for line in calls.read_text().splitlines())


def test_what_the_compiler_says_is_passed_on(source: Path) -> None:
    (source / "kernels.c").write_text("int wrong(void) { return missing; }")
    with pytest.raises(CompileError, match=r"(?s)kernels\.c .* failed with status 1: .*missing.* undeclared"):
        compile_library(source=source)


def test_a_library_that_lacks_an_operation_is_no_library(source: Path) -> None:
    (source / "kernels.c").write_text("void add(void) {}")
    with pytest.raises(CompileError, match=r"cannot be loaded: .*undefined symbol"):
        compile_library(source=source)


def test_a_compiler_that_hangs_is_ended_with_its_children(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *--version*) exit;; esac\nsleep 100 & echo $! > {child}\nwait\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    monkeypatch.setattr(compiler, "TIMEOUT_S", 0.5)
    with pytest.raises(CompileError, match="took more than"):
        compile_library(source=source)
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_cache_that_cannot_be_written_costs_the_next_start_a_compilation(
    source: Path, tmp_path: Path, calls: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    for started in (1, 2):
        assert compile_library(source=source).operations.keys() == argument_types().keys()
        assert compilations(calls) == 2 * started
    assert "the compiled kernels cannot be kept" in caplog.text


def test_the_cache_is_where_the_user_keeps_caches(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MANTA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compile_library(source=source)
    assert only_file(tmp_path / "home" / ".cache" / "manta" / "kernels").suffix == ".so"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    compile_library(source=source)
    assert only_file(tmp_path / "xdg" / "manta" / "kernels").suffix == ".so"


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "no library"])
def test_a_damaged_file_is_compiled_anew(source: Path, folder: Path, calls: Path, damage: str) -> None:
    compile_library(source=source)
    path = only_file(folder)
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "truncated": content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "no library": b"\0" * len(content),
    }[damage]
    # A new file, as the loader has mapped the old one.
    path.unlink()
    path.write_bytes(damaged)
    path.chmod(0o600)
    compile_library(source=source)
    assert compilations(calls) == 4
    assert len(only_file(folder).read_bytes()) == len(content)
    compile_library(source=source)
    assert compilations(calls) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_of_another_user_is_not_run(source: Path, folder: Path, calls: Path, whole_folder: bool) -> None:
    compile_library(source=source)
    os.chown(folder if whole_folder else only_file(folder), 12345, 12345)
    compile_library(source=source)
    assert compilations(calls) == 4


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_that_others_could_have_written_is_not_run(
    source: Path, folder: Path, calls: Path, whole_folder: bool
) -> None:
    compile_library(source=source)
    path = folder if whole_folder else only_file(folder)
    path.chmod(0o777)
    compile_library(source=source)
    assert compilations(calls) == 4


def test_two_processes_that_start_together_both_get_the_library(source: Path, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.kernels.cpu.compiler import compile_library; "
        "print(len(compile_library(source=Path(sys.argv[1])).operations))"
    )
    command = [sys.executable, "-c", code, str(source)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in started] == [str(len(argument_types()))] * 2
    assert only_file(folder).suffix == ".so"


def age(path: Path, days: float) -> Path:
    """Makes a file of the cache one that was last used so many days ago."""
    used = time.time() - days * 86_400
    os.utime(path, (used, used))
    return path


def pretend(folder: Path, number: int, days: float, suffix: str = "") -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{'.' if suffix else ''}{number:032x}.so{suffix}"
    path.write_bytes(b"an earlier library")
    return age(path, days)


def change(source: Path, what: str) -> None:
    (source / "step.h").write_text(f"/* {what} */")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> int:
    """A small number of libraries that are kept."""
    monkeypatch.setattr(compiler, "NUM_KEPT", 3)
    return compiler.NUM_KEPT


def test_only_the_libraries_used_last_are_kept(source: Path, folder: Path, kept: int) -> None:
    earlier = [pretend(folder, number, days=number) for number in range(1, 7)]
    compile_library(source=source)
    assert [path.exists() for path in earlier] == [True] * (kept - 1) + [False] * 4
    assert len(list(folder.iterdir())) == kept


def test_a_library_that_is_used_again_stays(source: Path, folder: Path, calls: Path, kept: int) -> None:
    compile_library(source=source)
    first = age(only_file(folder), days=100)
    idle = [pretend(folder, number, days=number) for number in range(1, 4)]
    compile_library(source=source)
    assert compilations(calls) == 2
    change(source, "a second version")
    compile_library(source=source)
    assert first.exists()
    assert [path.exists() for path in idle] == [True, False, False]


def test_what_another_process_may_be_about_to_load_stays(source: Path, folder: Path, kept: int) -> None:
    fresh = [pretend(folder, number, days=0) for number in range(2 * kept)]
    compile_library(source=source)
    assert all(path.exists() for path in fresh)


def test_what_others_put_there_and_what_is_being_written_is_left(source: Path, folder: Path, kept: int) -> None:
    abandoned, writing = pretend(folder, 1, 2, ".77.123"), pretend(folder, 2, 0, ".78.456")
    foreign = [folder / "notes.txt", folder / "libother.so"]
    for path in foreign:
        path.write_text("not ours")
        age(path, days=1000)
    compile_library(source=source)
    assert all(path.exists() for path in (*foreign, writing))
    assert not abandoned.exists()


def test_a_removed_library_goes_on_working_where_it_is_loaded(
    source: Path, folder: Path, calls: Path, kept: int
) -> None:
    loaded = compile_library(source=source)
    first = age(only_file(folder), days=100)
    for number in range(kept):
        pretend(folder, number, days=1)
    change(source, "a second version")
    compile_library(source=source)
    assert not first.exists()
    ctypes.CFUNCTYPE(None)(loaded.operations["add"].address)()
    (source / "step.h").unlink()
    compile_library(source=source)
    assert compilations(calls) == 6


def test_processes_that_clear_the_cache_together_all_start(source: Path, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.kernels.cpu.compiler import compile_library; "
        "print(len(compile_library(sys.argv[2], source=Path(sys.argv[1])).operations))"
    )
    for number in range(200):
        pretend(folder, number, days=1 + number)
    marches = ("x86-64", "x86-64-v2", "native") if os.uname().machine == "x86_64" else ("generic", "native")
    commands = [[sys.executable, "-c", code, str(source), march] for march in marches]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert {process.communicate()[0].strip() for process in started} == {str(len(argument_types()))}
    assert len(list(folder.iterdir())) == compiler.NUM_KEPT


def test_an_engine_without_a_compiler_says_so_once_and_generates(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    engine = build_engine(EngineConfig(threads=1, device="cpu", kv=KVConfig(memory=2**24), max_model_len=64))
    engine.add(Request("one", (5, 6, 7), SamplingParams(max_tokens=4, ignore_eos=True)))
    tokens = [token for _ in range(8) if engine.has_work() for event in engine.step() for token in event.token_ids]
    assert len(tokens) == 4
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("no compiled kernels: /bin/false")
