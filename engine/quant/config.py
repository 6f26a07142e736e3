"""The `quantization_config` of a checkpoint's config.json: which formats can be read, and what is told of the others.

Reads plain dictionaries: imports no torch, so that an unsupported model is refused within milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Scheme = Literal["w8a8", "w4a16"]
"""8 bits with activations quantized per token, or 4 bits in groups; see `engine.quant.weights`."""

SUPPORTED = (
    "GPTQ (4 bits), AWQ (4 bits, gemm) and compressed-tensors (int-quantized: 8 bits per channel with dynamic "
    "activations per token; pack-quantized: 4 bits per group or channel)"
)


class UnsupportedQuantization(Exception):
    """A quantization that cannot be run as it is meant: names what was found and what is supported."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """GPTQ (Frantar et al., 2022) as AutoGPTQ and GPTQModel write it."""

    group: int
    """Input channels to a scale; -1 is all of them."""
    zero_offset: int
    """What is added to a stored zero point: 1, or 0 where checkpoint_format is "gptq_v2"."""
    scheme: Scheme = "w4a16"


@dataclass(frozen=True, slots=True)
class Awq:
    """AWQ (Lin et al., 2023) as AutoAWQ writes it for its "gemm" kernels."""

    group: int
    scheme: Scheme = "w4a16"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """compressed-tensors, as llm-compressor writes it. The shapes of each layer's tensors tell its groups."""

    scheme: Scheme | Literal["mixed"]


CheckpointFormat = Gptq | Awq | CompressedTensors


def has_int4(layout: CheckpointFormat | None, scheme: str | None) -> bool:
    """Whether a checkpoint of this form, whose full weights are turned into `scheme`, has weights of 4 bits to run."""
    return scheme == "w4a16" or (layout is not None and layout.scheme != "w8a8")


def read_quantization(config: Mapping[str, Any]) -> CheckpointFormat | None:
    """The format that a config.json declares; None if its weights are not quantized. Raises UnsupportedQuantization."""
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise UnsupportedQuantization(f"quantization_config: expected an object, found {type(found).__name__}")
    method = str(found.get("quant_method") or "unknown").lower()
    match method:
        case "gptq":
            return _read_gptq(found)
        case "awq":
            return _read_awq(found)
        case "compressed-tensors":
            return _read_compressed_tensors(found)
    raise _unsupported(f"quant_method {method!r}")


def group_of(config: Mapping[str, Any], layout: CheckpointFormat) -> int:
    """Input channels to a scale in 4 bits of a config.json of this format; the fewest where layers differ, and -1 for
    all of a layer's."""
    if isinstance(layout, Gptq | Awq):
        return layout.group
    found = config.get("quantization_config") or config.get("compression_config") or {}
    weights = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
    sizes = [size for size in (each.get("group_size") for each in weights) if isinstance(size, int) and size > 0]
    return min(sizes, default=-1)


def _read_gptq(found: Mapping[str, Any]) -> Gptq:
    if found.get("bits") != 4:
        raise _unsupported(f"GPTQ with {found.get('bits')} bits")
    layout = str(found.get("checkpoint_format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(f"GPTQ with checkpoint_format {layout!r}")
    if found.get("is_marlin_format"):
        raise _unsupported("GPTQ in Marlin's layout")
    if overrides := found.get("dynamic"):
        raise _unsupported(f"GPTQ with other settings for some layers ({', '.join(map(str, overrides))})")
    return Gptq(_group(found.get("group_size", -1)), zero_offset=0 if layout == "gptq_v2" else 1)


def _read_awq(found: Mapping[str, Any]) -> Awq:
    bits = found.get("bits", found.get("w_bit"))
    if bits != 4:
        raise _unsupported(f"AWQ with {bits} bits")
    version = str(found.get("version") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(f"AWQ version {version!r}")
    if not found.get("zero_point", True):
        raise _unsupported("AWQ without zero points")
    return Awq(_group(found.get("group_size", found.get("q_group_size", -1))))


def _read_compressed_tensors(found: Mapping[str, Any]) -> CompressedTensors:
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _unsupported(f"compressed-tensors with sparsity {sparsity!r}")
    if (found.get("transform_config") or {}).get("config_groups"):
        raise _unsupported("compressed-tensors with transforms")
    groups = found.get("config_groups") or {}
    if not groups:
        raise UnsupportedQuantization("quantization_config: compressed-tensors without config_groups")
    schemes = {_group_scheme(group, str(group.get("format") or found.get("format"))) for group in groups.values()}
    return CompressedTensors(schemes.pop() if len(schemes) == 1 else "mixed")


def _group_scheme(group: Mapping[str, Any], layout: str) -> Scheme:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    name = f"compressed-tensors {layout} with {bits} bits ({weights.get('type', 'int')}, by {strategy})"
    if group.get("output_activations"):
        raise _unsupported(f"{name} and quantized outputs")
    if weights.get("type", "int") != "int":
        raise _unsupported(name)
    if layout == "int-quantized" and (bits, strategy) == (8, "channel"):
        if not weights.get("symmetric", True):
            raise _unsupported(f"{name}, asymmetric")
        if not _is_dynamic_per_token(inputs):
            raise _unsupported(f"{name} and activations {_describe(inputs)}")
        return "w8a8"
    if layout == "pack-quantized" and bits == 4 and strategy in ("group", "channel"):
        if inputs:
            raise _unsupported(f"{name} and activations {_describe(inputs)}")
        return "w4a16"
    raise _unsupported(name)


def _is_dynamic_per_token(inputs: Mapping[str, Any] | None) -> bool:
    expected = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    return inputs is not None and all(inputs.get(key) == value for key, value in expected.items())


def _describe(inputs: Mapping[str, Any] | None) -> str:
    if not inputs:
        return "that are not quantized"
    kind = "dynamic" if inputs.get("dynamic") else "static"
    symmetry = "symmetric" if inputs.get("symmetric", True) else "asymmetric"
    return f"in {inputs.get('num_bits')} bits ({inputs.get('type')}, {kind}, {symmetry}, by {inputs.get('strategy')})"


def _group(size: Any) -> int:
    if not isinstance(size, int) or (size != -1 and (size < 2 or size % 2)):
        raise UnsupportedQuantization(f"quantization_config: group_size {size!r}: expected an even number, or -1")
    return size


def _unsupported(what: str) -> UnsupportedQuantization:
    return UnsupportedQuantization(f"quantization_config: {what} is not supported; supported are {SUPPORTED}")
