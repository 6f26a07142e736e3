"""The attention kernels against float64, on every instruction set."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu.attention import CpuAttention
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Immediate, Recorder, StepArrays
from engine.kernels.operators import AttentionLayout, QKNorm
from engine.kernels.reference import ReferenceOperators
from tests.engine.kernels.cpu.attention_cases import (
    Case,
    make_case,
    make_layout,
    plain_attention,
    random_cache,
    random_case,
    rows_of,
)

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
TOLERANCE = {F32: 2e-5, BF16: 2e-2}
"""bfloat16 results near 2 are half a unit of 2^-7 apart, and the weights of the values are rounded too."""


def attend(library: Library, case: Case, threads: int = 2, *, deterministic: bool = False) -> Tensor:
    attention = CpuAttention(Immediate(library, threads), case.layout, deterministic=deterministic)
    return attention.attend(case.q, case.k, case.v, scale=case.scale, window=case.window)


def written(values: Tensor, layout: AttentionLayout) -> Tensor:
    """Of a cache of rows, what is at the step's slots."""
    return values.flatten(0, 1)[layout.slots]


def check(found: Tensor, case: Case) -> None:
    assert found.is_contiguous() and found.dtype == case.q.dtype
    torch.testing.assert_close(found.double(), plain_attention(case), atol=TOLERANCE[case.q.dtype], rtol=0)


@pytest.mark.parametrize("seed", range(24))
def test_attention_of_any_step_is_attention(library: Library, seed: int) -> None:
    case = random_case(seed)
    found = attend(library, case)
    check(found, case)
    for threads in (1, 3):
        assert torch.equal(attend(library, case, threads), found), "the same, however many threads share the work"


@pytest.mark.parametrize("cache", [BF16, INT8])
def test_bfloat16_is_as_accurate_as_its_rounding(library: Library, cache: torch.dtype) -> None:
    """Errors of many values, relative to what they are: no worse than a few roundings to 8 bits."""
    case = make_case([1, 1, 64], [1500, 300, 900], heads=(9, 3), cache=cache)
    expected = plain_attention(case)
    error = attend(library, case).double() - expected
    assert float(error.norm() / expected.norm()) < 3e-3


def test_a_long_context_is_cut_and_merged(library: Library) -> None:
    """Large scores far apart: the merge must weigh segments by their own maxima."""
    case = make_case([1, 3], [9000, 5000], dtype=F32)
    case.k.values.mul_(torch.linspace(0.1, 8.0, len(case.k.values)).view(-1, 1, 1, 1, 1))
    check(attend(library, case, threads=1), case)
    assert torch.equal(attend(library, case, threads=3), attend(library, case, threads=1))


def test_a_chunk_with_few_key_heads_is_cut_by_keys_too(library: Library) -> None:
    case = make_case([40], [6000], heads=(2, 1))
    found = attend(library, case, threads=3)
    check(found, case)
    assert torch.equal(attend(library, case, threads=1), found)


@pytest.mark.parametrize("cache", [BF16, INT8])
def test_a_group_wider_than_a_tile(library: Library, cache: torch.dtype) -> None:
    case = make_case([1, 3], [90, 700], heads=(101, 1), cache=cache)
    check(attend(library, case), case)


def test_a_sequence_does_not_depend_on_the_others_in_its_step(library: Library) -> None:
    case = make_case([1, 70, 1, 5], [3000, 900, 40, 700], window=None)
    together = attend(library, case, threads=3)
    for row, queries in enumerate(case.layout.query_lens):
        start = int(case.layout.cu_seq_q[row])
        table = case.layout.page_table[row : row + 1]
        alone = replace(
            case,
            layout=replace(
                case.layout,
                cu_seq_q=torch.tensor([0, queries], dtype=torch.int32),
                context_lens=case.layout.context_lens[row : row + 1],
                page_table=table,
                query_lens=(queries,),
                lens=(case.layout.lens[row],),
            ),
            q=case.q[start : start + queries],
        )
        assert torch.equal(attend(library, alone), together[start : start + queries])


