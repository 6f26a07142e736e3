"""Mixtures of experts in C, on every instruction set: the table, the products of all experts at once, and the sums."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu.experts import CpuExperts, CpuTable
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.linear import pack_experts, pack_linear
from engine.kernels.cpu.operators import CpuOperators
from engine.kernels.cpu.program import Immediate, Recorder, StepArrays, Target
from engine.kernels.operators import Operators, Routing
from engine.kernels.reference import ReferenceOperators
from engine.quant.weights import Int4Weight, Int8Weight, Weight
from tests.engine.kernels import routing_cases
from tests.engine.kernels.cpu import test_linear as linear
from tests.engine.kernels.routing_cases import check_table, mixture, random_experts, stacked

F32, BF16 = torch.float32, torch.bfloat16
HIDDEN, WIDTH = 64, 96
forms = pytest.mark.parametrize("form", linear.FORMS)
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])


def expert_weights(form: str, experts: int, dtype: torch.dtype = BF16) -> tuple[Weight, Weight]:
    """[gate; up] and down of each expert, one below the other."""
    shapes = ((experts * 2 * WIDTH, HIDDEN), (experts * HIDDEN, WIDTH))
    generator = torch.Generator().manual_seed(3)
    if form == "dense":
        inner, outer = (torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes)
        return inner.to(dtype), outer.to(dtype)
    if form == "int8":
        inner, outer = (linear.int8_weight(*shape, generator) for shape in shapes)
        return inner, outer
    inner, outer = (
        replace(linear.int4_weight(*shape, 32, generator, zeros=True), int8_activations=form == "int4a8")
        for shape in shapes
    )
    return inner, outer


def mixed(operators: Operators, routing: Routing, weights: tuple[Weight, Weight], x: Tensor, logits: Tensor) -> Tensor:
    inner = operators.expert_linear(weights[0], len(routing.held), gate="silu")
    outer = operators.expert_linear(weights[1], len(routing.held), out_dtype=F32)
    return operators.experts(routing, inner, outer)(x, logits)


def in_c(library: Library, threads: int = 2) -> CpuOperators:
    return CpuOperators(Immediate(library, threads))


@pytest.mark.parametrize("threads", [1, 2, 5])
@settings(max_examples=80)
@given(case=routing_cases.cases())
def test_every_pair_has_a_row_by_expert_and_then_by_token(
    library: Library, threads: int, case: routing_cases.Case
) -> None:
    if case.tokens == 0:
        return  # A step without tokens runs nothing, and the table stays unwritten.
    target = linear.Guarded(library, threads)
    table = CpuTable(target, case.routing, case.logits())
    target.check()
    check_table(case, table.weights, table.rows, table.offsets, table.sources, elsewhere=-1)


@settings(max_examples=40)
@given(case=routing_cases.cases(), width=st.sampled_from([1, 7, 64, 515, 1100]), dtype=st.sampled_from([F32, BF16]))
def test_rows_go_in_and_their_results_come_out(
    library: Library, case: routing_cases.Case, width: int, dtype: torch.dtype
) -> None:
    """With experts that leave rows as they are, a token gets the sum of its weights times itself."""
    if case.tokens == 0:
        return
    target = linear.Guarded(library)
    wide = torch.randn(case.tokens, width + 3).to(dtype)
    x = wide[:, :width]
    table = CpuTable(target, case.routing, case.logits())
    gathered = table.gather(x)
    y = table.sum(gathered.float(), dtype)
    target.check()
    rows = int(table.offsets[-1])
    assert torch.equal(gathered[:rows], x[table.sources[:rows]])
    shares = torch.tensor(
        [
            sum(weight for expert, weight in zip(experts, weights, strict=True) if expert in case.routing.held)
            for experts, weights in zip(case.chosen(), case.weights(), strict=True)
        ]
    )
    expected = x.double() * shares.double()[:, None]
    assert linear.excess(y, expected, 4e-6 * expected.abs()) <= 0


def stack(weights: list[Weight]) -> Weight:
    if isinstance(weights[0], Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    if isinstance(weights[0], Int8Weight):
        eights = [weight for weight in weights if isinstance(weight, Int8Weight)]
        return Int8Weight(torch.cat([each.values for each in eights]), torch.cat([each.scale for each in eights]))
    fours = [weight for weight in weights if isinstance(weight, Int4Weight)]
    zeros = [each.zero for each in fours if each.zero is not None]
    return replace(
        fours[0],
        packed=torch.cat([each.packed for each in fours]),
        scale=torch.cat([each.scale for each in fours]),
        zero=torch.cat(zeros) if zeros else None,
    )


@forms
@settings(max_examples=40)
@given(
    case=linear.cases,
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 13, 30, 97]), min_size=1, max_size=5).filter(any),
)
def test_each_expert_multiplies_its_own_rows(library: Library, form: str, case: linear.Case, counts: list[int]) -> None:
    """However many fall to it: bit for bit what the expert gives alone, which is what float64 gives."""
    case = replace(case, rows=sum(counts), has_order=False)
    weights = [replace(case, seed=case.seed + index).weight(form) for index in range(len(counts))]
    x = case.x(weights[0].shape[1])
    x.copy_(linear.on_grid(x, weights[0]))
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0)])
    target = linear.Guarded(library)
    y = pack_experts(target, stack(weights), len(counts), gate=case.gate, out_dtype=case.out_dtype)(x, offsets)
    target.check()
    for weight, begin, end in zip(weights, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if begin < end:
            alone = pack_linear(Immediate(library, 2), weight, gate=case.gate, out_dtype=case.out_dtype)
            assert torch.equal(y[begin:end], alone(x[begin:end]))
            linear.check(y[begin:end], x[begin:end], weight, None, case.gate)


@dtypes
@settings(max_examples=30)
@given(case=routing_cases.cases())
def test_a_mixture_is_the_weighted_sum_of_its_experts(
    library: Library, dtype: torch.dtype, case: routing_cases.Case
) -> None:
    experts = random_experts(len(case.routing.held), HIDDEN, WIDTH, dtype)
    x = torch.randn(case.tokens, HIDDEN, generator=torch.Generator().manual_seed(case.seed)).to(dtype)
    y = mixed(in_c(library), case.routing, stacked(experts), x, case.logits())
    expected = mixture(case, x, experts)
    assert y.shape == expected.shape and y.dtype == dtype
    tolerance = 2e-5 if dtype == F32 else 2e-2
    assert ((y.double() - expected).abs() <= tolerance * (1 + expected.abs())).all()


@forms
def test_every_form_of_a_weight_gives_what_the_reference_gives(library: Library, form: str) -> None:
    routing = Routing(9, 3, True, range(9))
    weights, x, logits = expert_weights(form, 9, F32), torch.randn(70, HIDDEN), torch.randn(70, 9)
    y, expected = (mixed(each, routing, weights, x, logits) for each in (in_c(library), ReferenceOperators()))
    errors = (y - expected).abs().amax(1) / expected.std()
    # Where sums round apart, an activation of 8 bits may become the neighbour of what it is in the other: rarely.
    assert errors.max() <= (0.1 if form in ("int8", "int4a8") else 1e-4)
    assert (errors > 1e-4).sum() <= 3


@forms
@dtypes
def test_a_token_does_not_depend_on_the_tokens_beside_it(library: Library, form: str, dtype: torch.dtype) -> None:
    routing = Routing(9, 4, True, range(9))
    weights, x = expert_weights(form, 9, dtype), torch.randn(150, HIDDEN).to(dtype)
    logits = torch.randn(150, 9)
    logits[:, 2] += 3  # An expert that most tokens run: its rows take several tiles.
    y = mixed(in_c(library), routing, weights, x, logits)
    for count in (1, 2, 40):
        some = slice(77, 77 + count)
        assert torch.equal(mixed(in_c(library), routing, weights, x[some], logits[some]), y[some])


@forms
def test_any_number_of_threads_gives_the_same_bits(native_library: Library, form: str) -> None:
    routing = Routing(6, 2, False, range(6))
    weights, x, logits = expert_weights(form, 6), torch.randn(50, HIDDEN).to(BF16), torch.randn(50, 6)
    results = [mixed(in_c(native_library, threads), routing, weights, x, logits) for threads in (1, 2, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


@forms
def test_a_program_gives_what_single_operations_give(native_library: Library, form: str) -> None:
    """A step of any number of tokens up to the capacity, as the experts get any number of rows."""
    weights, router = expert_weights(form, 6), torch.randn(6, HIDDEN).to(BF16)
    routing = Routing(6, 3, True, range(6))

    def forward(target: Target, x: Tensor) -> Tensor:
        logits = pack_linear(target, router, out_dtype=F32)(x)
        return mixed(CpuOperators(target), routing, weights, x, logits)

    recorder = Recorder(native_library, 2, 40)
    start = recorder.empty(40, HIDDEN, dtype=BF16)
    program = recorder.program(forward(recorder, start), (start,))
    for tokens in (40, 1, 7):
        x = torch.randn(tokens, HIDDEN).to(BF16)
        program.inputs[0][:tokens] = x
        assert torch.equal(program.run(StepArrays(tokens)), forward(Immediate(native_library, 2), x))


@forms
def test_what_several_hold_adds_up_to_the_whole(native_library: Library, form: str) -> None:
    weights, x, logits = expert_weights(form, 7, F32), torch.randn(30, HIDDEN), torch.randn(30, 7)
    whole = mixed(in_c(native_library), Routing(7, 3, True, range(7)), weights, x, logits)
    total = torch.zeros_like(whole)
    for held in (range(2), range(2, 3), range(3, 7)):
        own = rows_of(weights[0], held, 2 * WIDTH), rows_of(weights[1], held, HIDDEN)
        total += mixed(in_c(native_library), Routing(7, 3, True, held), own, x, logits)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5 * float(whole.std()))


def rows_of(weight: Weight, held: range, rows: int) -> Weight:
    some = slice(held.start * rows, held.stop * rows)
    if isinstance(weight, Tensor):
        return weight[some].clone()
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values[some], weight.scale[some])
    zero = None if weight.zero is None else weight.zero[some]
    return replace(weight, packed=weight.packed[some], scale=weight.scale[some], zero=zero)


@forms
@pytest.mark.parametrize("place", ["logits", "x"])
def test_what_is_not_finite_shows_in_its_token_alone(library: Library, form: str, place: str) -> None:
    routing = Routing(6, 2, False, range(6))
    weights, x, logits = expert_weights(form, 6, F32), torch.randn(5, HIDDEN), torch.randn(5, 6)
    expected = mixed(in_c(library), routing, weights, x, logits)
    (logits if place == "logits" else x)[2, 3] = torch.nan
    y = mixed(in_c(library), routing, weights, x, logits)
    assert torch.equal(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    assert y[2].isnan().all()


def test_logits_of_nothing_but_nan_choose_the_first_experts(library: Library) -> None:
    """Whatever a router says, no row lies outside the table."""
    logits = torch.full((3, 40), torch.nan)
    table = CpuTable(linear.Guarded(library), Routing(40, 18, True, range(40)), logits)
    assert table.offsets.tolist() == [*range(0, 55, 3), *[54] * 22]
    assert table.weights.isnan().all()


class TestErrors:
    @pytest.fixture
    def target(self, native_library: Library) -> Immediate:
        return Immediate(native_library, 1)

    def test_rows_that_are_no_whole_experts(self, target: Immediate) -> None:
        with pytest.raises(ValueError, match="33 rows are not 2 weights"):
            pack_experts(target, torch.randn(33, 8), 2)

    def test_reordered_channels_in_4_bits(self, target: Immediate) -> None:
        weight = linear.int4_weight(64, 64, 32, torch.Generator(), order=True)
        with pytest.raises(ValueError, match="act-order"):
            pack_experts(target, weight, 2)

    def test_more_experts_a_token_than_there_are(self, target: Immediate) -> None:
        packed = pack_experts(target, torch.randn(8, 2), 4)
        with pytest.raises(ValueError, match="5 experts a token of 4"):
            CpuExperts(target, Routing(4, 5, True, range(4)), packed, packed)

    @pytest.mark.parametrize(
        "logits",
        [torch.randn(3, 5), torch.randn(3, 4).to(BF16), torch.randn(4, 3).T],
        ids=["width", "dtype", "strides"],
    )
    def test_logits_of_another_shape_or_dtype(self, target: Immediate, logits: Tensor) -> None:
        with pytest.raises(ValueError, match="logits are torch"):
            CpuTable(target, Routing(4, 2, True, range(4)), logits)
