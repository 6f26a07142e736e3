"""Where the ranks of a replica run: what is reserved for them together, and what is said when there is no room.

Pure: nodes and their resources come in, bundles of a placement group go out. A bundle is on one node by nature, so a
stage whose ranks share a node is one bundle. Where no node has room for a whole stage, each rank is a bundle, and
bundles are packed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import ParallelConfig, Strategy
from cluster.planner.layout import Layout

_NEAREST = 3
_EPSILON = 1e-9

Amounts = Mapping[str, float]


class NoRoom(Exception):
    """The cluster has no room for so many ranks: one line that says what is asked, what there is and what would fit."""


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A living node, as Ray counts it."""

    name: str
    """Its address."""
    free: Amounts
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Bundles:
    """What a placement group is made of."""

    resources: tuple[dict[str, float], ...]
    labels: tuple[dict[str, str], ...]
    """Parallel to the resources: what the node must have."""
    strategy: Strategy

    def of_rank(self, rank: int, ranks: int) -> int:
        """The bundle that a rank is in."""
        return bundle_of(rank, ranks, len(self.resources))


def bundle_of(rank: int, ranks: int, bundles: int) -> int:
    """The bundle of a rank: bundles are stages or ranks, and ranks are counted stage after stage."""
    return rank * bundles // ranks


def lay_bundles(
    config: ParallelConfig, each: Amounts, nodes: Sequence[NodeRoom], copies: int = 1, *, totals: bool = False
) -> Bundles:
    """The bundles of each of so many replicas whose ranks take `each`. `totals`: what is said to be free of the nodes
    is all that they have.

    With no node known nothing is refused: stages are then taken to fit. Raises NoRoom.
    """
    candidates = (_by_stage(config, each), _by_rank(config, each))
    if not nodes:
        return candidates[0]
    for bundles in candidates:
        if fits(bundles, nodes, copies):
            return bundles
    raise NoRoom(refusal(config, each, nodes, copies, totals=totals))


def _by_stage(config: ParallelConfig, each: Amounts) -> Bundles:
    stage = {name: amount * config.tensor for name, amount in each.items()}
    strategy: Strategy = "SPREAD" if config.pipeline > 1 else "PACK"
    return Bundles(
        (stage,) * config.pipeline,
        tuple(_labels(config, index) for index in range(config.pipeline)),
        strategy if config.strategy == "auto" else config.strategy,
    )


def _by_rank(config: ParallelConfig, each: Amounts) -> Bundles:
    return Bundles(
        (dict(each),) * config.ranks,
        tuple(_labels(config, rank // config.tensor) for rank in range(config.ranks)),
        "PACK" if config.strategy == "auto" else config.strategy,
    )


def _labels(config: ParallelConfig, stage: int) -> dict[str, str]:
    if not config.labels:
        return {}
    return dict(config.labels[stage if len(config.labels) > 1 else 0])


def fits(bundles: Bundles, nodes: Sequence[NodeRoom], copies: int = 1) -> bool:
    """Whether all bundles of so many replicas find a node: those with least choice first, each on the node with most
    room left."""
    left = [dict(node.free) for node in nodes]
    return all(_place(bundles, nodes, left) for _ in range(copies))


def _place(bundles: Bundles, nodes: Sequence[NodeRoom], left: list[dict[str, float]]) -> bool:
    """Takes the bundles of one replica from what is left; whether it was enough."""
    wanted = sorted(
        zip(bundles.resources, bundles.labels, strict=True),
        key=lambda bundle: sum(_has(node, bundle[1]) for node in nodes),
    )
    if bundles.strategy == "STRICT_PACK":
        together = {name: value for labels in bundles.labels for name, value in labels.items()}
        wanted = [(_sum(bundles.resources), together)]
    able = set(range(len(nodes)))
    for resources, labels in wanted:
        choice = [index for index in able if _has(nodes[index], labels) and _holds(left[index], resources)]
        if not choice:
            return False
        chosen = max(choice, key=lambda index: min((left[index].get(name, 0.0) for name in resources), default=0.0))
        for name, amount in resources.items():
            left[chosen][name] = left[chosen].get(name, 0.0) - amount
        if bundles.strategy == "STRICT_SPREAD":
            able.remove(chosen)
    return True


def refusal(
    config: ParallelConfig, each: Amounts, nodes: Sequence[NodeRoom], copies: int = 1, *, totals: bool = False
) -> str:
    """What is asked, what is free or there at all, and where, and the nearest layouts for which there is room."""
    asked = Layout(config.tensor, config.pipeline, config.expert)
    wish = f"{asked} is {_count(config.ranks, 'rank')} of {_amounts(each)} each"
    if copies > 1:
        wish = f"{copies} replicas are asked for, and {wish}"
    if config.strategy.startswith("STRICT"):
        wish += f", placed {config.strategy}"
    if config.labels:
        wish += f", on nodes with {' or '.join(map(_label_text, dict.fromkeys(map(_frozen, config.labels))))}"
    there = "; ".join(f"{node.name} has {_amounts(node.free, each)}" for node in nodes)
    close = nearest(config, each, nodes, copies)
    nothing = "not even one rank fits" if copies == 1 else "not even one rank of each fits"
    works = f"nearest layouts that fit: {', '.join(map(str, close))}" if close else nothing
    return f"there is no room: {wish}. {'In all' if totals else 'Free'}: {there}; {works}"


def nearest(config: ParallelConfig, each: Amounts, nodes: Sequence[NodeRoom], copies: int = 1) -> tuple[Layout, ...]:
    """The layouts closest to the one asked for that fit. A model that can be cut finer can be cut into these."""
    asked = Layout(config.tensor, config.pipeline, config.expert)
    found = []
    for tensor in _divisors(config.tensor):
        for pipeline in range(1, config.pipeline + 1):
            expert = next(expert for expert in _divisors(config.expert) if tensor % expert == 0)
            degrees = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "labels": config.labels[:pipeline]}
            less = config.model_copy(update=degrees)
            if any(fits(bundles, nodes, copies) for bundles in (_by_stage(less, each), _by_rank(less, each))):
                found.append(Layout(tensor, pipeline, expert))
    return tuple(sorted(found, key=lambda layout: (asked.distance(layout), -layout.ranks))[:_NEAREST])


def _divisors(degree: int) -> list[int]:
    """Largest first."""
    return [part for part in range(degree, 0, -1) if degree % part == 0]


def _has(node: NodeRoom, labels: Mapping[str, str]) -> bool:
    """Whether a node has these labels. Selectors that Ray alone understands, like "in(a,b)", are taken to match."""
    return all(
        "(" in value or value.startswith("!") or node.labels.get(name) == value for name, value in labels.items()
    )


def _holds(free: Amounts, wanted: Amounts) -> bool:
    return all(free.get(name, 0.0) + _EPSILON >= amount for name, amount in wanted.items())


def _sum(parts: Sequence[Amounts]) -> dict[str, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in {name for part in parts for name in part}}


def _amounts(amounts: Amounts, only: Amounts | None = None) -> str:
    names = amounts if only is None else only
    return " and ".join(f"{amounts.get(name, 0.0):g} {name}" for name in names) or "nothing"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _frozen(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def _label_text(labels: tuple[tuple[str, str], ...]) -> str:
    return " and ".join(f"{name}={value}" for name, value in labels) or "any labels"
