"""A step's arrays arrive as they were laid out; a decode arrives at fixed addresses, filled up with harmless rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.cuda.inputs import ALIGNMENT, DecodeInputs, StepMemory, StepShape, upload
from tests.engine.kernels.cuda.device import DEVICE
from tests.engine.kernels.cuda.layouts import make_layout

HOST = torch.device("cpu")
ARRAYS = ("positions", "contexts", "slots", "cu_seq_q", "context_lens", "page_table")
SPARE = 50


@given(tokens=st.integers(1, 40), sequences=st.integers(1, 40), columns=st.integers(1, 9))
@settings(max_examples=50)
def test_arrays_are_aligned_and_apart(tokens: int, sequences: int, columns: int) -> None:
    memory = StepMemory.on_device(StepShape(tokens, sequences, columns), HOST)
    end = 0
    for array in memory.arrays.values():
        begin = array.data_ptr() - memory.memory.data_ptr()
        assert begin % ALIGNMENT == 0 and begin >= end
        end = begin + array.nbytes
    assert end == memory.num_bytes == len(memory.memory)


def test_a_step_arrives_as_it_was_laid_out() -> None:
    layout = make_layout((3, 1, 7), (5, 9, 7), page_tokens=4, device=HOST)
    token_ids = torch.arange(11)
    ids, found = upload(token_ids, layout, DEVICE)
    token_ids.zero_()
    assert ids.tolist() == list(range(11)) and ids.device.type == DEVICE.type
    for name in ARRAYS:
        assert torch.equal(getattr(found, name).cpu(), getattr(layout, name)), name
    assert (found.query_lens, found.lens, found.page_tokens) == (layout.query_lens, layout.lens, 4)


def test_a_decode_is_filled_up_with_rows_on_a_page_of_their_own() -> None:
    inputs = DecodeInputs(8, 5, 4, SPARE, DEVICE)
    addresses = [tensor.data_ptr() for tensor in (inputs.step(4)[0], *(getattr(inputs.step(4)[1], n) for n in ARRAYS))]
    for lens in ((5, 18, 1), (7,), (20, 3, 9, 4)):
        layout = make_layout((1,) * len(lens), lens, page_tokens=4, device=HOST)
        count = len(lens)
        inputs.fill(torch.arange(count) + 90, layout, 4)
        ids, found = inputs.step(4)
        assert ids[:count].tolist() == list(range(90, 90 + count))
        for name in ("positions", "contexts", "slots", "context_lens"):
            assert torch.equal(getattr(found, name)[:count].cpu(), getattr(layout, name)), name
        for row, length in enumerate(lens):
            pages = -(-length // 4)
            assert torch.equal(found.page_table[row, :pages].cpu(), layout.page_table[row, :pages])
        assert found.cu_seq_q.tolist() == [0, 1, 2, 3, 4]
        assert found.positions[count:].tolist() == ids[count:].tolist() == [0] * (4 - count)
        assert found.contexts[count:].tolist() == found.context_lens[count:].tolist() == [1] * (4 - count)
        assert found.slots[count:].tolist() == [SPARE * 4] * (4 - count)
        assert bool((found.page_table[count:] == SPARE).all())
        assert max(found.lens) >= max(lens) and found.query_lens == (1,) * 4
        assert [tensor.data_ptr() for tensor in (ids, *(getattr(found, n) for n in ARRAYS))] == addresses


@pytest.mark.parametrize(
    ("query_lens", "lens", "fits"),
    [
        ((1, 1), (20, 3), True),
        ((1,) * 8, (1,) * 8, True),
        ((1,) * 9, (1,) * 9, False),
        ((1, 2), (5, 5), False),
        ((1,), (21,), False),
    ],
)
def test_only_decodes_within_its_size_fit(query_lens: tuple[int, ...], lens: tuple[int, ...], fits: bool) -> None:
    inputs = DecodeInputs(8, 5, 4, SPARE, HOST)
    assert inputs.fits(make_layout(query_lens, lens, page_tokens=4, device=HOST)) is fits
