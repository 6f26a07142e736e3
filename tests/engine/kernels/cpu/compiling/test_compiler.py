"""A start finds kernels or goes on without them, whatever the machine lacks; of many starts one compiles."""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.build import build_engine
from engine.config import EngineConfig, KVConfig
from engine.kernels.cpu import compiler, kept_libraries
from engine.kernels.cpu.compiler import CompileError, compile_ahead, compile_library, load_library
from engine.kernels.cpu.features import ALL, SOURCES, Feature
from engine.kernels.cpu.library import SOURCE, Library, argument_types
from engine.sampling_params import SamplingParams
from engine.sequence import Request
from tests.engine.kernels.cpu.compiling.folders import compilations, only_file

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


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


@pytest.mark.parametrize("feature", sorted(ALL))
def test_what_many_models_do_without_is_compiled_for_those_who_need_it(
    feature: Feature, source: Path, calls: Path
) -> None:
    file, *_ = SOURCES[feature].files
    operations = SOURCES[feature].operations
    others = [name for name in argument_types() if name not in operations]
    (source / "kernels.c").write_text("".join(f"void {name}(void) {{}}\n" for name in others))
    (source / file).write_text("".join(f"void {name}(void) {{}}\n" for name in operations))
    without = ALL - {feature}
    assert compile_library(features=without, source=source).operations.keys() == set(others)
    assert compilations(calls) == 2
    assert compile_library(source=source).operations.keys() == argument_types().keys()
    assert compilations(calls) == 5
    assert compile_library(features=without, source=source).operations.keys() == set(others)
    assert compilations(calls) == 5


def test_nothing_that_every_model_needs_refers_to_what_some_do_without(folder: Path) -> None:
    library = compile_library(features=frozenset(), folder=folder)
    optional = frozenset().union(*(found.operations for found in SOURCES.values()))
    assert library.operations.keys() == argument_types().keys() - optional


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


def make_slow(wrapper: Path, seconds: float) -> None:
    """Each file takes the compiler so long."""
    content = wrapper.read_text()
    wrapper.write_text(content.replace("exec cc", f'case "$*" in *"-c "*) sleep {seconds};; esac\nexec cc'))


