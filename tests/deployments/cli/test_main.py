"""The `manta` command itself: help that is quick, exit codes, one-line errors."""

import re
import subprocess
import sys

import pytest

from deployments.cli.errors import CommandError, ExitCode
from deployments.cli.main import COMMANDS, report
from engine.errors import ModelError
from tests.deployments.cli.command import MANTA, ROOT, environment, manta

HEAVY = {"torch", "transformers", "ray", "fastapi", "httpx", "numpy", "tokenizers"}


def test_help_names_every_command_and_the_exit_codes() -> None:
    result = manta("--help")
    assert result.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", result.stdout)
    assert "130 interrupted" in result.stdout


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from deployments.cli.main import main\n"
        f"sys.argv = ['manta', *{command!r}, '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('heavy:', sorted({HEAVY!r} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "heavy: []", result.stdout + result.stderr


def test_version() -> None:
    assert re.fullmatch(r"manta \S+\n", manta("version").stdout)
    assert manta("--version").stdout == manta("version").stdout


def test_an_unknown_command_is_bad_usage_and_suggests_the_right_one() -> None:
    result = manta("chta")
    assert result.returncode == 2
    assert "chat" in result.stderr


def test_failures_are_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (CommandError("no luck"), ExitCode.FAILED, "manta: no luck"),
        (CommandError("bad\nflag", ExitCode.BAD_INPUT), ExitCode.BAD_INPUT, "manta: bad flag"),
        (ModelError("x/config.json: missing"), ExitCode.BAD_INPUT, "manta: x/config.json: missing"),
        (KeyError("oops"), ExitCode.FAILED, "manta: KeyError: 'oops' (manta --debug ... shows where)"),
    ]
    for error, code, line in cases:
        assert report(error) == code
        assert capsys.readouterr().err == line + "\n"


def test_debug_shows_the_traceback() -> None:
    failing = ["chat", "--url", "ftp://nowhere"]
    plain = subprocess.run([*MANTA, *failing], capture_output=True, text=True, env=environment(), cwd=ROOT)
    debug = subprocess.run([*MANTA, "--debug", *failing], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert plain.returncode == debug.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
