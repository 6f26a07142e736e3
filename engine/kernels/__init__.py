"""The arithmetic of a decoder: one protocol, a plain torch implementation, one in C for CPUs, one for CUDA."""

from engine.kernels.operators import (
    AttentionLayout,
    Embedding,
    ExpertLinear,
    Experts,
    Linear,
    Operators,
    QKNorm,
    RanksSum,
    Routing,
    StepAttention,
    Wanted,
)
from engine.kernels.reference import ReferenceOperators

__all__ = [
    "AttentionLayout",
    "Embedding",
    "ExpertLinear",
    "Experts",
    "Linear",
    "Operators",
    "QKNorm",
    "RanksSum",
    "ReferenceOperators",
    "Routing",
    "StepAttention",
    "Wanted",
]
