"""Packed linear layers agree with float64 on the numbers that they were given, on every instruction set, and a token's
result does not depend on its company."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu.library import Library
from engine.kernels.cpu.linear import PANEL, PackedLinear, pack_linear, panel_order
from engine.kernels.cpu.program import Immediate, Recorder, StepArrays
from engine.models.spec import Activation
from engine.quant.weights import Int4Weight, Int8Weight, Weight

F32, BF16 = torch.float32, torch.bfloat16
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
HALF_STEP = {F32: 2.0**-24, BF16: 2.0**-8}
"""Relative error of rounding to nearest."""
ROUNDING = 4e-7
"""Of a float32 sum, for each square root of the number of its terms, relative to the sum of their magnitudes."""
GUARD = 64


class Guarded(Immediate):
    """Surrounds every value with bytes that no operation may touch, and fills it with NaN."""

    def __init__(self, library: Library, threads: int = 2) -> None:
        super().__init__(library, threads)
        self._blocks: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(shape, dtype=dtype)
        block = torch.full((values.nbytes + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        self._blocks.append(block)
        inside = block[GUARD : GUARD + values.nbytes].view(dtype).view(shape)
        return inside.fill_(torch.nan) if dtype.is_floating_point else inside

    def check(self) -> None:
        for block in self._blocks:
            assert (block[:GUARD] == 0xA5).all() and (block[-GUARD:] == 0xA5).all()
        self._blocks.clear()


@dataclass(frozen=True)
class Case:
    rows: int
    out: int
    columns: int
    dtype: torch.dtype
    out_dtype: torch.dtype | None
    gate: Activation | None
    has_bias: bool
    gap: int
    """Elements between rows of x."""
    group: int
    has_zeros: bool
    has_order: bool
    seed: int

    def weight(self, form: str) -> Weight:
        generator = torch.Generator().manual_seed(self.seed)
        if form == "dense":
            return torch.randn(self.out, self.columns, generator=generator).to(self.dtype)
        if form == "int8":
            return int8_weight(self.out, self.columns, generator)
        columns = -(-self.columns // self.group) * self.group
        weight = int4_weight(self.out, columns, self.group, generator, zeros=self.has_zeros, order=self.has_order)
        return replace(weight, int8_activations=form == "int4a8")

    def x(self, columns: int) -> Tensor:
        """Rows with NaN between them."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        wide = torch.full((self.rows, columns + self.gap), torch.nan, dtype=self.dtype)
        wide[:, :columns] = torch.randn(self.rows, columns, generator=generator)
        return wide[:, :columns]

    def bias(self) -> Tensor | None:
        return torch.linspace(-2, 3, self.out).to(self.dtype) if self.has_bias else None


cases = st.builds(
    Case,
    rows=st.one_of(st.integers(1, 30), st.sampled_from([64, 97, 200])),
    out=st.one_of(st.integers(1, 50), st.sampled_from([64, 96, 130])).map(lambda half: 2 * half),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([256, 384, 1001])),
    dtype=st.sampled_from([F32, BF16]),
    out_dtype=st.sampled_from([None, F32]),
    gate=st.sampled_from([None, None, *ACTIVATIONS]),
    has_bias=st.booleans(),
    gap=st.sampled_from([0, 1, 3, 32]),
    group=st.sampled_from([32, 64, 128]),
    has_zeros=st.booleans(),
    has_order=st.booleans(),
    seed=st.integers(0, 1000),
)
FORMS = ("dense", "int8", "int4", "int4a8")
"""Of weights; the last has activations of 8 bits."""
forms = pytest.mark.parametrize("form", FORMS)


def int8_weight(out: int, columns: int, generator: torch.Generator) -> Int8Weight:
    values = torch.randint(-127, 128, (out, columns), dtype=torch.int8, generator=generator)
    return Int8Weight(values, torch.rand(out, generator=generator) * 0.02 + 1e-3)


def int4_weight(
    out: int, columns: int, group: int, generator: torch.Generator, *, zeros: bool = False, order: bool = False
) -> Int4Weight:
    groups = (out, columns // group)
    return Int4Weight(
        torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, generator=generator),
        (torch.rand(groups, generator=generator) * 0.2 + 1e-3).half().float(),
        torch.randint(0, 16, groups, dtype=torch.uint8, generator=generator) if zeros else None,
        torch.randperm(columns, generator=generator) if order else None,
    )


