"""The C reductions mean exactly what the reductions in torch mean, ties and NaN included."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu.library import Library
from engine.kernels.cpu.vocabulary import CpuReductions

INF = math.inf


def sorted_by_rank(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = x.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """[R, V] with ties, both zeros, -inf and +inf; long enough for blocks of every size."""
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    levels = draw(st.sampled_from([2, 5, 1000]))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = (torch.randint(0, levels, (rows, vocabulary), generator=seed) - levels // 2) / 4.0
    for special in draw(st.lists(st.sampled_from([-INF, INF, -0.0, 3e38, 1e-45]), max_size=3)):
        x[torch.rand(x.shape, generator=seed) < 0.1] = special
    return x


@given(x=logits(), padding=st.integers(0, 3))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_the_largest_is_the_first_of_equals(library: Library, x: Tensor, padding: int) -> None:
    strided = torch.cat((x, torch.full((len(x), padding), INF)), dim=1)[:, : x.shape[1]]
    values, ids = CpuReductions(library, 2).largest(strided)
    expected_values, expected_ids = sorted_by_rank(x, 1)
    assert values == expected_values[:, 0].tolist()
    assert ids == expected_ids[:, 0].tolist()


@given(x=logits(), share=st.floats(0, 1))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_the_k_largest_come_in_order_with_equals_by_id(library: Library, x: Tensor, share: float) -> None:
    k = max(1, round(share**3 * x.shape[1]))
    values, ids = CpuReductions(library, 2).k_largest(x, k)
    expected_values, expected_ids = sorted_by_rank(x, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "random"])
@pytest.mark.parametrize("k", [1, 50, 1024])
def test_a_real_vocabulary_in_any_order(library: Library, order: str, k: int) -> None:
    x = torch.arange(50_257, dtype=torch.float32).repeat(3, 1) / 1000
    x = {"rising": x, "falling": -x, "equal": torch.zeros_like(x), "random": torch.randn_like(x)}[order]
    values, ids = CpuReductions(library, 2).k_largest(x, k)
    expected_values, expected_ids = sorted_by_rank(x, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


@given(x=logits())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_log_sum_exp_is_that_of_float64(library: Library, x: Tensor) -> None:
    x = x.clamp(max=1e30)
    sums = CpuReductions(library, 2).log_sum_exp(x)
    expected = x.double().logsumexp(-1)
    assert ((sums == expected) | ((sums - expected).abs() <= 3e-7 * expected.abs().clamp(min=1))).all()


@pytest.mark.parametrize("place", [0, 63, 64, 100, 129])
def test_nan_is_reported_wherever_it_is(library: Library, place: int) -> None:
    x = torch.randn(3, 130)
    x[1, place] = torch.nan
    reductions = CpuReductions(library, 2)
    values, ids = reductions.largest(x)
    assert [math.isnan(value) for value in values] == [False, True, False]
    assert ids[1] == place
    assert reductions.log_sum_exp(x).isnan().tolist() == [False, True, False]
    _, ids = reductions.k_largest(x, 130)
    assert ids.sort().values.tolist() == [list(range(130))] * 3


def test_infinite_rows(library: Library) -> None:
    reductions = CpuReductions(library, 1)
    x = torch.full((2, 200), -INF)
    x[1, 7] = INF
    assert reductions.largest(x)[0] == [-INF, INF]
    assert reductions.k_largest(x, 3)[1].tolist() == [[0, 1, 2], [7, 0, 1]]
    sums = reductions.log_sum_exp(x)
    assert sums[0] == -INF
    assert sums[1].isnan()


def test_no_rows_give_no_results(native_library: Library) -> None:
    reductions = CpuReductions(native_library, 2)
    assert reductions.largest(torch.empty(0, 10)) == ([], [])
    assert reductions.k_largest(torch.empty(0, 10), 3)[0].shape == (0, 3)


def test_rows_and_threads_do_not_change_a_result(native_library: Library) -> None:
    x = torch.randn(40, 5003) * 4
    together, alone = CpuReductions(native_library, 4), CpuReductions(native_library, 1)
    assert torch.equal(together.log_sum_exp(x), torch.cat([alone.log_sum_exp(row[None]) for row in x]))


@pytest.mark.parametrize("x", [torch.zeros(2, 5).double(), torch.zeros(5), torch.zeros(5, 2).T, torch.zeros(2, 0)])
def test_what_the_kernels_cannot_read_is_refused(native_library: Library, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected .* float32"):
        CpuReductions(native_library, 1).largest(x)


@pytest.mark.parametrize("k", [0, 6])
def test_k_must_be_in_the_vocabulary(native_library: Library, k: int) -> None:
    with pytest.raises(ValueError, match="k must be from 1 to 5"):
        CpuReductions(native_library, 1).k_largest(torch.zeros(2, 5), k)