def test_a_compilation_may_take_longer_than_each_of_its_files(
    source: Path, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_slow(tmp_path / "wrapper", 1.2)
    monkeypatch.setattr(compiler, "available_cores", lambda: 1)
    monkeypatch.setattr(compiler, "TIMEOUT_S", 2.2)
    assert compile_library(source=source).operations.keys() == argument_types().keys()


def test_of_many_that_start_together_one_compiles(source: Path, calls: Path, tmp_path: Path) -> None:
    make_slow(tmp_path / "wrapper", 0.5)
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: compile_library(source=source), range(4)))
    assert all(library.operations.keys() == argument_types().keys() for library in libraries)
    assert compilations(calls) == 2


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process whose turn it is."""
    folder.mkdir(mode=0o700, parents=True)
    code = (
        "import fcntl, os, sys, time; lock = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_is_killed_while_compiling_holds_up_nobody(source: Path, holder: subprocess.Popen[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(compile_library, source=source)
        with pytest.raises(TimeoutError):
            waiting.result(1.0)
        holder.kill()
        assert waiting.result(60).operations.keys() == argument_types().keys()


def test_who_is_stopped_while_compiling_holds_up_nobody_for_long(
    source: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_libraries, "WAIT_S", 0.3)
    assert compile_library(source=source).operations.keys() == argument_types().keys()
    assert "this process compiles its own" in caplog.text


@pytest.mark.parametrize(("instructions", "warnings"), [("AVX-512 BF16", 0), ("AVX2", 0), ("portable C", 1)])
def test_what_the_kernels_use_is_said_once_and_slow_ones_are_warned_of(
    instructions: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = SimpleNamespace(instruction_set=instructions)
    monkeypatch.setattr(compiler, "compile_library", lambda *, features: found)
    with caplog.at_level(logging.INFO, logger=compiler.__name__):
        assert load_library() is found and load_library() is found
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert said == [f"the compiled kernels use {instructions}"]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == warnings


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names instructions of x86")
@pytest.mark.parametrize(
    ("march", "name"),
    [("x86-64", "portable C"), ("x86-64-v3", "AVX2"), ("x86-64-v4", "AVX-512"), ("sapphirerapids", "AVX-512 BF16")],
)
def test_the_name_is_that_of_what_was_compiled_for(march: str, name: str, source: Path) -> None:
    """Compiled from vector.h as it is; the name needs none of the instructions."""
    for file in ("vector.h", "step.h"):
        shutil.copy(SOURCE / file, source)
    (source / "program.c").write_text(
        '#include "vector.h"\nvoid run_program(void) {}\nconst char *instruction_set(void) { return VECTOR_NAME; }\n'
    )
    assert compile_library(march, source=source).instruction_set == name


@pytest.fixture
def with_header(source: Path) -> Path:
    """Its common header has a function that each of two files calls."""
    (source / "vector.h").write_text("#ifndef H\n#define H\nstatic inline int two(void) { return 2; }\n#endif\n")
    for file in source.glob("*.c"):
        call = f"int {file.stem}_calls(void) {{ return two(); }}\n"
        file.write_text(f'#include "vector.h"\n{call}{file.read_text()}')
    return source


def is_gcc() -> bool:
    if shutil.which("cc") is None:
        return False
    version = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout
    return "Free Software Foundation" in version


@pytest.mark.skipif(not is_gcc(), reason="clang reads the header in each file")
def test_what_files_begin_with_is_compiled_once_for_all_of_them(with_header: Path, calls: Path) -> None:
    assert compile_library(source=with_header).function("kernels_calls")() == 2
    headers = [line for line in calls.read_text().splitlines() if "-x c-header" in line]
    assert len(headers) == 1 and headers[0].endswith("/vector.h.gch")
    files = [line for line in calls.read_text().splitlines() if " -c " in line]
    assert len(files) == 2 and all("/vector.h -c " in line for line in files)


@pytest.mark.parametrize("refused", ["c-header", "-include"])
def test_without_a_compiled_header_there_are_kernels_all_the_same(
    refused: str, with_header: Path, calls: Path, tmp_path: Path
) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(wrapper.read_text().replace("exec cc", f'case "$*" in *"{refused}"*) exit 1;; esac\nexec cc'))
    assert compile_library(source=with_header).function("kernels_calls")() == 2


def test_two_processes_that_start_together_both_get_the_library(source: Path, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.kernels.cpu.compiler import compile_library; "
        "print(len(compile_library(source=Path(sys.argv[1])).operations))"
    )
    command = [sys.executable, "-c", code, str(source)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in started] == [str(len(argument_types()))] * 2
    assert only_file(folder).suffix == ".so"


def test_what_is_compiled_before_torch_is_there_is_what_is_loaded_after(source: Path, calls: Path) -> None:
    code = """
import sys
from pathlib import Path
from engine.kernels.cpu.compiler import compile_ahead, compile_library

compile_ahead(source=Path(sys.argv[1]))
assert "torch" not in sys.modules
compiled = Path(sys.argv[2]).read_text()
import torch

print(len(compile_library(source=Path(sys.argv[1])).operations))
assert Path(sys.argv[2]).read_text().count(" -c ") == compiled.count(" -c ") > 0
"""
    output = subprocess.run([sys.executable, "-c", code, str(source), str(calls)], capture_output=True, text=True)
    assert output.stdout.strip() == str(len(argument_types())), output.stderr


def test_nothing_is_compiled_ahead_that_is_there_or_could_not_be_kept(
    source: Path, calls: Path, folder: Path, tmp_path: Path
) -> None:
    compile_library(source=source)
    compile_ahead(source=source)
    assert compilations(calls) == 2
    (tmp_path / "file").write_text("where the folder should be")
    compile_ahead(source=source, folder=tmp_path / "file")
    assert compilations(calls) == 2


def test_whoever_wants_what_is_being_compiled_ahead_waits_for_it(source: Path, calls: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(compile_ahead, source=source)
        wanted = pool.submit(compile_library, source=source)
        assert wanted.result().operations.keys() == argument_types().keys()
        ahead.result()
    assert compilations(calls) == 2


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
