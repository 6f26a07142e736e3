"""The few operators that torch does not fuse: one protocol, a plain torch implementation, later C and CUDA ones."""

from engine.kernels.operators import AttentionLayout, Operators, StepAttention
from engine.kernels.reference import ReferenceOperators

__all__ = ["AttentionLayout", "Operators", "ReferenceOperators", "StepAttention"]
