"""The application over fake engines, started once for all tests of a file."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ports import free_ports
from deployments.text import TextModel
from tests.deployments.app.application import Application
from tests.deployments.fakes import write_fake_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    model = tmp_path_factory.mktemp("model")
    write_fake_model(model)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.deployments.app.server", str(model), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            application = Application(f"http://127.0.0.1:{port}", process, TextModel.load(model), str(model))
            application.wait_for("ready")
            yield application
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(60)
