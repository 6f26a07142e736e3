"""The `manta` command: which sub-commands exist, and how a failure reaches the shell.

A sub-command's module is imported when that command runs or is asked for help, never before.
"""

import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from deployments.cli.errors import CommandError, ExitCode, one_line
from deployments.version import installed_version

# Name -> (module, function, what `manta --help` says).
COMMANDS = {
    "serve": ("deployments.cli.serve", "serve", "Serve a model over an OpenAI-compatible HTTP API."),
    "chat": ("deployments.cli.chat", "chat", "Talk to a served model in the terminal."),
    "generate": (
        "deployments.cli.generate",
        "generate",
        "Run a file of prompts through a model, offline, resumable.",
    ),
    "quantize": ("deployments.cli.quantize", "quantize", "Write a copy of a model in 8 or 4 bits."),
    "plan": ("deployments.cli.plan", "plan", "Lay a model out over accelerators: bytes of every rank, before a start."),
    "bench": ("deployments.cli.bench", "bench", "Measure a running endpoint: throughput and latencies under load."),
    "version": ("deployments.cli.main", "print_version", "Print the version."),
}

EPILOG = """
[bold]Examples[/bold]

  manta serve\n
  manta serve ./my-model --replicas 2\n
  manta chat\n
  echo "Tell me a story." | manta chat\n
  manta generate manta-tiny --prompts in.jsonl --out out.jsonl\n
  manta plan ./my-model --nodes 2*8x80GiB\n
  manta bench --num-prompts 64 --concurrency 8

[bold]Exit codes[/bold]

  0 done, 1 failed, 2 bad usage, model or input, 130 interrupted
"""


class LazyGroup(TyperGroup):
    """A group that knows the one-line help of its commands, and loads a command once it is chosen."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, _, short_help) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=short_help))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Click's hook between the arguments and the command they name."""
        if args and args[0] in COMMANDS:
            self.add_command(load_command(args[0]))
        return super().resolve_command(ctx, args)


def load_command(name: str) -> Any:
    """Imports one sub-command and gives it its options."""
    module, function, _ = COMMANDS[name]
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name)(getattr(import_module(module), function))
    return typer.main.get_command(app)


def print_version() -> None:
    """Print the version."""
    print(f"manta {installed_version()}")


@dataclass
class GlobalOptions:
    """What was given before the name of the sub-command."""

    debug: bool = False


def build_app(options: GlobalOptions) -> typer.Typer:
    """The command line; parsing it fills in `options`."""
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print_version()
            raise typer.Exit

    @app.callback(epilog=EPILOG)
    def manta(
        debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of a failure.")] = False,
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        """Manta serves large language models on Ray, behind an OpenAI-compatible API."""
        options.debug = debug

    return app


def main() -> None:
    """Entry point of the `manta` command. Every failure ends here, as one line on stderr and an exit code."""
    options = GlobalOptions()
    try:
        build_app(options)(prog_name="manta")
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        sys.exit(report(error))


def report(error: Exception) -> ExitCode:
    """Prints the one line that says why a command failed, and returns the exit code that goes with it."""
    from engine.errors import InvalidRequest, ModelError

    if isinstance(error, CommandError):
        print(f"manta: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, ModelError | InvalidRequest):
        print(f"manta: {one_line(error)}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    print(f"manta: {type(error).__name__}: {one_line(error)} (manta --debug ... shows where)", file=sys.stderr)
    return ExitCode.FAILED


if __name__ == "__main__":
    main()
