"""Linear layers on a GPU: dense, 8-bit integers, 8-bit floats, 4-bit weights (`int4`). Owns the choice of the form.

A `Product` is a weight in the form that one of torch's kernels reads; `CudaLinear` is a product with a gate behind it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.cuda.fused import Fused
from engine.kernels.cuda.int4 import Crossovers, Int4Product, int4_obstacle
from engine.models.spec import Activation
from engine.quant.weights import Int4Weight, Int8Weight, Weight

INT_MM_MULTIPLE = 8
"""`torch._int_mm` on CUDA wants inner and outer sizes that are multiples of this."""
INT_MM_ROWS = 32
"""It also wants more than 16 rows; shorter steps are padded to this many, a tile of the tensor cores."""
FP8_MULTIPLE = 16
"""`torch._scaled_mm` wants weight sizes that are multiples of this."""
FP8_TRIED_ROWS = (1, 16, 128)
"""Rows of the products that are tried when a weight is turned into 8-bit floats: decodes, and short prompts."""
FP8_CAPABILITY = (8, 9)
"""Compute capability with products of 8-bit floats, and above."""

log = logging.getLogger(__name__)

Warn = Callable[[str], object]


class Product(Protocol):
    """`x @ weight.T + bias`."""

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, in] contiguous to [T, out] of `dtype`."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight by number: [T] to [T, in] of `dtype`."""


class CudaLinear:
    """A product, gated if asked for."""

    def __init__(
        self, product: Product, fused: Fused, gate: Activation | None = None, out_dtype: torch.dtype | None = None
    ) -> None:
        self.product = product
        self._fused = fused
        self._gate = gate
        self._out_dtype = out_dtype

    def __call__(self, x: Tensor) -> Tensor:
        y = self.product(x, self._out_dtype or x.dtype)
        return y if self._gate is None else self._fused.gate(y, self._gate)


@dataclass(frozen=True, slots=True, eq=False)
class DenseProduct:
    """A weight in the dtype of the activations."""

    weight: Tensor
    """[out, in]."""
    bias: Tensor | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == x.dtype or not x.is_cuda:
            return F.linear(x, self.weight, self.bias).to(dtype)
        # The sums are float32 already: a wider result costs no pass of its own and no rounding.
        y = torch.mm(x, self.weight.T, out_dtype=dtype)
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Product:
    """W8A8: activations quantized per token, exact sums in int32, both scales at the end."""

    values: Tensor
    """[out, in] int8, both padded with zeros to multiples of INT_MM_MULTIPLE."""
    scale: Tensor
    """[out] float32, padded likewise."""
    bias: Tensor | None
    """[out] float32, padded likewise."""
    shape: tuple[int, int]
    """Of the weight itself."""
    fused: Fused

    @staticmethod
    def of(weight: Int8Weight, bias: Tensor | None, fused: Fused) -> "Int8Product":
        out_pad, in_pad = (-size % INT_MM_MULTIPLE for size in weight.shape)
        return Int8Product(
            values=F.pad(weight.values, (0, in_pad, 0, out_pad)).contiguous(),
            scale=F.pad(weight.scale, (0, out_pad)),
            bias=None if bias is None else F.pad(bias.to(torch.float32), (0, out_pad)),
            shape=weight.shape,
            fused=fused,
        )

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        count = len(x)
        values, row_scale = self.fused.quantize_rows(x, torch.int8, max(count, INT_MM_ROWS), self.values.shape[1])
        sums = torch._int_mm(values, self.values.T)[:count]
        y = self.fused.scale_sums(sums, row_scale[:count], self.scale, self.bias, dtype)
        return y if y.shape[1] == self.shape[0] else y[:, : self.shape[0]].contiguous()

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return Int8Weight(self.values[ids, : self.shape[1]], self.scale[ids]).dequantize().to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Product:
    """W8A8 in float8 e4m3 (Micikevicius et al., 2022): a scale for each output channel and for each token."""

    values: Tensor
    """[out, in] float8_e4m3fn."""
    scale: Tensor
    """[out] float32: weight[o, i] = values[o, i] * scale[o]."""
    bias: Tensor | None
    fused: Fused

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, fused: Fused) -> "Fp8Product":
        """From a dense weight whose sizes are multiples of FP8_MULTIPLE."""
        values, scale = fused.quantize_rows(weight.contiguous(), torch.float8_e4m3fn, *weight.shape)
        return Fp8Product(values, scale.squeeze(1), bias, fused)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        values, row_scale = self.fused.quantize_rows(x, torch.float8_e4m3fn, *x.shape)
        if x.is_cuda:
            y = torch._scaled_mm(
                values, self.values.T, row_scale, self.scale[None, :], out_dtype=x.dtype, use_fast_accum=True
            ).to(dtype)
        else:
            sums = values.to(torch.float32) @ self.values.T.to(torch.float32)
            y = (sums * row_scale * self.scale).to(dtype)
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.values[ids].to(torch.float32) * self.scale[ids, None]).to(dtype)


def make_product(
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    fused: Fused,
    *,
    fp8: bool,
    has_rows: bool,
    crossovers: Crossovers | None = None,
    warn: Warn = log.warning,
) -> Product:
    """The fastest form of a weight on its device, for activations of `dtype`.

    `fp8` turns a dense weight into 8-bit floats where its sizes allow it; `has_rows` is asked of an embedding, which
    stays dense where the weight is not of 8 bits. `crossovers` tells when to unpack weights of 4 bits; `warn` is told
    of a form that was asked for and cannot be had.
    """
    if isinstance(weight, Int8Weight):
        return Int8Product.of(weight, bias, fused)
    if isinstance(weight, Int4Weight):
        obstacle = int4_obstacle(weight, dtype)
        if not weight.packed.is_cuda or has_rows or obstacle is not None:
            if obstacle is not None and not has_rows:
                warn(f"weights of 4 bits are made dense and take four times the memory: the kernel is given {obstacle}")
            return DenseProduct(weight.dequantize().to(dtype), bias)
        product = Int4Product.of(weight, bias)
        return product if crossovers is None else replace(product, unpacking=crossovers.unpacking(product))
    if fp8 and not has_rows and not any(size % FP8_MULTIPLE for size in weight.shape):
        product8 = Fp8Product.of(weight, bias, fused)
        if (refusal := refused(product8, dtype)) is None:
            return product8
        warn(f"weights of {weight.shape[0]} x {weight.shape[1]} stay as they are, not in 8-bit floats: {refusal}")
    return DenseProduct(weight, bias)


def refused(product: Fp8Product, dtype: torch.dtype) -> str | None:
    """What the device's libraries say against a product of few rows, tried once; None if it runs.

    cuBLAS has no kernel for few rows of some sizes with a scale for each row, and says so only when it is asked for
    one (pytorch/ao#4582: no more than 256 rows of 9216 channels).
    """
    columns = product.values.shape[1]
    for rows in FP8_TRIED_ROWS:
        try:
            product(torch.zeros((rows, columns), dtype=dtype, device=product.values.device), dtype)
        except RuntimeError as error:
            return f"a product of {rows} rows fails with {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def fp8_obstacle(capability: tuple[int, int]) -> str | None:
    """Why a device has no products of 8-bit floats, in words; None if it has."""
    if capability >= FP8_CAPABILITY:
        return None
    return f"compute capability {capability[0]}.{capability[1]} has no float8 products; 8.9 and later have"
