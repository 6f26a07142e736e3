"""Rotary angles in C against float64, for positions as large as contexts get."""

import math

import pytest
import torch

from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Immediate, StepArrays
from engine.kernels.operators import AttentionLayout


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_cosines_and_sines_of_position_times_frequency(library: Library, tokens: int) -> None:
    pairs, amplitude = 9, 1.25
    frequencies = 1.0 / 10000.0 ** (torch.arange(pairs) / pairs)
    positions = torch.randint(0, 131072, (tokens,))
    nothing = torch.zeros(tokens + 1, dtype=torch.int32)
    layout = AttentionLayout(positions, positions, positions, nothing, nothing, nothing[None], 4, (1,), (1,))
    found = torch.full((tokens, 2 * pairs), math.nan)
    Immediate(library, 2).emit(
        "rotary_angles",
        StepArrays(tokens, layout=layout),
        inverse_frequencies=frequencies,
        pairs=pairs,
        amplitude=amplitude,
        cos_sin=found,
    )
    # The angle itself is a float32, as in every implementation of RoPE.
    angles = (positions.float()[:, None] * frequencies).double()
    expected = amplitude * torch.cat((angles.cos(), angles.sin()), dim=1)
    assert torch.allclose(found.double(), expected, atol=1e-6)
