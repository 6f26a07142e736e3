"""In how many bytes a model's parameters, and keys and values, are held. Pure: the sizes of `engine.quant.weights`.

What is counted is what the loader counts, `LoadedModel.num_bytes`, to the byte. Packing for a kernel pads it by less
than a panel of 32 rows a layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.kv.sizing import layer_bytes_per_token
from engine.models.dtypes import Scalar, auto_dtype
from engine.models.spec import ModelSpec
from engine.quant.config import CheckpointFormat, Scheme, group_of, has_int4
from engine.quant.plan import Kind, head_group, is_layer_linear, kind_of, unit_of

Conversion = Scheme | Literal["fp8"]
ITEM_BYTES: Mapping[Scalar, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_BYTES = 4
"""float32, of a row in 8 bits and of a group in 4."""
ZERO_BYTES = 1
"""uint8, of a group in 4 bits. Counted always: config.json does not tell whether a checkpoint has them."""
FP8_MULTIPLE = 16
"""Sizes of a weight that can be held in 8-bit floats (`engine.kernels.cuda.linear`)."""


@dataclass(frozen=True, slots=True)
class Form:
    """How everything is held."""

    dtype: Scalar
    """Of activations, and of whatever is not quantized."""
    conversion: Conversion | None = None
    """What full weights are turned into at load."""
    checkpoint: Scheme | None = None
    """What the layers of the checkpoint are in already."""
    group: int = 64
    """Input channels to a scale of a layer in 4 bits; -1 is all of them."""
    int8_kv: bool = False
    head_group: int | None = None
    """Of the head; None: it is not in 4 bits."""

    @property
    def item_bytes(self) -> int:
        """Of an activation."""
        return ITEM_BYTES[self.dtype]

    @property
    def unit(self) -> int:
        """Input channels of a layer that stay together when it is cut."""
        return unit_of("w4a16" if "w4a16" in (self.conversion, self.checkpoint) else None, self.group)

    @property
    def multiplies_int8(self) -> bool:
        """Whether most products are of 8 bits on both sides."""
        return self.checkpoint == "w8a8" or self.conversion in ("w8a8", "fp8")

    @property
    def name(self) -> str:
        return self.conversion or self.checkpoint or self.dtype

    def weight_bytes(self, name: str, shape: tuple[int, ...], spec: ModelSpec) -> int:
        """Of the part of this shape of the parameter `name`."""
        match self._kind(name, shape, spec):
            case "int8":
                return math.prod(shape) + shape[0] * SCALE_BYTES
            case "int4":
                rows, columns = shape
                group = self.group if is_layer_linear(name) else self.head_group
                groups = rows * (columns // group if group is not None and group > 0 else 1)
                return rows * columns // 2 + groups * (SCALE_BYTES + ZERO_BYTES)
        return math.prod(shape) * self.item_bytes

    def layer_kv_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Of one token's keys and values in one layer of a rank with so many heads."""
        item_bytes = 1 if self.int8_kv else self.item_bytes
        return layer_bytes_per_token(kv_heads, head_dim, item_bytes, scaled=self.int8_kv)

    def _kind(self, name: str, shape: tuple[int, ...], spec: ModelSpec) -> Kind:
        if self.checkpoint is not None and is_layer_linear(name):
            return "int8" if self.checkpoint == "w8a8" else "int4"
        if self.conversion == "fp8":
            # 8-bit floats take what integers do.
            is_product = is_layer_linear(name) and not any(size % FP8_MULTIPLE for size in shape)
            return "int8" if is_product else "dense"
        return kind_of(name, spec, self.conversion, self.head_group)


@dataclass(frozen=True, slots=True)
class Choices:
    """What an operator asks for, as in `engine.config`; "auto" is resolved as `engine.build` does."""

    device: Literal["cuda", "cpu"]
    dtype: Scalar | Literal["auto"] = "auto"
    quantization: Conversion | Literal["auto"] = "auto"
    group: int = 64
    kv: Literal["auto", "model", "int8"] = "auto"


def form_of(config: Mapping[str, Any], layout: CheckpointFormat | None, choices: Choices) -> Form:
    """The form of a model with this config.json. Raises ValueError for a dtype that cannot be run."""
    conversion = None if choices.quantization == "auto" else choices.quantization
    if conversion == "fp8" and choices.device == "cpu":
        raise ValueError('quantization "fp8" needs a CUDA device; on a CPU use "w8a8"')
    quantized = conversion is not None or layout is not None
    return Form(
        dtype=_dtype(config, layout, choices),
        conversion=conversion,
        checkpoint=None if layout is None else _held(layout),
        group=choices.group if layout is None else group_of(config, layout),
        int8_kv=choices.kv == "int8" or (choices.kv == "auto" and choices.device == "cpu" and quantized),
        head_group=None if conversion == "fp8" else head_group(conversion, choices.group, choices.device),
    )


def _dtype(config: Mapping[str, Any], layout: CheckpointFormat | None, choices: Choices) -> Scalar:
    if choices.dtype != "auto":
        return choices.dtype
    int4 = has_int4(layout, choices.quantization)
    return auto_dtype(config, choices.device, int4=int4).dtype


def _held(layout: CheckpointFormat) -> Scheme:
    """Layers in both are counted as the larger one."""
    return "w4a16" if layout.scheme == "w4a16" else "w8a8"
