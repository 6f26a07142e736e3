"""How a command fails: one line for the user and an exit code with a meaning. Knows no command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell is told."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    """Wrong usage, model or input file: repeating the command as it is cannot help."""
    INTERRUPTED = 130
    """Ctrl-C, as shells report SIGINT."""


class CommandError(Exception):
    """Ends a command. The message is printed as it is, so it says what is wrong, where, and what would be right."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """The message of an exception as a single line; its type alone when it has no message.

    A pydantic error becomes "field.path: reason; field.path: reason".
    """
    # Told by its method, so that a command without configuration does not import pydantic to say so.
    if hasattr(error, "errors") and hasattr(error, "error_count"):
        parts = []
        for detail in error.errors():
            where = ".".join(str(part) for part in detail["loc"])
            reason = str(detail["msg"]).removeprefix("Value error, ")
            parts.append(f"{where}: {reason}" if where else reason)
        return "; ".join(parts)
    return " ".join(str(error).split()) or type(error).__name__