@pytest.mark.parametrize(("dtype", "cache"), [(F32, F32), (BF16, BF16), (BF16, INT8), (F32, INT8)])
@pytest.mark.parametrize("window", [None, 700])
def test_deterministic_attention_does_not_depend_on_the_chunk(
    library: Library, dtype: torch.dtype, cache: torch.dtype, window: int | None
) -> None:
    """The last 150 tokens of 2,500 at once, in chunks, and one after the other."""
    queries, length = 150, 2500
    case = make_case([queries], [length], heads=(6, 2), dtype=dtype, cache=cache, window=window)
    whole = attend(library, case, deterministic=True)
    check(whole, case)
    for chunk in (1, 7, 64):
        for start in range(0, queries, chunk):
            count = min(chunk, queries - start)
            context = length - queries + start + count
            layout = replace(
                case.layout,
                cu_seq_q=torch.tensor([0, count], dtype=torch.int32),
                context_lens=torch.tensor([context], dtype=torch.int32),
                query_lens=(count,),
                lens=(context,),
            )
            part = replace(case, layout=layout, q=case.q[start : start + count])
            assert torch.equal(attend(library, part, deterministic=True), whole[start : start + count])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_what_stale_slots_hold_does_not_matter(library: Library, dtype: torch.dtype, page_tokens: int) -> None:
    case = make_case([1, 33, 2], [77, 101, 5], dtype=dtype, page_tokens=page_tokens)
    qkv = torch.randn(sum(case.layout.lens), 8 * 64).to(dtype)
    whole = make_layout(case.layout.lens, case.layout.lens, page_tokens)
    found = []
    for stale in (0.0, math.nan):
        for half in (case.k, case.v):
            half.values.fill_(stale)
        CpuAttention(Immediate(library, 2), whole).write(qkv.clone(), None, case.k, case.v)
        found.append(attend(library, case))
    assert found[1].isfinite().all()
    assert torch.equal(found[1], found[0])


def test_what_is_not_finite_stays_with_its_own_sequence(library: Library) -> None:
    case = make_case([1, 1, 20], [50, 60, 70], dtype=F32)
    case.k.values[int(case.layout.page_table[0, 0])] = math.nan
    found = attend(library, case)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary", ["none", "part", "all"])
