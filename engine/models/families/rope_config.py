"""Rotary parameters of a Hugging Face config, in the `rope_parameters` form and in the older keys, as a `RopeSpec`."""

import math
from typing import Any

from engine.models.families.family import Config, UnsupportedConfig, count
from engine.models.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_spec(
    config: Config,
    head_dim: int,
    *,
    theta_key: str = "rope_theta",
    share_key: str = "partial_rotary_factor",
    default_share: float = 1.0,
) -> RopeSpec:
    """Reads `rope_scaling`, or else `rope_parameters`; what they leave out is under keys of the config itself."""
    values = _parameters(config, theta_key, share_key)
    share = values["partial_rotary_factor"] or default_share
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2:
        raise UnsupportedConfig(f"partial_rotary_factor {share} gives an odd rotary dimension ({rotary_dim})")
    return RopeSpec(float(values["rope_theta"]), rotary_dim, _scaling(values, config, rotary_dim))


def max_position(config: Config, rope: RopeSpec) -> int:
    """The longest sequence: configs give the length before scaling for linear and dynamic, before or after for YaRN."""
    declared = count(config, "max_position_embeddings")
    match rope.scaling:
        case LinearScaling(factor) | DynamicScaling(factor=factor):
            return int(declared * factor)
        case YarnScaling(factor=factor, original_max_position=original):
            return max(declared, int(original * factor))
        case _:
            return declared


def _parameters(config: Config, theta_key: str, share_key: str) -> dict[str, Any]:
    values = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in values.values()):
        raise UnsupportedConfig("rope_parameters per layer type are not supported")
    values.setdefault("rope_theta", config.get(theta_key) or 10000.0)
    values.setdefault("partial_rotary_factor", config.get(share_key))
    values.setdefault("rope_type", values.get("type", "default"))
    return values


def _scaling(values: dict[str, Any], config: Config, rotary_dim: int) -> RopeScaling | None:
    declared = count(config, "max_position_embeddings")
    original = int(
        config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or declared
    )
    try:
        match values["rope_type"]:
            case "default":
                return None
            case "linear":
                return LinearScaling(float(values["factor"]))
            case "dynamic":
                return DynamicScaling(float(values["factor"]), declared)
            case "llama3":
                low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
                return Llama3Scaling(float(values["factor"]), low, high, original)
            case "yarn":
                return _yarn(values, declared, original)
            case "longrope":
                return _longrope(values, declared, original, rotary_dim)
            case kind:
                raise UnsupportedConfig(f"rope_type {kind!r} is not supported; supported are {', '.join(_KINDS)}")
    except KeyError as error:
        raise UnsupportedConfig(
            f"rope_type {values['rope_type']!r} needs {error.args[0]!r} in its parameters"
        ) from error


def _yarn(values: dict[str, Any], declared: int, original: int) -> YarnScaling:
    factor = float(values.get("factor") or declared / original)
    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
    amplitude = values.get("attention_factor")
    if amplitude is None and mscale and mscale_all_dim:
        amplitude = _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
    elif amplitude is None:
        amplitude = _temperature(factor)
    return YarnScaling(
        factor=factor,
        original_max_position=original,
        attention_factor=float(amplitude),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        truncate=bool(values.get("truncate", True)),
    )


def _temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(values: dict[str, Any], declared: int, original: int, rotary_dim: int) -> LongRopeScaling:
    factor = float(values.get("factor") or declared / original)
    amplitude = values.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = tuple(values["short_factor"]), tuple(values["long_factor"])
    if not len(short) == len(long) == rotary_dim // 2:
        raise UnsupportedConfig(
            f"longrope needs {rotary_dim // 2} short and long factors, found {len(short)}, {len(long)}"
        )
    return LongRopeScaling(short, long, original, float(amplitude))
