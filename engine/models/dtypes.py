"""The dtype that a model runs in when nobody chose one. Pure, and imports no torch: planners decide as loaders do."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

Scalar = Literal["float32", "bfloat16", "float16"]
SCALARS: tuple[Scalar, ...] = get_args(Scalar)


class AutoDType(NamedTuple):
    """What "auto" comes to."""

    dtype: Scalar
    reason: str | None
    """Why it is not the checkpoint's, in words; None where it is."""


def auto_dtype(config: Mapping[str, Any], device: str, *, int4: bool) -> AutoDType:
    """For a model with this config.json on a device of torch's type `device`; `int4` is whether weights have 4 bits.

    Raises ValueError for a dtype that cannot be run.
    """
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    stored = next((scalar for scalar in SCALARS if scalar == name), None)
    if stored is None:
        raise ValueError(f"dtype {name!r} cannot be run; choose one of {', '.join(SCALARS)}")
    if device == "cpu" and stored == "float16":
        return AutoDType("bfloat16", "a float16 checkpoint runs in bfloat16, which CPUs have instructions for")
    if device == "cuda" and stored == "float32":
        return AutoDType("bfloat16", "a float32 checkpoint runs in bfloat16: no CUDA kernel computes in float32")
    if device == "cuda" and stored == "float16" and int4:
        return AutoDType("bfloat16", "weights of 4 bits run in bfloat16, which alone their CUDA kernel multiplies by")
    return AutoDType(stored, None)
