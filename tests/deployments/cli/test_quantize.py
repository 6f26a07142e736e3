"""`manta quantize` as a user runs it."""

from pathlib import Path

import pytest

from deployments.cli.errors import CommandError
from deployments.cli.quantize import check_flags
from tests.deployments.cli.command import manta


def test_a_copy_of_the_built_in_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 40)
    out = tmp_path / "out"
    flags = ("--scheme", "w8a8", "--smooth", "0.5", "--calibration", text)
    result = manta("quantize", "manta-tiny", out, *flags)
    assert result.returncode == 0, result.stderr
    first, sizes, error = result.stdout.splitlines()
    assert first == f"{out}: 35 layers quantized"
    assert sizes.startswith("weights 6.9 MiB before, 4.1 MiB after (60%)")
    assert 0.5 < float(error.split()[2].rstrip("%")) < 2
    assert (out / "tokenizer.json").exists()
    again = manta("quantize", "manta-tiny", out, "--scheme", "w4a16")
    assert again.returncode == 2
    assert again.stderr == f"manta: {out}: exists; --force replaces it\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("fp8", None, None, None), "--scheme: 'fp8' is not one of w8a8, w4a16"),
        (("w8a8", 64, None, None), "--group: only w4a16"),
        (("w4a16", 48, None, None), "--group: 48 is not one of 32, 64, 128"),
        (("w4a16", None, 0.5, None), "--smooth: only w8a8"),
        (("w8a8", None, 1.5, None), "--smooth: 1.5 is not between 0 and 1"),
        (("w8a8", None, None, Path("x")), "--calibration: is read for --smooth only"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[str, int | None, float | None, Path | None], expected: str) -> None:
    with pytest.raises(CommandError, match=expected):
        check_flags(*flags)
