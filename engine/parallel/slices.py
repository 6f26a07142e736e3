"""Which part of each parameter a rank of a tensor-parallel group holds. Pure: names and shapes, no tensors, no files.

The rule is Megatron-LM's (Shoeybi et al., 2019): a layer that makes heads or inner channels is cut by rows, the one
that takes them by columns, so that a block needs one sum over the ranks after attention and one after the MLP. The
vocabulary is cut by rows. Norms, routers and positions are whole on every rank, biases that are added after a sum on
the first alone. Experts are dealt out whole to groups of ranks, and the ranks of a group cut theirs by inner channels
(DeepSpeed-MoE).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.models.spec import ModelSpec

_BEHIND_A_SUM = ("out", "mlp_out", "shared_out")
"""Layers of which ranks make partial sums."""
VOCABULARY_UNIT = 32
"""A rank's rows of the vocabulary are a multiple of it: a panel of the C kernels, two tiles of a GPU's products."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows, columns, heads or experts of the whole model."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class TensorRank:
    """One of the ranks that share the parameters of a stage."""

    rank: int = 0
    size: int = 1
    expert: int = 1
    """Groups of ranks that the experts are dealt out to; consecutive ranks are a group."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}; expected 0 to {self.size - 1}")
        if self.expert < 1 or self.size % self.expert:
            raise ValueError(f"{self.size} ranks are not divisible into {self.expert} groups for the experts")

    @property
    def group_size(self) -> int:
        """Ranks that cut the same experts."""
        return self.size // self.expert


@dataclass(frozen=True, slots=True)
class Slice:
    """What a rank holds of a parameter: these columns of these rows, in this order, then rows of zeros."""

    rows: tuple[Run, ...]
    columns: tuple[Run, ...] | None
    """None for a parameter of one axis."""
    padding: int = 0
    """Rows of zeros."""

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(run.count for run in self.rows) + self.padding
        return (rows,) if self.columns is None else (rows, sum(run.count for run in self.columns))


def slice_of(name: str, shape: tuple[int, ...], spec: ModelSpec, rank: TensorRank, unit: int = 1) -> Slice:
    """The part of the parameter `name` of `spec.parameter_shapes()`, whose whole shape is `shape`.

    Inner channels are dealt out in blocks of `unit`, those that share a scale in 4 bits, as evenly as they go. The
    degrees must have no `obstacle`.
    """
    module, _, kind = name.rpartition(".")
    part = module.rpartition(".")[2]
    columns = None if len(shape) == 1 else (Run(0, shape[1]),)
    match part:
        case "embed" | "head":
            rows = _vocabulary(shape[0], rank)
            return Slice(rows, columns, _rows_of_vocabulary(shape[0], rank.size) - sum(run.count for run in rows))
        case "qkv":
            return Slice(_qkv(spec, rank), columns)
        case "mlp_in":
            return Slice(_halves(shape[0], 2 if spec.gated_mlp else 1, unit, rank), columns)
        case "shared_in":
            return Slice(_halves(shape[0], 2, unit, rank), columns)
        case "out" if kind == "weight":
            heads = query_heads(spec, rank)
            return Slice((Run(0, shape[0]),), (Run(heads.start * spec.head_dim, heads.count * spec.head_dim),))
        case "mlp_out" | "shared_out" if kind == "weight":
            return Slice((Run(0, shape[0]),), (_share(shape[1], unit, rank.size, rank.rank),))
        case "experts_in":
            return Slice(_experts_in(spec, rank, unit), columns)
        case "experts_out":
            experts = experts_of(spec, rank)
            rows = (Run(experts.start * spec.hidden, experts.count * spec.hidden),)
            return Slice(rows, (_share(shape[1], unit, rank.group_size, rank.rank % rank.group_size),))
    return Slice((Run(0, shape[0]),), columns)


def is_held(name: str, rank: TensorRank) -> bool:
    """Whether the rank has any of the parameter `name`: a bias that is added after a sum counts once, on rank 0."""
    module, _, kind = name.rpartition(".")
    return rank.rank == 0 or kind != "bias" or module.rpartition(".")[2] not in _BEHIND_A_SUM


def query_heads(spec: ModelSpec, rank: TensorRank) -> Run:
    """The query heads that a rank computes."""
    count = spec.heads // rank.size
    return Run(rank.rank * count, count)


def key_heads(spec: ModelSpec, rank: TensorRank) -> Run:
    """The heads of keys and values that its queries read: where there are fewer than ranks, several hold the same."""
    if rank.size <= spec.kv_heads:
        count = spec.kv_heads // rank.size
        return Run(rank.rank * count, count)
    return Run(rank.rank * spec.kv_heads // rank.size, 1)


def experts_of(spec: ModelSpec, rank: TensorRank) -> Run:
    """The experts of which a rank holds all or a part; none where the model has none."""
    if spec.experts is None:
        return Run(0, 0)
    count = spec.experts.count // rank.expert
    return Run(rank.rank // rank.group_size * count, count)


def obstacle(spec: ModelSpec, size: int, expert: int = 1, unit: int = 1) -> str | None:
    """Why the parameters cannot be cut for so many ranks and groups of experts, in words; None if they can."""
    if size < 1 or expert < 1:
        return "degrees are at least 1"
    if spec.heads % size:
        return f"{spec.heads} heads cannot be divided among {size} ranks"
    if spec.kv_heads % size and size % spec.kv_heads:
        return (
            f"{size} ranks neither divide {spec.kv_heads} heads of keys and values nor are a multiple of them: "
            "the queries of some rank would need keys of two of its neighbours"
        )
    channels = spec.heads // size * spec.head_dim
    if size > 1 and channels % unit:
        return f"the {channels} channels of a rank's heads are no multiple of the group of {unit}"
    if spec.experts is None:
        if expert > 1:
            return "the model has no experts"
        return _inner_obstacle(spec.intermediate, size, unit)
    if spec.experts.count % expert:
        return f"{spec.experts.count} experts cannot be divided among {expert} groups of ranks"
    if size % expert:
        return f"{size} ranks cannot be divided into {expert} groups for the experts"
    shared = spec.experts.shared_intermediate
    return _inner_obstacle(spec.experts.intermediate, size // expert, unit) or (
        _inner_obstacle(shared, size, unit) if shared else None
    )


def _inner_obstacle(channels: int, parts: int, unit: int) -> str | None:
    blocks = -(-channels // unit)
    if blocks >= parts:
        return None
    return f"{channels} inner channels in blocks of {unit} are too few for {parts} ranks"


def _share(channels: int, unit: int, parts: int, index: int) -> Run:
    """Part `index` of channels that are dealt out in blocks of `unit`; parts differ by one block at most."""
    blocks = -(-channels // unit)
    begin = index * blocks // parts * unit
    end = min((index + 1) * blocks // parts * unit, channels)
    return Run(begin, end - begin)


def _rows_of_vocabulary(rows: int, size: int) -> int:
    """Of each rank: all have the same number, so that logits are gathered in equal parts. One rank needs no padding."""
    if size == 1:
        return rows
    return -(-rows // (size * VOCABULARY_UNIT)) * VOCABULARY_UNIT


def _vocabulary(rows: int, rank: TensorRank) -> tuple[Run, ...]:
    each = _rows_of_vocabulary(rows, rank.size)
    begin = min(rank.rank * each, rows)
    end = min(begin + each, rows)
    return (Run(begin, end - begin),) if end > begin else ()


def _qkv(spec: ModelSpec, rank: TensorRank) -> tuple[Run, ...]:
    """Rows of the merged projection: the rank's queries, then its keys, then its values."""
    queries, keys = query_heads(spec, rank), key_heads(spec, rank)
    starts = (queries.start, spec.heads + keys.start, spec.heads + spec.kv_heads + keys.start)
    counts = (queries.count, keys.count, keys.count)
    return _joined(Run(start * spec.head_dim, n * spec.head_dim) for start, n in zip(starts, counts, strict=True))


def _halves(rows: int, halves: int, unit: int, rank: TensorRank) -> tuple[Run, ...]:
    """The same inner channels of the gate and of what it multiplies, which lie one below the other."""
    each = rows // halves
    share = _share(each, unit, rank.size, rank.rank)
    return _joined(Run(half * each + share.start, share.count) for half in range(halves))


def _experts_in(spec: ModelSpec, rank: TensorRank, unit: int) -> tuple[Run, ...]:
    assert spec.experts is not None
    inner, held = spec.experts.intermediate, experts_of(spec, rank)
    share = _share(inner, unit, rank.group_size, rank.rank % rank.group_size)
    halves = range(2 * held.start, 2 * held.end)
    return _joined(Run(half * inner + share.start, share.count) for half in halves)


def _joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same, with neighbours made one."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].end == run.start:
            joined[-1] = Run(joined[-1].start, joined[-1].count + run.count)
        else:
            joined.append(run)
    return tuple(joined)