def exact_weight(weight: Weight) -> Tensor:
    return (weight if isinstance(weight, Tensor) else weight.dequantize()).double()


def quantized(x: Tensor) -> Tensor:
    """x rounded to a grid that quantization leaves as it is: 127 steps of 1 / 64 are the largest magnitude of a row."""
    grid = (x.double() / x.abs().amax(1, keepdim=True).clamp_min(1e-30).double() * 127).round()
    grid[:, :1] = 127
    return (grid / 64).to(x.dtype)


def on_grid(x: Tensor, weight: Weight) -> Tensor:
    """x rounded so that the weight's own rounding of it changes nothing."""
    if isinstance(weight, Int8Weight):
        return quantized(x)
    if not (isinstance(weight, Int4Weight) and weight.int8_activations):
        return x
    order = torch.arange(x.shape[1]) if weight.order is None else weight.order
    rounded = torch.empty_like(x)
    rounded[:, order] = quantized(x[:, order].reshape(-1, weight.group)).reshape(x.shape)
    return rounded


def excess(y: Tensor, exact: Tensor, error: Tensor) -> float:
    """By how much y is farther from the exact values than `error` and its own rounding allow."""
    return ((y.double() - exact).abs() - error - 1.01 * HALF_STEP[y.dtype] * exact.abs()).max().item()


def check(y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, gate: Activation | None) -> None:
    """y is what float64 gives, but for the rounding of float32 sums and of the result."""
    exact, magnitude = x.double() @ exact_weight(weight).T, x.double().abs() @ exact_weight(weight).abs().T
    if isinstance(weight, Int4Weight) and weight.zero is not None:
        # The sum of value - 8 and that of 8 - zero are rounded apart.
        scale = weight.scale.double().repeat_interleave(weight.group, dim=1)
        magnitude = 16 * x.double().abs().amax(1, keepdim=True) * scale.sum(1)
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    error = ROUNDING * x.shape[1] ** 0.5 * magnitude
    if gate is not None:
        (opened, up), (opened_error, up_error) = exact.chunk(2, dim=1), error.chunk(2, dim=1)
        exact = ACTIVATIONS[gate](opened) * up
        error = 1.2 * up.abs() * opened_error + (opened.abs() + opened_error) * up_error + 1e-6 * (opened * up).abs()
    assert y.shape == exact.shape
    assert excess(y, exact, error) <= 0


@forms
@settings(max_examples=60)
@given(case=cases)
def test_agrees_with_float64(library: Library, form: str, case: Case) -> None:
    weight, bias, target = case.weight(form), case.bias(), Guarded(library)
    linear = pack_linear(target, weight, bias, gate=case.gate, out_dtype=case.out_dtype)
    x = case.x(weight.shape[1])
    x.copy_(on_grid(x, weight))
    y = linear(x)
    assert y.dtype == (case.out_dtype or case.dtype)
    target.check()
    check(y, x, weight, bias, case.gate)


