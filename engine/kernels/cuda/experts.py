"""Linear layers of experts on a GPU: dense weights in bfloat16, the products of all experts one grouped kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cuda.fused import Fused
from engine.models.spec import Activation
from engine.quant.weights import Weight

GROUPED_MULTIPLE = 8
"""`torch.nn.functional.grouped_mm` wants rows of whole 16 bytes."""


class CudaExpertLinear:
    """`engine.kernels.ExpertLinear`; where rows begin stays on the device, so that a graph can hold it.

    Weights in 8 and 4 bits are turned into bfloat16: torch has no grouped kernel for them.
    """

    def __init__(
        self, weight: Weight, experts: int, gate: Activation | None, out_dtype: torch.dtype | None, fused: Fused
    ) -> None:
        """Raises ValueError for a shape that the kernel does not know."""
        dense = weight if isinstance(weight, Tensor) else weight.dequantize().to(torch.bfloat16)
        if dense.shape[1] % GROUPED_MULTIPLE or dense.shape[0] // experts % GROUPED_MULTIPLE:
            raise ValueError(
                f"experts of {dense.shape[0] // experts} x {dense.shape[1]} have no CUDA kernel: multiples of "
                f"{GROUPED_MULTIPLE} have; choose device cpu"
            )
        self._weight = dense.view(experts, -1, dense.shape[1]).transpose(1, 2)
        self._gate = gate
        self._out_dtype = out_dtype
        self._fused = fused

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        y = F.grouped_mm(x, self._weight, offs=offsets[1:].to(torch.int32))
        y = y if self._gate is None else self._fused.gate(y, self._gate)
        return y.to(self._out_dtype or x.dtype)
