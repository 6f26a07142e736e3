"""The compiled kernels as Python sees them: one structure of arguments for each operation, read from the C headers.

Owns the boundary to C and nothing of what the operations compute. Calls release the GIL.
"""

import ctypes
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from engine.models.spec import Activation

SOURCE = Path(__file__).parent / "source"
ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
PORTABLE = "portable C"
"""The `instruction_set` where vector.h has no instructions of the machine to choose."""
NO_ACTIVATION = -1
"""As `enum activation` of step.h."""
_OPERATION = re.compile(r"struct (\w+) \{([^{}]*)\};\s*OPERATION\(\1\);")
_STEP = re.compile(r"struct step \{([^{}]*)\};")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_FIELD = re.compile(r"(?:const )?(\w+) (\**)(\w+)$")
_SCALARS: Mapping[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: where its code is and what its arguments are."""

    name: str
    address: int
    arguments: type[ctypes.Structure]


class Axis(IntEnum):
    """`enum axis` of program.c: which of a program's two steps an operation runs on."""

    TOKENS = 0
    """That of all tokens."""
    ROWS = 1
    """That of the tokens whose results are wanted."""


class Call(ctypes.Structure):
    """`struct operation` of program.c."""

    _fields_ = (("run", ctypes.c_void_p), ("args", ctypes.c_void_p), ("axis", ctypes.c_int64))


class Library:
    """A loaded shared library of kernels."""

    def __init__(self, path: Path, left_out: Collection[str] = ()) -> None:
        """Raises OSError if the file cannot be loaded, and AttributeError if it lacks an operation of the headers that
        is not `left_out`."""
        self._library = ctypes.CDLL(str(path))
        self.operations = {
            name: Operation(name, ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0, arguments)
            for name, arguments in argument_types().items()
            if name not in left_out
        }
        name = self._library.instruction_set
        name.restype = ctypes.c_char_p
        self.instruction_set: str = name().decode()
        """What the kernels were compiled for, in words: `VECTOR_NAME` of vector.h."""
        self._run = self._library.run_program
        self._run.restype = None
        self._run.argtypes = [
            ctypes.POINTER(Call),
            ctypes.c_int64,
            ctypes.POINTER(step_type()),
            ctypes.POINTER(step_type()),
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]

    def run(
        self,
        calls: "ctypes.Array[Call]",
        step: ctypes.Structure,
        rows: ctypes.Structure,
        threads: int,
        taken: int,
        seconds: int | None = None,
    ) -> None:
        """Runs the calls in order, each on the step of its axis.

        `taken` is the address of one int64 and `seconds` of one double for each call.
        """
        self._run(calls, len(calls), step, rows, threads, taken, seconds)

    def function(self, name: str) -> Any:
        """A function that is no operation, such as one that packs weights; the caller sets its argument types."""
        return getattr(self._library, name)


@cache
def argument_types() -> dict[str, type[ctypes.Structure]]:
    """Every operation that the headers declare, by name."""
    found: dict[str, type[ctypes.Structure]] = {}
    for header in sorted(SOURCE.glob("*.h")):
        for name, body in _OPERATION.findall(_COMMENT.sub("", header.read_text(encoding="utf-8"))):
            found[name] = _structure(name, body)
    return found


@cache
def step_type() -> type[ctypes.Structure]:
    """`struct step` of step.h."""
    match = _STEP.search(_COMMENT.sub("", (SOURCE / "step.h").read_text(encoding="utf-8")))
    assert match is not None
    return _structure("step", match[1])


def field_names(structure: type[ctypes.Structure]) -> list[str]:
    """The fields of a structure, in order."""
    fields: Any = structure._fields_
    return [name for name, *_ in fields]


def _structure(name: str, body: str) -> type[ctypes.Structure]:
    fields = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        match = _FIELD.match(declaration)
        if match is None or not (match[2] or match[1] in _SCALARS):
            raise ValueError(f"struct {name}: {declaration!r} is neither an int64_t, a double nor a pointer")
        fields.append((match[3], ctypes.c_void_p if match[2] else _SCALARS[match[1]]))
    return type(name, (ctypes.Structure,), {"_fields_": fields})
