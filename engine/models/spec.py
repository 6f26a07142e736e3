"""What a model is, in plain numbers and choices: everything the decoder needs besides the weights themselves.

Owns the names and shapes of the decoder's parameters. Knows no tensors, no files and no Hugging Face names.
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rms", "layer"]
Block = Literal["pre", "post", "parallel"]
"""Where a layer normalises: before attention and MLP, after each (on the residual sum), or before both at once."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023): every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """Dynamic NTK: the base grows with the context once it exceeds `original_max_position`."""

    factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between the two bounds."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, section 3): NTK-by-parts with an attention temperature folded into cos and sin."""

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024): one divisor per frequency, a second set for contexts past the original length."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions: pairs (i, i + rotary_dim / 2) of each head's first `rotary_dim` values are rotated."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """One learned vector per position, at row `position + offset` of a table of `rows` rows."""

    rows: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of gated MLPs in place of one: each token runs those that its router scores highest."""

    count: int
    per_token: int
    intermediate: int
    """Of each expert."""
    renormalised: bool
    """Whether the weights of a token's experts are made to add up to 1."""
    shared_intermediate: int = 0
    """Of an expert that every token runs besides; 0: there is none."""
    shared_gate: bool = False
    """Whether the shared expert's result is weighed by a sigmoid of its own."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only transformer."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_position: int
    """Longest sequence that the positions were made for."""
    norm: NormKind
    norm_eps: float
    positions: RopeSpec | LearnedPositions
    activation: Activation
    gated_mlp: bool
    """MLP is `down(activation(gate(x)) * up(x))` instead of `down(activation(up(x)))`."""
    block: Block = "pre"
    final_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before the rotation (Qwen3)."""
    windows: tuple[int | None, ...] = ()
    """Per layer, how many keys a query sees counting its own; None for all. Empty means None for every layer."""
    embedding_dim: int | None = None
    """Width of the token embeddings where it differs from `hidden` (OPT-350m projects in and out)."""
    tied_embeddings: bool = False
    attention_scale: float | None = None
    """Multiplies the scores; None is `head_dim ** -0.5`."""
    experts: ExpertsSpec | None = None
    """Of every layer, in place of the MLP."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def qkv_rows(self) -> int:
        """Rows of the merged projection: all query heads, then all key heads, then all value heads."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the decoder by name, in the order of use. Linear weights are [out, in]."""
        width = self.embedding_dim or self.hidden
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, width)}
        if width != self.hidden:
            shapes["project_in.weight"] = (self.hidden, width)
        if isinstance(self.positions, LearnedPositions):
            shapes["position.weight"] = (self.positions.rows, self.hidden)
        for layer in range(self.layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        if self.final_norm:
            shapes |= self._norm_shapes("final_norm")
        if width != self.hidden:
            shapes["project_out.weight"] = (width, self.hidden)
        if not self.tied_embeddings:
            shapes["head.weight"] = (self.vocab_size, width)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        attention = self.heads * self.head_dim
        shapes = self._norm_shapes("attention_norm")
        shapes |= _linear_shapes("qkv", self.qkv_rows, self.hidden, self.qkv_bias)
        if self.qk_norm:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        shapes |= _linear_shapes("out", self.hidden, attention, self.out_bias)
        shapes |= self._norm_shapes("mlp_norm")
        return shapes | (self._mlp_shapes() if self.experts is None else _expert_shapes(self.experts, self.hidden))

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        rows = self.intermediate * (2 if self.gated_mlp else 1)
        shapes = _linear_shapes("mlp_in", rows, self.hidden, self.mlp_bias)
        return shapes | _linear_shapes("mlp_out", self.hidden, self.intermediate, self.mlp_bias)

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden,)}
        if self.norm == "layer":
            shapes[f"{name}.bias"] = (self.hidden,)
        return shapes


def _linear_shapes(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def _expert_shapes(experts: ExpertsSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    """The experts' matrices one below the other, each of theirs as `mlp_in` and `mlp_out` of a gated MLP."""
    shapes: dict[str, tuple[int, ...]] = {
        "router.weight": (experts.count, hidden),
        "experts_in.weight": (experts.count * 2 * experts.intermediate, hidden),
        "experts_out.weight": (experts.count * hidden, experts.intermediate),
    }
    if experts.shared_intermediate:
        shapes["shared_in.weight"] = (2 * experts.shared_intermediate, hidden)
        shapes["shared_out.weight"] = (hidden, experts.shared_intermediate)
    if experts.shared_gate:
        shapes["shared_gate.weight"] = (1, hidden)
    return shapes
