"""What a family is, and the readings of a Hugging Face config that several of them share. No forward code here."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.models.pieces import Piece
from engine.models.spec import Activation, ModelSpec

Config = Mapping[str, Any]
"""What config.json says, over the family's defaults."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class UnsupportedConfig(Exception):
    """A config option that the decoder does not implement: running it anyway would be silently wrong."""


@dataclass(frozen=True, slots=True)
class Family:
    """A mapping of one architecture."""

    architecture: str
    model_type: str
    read: Callable[[Config], ModelSpec]
    """Raises UnsupportedConfig."""
    pieces: Callable[[ModelSpec, Collection[str]], Iterator[Piece]]
    """Where each checkpoint tensor goes, given the names that the checkpoint has: these tell its prefixes."""
    defaults: Config
    """What transformers takes a key for that config.json leaves out, where it takes it for anything."""

    def spec(self, config: Config) -> ModelSpec:
        """The model that a config.json describes. Raises UnsupportedConfig, naming the key."""
        return self.read({**self.defaults, **config})


def count(config: Config, key: str) -> int:
    """A whole number of at least 1."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedConfig(f"{key} is {value!r}; it must be a whole number of at least 1")
    return value


def number(config: Config, key: str) -> float:
    """A finite number above 0."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UnsupportedConfig(f"{key} is {value!r}; it must be a number above 0")
    return float(value)


def head_size(config: Config, hidden_key: str, heads_key: str) -> int:
    """Channels of a head, where the heads share the hidden ones evenly."""
    hidden, heads = count(config, hidden_key), count(config, heads_key)
    if hidden % heads:
        raise UnsupportedConfig(f"{hidden_key} {hidden} is not a multiple of {heads_key} {heads}")
    return hidden // heads


def activation_of(config: Config, key: str) -> Activation:
    name = config[key]
    if name not in _ACTIVATIONS:
        raise UnsupportedConfig(f"{key} {name!r} is not supported; supported are {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def require(config: Config, key: str, expected: object) -> None:
    """Refuses a config whose option has another value than the only one that is implemented."""
    value = config.get(key, expected)
    if value != expected:
        raise UnsupportedConfig(f"{key} {value!r} is not supported; it must be {expected!r}")


def eos_token_ids(config: Config) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)


def prefix_of(names: Collection[str], anchor: str, prefixes: tuple[str, ...]) -> str:
    """The prefix under which the checkpoint keeps its base model, told by a tensor that every model has.

    Falls back to the first, so that a missing anchor is reported under its usual name.
    """
    return next((prefix for prefix in prefixes if prefix + anchor in names), prefixes[0])


def norm_pieces(target: str, source: str, spec: ModelSpec) -> Iterator[Piece]:
    yield Piece.whole(f"{target}.weight", f"{source}.weight", (spec.hidden,))
    if spec.norm == "layer":
        yield Piece.whole(f"{target}.bias", f"{source}.bias", (spec.hidden,))


def linear_pieces(
    target: str, source: str, rows: int, columns: int, *, bias: bool, at: int = 0, transposed: bool = False
) -> Iterator[Piece]:
    """A linear layer of [rows, columns] that fills the parameter from row `at`; `transposed` as in `Piece`."""
    shape = (columns, rows) if transposed else (rows, columns)
    yield Piece.whole(f"{target}.weight", f"{source}.weight", shape, at=at, transposed=transposed)
    if bias:
        yield Piece.whole(f"{target}.bias", f"{source}.bias", (rows,), at=at)


def merged_qkv_pieces(target: str, source: str, spec: ModelSpec) -> Iterator[Piece]:
    """Separate q_proj, k_proj and v_proj under `source`, one after the other in the merged projection."""
    query_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    starts = {"q_proj": (query_rows, 0), "k_proj": (kv_rows, query_rows), "v_proj": (kv_rows, query_rows + kv_rows)}
    for name, (rows, at) in starts.items():
        yield from linear_pieces(target, f"{source}.{name}", rows, spec.hidden, bias=spec.qkv_bias, at=at)
