"""One model on two of three hosts, served over HTTP: hosts are lost under its streams, and no client sees more than a
pause.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.compiled import compiled_library
from tests.netns.isolation import ROOT

NOTICED_S = 2.0
STRIKES = "rank-cut", "replica-killed"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    compiled_library()
    found = tmp_path_factory.mktemp("netns") / "reports.json"
    options = ["--layouts", "pipeline", "--strikes", ",".join(STRIKES), "--max-tokens", "200", "--json", str(found)]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.netns", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return dict(zip(STRIKES, json.loads(Path(found).read_text()), strict=True))


@pytest.mark.parametrize("strike", STRIKES)
def test_streams_outlive_a_host(reports: dict[str, dict[str, Any]], strike: str) -> None:
    report = reports[strike]
    assert report["cut"] > 0 and not report["complaints"]
    assert report["went_on_s"] is not None and report["loaded_s"] is not None
    assert "store of streams" not in report["also_there"], "it would be lost together with a gateway"


def test_ranks_that_are_cut_off_are_lost_in_time_and_end_by_themselves(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["rank-cut"]
    assert report["noticed_s"] < NOTICED_S
    assert report["ended_s"] < NOTICED_S + 1
    # Long before Ray, which has not lost it yet, would end them.
    assert report["orphans_s"] is not None