def test_write_is_the_reference(library: Library, head_dim: int, dtype: torch.dtype, norm: bool, rotary: str) -> None:
    torch.manual_seed(0)
    layout = make_layout([5, 1, 1, 2], [5, 1, 100, 40], page_tokens=16)
    k, v = random_cache(20, 16, 2, head_dim, dtype)
    expected_k, expected_v = rows_of(k, v)
    qkv = torch.randn(9, (6 + 4) * head_dim).to(dtype)
    rotary_dim = {"none": 0, "part": head_dim // 2, "all": head_dim}[rotary]
    angles = torch.rand(9, rotary_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1) if rotary_dim else None
    weights = (torch.rand(2, head_dim) + 0.5).to(dtype)
    qk_norm = QKNorm(weights[0], weights[1], 1e-5) if norm else None
    expected = ReferenceOperators().attention(layout).write(qkv.clone(), cos_sin, expected_k, expected_v, qk_norm)
    found = CpuAttention(Immediate(library, 2), layout).write(qkv, cos_sin, k, v, qk_norm)
    assert found.data_ptr() == qkv.data_ptr()
    # Sums in another order may round the other way: one unit of the last place.
    tolerance = {F32: {"atol": 1e-5, "rtol": 1e-5}, BF16: {"atol": 1e-6, "rtol": 2**-7}}[dtype]
    torch.testing.assert_close(found, expected, **tolerance)
    found_k, found_v = rows_of(k, v)
    torch.testing.assert_close(found_k.values, expected_k.values, **tolerance)
    assert torch.equal(written(found_v.values, layout), written(expected_v.values, layout))


@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_write_to_an_int8_cache_is_the_reference(library: Library, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = make_layout([5, 1, 1, 2], [5, 1, 100, 40], page_tokens=16)
    k, v = random_cache(20, 16, 2, head_dim, INT8)
    assert k.scales is not None and v.scales is not None
    expected_k, expected_v = rows_of(k, v)
    qkv = (torch.randn(9, (6 + 4) * head_dim) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    qkv[3] = 0
    ReferenceOperators().attention(layout).write(qkv.clone(), None, expected_k, expected_v)
    CpuAttention(Immediate(library, 2), layout).write(qkv, None, k, v)
    for found, expected in zip(rows_of(k, v), (expected_k, expected_v), strict=True):
        assert found.scales is not None and expected.scales is not None
        torch.testing.assert_close(found.scales, expected.scales, atol=0, rtol=1e-6)
        difference = (written(found.values, layout).int() - written(expected.values, layout).int()).abs()
        assert int(difference.max()) <= 1
        assert int(difference.count_nonzero()) <= 2, "only what lies halfway may go either way"


def test_a_head_that_is_not_finite_does_not_become_a_number(library: Library) -> None:
    layout = make_layout([1], [1], page_tokens=16)
    k, v = random_cache(4, 16, 2, 8, INT8)
    qkv = torch.randn(1, 6 * 8)
    qkv[0, 2 * 8 + 3], qkv[0, 4 * 8] = math.nan, math.inf
    CpuAttention(Immediate(library, 1), layout).write(qkv, None, k, v)
    page, offset = divmod(int(layout.slots[0]), 16)
    assert k.scales is not None and v.scales is not None
    assert k.scales[page, :, offset].isnan().tolist() == v.scales[page, :, offset].isnan().tolist() == [True, False]


def test_a_program_attends_as_single_calls_do(native_library: Library) -> None:
    heads, kv_heads, head_dim, capacity = 6, 2, 64, 200
    width = (heads + 2 * kv_heads) * head_dim
    k, v = random_cache(80, 16, kv_heads, head_dim, BF16)
    placeholder = make_layout([1], [1], 16)
    recorder = Recorder(native_library, 2, capacity)
    qkv = recorder.empty(capacity, width, dtype=BF16)
    cos_sin = torch.empty(capacity, head_dim, device="meta")
    recorded = CpuAttention(recorder, placeholder)
    q = recorded.write(qkv, cos_sin, k, v)
    program = recorder.program(recorded.attend(q, k, v, scale=0.1, window=None), inputs=(qkv,))
    for query_lens, lens in (([1, 1], [600, 40]), ([100, 1, 30], [100, 20, 300])):
        torch.manual_seed(len(lens))
        layout = make_layout(query_lens, lens, 16)
        tokens = sum(query_lens)
        x, angles = torch.randn(tokens, width).to(BF16), torch.rand(tokens, head_dim)
        single = CpuAttention(Immediate(native_library, 1), layout)
        expected = single.attend(single.write(x.clone(), angles, k, v), k, v, scale=0.1, window=None)
        program.inputs[0][:tokens] = x
        found = program.run(StepArrays(tokens, layout=layout, cos_sin=angles))
        assert torch.equal(found, expected)


def test_caches_that_no_kernel_reads_are_refused(native_library: Library) -> None:
    layout = make_layout([1], [1], 16)
    attention = CpuAttention(Immediate(native_library, 1), layout)
    for dtype, cache, head_dim in ((BF16, F32, 64), (F32, F32, 12), (F32, F32, 264)):
        k, v = random_cache(4, 16, 1, head_dim, cache)
        with pytest.raises(ValueError, match=r"kernel|multiple of 8"):
            attention.attend(torch.randn(1, 2, head_dim).to(dtype), k, v, scale=1.0, window=None)
    k, v = random_cache(4, 16, 2, 64, F32)
    with pytest.raises(ValueError, match="3 query heads"):
        attention.attend(torch.randn(1, 3, 64), k, v, scale=1.0, window=None)
