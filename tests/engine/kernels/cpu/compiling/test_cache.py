"""What is compiled is kept and found again; code of others is never run."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.kernels.cpu import kept_libraries
from engine.kernels.cpu.compiler import CompileError, compile_library
from engine.kernels.cpu.library import Library, argument_types
from tests.engine.kernels.cpu.compiling.folders import compilations, only_file

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


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


def test_a_cache_that_nothing_can_be_run_from_costs_each_start_a_compilation(
    source: Path, folder: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where it is mounted noexec."""

    def load(path: Path, left_out: frozenset[str]) -> Library:
        if path.resolve().parent == folder:
            raise OSError("failed to map segment from shared object")
        return Library(path, left_out)

    monkeypatch.setattr(kept_libraries, "Library", load)
    for started in (1, 2):
        assert compile_library(source=source).operations.keys() == argument_types().keys()
        assert compilations(calls) == 2 * started
    assert f"kernels cannot be loaded from {folder}" in caplog.text


def test_a_folder_that_is_a_link_is_not_used(
    source: Path, folder: Path, calls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is in /tmp, somebody else may have put it there, and may let it lead elsewhere at any time."""
    compile_library(source=source)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    compile_library(source=source)
    assert compilations(calls) == 4
    assert "or it is a link" in caplog.text


def test_a_file_that_is_a_link_is_not_run(source: Path, folder: Path, calls: Path, tmp_path: Path) -> None:
    compile_library(source=source)
    path = only_file(folder)
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    compile_library(source=source)
    assert compilations(calls) == 4


def test_what_was_checked_is_what_is_loaded(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another file takes its place in between."""
    compile_library(source=source)
    path = only_file(folder)
    check = kept_libraries._is_whole

    def check_and_replace(file: int) -> bool:
        is_whole = check(file)
        path.unlink()
        path.write_bytes(b"something else")
        return is_whole

    monkeypatch.setattr(kept_libraries, "_is_whole", check_and_replace)
    library = kept_libraries.load(path, frozenset())
    assert library is not None and library.instruction_set == "AVX2"


def test_libraries_of_one_process_are_not_taken_for_each_other(source: Path) -> None:
    """The loader knows a library by its name, also one that lacks something."""
    whole = (source / "kernels.c").read_text()
    (source / "kernels.c").write_text("void add(void) {}")
    with pytest.raises(CompileError, match="undefined symbol"):
        compile_library(source=source)
    (source / "kernels.c").write_text(whole)
    for name in ("first", "second"):
        (source / "program.c").write_text(
            f'void run_program(void) {{}}\nconst char *instruction_set(void) {{ return "{name}"; }}\n'
        )
        compile_library(source=source)
        assert compile_library(source=source).instruction_set == name


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
    monkeypatch.setattr(kept_libraries, "NUM_KEPT", 3)
    return kept_libraries.NUM_KEPT


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
    assert len(list(folder.iterdir())) == kept_libraries.NUM_KEPT
