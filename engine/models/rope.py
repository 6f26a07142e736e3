"""Rotary position embedding (Su et al., 2021): from positions to cosines and sines, for every scaling of the spec.

Angles are computed for the tokens of a step rather than looked up in a table of all positions: it costs microseconds
once per step, and a table for 128k positions costs 64 MB. Rotation itself is an operator (`engine.kernels`).
"""

import math

import torch
from torch import Tensor

from engine.models.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
)


class Rope:
    """The frequencies of one `RopeSpec`, in float32 whatever the model's dtype."""

    def __init__(self, spec: RopeSpec, device: torch.device | str = "cpu") -> None:
        self._spec = spec
        self._inv_freq = inverse_frequencies(spec).to(device)
        self._long_inv_freq = long_inverse_frequencies(spec)
        if self._long_inv_freq is not None:
            self._long_inv_freq = self._long_inv_freq.to(device)
        match spec.scaling:
            case YarnScaling(attention_factor=factor) | LongRopeScaling(attention_factor=factor):
                self._amplitude = factor
            case _:
                self._amplitude = 1.0

    @property
    def dim(self) -> int:
        """Values of each head that are rotated."""
        return self._spec.rotary_dim

    @property
    def amplitude(self) -> float:
        """Multiplies cosines and sines."""
        return self._amplitude

    @property
    def fixed_frequencies(self) -> Tensor | None:
        """[dim / 2] float32 where the angles are a function of the position alone; else None."""
        depends_on_context = isinstance(self._spec.scaling, DynamicScaling | LongRopeScaling)
        return None if depends_on_context else self._inv_freq

    def cos_sin(self, positions: Tensor, contexts: Tensor) -> Tensor:
        """Cosines, then sines, of every token: [T] and [T] int64 to [T, rotary_dim] float32.

        `contexts` is the length of each token's sequence in this step. Only dynamic NTK and LongRoPE look at it: past
        the original length they rotate by frequencies of the context at hand and leave older keys as they are, as the
        Hugging Face implementation does for one sequence. There the result therefore depends on how a prompt was cut
        into chunks; all other scalings are a function of the position alone.
        """
        angles = positions.to(torch.float32).unsqueeze(1) * self._frequencies(contexts)
        return torch.cat((angles.cos(), angles.sin()), dim=1) * self._amplitude

    def _frequencies(self, contexts: Tensor) -> Tensor:
        """[rotary_dim / 2], or [T, rotary_dim / 2] where they depend on the context."""
        match self._spec.scaling:
            case DynamicScaling() as scaling:
                return _dynamic_inverse_frequencies(self._spec, scaling, contexts)
            case LongRopeScaling() as scaling:
                assert self._long_inv_freq is not None
                is_long = (contexts > scaling.original_max_position).unsqueeze(1)
                return torch.where(is_long, self._long_inv_freq, self._inv_freq)
            case _:
                return self._inv_freq


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """[rotary_dim / 2] float32 angles per position, for contexts within the original length."""
    plain = 1.0 / spec.theta ** _exponents(spec.rotary_dim)
    match spec.scaling:
        case None | DynamicScaling():
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(plain, spec, scaling)
        case LongRopeScaling() as scaling:
            return plain / torch.tensor(scaling.short_factor, dtype=torch.float32)


def long_inverse_frequencies(spec: RopeSpec) -> Tensor | None:
    """LongRoPE's second set, for contexts past the original length; None for every other scaling."""
    if not isinstance(spec.scaling, LongRopeScaling):
        return None
    return 1.0 / (torch.tensor(spec.scaling.long_factor) * spec.theta ** _exponents(spec.rotary_dim))


def _exponents(rotary_dim: int) -> Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim


def _dynamic_inverse_frequencies(spec: RopeSpec, scaling: DynamicScaling, contexts: Tensor) -> Tensor:
    """[T, rotary_dim / 2]; the base is the plain one as long as the context fits the original length."""
    excess = contexts.clamp(min=scaling.original_max_position).to(torch.float32) / scaling.original_max_position
    stretch = scaling.factor * excess - (scaling.factor - 1)
    base = spec.theta * stretch ** (spec.rotary_dim / (spec.rotary_dim - 2))
    return 1.0 / base.unsqueeze(1) ** _exponents(spec.rotary_dim).to(contexts.device)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_max_position * plain / (2 * math.pi)
    kept_share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_share = kept_share.clamp(0.0, 1.0)
    return (1 - kept_share) * plain / scaling.factor + kept_share * plain


def _yarn(plain: Tensor, spec: RopeSpec, scaling: YarnScaling) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """The pair that turns `rotations` times over the original context."""
        ratio = scaling.original_max_position / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    span = high - low if high != low else 0.001
    interpolated_share = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return interpolated_share * plain / scaling.factor + (1 - interpolated_share) * plain
