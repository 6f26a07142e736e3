"""The arithmetic of a decoder: one protocol, a plain torch implementation, one in C for CPUs, one for CUDA."""

from engine.kernels.operators import AttentionLayout, Embedding, Linear, Operators, QKNorm, StepAttention, Wanted
from engine.kernels.reference import ReferenceOperators

__all__ = [
    "AttentionLayout",
    "Embedding",
    "Linear",
    "Operators",
    "QKNorm",
    "ReferenceOperators",
    "StepAttention",
    "Wanted",
]
