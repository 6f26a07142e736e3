"""Attention over pages: what is asked of flash attention, what is gathered instead, and on a GPU what comes of it."""

from collections.abc import Sequence

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.kernels.cuda.attention import CudaAttention, flash_attention, flash_obstacle
from engine.kernels.reference import PagedAttention
from engine.kv.cache import KVPages
from tests.engine.kernels.cuda.device import DEVICE, HAS_GPU, make_fused
from tests.engine.kernels.cuda.flash import flash_varlen
from tests.engine.kernels.cuda.layouts import make_layout

CAPABILITY = (9, 0)
STEPS: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "decodes": ((1, 1, 1), (1, 600, 257)),
    "prompts": ((270, 5, 256), (270, 5, 256)),
    "chunks and decodes": ((1, 40, 1, 30), (513, 296, 30, 812)),
}
HEADS = {"one group": (4, 1, 64), "groups": (9, 3, 64), "no groups": (4, 4, 24)}


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_varlen)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", HEADS)
def test_flash_attention_is_the_reference_over_pages_of_a_layer_among_others(
    window: int | None, step: str, heads: str
) -> None:
    """Slots that no sequence has written are NaN."""
    num_heads, kv_heads, head_dim = HEADS[heads]
    layout = make_layout(*STEPS[step], page_tokens=256)
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((10, 3, 2, 256, kv_heads, head_dim), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    for row, length in enumerate(layout.lens):
        for column in range(-(-length // 256)):
            used = min(256, length - 256 * column)
            values = torch.randn(3, 2, used, kv_heads, head_dim, generator=generator)
            memory[layout.page_table[row, column], :, :, :used] = values.to(DEVICE, torch.bfloat16)
    k, v = KVPages(memory[:, 1, 0]), KVPages(memory[:, 1, 1])
    shape = (sum(layout.query_lens), (num_heads + 2 * kv_heads) * head_dim)
    qkv = torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)

    found = CudaAttention(layout, make_fused("triton" if HAS_GPU else "torch"), CAPABILITY)
    q = found.write(qkv, None, k, v)
    attended = found.attend(q, k, v, scale=head_dim**-0.5, window=window)

    clean = [KVPages(torch.nan_to_num(half.values)) for half in (k, v)]
    expected = PagedAttention(layout).attend(q.contiguous(), *clean, scale=head_dim**-0.5, window=window)
    assert attended.is_contiguous() and attended.shape == (shape[0], num_heads, head_dim)
    assert torch.allclose(attended.float(), expected.float(), atol=2e-2)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("query_lens", [(1, 1), (40, 1)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_torch_itself_takes_the_call(window: int | None, query_lens: tuple[int, int], kv_heads: int) -> None:
    """The function as it is, on tensors without contents: names, types and shapes of the arguments."""
    layout = make_layout(query_lens, (600, 9), page_tokens=256)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pages = KVPages(torch.empty(4, 256, kv_heads, 16, dtype=torch.bfloat16, device=DEVICE))
        q = torch.empty(sum(query_lens), 4, 16, dtype=torch.bfloat16, device=DEVICE)
        out = flash_attention(q, pages, pages, layout, scale=0.25, window=window)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"capability": (7, 5)}, "compute capability 7.5"),
        ({"page_tokens": 16}, "pages of 16 tokens"),
        ({"head_dim": 12}, "heads of 12 values"),
        ({"head_dim": 264}, "heads of 264 values"),
        ({"kv_dtype": torch.int8}, "keys and values of int8"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "activations of float32"),
    ],
)
def test_what_flash_attention_cannot_do_is_named(changed: dict[str, object], words: str) -> None:
    able: dict[str, object] = {
        "capability": (8, 0),
        "page_tokens": 512,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "kv_dtype": torch.bfloat16,
    }
    assert flash_obstacle(**able) is None  # type: ignore[arg-type]
    found = flash_obstacle(**(able | changed))  # type: ignore[arg-type]
    assert found is not None and words in found


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_pages_that_it_cannot_read_are_gathered(kv_dtype: torch.dtype) -> None:
    """Small pages, and pages of 8 bits: the same as the reference does, step by step."""
    layout = make_layout((6, 1), (6, 1), page_tokens=4)
    scales = [torch.zeros(4, 4, 2, device=DEVICE) if kv_dtype == torch.int8 else None for _ in range(4)]
    halves = [KVPages(torch.zeros(4, 4, 2, 16, dtype=kv_dtype, device=DEVICE), scale) for scale in scales]
    qkv = torch.randn(7, 8 * 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    found, expected = CudaAttention(layout, make_fused("torch"), CAPABILITY), PagedAttention(layout)
    results = [
        each.attend(each.write(qkv.clone(), None, k, v), k, v, scale=0.25, window=None)
        for each, k, v in ((found, *halves[:2]), (expected, *halves[2:]))
    ]
    assert torch.equal(*results)
    assert torch.equal(halves[0].values, halves[2].values) and torch.equal(halves[1].values, halves[3].values)
