"""Embedding rows, taken rows, sums and activations agree with float64 for any width and any number of threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.operators import ACTIVATIONS, CpuOperators
from engine.kernels.cpu.program import Immediate, StepArrays
from engine.kernels.reference import ReferenceOperators

SHAPES = [(1, 1), (1, 2050), (3, 7), (5, 64), (2, 4096), (33, 129)]
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
"""Relative error of rounding to nearest."""
EXACT = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=["float32", "bfloat16"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def run(library: Library, name: str, rows: int, threads: int = 2, ids: Tensor | None = None, **fields: object) -> None:
    Immediate(library, threads).emit(name, StepArrays(rows, token_ids=ids), **fields)


def activate(library: Library, x: Tensor, activation: str, threads: int = 2) -> Tensor:
    y = torch.full_like(x, torch.nan)
    number = ACTIVATIONS[activation]
    run(library, "activate", len(x), threads, x=x, y=y, width=x.shape[1], activation=number, dtype=DTYPES[x.dtype])
    return y


@dtypes
@shapes
def test_a_sum_is_the_nearest_to_the_exact_one(library: Library, shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    y = torch.full_like(a, torch.nan)
    run(library, "add", shape[0], a=a, b=b, y=y, width=shape[1], dtype=DTYPES[dtype])
    assert torch.equal(y, (a.float() + b.float()).to(dtype))


@dtypes
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_agree_with_float64(library: Library, activation: str, dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-120, 120, 4001), torch.linspace(-3, 3, 1000), torch.tensor([0.0, -0.0])))[None]
    x = x.to(dtype)
    exact = EXACT[activation](x.double())
    error = (activate(library, x, activation).double() - exact).abs()
    assert (error <= 1e-6 + 2 * HALF_STEP[dtype] * exact.abs()).all()


@dtypes
@shapes
def test_activations_of_any_width_touch_their_elements_alone(
    library: Library, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    block = torch.full((shape[0] * shape[1] + 40,), 7.0, dtype=dtype)
    y = block[20:-20].view(shape)
    run(library, "activate", shape[0], x=x, y=y, width=shape[1], activation=ACTIVATIONS["relu"], dtype=DTYPES[dtype])
    assert torch.equal(y, F.relu(x))
    assert (block[:20] == 7).all() and (block[-20:] == 7).all()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_nan_and_overflow_are_not_hidden(library: Library, activation: str) -> None:
    y = activate(library, torch.tensor([[torch.nan, torch.inf, 1e30]]), activation)[0].tolist()
    assert y[0] != y[0]
    assert y[1:] == pytest.approx([torch.inf, 1e30])


@dtypes
def test_threads_divide_the_work_and_change_nothing(library: Library, dtype: torch.dtype) -> None:
    x = torch.randn(37, 501).to(dtype)
    assert torch.equal(activate(library, x, "silu", threads=3), activate(library, x, "silu", threads=1))


@dtypes
@pytest.mark.parametrize("from_positions", [False, True])
def test_embedding_takes_the_named_rows(library: Library, dtype: torch.dtype, from_positions: bool) -> None:
    table = torch.randn(50, 33).to(dtype)
    ids = torch.tensor([49, 0, 7, 7, 21])
    step = StepArrays(len(ids))
    setattr(step.struct, "positions" if from_positions else "token_ids", ids.data_ptr())
    y = torch.full((len(ids), 33), torch.nan, dtype=dtype)
    fields = {"table": table, "from_positions": from_positions, "width": 33, "dtype": DTYPES[dtype], "y": y}
    Immediate(library, 2).emit("embed", step, first=0, rows=len(table), **fields)
    assert torch.equal(y, table[ids])


@dtypes
def test_rows_of_ids_that_a_table_does_not_hold_are_zeros(library: Library, dtype: torch.dtype) -> None:
    """Plain tables and packed ones, whose padding would be read otherwise."""
    table = torch.randn(40, 24).to(dtype)
    ids, held = torch.tensor([9, 10, 25, 42, 43, 60, 0]), range(10, 43)
    expected = torch.zeros(len(ids), 24, dtype=dtype)
    expected[1:4] = table[ids[1:4] - 10]
    operators = CpuOperators(Immediate(library, 2))
    assert torch.equal(operators.embedding(table, held)(ids), expected)
    head = operators.linear(table, out_dtype=torch.float32)
    assert torch.equal(operators.tied_embedding(head, dtype, held)(ids), expected)
    assert torch.equal(ReferenceOperators().embedding(table, held)(ids), expected)


@dtypes
@pytest.mark.parametrize("rows", [[], [3], [0, 4, 5, 6], list(range(7))], ids=str)
def test_taken_rows_are_those_named(library: Library, dtype: torch.dtype, rows: list[int]) -> None:
    """Of rows that lie apart, as queries do beside their keys and values."""
    merged = torch.randn(7, 5 * 33).to(dtype)
    x = merged[:, : 3 * 33].unflatten(1, (3, 33))
    taken = CpuOperators(Immediate(library, 2)).take_rows(x, torch.tensor(rows, dtype=torch.int64))
    assert taken.is_contiguous() and torch.equal(taken, x[rows])


@dtypes
@shapes
def test_a_gated_sum_is_near_the_exact_one(library: Library, shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b, gate = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), 4 * torch.randn(shape[0], 1)
    y = CpuOperators(Immediate(library, 2)).add_gated(a, b, gate)
    exact = a.double() + b.double() * gate.double().sigmoid()
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 1e-6 + 2 * HALF_STEP[dtype] * exact.abs()).all()