@forms
@settings(max_examples=30)
@given(case=cases)
def test_a_row_does_not_depend_on_the_rows_beside_it(library: Library, form: str, case: Case) -> None:
    weight = case.weight(form)
    linear = pack_linear(Immediate(library, 2), weight, case.bias(), gate=case.gate, out_dtype=case.out_dtype)
    x = case.x(weight.shape[1])
    y = linear(x)
    for row in {0, case.rows // 2, case.rows - 1}:
        assert torch.equal(linear(x[row : row + 1])[0], y[row])


@forms
@settings(max_examples=30)
@given(case=cases)
def test_rows_are_those_of_the_weight(library: Library, form: str, case: Case) -> None:
    weight, target = case.weight(form), Guarded(library)
    ids = torch.randint(0, case.out, (case.rows,), generator=torch.Generator().manual_seed(case.seed))
    dtype = case.out_dtype or case.dtype
    rows = pack_linear(target, weight).rows(dtype)(ids)
    target.check()
    assert rows.dtype == dtype
    exact = exact_weight(weight)[ids]
    # value * scale and zero * scale are rounded apart.
    magnitude = exact.abs() if not isinstance(weight, Int4Weight) else 16 * weight.scale.max().double()
    assert excess(rows, exact, 2 * HALF_STEP[F32] * magnitude) <= 0


def layer(form: str, out: int, columns: int, dtype: torch.dtype = BF16) -> Weight:
    generator = torch.Generator().manual_seed(5)
    if form == "dense":
        return torch.randn(out, columns, generator=generator).to(dtype)
    if form == "int8":
        return int8_weight(out, columns, generator)
    weight = int4_weight(out, columns, 128, generator, zeros=True)
    return replace(weight, int8_activations=form == "int4a8")


@forms
@pytest.mark.parametrize("rows", [1, 13, 97])
def test_long_rows_pass_through_in_several_pieces(native_library: Library, form: str, rows: int) -> None:
    weight = layer(form, 80, 10_240)
    x = on_grid(torch.randn(rows, 10_240).to(BF16), weight)
    linear = pack_linear(Immediate(native_library, 2), weight, out_dtype=F32)
    y = linear(x)
    check(y, x, weight, None, None)
    assert torch.equal(linear(x[-1:])[0], y[-1])


@forms
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_every_number_of_rows_gives_the_same_bits(native_library: Library, form: str, dtype: torch.dtype) -> None:
    linear = pack_linear(Immediate(native_library, 2), layer(form, 96, 1152, dtype), out_dtype=F32)
    x = torch.randn(30, 1152).to(dtype)
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in range(1, 31):
        assert torch.equal(linear(x[:rows]), alone[:rows]), rows


@forms
def test_any_number_of_threads_gives_the_same_bits(native_library: Library, form: str) -> None:
    weight, x = layer(form, 70, 256), torch.randn(50, 256).to(BF16)
    results = [pack_linear(Immediate(native_library, threads), weight, gate="silu")(x) for threads in (1, 2, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


@forms
def test_a_program_gives_what_single_operations_give(native_library: Library, form: str) -> None:
    weights = [layer(form, 256, 128), layer(form, 64, 128)]

    def forward(target: Immediate | Recorder, x: Tensor) -> Tensor:
        hidden = pack_linear(target, weights[0], gate="silu")(x)
        return pack_linear(target, weights[1], out_dtype=F32)(hidden)

    recorder = Recorder(native_library, 2, 20)
    start = recorder.empty(20, 128, dtype=BF16)
    program = recorder.program(forward(recorder, start), (start,))
    for rows in (20, 1, 7):
        x = torch.randn(rows, 128).to(BF16)
        program.inputs[0][:rows] = x
        assert torch.equal(program.run(StepArrays(rows)), forward(Immediate(native_library, 2), x))


@forms
def test_the_original_weight_is_not_needed_any_more(native_library: Library, form: str) -> None:
    weight, x = layer(form, 64, 128), torch.randn(3, 128).to(BF16)
    linear = pack_linear(Immediate(native_library, 2), weight)
    before = linear(x)
    for tensor in (weight,) if isinstance(weight, Tensor) else (weight.scale, *tensors_of(weight)):
        tensor.zero_()
    assert torch.equal(linear(x), before)


def tensors_of(weight: Int8Weight | Int4Weight) -> list[Tensor]:
    parts = [weight.values] if isinstance(weight, Int8Weight) else [weight.packed, weight.zero]
    return [part for part in parts if part is not None]


def test_no_rows_are_no_error(native_library: Library) -> None:
    for form in FORMS:
        assert pack_linear(Immediate(native_library, 2), layer(form, 64, 128))(
            torch.empty(0, 128, dtype=BF16)
        ).shape == (0, 64)


@pytest.mark.parametrize("sign", [1, -1])
def test_int8_sums_are_exact_at_their_largest(library: Library, sign: int) -> None:
    columns = 65_536
    weight = Int8Weight(torch.full((2, columns), 127, dtype=torch.int8), torch.ones(2))
    y = pack_linear(Immediate(library, 2), weight)(torch.full((1, columns), sign * 127.0))
    assert y.tolist() == [[sign * 127 * 127 * columns] * 2]


@forms
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(library: Library, form: str, value: float) -> None:
    x = torch.randn(5, 128)
    x[2, 77] = value
    finite = pack_linear(Immediate(library, 2), layer(form, 64, 128, F32))(x).isfinite()
    assert finite[[0, 1, 3, 4]].all()
    assert not finite[2].any()


def test_int8_rows_of_zeros_give_the_bias(library: Library) -> None:
    bias = torch.randn(64)
    y = pack_linear(Immediate(library, 2), layer("int8", 64, 128), bias)(torch.zeros(2, 128))
    assert torch.equal(y, bias.expand(2, -1))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_int8_quantizes_to_the_nearest_of_255_steps(library: Library, dtype: torch.dtype) -> None:
    identity = Int8Weight(torch.eye(200, dtype=torch.int8), torch.ones(200))
    x = (torch.randn(40, 200) * torch.logspace(-12, 12, 40)[:, None]).to(dtype)
    steps = x.abs().amax(1, keepdim=True).double() / 127
    y = pack_linear(Immediate(library, 2), identity, out_dtype=F32)(x)
    assert ((y.double() - x.double()).abs() <= 0.5001 * steps).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_int4_can_quantize_each_group_to_the_nearest_of_255_steps(library: Library, dtype: torch.dtype) -> None:
    # Of value 9 and 8, 1 and 0 are left: an identity.
    values = torch.full((192, 192), 8, dtype=torch.uint8) + torch.eye(192, dtype=torch.uint8)
    packed = values[:, ::2] | values[:, 1::2] << 4
    weight = Int4Weight(packed, torch.ones(192, 6), None, int8_activations=True)
    x = (torch.randn(40, 6, 32) * torch.logspace(-6, 6, 240).view(40, 6, 1)).to(dtype)
    x[3, 2] = 0
    steps = x.abs().amax(2, keepdim=True).double() / 127
    y = pack_linear(Immediate(library, 2), weight, out_dtype=F32)(x.flatten(1)).view(x.shape)
    assert ((y.double() - x.double()).abs() <= 0.5001 * steps).all()


@pytest.mark.parametrize(("form", "bits"), [("dense", 16), ("int8", 8.3), ("int4", 4.6)])
def test_a_packed_weight_is_no_larger_than_it_needs_to_be(native_library: Library, form: str, bits: float) -> None:
    packed = pack_linear(Immediate(native_library, 2), layer(form, 1024, 1024))
    assert packed.num_bytes * 8 <= bits * 1024 * 1024


@given(out=st.integers(1, 200).map(lambda half: 2 * half), gated=st.booleans())
def test_panel_order_puts_a_gate_beside_what_it_opens(out: int, gated: bool) -> None:
    ordered = panel_order(torch.arange(1, out + 1), gated=gated).view(-1, PANEL)
    assert sorted(ordered[ordered > 0].tolist()) == list(range(1, out + 1))
    if gated:
        gate, up = ordered.chunk(2, dim=1)
        assert torch.equal(up, torch.where(gate > 0, gate + out // 2, 0))


class TestErrors:
    @pytest.fixture
    def target(self, native_library: Library) -> Immediate:
        return Immediate(native_library, 1)

    def test_a_gate_needs_as_many_rows_of_up(self, target: Immediate) -> None:
        with pytest.raises(ValueError, match="33 rows"):
            pack_linear(target, torch.randn(33, 8), gate="silu")

    def test_a_dtype_without_kernel(self, target: Immediate) -> None:
        with pytest.raises(TypeError, match="float16"):
            pack_linear(target, torch.randn(32, 8).half())

    def test_groups_that_do_not_divide_the_channels(self, target: Immediate) -> None:
        weight = Int4Weight(torch.zeros(4, 20, dtype=torch.uint8), torch.ones(4, 2), None)
        with pytest.raises(ValueError, match="groups of 20"):
            pack_linear(target, weight)

    def test_more_channels_than_int8_sums_hold(self, target: Immediate) -> None:
        weight = Int8Weight(torch.zeros(1, 2**17 + 1, dtype=torch.int8), torch.ones(1))
        with pytest.raises(ValueError, match="131073 input channels"):
            pack_linear(target, weight)
        half = torch.zeros(1, 2**16 + 16, dtype=torch.uint8)
        with pytest.raises(ValueError, match="groups of 131104 input channels"):
            pack_linear(target, Int4Weight(half, torch.ones(1, 1), None, int8_activations=True))

    @pytest.mark.parametrize(
        "x", [torch.randn(2, 9), torch.randn(2, 8).to(BF16), torch.randn(8, 2).T], ids=["width", "dtype", "transposed"]
    )
    def test_x_of_another_shape_or_dtype(self, target: Immediate, x: Tensor) -> None:
        linear: PackedLinear = pack_linear(target, torch.randn(32, 8))
        with pytest.raises(ValueError, match="x is torch"):
            linear(x)

    def test_a_gated_weight_has_no_rows(self, target: Immediate) -> None:
        with pytest.raises(ValueError, match="embeddings"):
            pack_linear(target, torch.randn(32, 8), gate="relu").rows(F32)
