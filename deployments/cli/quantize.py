"""`manta quantize`: a full-precision model directory becomes one in 8 or 4 bits, for this server and for others."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.errors import CommandError, ExitCode
from engine.quant.plan import GROUPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.quant.export import Report
    from engine.quant.smooth import Scaling

SCHEMES = ("w8a8", "w4a16")


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, a hub id, or manta-tiny, the built-in model.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    scheme: Annotated[str, typer.Option(help="w8a8 or w4a16.")],
    group: Annotated[int | None, typer.Option(help="Input channels to a scale in w4a16: 32, 64, 128. [64]")] = None,
    smooth: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="SmoothQuant for w8a8: 0 to 1, 0.5 for most models. [none]"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text for --smooth, like what the model will read.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
) -> None:
    """Write a copy of a model with its linear layers in 8 or 4 bits.

    w8a8 is 8 bits with a scale per output channel, its activations
    quantized per token as it runs: faster everywhere. w4a16 is 4 bits in
    groups of input channels: half the memory again, and fastest for few
    sequences at once. Embeddings and head stay as they are in the copy;
    `manta serve OUT --quantization SCHEME` turns the head into the same
    form as it loads.

    The copy is a compressed-tensors checkpoint, which other servers read.
    `manta serve MODEL --quantization SCHEME` gives nearly the same without
    one; the copy is loaded faster, its 4-bit scales are searched more
    finely, and only it can be smoothed.

    --smooth runs the model on 32 prompts of 512 tokens, to see which
    channels of its activations are large, and moves their range into the
    weights (SmoothQuant). The prompts come from --calibration, else from
    simple English that is built in; a model without tokenizer.json is given
    random tokens.

    Examples:

      manta quantize ./my-model ./my-model-w8a8 --scheme w8a8 --smooth 0.5

      manta quantize org/name ./name-w4a16 --scheme w4a16 --group 128
    """
    check_flags(scheme, group, smooth, calibration)
    from engine.models.source import resolve_model
    from engine.quant.export import Exporter, Target, check_is_free

    source = resolve_model(model, revision)
    check_is_free(out, force=force)
    target = Target("w8a8" if scheme == "w8a8" else "w4a16", group or 64)
    exporter = Exporter(source, target)
    if smooth is not None:
        exporter = Exporter(source, target, smoothing_of(source, smooth, calibration))
    with progress("tensors", exporter.num_tensors) as advance:
        report = exporter.write(out, force=force, advance=advance)
    print(summary(out, report))


def check_flags(scheme: str, group: int | None, smooth: float | None, calibration: Path | None) -> None:
    """Raises CommandError naming the flag that is wrong or does not go with the others."""
    problem = ""
    if scheme not in SCHEMES:
        problem = f"--scheme: {scheme!r} is not one of {', '.join(SCHEMES)}"
    elif group is not None and scheme != "w4a16":
        problem = "--group: only w4a16 has groups; w8a8 has a scale per output channel"
    elif group is not None and group not in GROUPS:
        problem = f"--group: {group} is not one of {', '.join(map(str, GROUPS))}"
    elif smooth is not None and scheme != "w8a8":
        problem = "--smooth: only w8a8 quantizes activations, whose range it moves"
    elif smooth is not None and not 0 <= smooth <= 1:
        problem = f"--smooth: {smooth} is not between 0 and 1"
    elif calibration is not None and smooth is None:
        problem = "--calibration: is read for --smooth only; give that too"
    if problem:
        raise CommandError(problem, ExitCode.BAD_INPUT)


def smoothing_of(source: Path, alpha: float, calibration: Path | None) -> "Mapping[str, Scaling]":
    """Runs the model on some text. Raises ModelError."""
    from engine.models.directory import load_spec
    from engine.quant.calibrate import activation_ranges
    from engine.quant.smooth import smoothing
    from engine.quant.texts import calibration_prompts

    spec = load_spec(source)
    prompts = calibration_prompts(source, spec, calibration)
    with progress("prompts", len(prompts)) as advance:
        ranges = activation_ranges(source, prompts, max(map(len, prompts)), advance)
    return smoothing(spec, ranges, alpha)


@contextmanager
def progress(what: str, total: int) -> "Iterator[Callable[[], None]]":
    """A bar on a terminal's stderr, nothing elsewhere; yields what to call after each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def summary(out: Path, report: "Report") -> str:
    """What was written, in three lines."""
    worst = max(report.errors, key=report.errors.__getitem__)
    before, after = report.bytes_before / 2**20, report.bytes_after / 2**20
    return (
        f"{out}: {report.num_quantized} layers quantized\n"
        f"weights {before:.1f} MiB before, {after:.1f} MiB after ({after / before:.0%})\n"
        f"mean error {report.error:.2%} of a weight; largest {report.errors[worst]:.2%} in {worst}"
    )
