"""Where the tests of the CUDA path run, and what they need: a GPU, or Triton's interpreter on the CPU."""

from importlib.util import find_spec

import pytest
import torch

from engine.kernels.cuda.fused import Fused, TorchFused

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
FUSED = ("torch", "triton")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device: none here")


def make_fused(name: str) -> Fused:
    """The implementation of that name; skips the test where it cannot run."""
    if name == "torch":
        return TorchFused()
    if find_spec("triton") is None:
        pytest.skip("needs Triton: not installed here")
    import triton

    if not HAS_GPU and not isinstance(triton.language.sigmoid, triton.runtime.interpreter.InterpretedFunction):
        pytest.skip("needs a CUDA device: none here, and Triton was imported before its interpreter was chosen")
    from engine.kernels.cuda.triton_fused import TritonFused

    return TritonFused()


def skip_wrong_float8(fused: Fused) -> None:
    """Triton 3.7's interpreter makes 64 of 124.1: a mantissa that is rounded up to the next power loses the carry."""
    if fused.name == "Triton" and not HAS_GPU:
        pytest.skip("needs a CUDA device: none here, and Triton's interpreter rounds no float8 right")
