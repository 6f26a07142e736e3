"""Threads of the arithmetic must not starve when the machine has other work: their spinning is bounded, in time."""

import os
import subprocess
import sys

import pytest

_REPORT = "import sys; import engine.build; import os; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("chosen", "spins"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")]
)
def test_spinning_is_bounded_unless_the_operator_chose_otherwise(chosen: dict[str, str], spins: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | chosen
    done = subprocess.run([sys.executable, "-c", _REPORT], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", spins]
