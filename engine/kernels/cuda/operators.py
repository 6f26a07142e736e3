"""The operators of a CUDA device: what a decoder asks for, in the forms of `linear`, `attention` and `fused`."""

import logging

import torch
from torch import Tensor

from engine.kernels.cuda.attention import CudaAttention
from engine.kernels.cuda.experts import CudaExpertLinear
from engine.kernels.cuda.fused import Fused
from engine.kernels.cuda.int4 import Crossovers, device_seconds, pack
from engine.kernels.cuda.linear import CudaLinear, make_product
from engine.kernels.operators import AttentionLayout, Embedding, ExpertLinear, Experts, Linear, RanksSum, Routing
from engine.kernels.reference import ReferenceOperators, held_rows
from engine.kernels.routing import TableExperts
from engine.models.spec import Activation
from engine.quant.weights import Weight

log = logging.getLogger(__name__)


class CudaOperators:
    """`engine.kernels.Operators` for bfloat16 and float16 parameters that are on the device already."""

    def __init__(
        self,
        dtype: torch.dtype,
        fused: Fused,
        capability: tuple[int, int],
        *,
        fp8: bool = False,
        ranks: RanksSum | None = None,
    ) -> None:
        """`dtype` is that of the activations; `fp8` turns dense linear weights, the head's apart, into 8-bit floats.

        `ranks` adds up what the ranks of a model have; None: there is one.
        """
        self._dtype = dtype
        self._fused = fused
        self._capability = capability
        self._fp8 = fp8
        self._reference = ReferenceOperators(ranks)
        self._crossovers = Crossovers(device_seconds, pack)
        self._warned: set[str] = set()

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        gate: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Linear:
        # Heads and routers ask for a dtype of their own. A head may have to serve as the embedding too, and a router is
        # too small to gain by another form.
        stays = out_dtype is not None
        product = make_product(
            weight,
            bias,
            self._dtype,
            self._fused,
            fp8=self._fp8,
            has_rows=stays,
            crossovers=self._crossovers,
            warn=self._warn,
        )
        return CudaLinear(product, self._fused, gate, out_dtype)

    def expert_linear(
        self, weight: Weight, experts: int, *, gate: Activation | None = None, out_dtype: torch.dtype | None = None
    ) -> ExpertLinear:
        if self._dtype != torch.bfloat16:
            raise ValueError('mixtures of experts have CUDA kernels for bfloat16 alone; choose dtype "bfloat16"')
        if self._fp8 or not isinstance(weight, Tensor):
            self._warn("the weights of experts run in bfloat16: torch has no grouped CUDA kernel for 8 or 4 bits")
        return CudaExpertLinear(weight, experts, gate, out_dtype, self._fused)

    def experts(self, routing: Routing, inner: ExpertLinear, outer: ExpertLinear) -> Experts:
        return TableExperts(routing, inner, outer)

    def embedding(self, table: Tensor, held: range | None = None) -> Embedding:
        return self._reference.embedding(table, held)

    def tied_embedding(self, head: Linear, dtype: torch.dtype, held: range | None = None) -> Embedding:
        assert isinstance(head, CudaLinear)
        product = head.product
        return held_rows(lambda ids: product.rows(ids, dtype), held)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return self._reference.sum_over_ranks(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def add_gated(self, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        return self._reference.add_gated(a, b, gate)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._fused.rms_norm(x, weight, eps, residual)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._fused.layer_norm(x, weight, bias, eps, residual)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return self._reference.activate(x, activation)

    def attention(self, layout: AttentionLayout) -> CudaAttention:
        return CudaAttention(layout, self._fused, self._capability)

    def _warn(self, message: str) -> None:
        """Once, however many layers it is true of."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)
