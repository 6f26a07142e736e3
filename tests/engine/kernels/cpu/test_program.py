"""A recorded program does what its operations do one by one, for any number of rows."""

import pytest
import torch

from engine.kernels.cpu.library import Library
from engine.kernels.cpu.operators import CpuOperators
from engine.kernels.cpu.program import Immediate, Program, Recorder, StepArrays
from tests.compiled import compiled_library

CAPACITY, WIDTH = 40, 24


@pytest.fixture(scope="module")
def library() -> Library:
    return compiled_library()


def chain(operators: CpuOperators, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Values that live long, that live short, and views."""
    first, total = operators.rms_norm(x, weight, 1e-5)
    for _ in range(5):
        acted = operators.activate(first, "silu")
        first, total = operators.rms_norm(acted.view(len(x), WIDTH), weight, 1e-5, total)
    return operators.add(first, total)


def record(library: Library, weight: torch.Tensor) -> Program:
    recorder = Recorder(library, threads=2, capacity=CAPACITY)
    x = recorder.empty(CAPACITY, WIDTH, dtype=torch.float32)
    return recorder.program(chain(CpuOperators(recorder), x, weight), inputs=(x,))


def test_a_program_gives_what_its_operations_give_one_by_one(library: Library) -> None:
    weight = torch.rand(WIDTH)
    program = record(library, weight)
    for rows in (1, 3, CAPACITY, 2):
        x = torch.randn(rows, WIDTH)
        program.inputs[0][:rows] = x
        expected = chain(CpuOperators(Immediate(library, 2)), x, weight)
        assert torch.equal(program.run(StepArrays(rows)), expected)


def test_two_programs_of_one_recorder_have_nothing_in_common(library: Library) -> None:
    recorder = Recorder(library, threads=1, capacity=CAPACITY)
    operators = CpuOperators(recorder)
    programs = []
    for _ in range(2):
        x = recorder.empty(CAPACITY, WIDTH, dtype=torch.float32)
        programs.append(recorder.program(operators.add(x, x), inputs=(x,)))
    for number, program in enumerate(programs, start=1):
        program.inputs[0].fill_(number)
    first, second = (program.run(StepArrays(CAPACITY)) for program in programs)
    assert first.eq(2).all() and second.eq(4).all()
    assert [[note.name for note in program.notes] for program in programs] == [["add"], ["add"]]


def test_torch_may_do_a_part_of_a_program(library: Library) -> None:
    """Strided views of values go to torch, and its results to the kernels after it."""

    def double(x: torch.Tensor, y: torch.Tensor) -> None:
        torch.mul(x, 2.0, out=y)

    def build(operators: CpuOperators, target: Immediate | Recorder, x: torch.Tensor) -> torch.Tensor:
        total = operators.add(x, x)
        doubled = target.empty(len(x), WIDTH // 2, dtype=torch.float32)
        target.call("double", double, total[:, WIDTH // 2 :], doubled)
        return operators.add(doubled, doubled)

    recorder = Recorder(library, threads=2, capacity=CAPACITY)
    x = recorder.empty(CAPACITY, WIDTH, dtype=torch.float32)
    program = recorder.program(build(CpuOperators(recorder), recorder, x), inputs=(x,))
    seconds = program.time_operations()
    for rows in (CAPACITY, 3):
        values = torch.randn(rows, WIDTH)
        program.inputs[0][:rows] = values
        immediate = Immediate(library, 2)
        assert torch.equal(program.run(StepArrays(rows)), 8 * values[:, WIDTH // 2 :])
        assert torch.equal(build(CpuOperators(immediate), immediate, values), 8 * values[:, WIDTH // 2 :])
    assert seconds.gt(0).all()


def some_rows(operators: CpuOperators, x: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Operations on all tokens, then on those rows of two of their values."""
    normed, total = operators.rms_norm(x, weight, 1e-5, x)
    normed, total = (operators.take_rows(values, rows) for values in (normed, total))
    return operators.add(operators.activate(normed, "silu"), total)


def test_what_is_made_of_taken_rows_is_on_them_alone(library: Library) -> None:
    weight = torch.rand(WIDTH)
    recorder = Recorder(library, threads=2, capacity=CAPACITY)
    x = recorder.empty(CAPACITY, WIDTH, dtype=torch.float32)
    program = recorder.program(some_rows(CpuOperators(recorder), x, recorder.rows, weight), inputs=(x,))
    for tokens, rows in ((9, [2, 5, 8]), (CAPACITY, [CAPACITY - 1]), (9, []), (3, [0, 1, 2]), (3, None)):
        values = torch.randn(tokens, WIDTH)
        index = torch.tensor(range(tokens) if rows is None else rows, dtype=torch.int64)
        program.inputs[0][:tokens] = values
        expected = some_rows(CpuOperators(Immediate(library, 2)), values, index, weight)
        found = program.run(StepArrays(tokens), None if rows is None else StepArrays(len(index), rows=index))
        assert found.shape == (len(index), WIDTH) and torch.equal(found, expected)


def test_torch_is_given_the_taken_rows(library: Library) -> None:
    recorder = Recorder(library, threads=1, capacity=CAPACITY)
    x = recorder.empty(CAPACITY, WIDTH, dtype=torch.float32)
    taken = CpuOperators(recorder).take_rows(x, recorder.rows)
    seen: list[int] = []
    recorder.call("count", lambda values: seen.append(len(values)), taken)
    program = recorder.program(taken, inputs=(x,))
    program.run(StepArrays(9), StepArrays(2, rows=torch.tensor([0, 4])))
    assert seen == [2]


def test_values_of_all_tokens_do_not_meet_those_of_taken_rows(library: Library) -> None:
    recorder = Recorder(library, threads=1, capacity=CAPACITY)
    operators = CpuOperators(recorder)
    x = recorder.empty(CAPACITY, WIDTH, dtype=torch.float32)
    doubled = operators.add(x, x)
    taken = operators.take_rows(doubled, recorder.rows)
    with pytest.raises(ValueError, match="add: some values are of all tokens and some of the wanted ones"):
        operators.add(taken, doubled)


def test_more_rows_than_the_capacity_are_refused(library: Library) -> None:
    program = record(library, torch.rand(WIDTH))
    with pytest.raises(ValueError, match="41 tokens in a step; the program was made for at most 40"):
        program.run(StepArrays(CAPACITY + 1))


def test_time_is_kept_for_each_operation(library: Library) -> None:
    program = record(library, torch.rand(WIDTH))
    seconds = program.time_operations()
    program.run(StepArrays(CAPACITY))
    once = seconds.clone()
    program.run(StepArrays(CAPACITY))
    assert once.gt(0).all() and seconds.gt(once).all()


def test_wrong_fields_name_the_operation_and_what_it_takes(library: Library) -> None:
    target = Immediate(library, 1)
    x = torch.zeros(1, WIDTH)
    with pytest.raises(TypeError, match=r"add: fields \['a', 'b', 'dtype', 'width', 'y'\] expected, \['a', 'b'\]"):
        target.emit("add", StepArrays(1), a=x, b=x)
