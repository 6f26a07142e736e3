"""SmoothQuant (Xiao et al., 2023): factors that move the range of activations into the weights that multiply them.

Channel j of a linear layer's input is divided by s_j = max|X_j|^a / max|W_j|^(1 - a) where it is made, and column j of
the weight multiplied by it: the layer's result is the same, and a few channels no longer decide the scale of a whole
token. Pure: knows parameters by name and shape, and no file. Factors are rounded to powers of two, so that folding
them into norms and biases of 16 bits is exact.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """Factors of a parameter: of its rows (a vector has only these) and of its columns; None is 1."""

    rows: Tensor | None = None
    """[out] float32."""
    columns: Tensor | None = None
    """[in] float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Largest magnitudes by input channel of one linear layer, each [in] float32."""

    inputs: Tensor
    weight: Tensor


def smoothing(spec: ModelSpec, ranges: Mapping[str, Ranges], alpha: float) -> dict[str, Scaling]:
    """Factors by parameter name; `ranges` by the name of the layers' linear weights.

    Smoothed is what is linear in the parameters before it: what follows a norm of a block that normalises first, values
    before the output projection, and the up projection of a gated MLP or of one with ReLU, which positive factors pass;
    of a mixture of experts, nothing.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    has_mlp = spec.experts is None  # Otherwise the norm before it is the router's too, and no expert has all tokens.
    smoothed = (("attention_norm", "qkv"), *((("mlp_norm", "mlp_in"),) if has_mlp else ()))
    for prefix in (f"layers.{layer}." for layer in range(spec.layers)):
        if spec.block != "post":  # There the norm's result is the residual too.
            for norm, linear in smoothed:
                factors = _factors(ranges[f"{prefix}{linear}.weight"], alpha)
                columns[f"{prefix}{linear}.weight"] = factors
                rows[f"{prefix}{norm}.weight"] = rows[f"{prefix}{norm}.bias"] = 1 / factors
        factors, value_rows = _value_factors(spec, ranges[f"{prefix}out.weight"], alpha)
        columns[f"{prefix}out.weight"] = factors
        rows[f"{prefix}qkv.weight"] = rows[f"{prefix}qkv.bias"] = value_rows
        if has_mlp and (spec.gated_mlp or spec.activation == "relu"):
            factors = _factors(ranges[f"{prefix}mlp_out.weight"], alpha)
            columns[f"{prefix}mlp_out.weight"] = factors
            gate = torch.ones_like(factors) if spec.gated_mlp else torch.ones(0)
            rows[f"{prefix}mlp_in.weight"] = rows[f"{prefix}mlp_in.bias"] = torch.cat((gate, 1 / factors))
    known = spec.parameter_shapes().keys()
    return {name: Scaling(rows.get(name), columns.get(name)) for name in (rows | columns) if name in known}


def column_ranges(blocks: Iterable[Tensor], columns: int) -> Tensor:
    """[in] float32 largest magnitude of each column over blocks of rows."""
    largest = torch.zeros(columns)
    for block in blocks:
        torch.maximum(largest, block.abs().amax(dim=0).to(torch.float32), out=largest)
    return largest


def _value_factors(spec: ModelSpec, ranges: Ranges, alpha: float) -> tuple[Tensor, Tensor]:
    """Factors of the output projection's columns, and of the rows of the merged projection that makes the values.

    Query heads that share a key-value head share its factors.
    """
    shape = (spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
    shared = Ranges(ranges.inputs.view(shape).amax(dim=1).flatten(), ranges.weight.view(shape).amax(dim=1).flatten())
    factors = _factors(shared, alpha)
    expanded = factors.view(spec.kv_heads, 1, spec.head_dim).expand(shape).flatten()
    unchanged = torch.ones(spec.qkv_rows - len(factors))
    return expanded, torch.cat((unchanged, 1 / factors))


def _factors(ranges: Ranges, alpha: float) -> Tensor:
    """[in] powers of two; 1 for a channel that was never seen or has no weights."""
    factors = ranges.inputs.pow(alpha) / ranges.weight.pow(1 - alpha)
    is_usable = (ranges.inputs > 0) & (ranges.weight > 0) & factors.isfinite() & (factors > 0)
    return torch.where(is_usable, factors, 1.0).log2().round().exp2()
