"""Which parameters of a decoder a scheme quantizes, and into what. Pure: knows names and shapes, no tensors.

All linear layers of the blocks take the scheme's form, but for routers and the gates of shared experts, which are small
and decide what becomes of everything else. The head, which is the largest matrix of a decode step, takes it too, but
that some heads stay in 8 bits (`head_group`, `kind_of`); where it is tied, so does the embedding, whose rows are
looked up in it. Norms, biases, positions and OPT's embedding projections stay as they are.
"""

from collections.abc import Iterable
from typing import Literal

from engine.models.spec import ModelSpec
from engine.quant.config import Scheme

Kind = Literal["dense", "int8", "int4"]

GROUPS = (32, 64, 128)
"""Sizes of a 4-bit group that can be asked for."""
_LINEARS = ("qkv", "out", "mlp_in", "mlp_out", "experts_in", "experts_out", "shared_in", "shared_out")
_LINEAR_KIND: dict[Scheme, Kind] = {"w8a8": "int8", "w4a16": "int4"}


def head_parameter(spec: ModelSpec) -> str:
    return "embed.weight" if spec.tied_embeddings else "head.weight"


def is_layer_linear(parameter: str) -> bool:
    """Whether it is the weight of a linear layer of a block."""
    block, _, name = parameter.rpartition(".")[0].rpartition(".")
    return block.startswith("layers.") and name in _LINEARS and parameter.endswith(".weight")


def kind_of(parameter: str, spec: ModelSpec, scheme: Scheme | None, head_group: int | None) -> Kind:
    """The form of a parameter of `spec.parameter_shapes()`.

    A head whose channels, which in OPT need not be those of the layers, the group does not divide is in 8 bits.
    """
    if scheme is None:
        return "dense"
    if parameter == head_parameter(spec):
        columns = spec.parameter_shapes()[parameter][1]
        return "int8" if head_group is None or columns % head_group else "int4"
    return _LINEAR_KIND[scheme] if is_layer_linear(parameter) else "dense"


def head_group(scheme: Scheme | None, group: int, device: str) -> int | None:
    """Input channels to a scale of a head in 4 bits, where `group` is asked for; None where heads are in 8 bits.

    They are on a CUDA device: the 4-bit product there rounds its sums to bfloat16, in which logits tie, and its packed
    form has no rows for an embedding.
    """
    return group if scheme == "w4a16" and device != "cuda" else None


def unit_of(scheme: Scheme | None, group: int) -> int:
    """Input channels of a layer that stay together when it is cut: those that share a scale in 4 bits.

    A `group` of -1 is all of a layer's, whose scale every part has; kernels take these in steps.
    """
    if scheme != "w4a16":
        return 1
    return group if group > 0 else GROUPS[0]


def group_obstacle(group: int, columns: int, all_columns: Iterable[int]) -> str | None:
    """Why a layer of so many input channels cannot have this group, and which groups would do; None if it can."""
    if columns % group == 0:
        return None
    fitting = " or ".join(map(str, fitting_groups(all_columns)))
    remedy = f"a group of {fitting} fits every layer" if fitting else f"no group of {GROUPS} fits: use w8a8"
    return f"{columns} input channels are no multiple of the group of {group}; {remedy}"


def fitting_groups(columns: Iterable[int]) -> tuple[int, ...]:
    """Of `GROUPS`, those that divide every number of input channels."""
    numbers = set(columns)
    return tuple(group for group in GROUPS if all(number % group == 0 for number in numbers))
