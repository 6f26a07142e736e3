"""Layouts of steps over pages in shuffled order, on the host or where the tests run."""

from collections.abc import Sequence

import torch

from engine.kernels.operators import AttentionLayout
from tests.engine.kernels import layouts
from tests.engine.kernels.cuda.device import DEVICE


def make_layout(
    query_lens: Sequence[int], lens: Sequence[int], *, page_tokens: int, device: torch.device = DEVICE
) -> AttentionLayout:
    """Where the tests run, unless a device is given."""
    return layouts.make_layout(query_lens, lens, page_tokens, device=device)
