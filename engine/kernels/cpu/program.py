"""Step programs: a forward pass recorded once as a list of C operations, and run with one call a step.

A decoder's `forward` is Python that calls an operator for each piece of work. For a small model or a single stream,
that Python and the start of as many parallel regions cost more than the arithmetic. So the same `forward` runs once on
`meta` tensors, which have shapes and no memory; each operator notes its C operation in a `Recorder`; the values between
them get places in one block of memory by their lifetimes; and from then on a step is one call to C without the GIL. It
is to the CPU what a CUDA graph is to a GPU, except that any number of tokens up to the capacity can run.

A program's operations run on all tokens of a step until one takes the rows of those that are wanted: what is made from
these is on them alone.

Knows no model and no operator: both come as callables.
"""

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.kernels.cpu.arena import ALIGNMENT, Lifetime, plan_arena
from engine.kernels.cpu.library import Axis, Call, Library, field_names, step_type
from engine.kernels.operators import AttentionLayout

Field = int | float | Tensor | None
TorchFunction = Callable[..., None]


class StepArrays:
    """`struct step` over the tensors of one step, which it keeps alive."""

    def __init__(
        self,
        tokens: int,
        token_ids: Tensor | None = None,
        layout: AttentionLayout | None = None,
        cos_sin: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """`rows` are `Wanted.rows`, for a step of wanted tokens; on `meta`, any such step may come."""
        self.struct = step_type()()
        self.struct.tokens = tokens
        self._kept = (token_ids, layout, cos_sin, rows)
        self.takes_rows = rows is not None
        if rows is not None and not rows.is_meta:
            self.struct.rows = rows.data_ptr()
        if token_ids is not None:
            self.struct.token_ids = token_ids.data_ptr()
        if cos_sin is not None:
            self.struct.cos_sin = cos_sin.data_ptr()
        if layout is not None:
            self.struct.sequences = len(layout.lens)
            self.struct.positions = layout.positions.data_ptr()
            self.struct.slots = layout.slots.data_ptr()
            self.struct.cu_seq_q = layout.cu_seq_q.data_ptr()
            self.struct.context_lens = layout.context_lens.data_ptr()
            self.struct.page_table = layout.page_table.data_ptr()
            self.struct.page_table_stride = layout.page_table.stride(0)


class Target(Protocol):
    """Where operators put their work: into a program, or through to the kernels at once."""

    library: Library
    threads: int

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A new value, rows first."""

    def is_positions(self, ids: Tensor) -> bool:
        """Whether these row numbers are the step's positions rather than its token ids."""

    def emit(self, name: str, step: StepArrays, **fields: Field) -> None:
        """Does, or notes, operation `name` with these arguments. Tensors stand for their addresses."""

    def call(self, name: str, function: "TorchFunction", *values: Tensor) -> None:
        """Does, or notes, a call of torch: `function` of the step's rows of these values, which it may write to."""


class Immediate:
    """Runs each operation as it comes, on real tensors: for single operators, and for tests."""

    def __init__(self, library: Library, threads: int) -> None:
        self.library = library
        self.threads = threads
        self._taken = torch.zeros(1, dtype=torch.int64)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def is_positions(self, ids: Tensor) -> bool:
        return False

    def emit(self, name: str, step: StepArrays, **fields: Field) -> None:
        operation = self.library.operations[name]
        arguments = _arguments(operation.arguments, fields, _address)
        calls = (Call * 1)(Call(operation.address, ctypes.addressof(arguments), Axis.TOKENS))
        self.library.run(calls, step.struct, step.struct, self.threads, self._taken.data_ptr())

    def call(self, name: str, function: TorchFunction, *values: Tensor) -> None:
        function(*values)


class Note(NamedTuple):
    """An operation as it was recorded; tensors on `meta` are values of the program."""

    name: str
    fields: Mapping[str, Field]
    axis: Axis
    function: TorchFunction | None = None
    """For a call of torch; its values are the fields, in order."""


class Recorder:
    """Notes operations on `meta` tensors; `program` turns them into something that runs."""

    def __init__(self, library: Library, threads: int, capacity: int) -> None:
        """`capacity` is the number of tokens (rows) that the program can run at most."""
        self.library = library
        self.threads = threads
        self.capacity = capacity
        self.token_ids = torch.empty(capacity, dtype=torch.int64, device="meta")
        self.positions = torch.empty(capacity, dtype=torch.int64, device="meta")
        self.rows = torch.empty(capacity, dtype=torch.int64, device="meta")
        """`Wanted.rows` of a step."""
        self._notes: list[Note] = []
        self._axes: dict[int, Axis] = {}
        """Of each value, by the identity of its storage."""

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def is_positions(self, ids: Tensor) -> bool:
        return ids is self.positions

    def emit(self, name: str, step: StepArrays, **fields: Field) -> None:
        self._note(name, fields, takes_rows=step.takes_rows)

    def call(self, name: str, function: TorchFunction, *values: Tensor) -> None:
        self._note(name, dict(zip(map(str, range(len(values))), values, strict=True)), function)

    def program(self, result: Tensor, inputs: tuple[Tensor, ...] = ()) -> "Program":
        """The program of everything noted since the last one; a run returns `result`.

        `inputs` are values that the caller fills before a run.
        """
        notes, self._notes = self._notes, []
        axes, self._axes = self._axes, {}
        memory = _Memory(_lifetimes(notes, result, inputs))
        parts: list[_Calls | _TorchCall] = []
        for is_torch, group in groupby(enumerate(notes), key=lambda item: item[1].function is not None):
            if is_torch:
                parts += [_TorchCall(index, note, memory) for index, note in group]
            else:
                parts.append(_Calls(list(group), self.library, self.threads, memory))
        axis = axes[_storage(result)]
        return Program(notes, parts, tuple(memory.tensor(value) for value in inputs), memory.tensor(result), axis)

    def _note(
        self, name: str, fields: Mapping[str, Field], function: TorchFunction | None = None, *, takes_rows: bool = False
    ) -> None:
        """Notes an operation on the axis of the values that it is given; those that it makes are on this axis too."""
        values = {_storage(field) for field in fields.values() if isinstance(field, Tensor) and field.is_meta}
        known = {self._axes[value] for value in values if value in self._axes}
        axis = Axis.ROWS if takes_rows or Axis.ROWS in known else Axis.TOKENS
        if not takes_rows and known > {axis}:
            raise ValueError(f"{name}: some values are of all tokens and some of the wanted ones; take their rows too")
        self._axes |= dict.fromkeys(values - self._axes.keys(), axis)
        self._notes.append(Note(name, fields, axis, function))


class _Calls:
    """Consecutive operations of the C library: one call."""

    def __init__(self, notes: list[tuple[int, Note]], library: Library, threads: int, memory: "_Memory") -> None:
        self._first = notes[0][0]
        self._library = library
        self._threads = threads
        self._memory = memory
        self._notes = notes
        operations = [library.operations[note.name] for _, note in notes]
        self._arguments = [
            _arguments(operation.arguments, note.fields, memory.address)
            for operation, (_, note) in zip(operations, notes, strict=True)
        ]
        self._calls = (Call * len(notes))(
            *(
                Call(operation.address, ctypes.addressof(arguments), note.axis)
                for operation, arguments, (_, note) in zip(operations, self._arguments, notes, strict=True)
            )
        )
        self._taken = torch.zeros(len(notes), dtype=torch.int64)

    def run(self, step: StepArrays, rows: StepArrays, seconds: Tensor | None) -> None:
        address = None if seconds is None else seconds[self._first :].data_ptr()
        self._library.run(self._calls, step.struct, rows.struct, self._threads, self._taken.data_ptr(), address)


class _TorchCall:
    """One call of torch between them."""

    def __init__(self, index: int, note: Note, memory: "_Memory") -> None:
        assert note.function is not None
        self._index = index
        self._function = note.function
        self._axis = note.axis
        self._values = [memory.tensor(field) for field in note.fields.values() if isinstance(field, Tensor)]

    def run(self, step: StepArrays, rows: StepArrays, seconds: Tensor | None) -> None:
        begin = time.perf_counter()
        count = (step, rows)[self._axis].struct.tokens
        self._function(*(value[:count] for value in self._values))
        if seconds is not None:
            seconds[self._index] += time.perf_counter() - begin


class _Memory:
    """One block of memory with a place for each value of a program. A value and its views share a storage."""

    def __init__(self, lifetimes: Mapping[int, Lifetime]) -> None:
        arena = plan_arena(list(lifetimes.values()))
        self._offsets = dict(zip(lifetimes, arena.offsets, strict=True))
        block = torch.empty(arena.num_bytes + ALIGNMENT, dtype=torch.uint8)
        self._block = block[-block.data_ptr() % ALIGNMENT :]

    def address(self, tensor: Tensor) -> int:
        """Of a value in here, or of a tensor that has memory of its own."""
        return self._block.data_ptr() + self._offset(tensor) if tensor.is_meta else tensor.data_ptr()

    def tensor(self, value: Tensor) -> Tensor:
        """A value, or a view of one, as a tensor."""
        whole = self._block[self._offset(value) :]
        whole = whole[: len(whole) // value.element_size() * value.element_size()].view(value.dtype)
        return whole.as_strided(value.size(), value.stride())

    def _offset(self, value: Tensor) -> int:
        inside = int(value.storage_offset()) * value.element_size()
        return self._offsets[_storage(value)] + inside


def _lifetimes(notes: Sequence[Note], result: Tensor, inputs: Sequence[Tensor]) -> dict[int, Lifetime]:
    """By the identity of a value's storage, in order of first use. Inputs are alive before the first operation."""
    lifetimes: dict[int, Lifetime] = {}
    used: list[list[Field]] = [list(inputs), *(list(note.fields.values()) for note in notes), [result]]
    for index, fields in enumerate(used):
        for value in fields:
            if isinstance(value, Tensor) and value.is_meta:
                storage = _storage(value)
                first = lifetimes[storage].first if storage in lifetimes else index
                lifetimes[storage] = Lifetime(value.untyped_storage().nbytes(), first, index)
    return lifetimes


class Program:
    """A recorded list of operations with all of its memory."""

    def __init__(
        self,
        notes: list[Note],
        parts: "list[_Calls | _TorchCall]",
        inputs: tuple[Tensor, ...],
        output: Tensor,
        axis: Axis,
    ) -> None:
        """`axis` is that of the result."""
        self.notes = notes
        self.inputs = inputs
        """[capacity, ...] values to fill before a run."""
        self.output = output
        """[capacity, ...] where the result is; overwritten by the next run."""
        self.seconds: Tensor | None = None
        """[operations] float64, increased by every run by the time of each operation; None where nobody asked."""
        self._parts = parts
        self._axis = axis

    @property
    def capacity(self) -> int:
        """Rows of a step at most."""
        return len(self.output)

    def run(self, step: StepArrays, rows: StepArrays | None = None) -> Tensor:
        """Runs the step; returns the result's first rows, one for each token, valid until the next run.

        `rows` is the step of the wanted tokens, and the result of a program that takes rows is theirs; None: all are.
        """
        rows = rows or step
        tokens = max(step.struct.tokens, rows.struct.tokens)
        if tokens > self.capacity:
            raise ValueError(f"{tokens} tokens in a step; the program was made for at most {self.capacity}")
        for part in self._parts:
            part.run(step, rows, self.seconds)
        return self.output[: (step, rows)[self._axis].struct.tokens]

    def time_operations(self) -> Tensor:
        """From now on runs keep the time of each operation, from zero; returns where: [operations] float64."""
        self.seconds = torch.zeros(len(self.notes), dtype=torch.float64)
        return self.seconds


def _storage(value: Tensor) -> int:
    """What identifies a value: its views have the same."""
    return int(value.untyped_storage()._cdata)


def _address(value: Tensor) -> int:
    if value.is_meta:
        raise ValueError("a value of a program was given to an operation outside of it")
    return value.data_ptr()


def _arguments(
    structure: type[ctypes.Structure], fields: Mapping[str, Field], address: Callable[[Tensor], int]
) -> ctypes.Structure:
    expected = set(field_names(structure))
    if fields.keys() != expected:
        raise TypeError(f"{structure.__name__}: fields {sorted(expected)} expected, {sorted(fields)} given")
    return structure(**{name: address(field) if isinstance(field, Tensor) else field for name, field in fields.items()})
