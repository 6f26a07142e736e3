"""One replica in a given layout on given accelerators: whether it fits, what its ranks hold, how fast it is. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.planner.layout import Layout, Plan, Problem, Shard
from cluster.planner.nodes import Slot
from cluster.planner.shares import Share, shares
from cluster.planner.stages import Layer, NoRoom, Room, split
from cluster.planner.timing import Clock, StageShape, Traffic, busy_seconds, predict
from cluster.planner.usual import usual_layers
from cluster.planner.workspace import StepLimits, workspace_bytes
from engine.parallel.slices import experts_of, key_heads, query_heads


class DoesNotFit(Exception):
    """A layout that these accelerators cannot hold: says which rank needs what, and what there is."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A model, cut for so many tensor ranks, whatever its stages."""

    problem: Problem
    shares: tuple[Share, ...]
    limits: StepLimits

    @staticmethod
    def of(problem: Problem, tensor: int, expert: int) -> "Cut":
        """The degrees must have no obstacle."""
        spec, wishes = problem.spec, problem.wishes
        table = pages_of(spec.max_position, problem.accelerator.page_tokens)
        limits = StepLimits(wishes.batch_tokens, wishes.sequences, table)
        return Cut(problem, shares(spec, problem.form, tensor, expert), limits)

    @property
    def clock(self) -> Clock:
        largest = max(self.shares, key=lambda share: share.layer.num_bytes)
        return Clock(self.problem.spec, self.problem.form, largest, self.problem.accelerator.rates)

    @property
    def layer_bytes(self) -> int:
        """Of the rank that holds most."""
        return max(share.layer.num_bytes for share in self.shares)

    @property
    def page_bytes(self) -> int:
        """Of a page of one layer, on any rank."""
        return self.problem.accelerator.page_tokens * self.shares[0].layer_kv_bytes

    def workspace_bytes(self, share: Share, *, last: bool) -> int:
        return workspace_bytes(self.problem.spec, self.problem.form, share, self.limits, last=last)

    def end_bytes(self, shape: StageShape) -> int:
        """Of a stage without layers, on the rank that holds most."""
        return max(
            share.end_bytes(first=shape.first, last=shape.last) + self.workspace_bytes(share, last=shape.last)
            for share in self.shares
        )


def lay_out(cut: Cut, layout: Layout, slots: Sequence[Slot], context: int, replicas: int) -> Plan:
    """The plan of `replicas` replicas of which the tightest has these slots, one for each stage. Raises DoesNotFit.

    At least one sequence of `context` tokens must fit, as the scheduler demands of a pool.
    """
    problem, page_tokens = cut.problem, cut.problem.accelerator.page_tokens
    prompt = context // 2
    traffic = Traffic(prompt, context - prompt, problem.wishes.batch_tokens)
    empty = _empty_stages(slots)
    rooms, layer = _rooms(cut, empty, slots, traffic), _layer(cut, slots, traffic)
    needed, spare = pages_of(context, page_tokens), problem.accelerator.spare_pages
    try:
        counts = _deal(cut, rooms, layer, needed)
    except NoRoom:
        raise DoesNotFit(_shortage(cut, layout, slots, context)) from None
    stages = [replace(stage, layers=count) for stage, count in zip(empty, counts, strict=True)]
    pages = min(
        problem.wishes.sequences * cut.limits.table_pages,
        *(_pages(room, layer, count) - spare for room, count in zip(rooms, counts, strict=True)),
    )
    sequences = min(problem.wishes.sequences, pages // needed)
    return Plan(
        layout=layout,
        replicas=replicas,
        shards=tuple(_shards(cut, stages, slots, pages + spare)),
        pages=pages,
        page_tokens=page_tokens,
        kv_memory=pages * layout.tensor * problem.spec.layers * cut.page_bytes,
        context=context,
        prediction=predict(cut.clock, stages, sequences, traffic),
    )


def _deal(cut: Cut, rooms: Sequence[Room], layer: Layer, needed: int) -> tuple[int, ...]:
    """Layers of each stage, for sequences of `needed` pages: those of a replica that is told nothing, where no others
    leave room for more sequences; else, of the others, those whose slowest stage is fastest. Raises NoRoom."""
    spec, wishes, spare = cut.problem.spec, cut.problem.wishes, cut.problem.accelerator.spare_pages
    wanted = range(spare + needed, spare + wishes.sequences * needed + 1)
    sequences = (split(spec.layers, rooms, layer, wanted).pages - spare) // needed
    enough = spare + sequences * needed
    usual = usual_layers(spec, len(rooms))
    if all(layer.most(room.memory, enough) >= count for room, count in zip(rooms, usual, strict=True)):
        return usual
    return split(spec.layers, rooms, layer, range(enough, enough + 1)).layers


def pages_of(tokens: int, page_tokens: int) -> int:
    return -(-tokens // page_tokens)


def _empty_stages(slots: Sequence[Slot]) -> list[StageShape]:
    return [
        StageShape(
            layers=0,
            first=index == 0,
            last=index == len(slots) - 1,
            crosses=slot.crosses,
            next_is_near=set(slot.nodes) == set(slots[(index + 1) % len(slots)].nodes),
        )
        for index, slot in enumerate(slots)
    ]


def _rows(cut: Cut, num_stages: int) -> int:
    """Sequences of the decodes by which stages are balanced."""
    return max(1, cut.problem.wishes.sequences // num_stages)


def _usable(cut: Cut, slot: Slot) -> int:
    return int(slot.memory * cut.problem.wishes.memory_share)


def _rooms(cut: Cut, stages: Sequence[StageShape], slots: Sequence[Slot], traffic: Traffic) -> list[Room]:
    rows = _rows(cut, len(slots))
    return [
        Room(_usable(cut, slot) - cut.end_bytes(stage), busy_seconds(cut.clock, stage, rows, traffic))
        for stage, slot in zip(stages, slots, strict=True)
    ]


def _layer(cut: Cut, slots: Sequence[Slot], traffic: Traffic) -> Layer:
    alone = StageShape(1, first=False, last=False, crosses=slots[0].crosses, next_is_near=True)
    seconds = busy_seconds(cut.clock, alone, _rows(cut, len(slots)), traffic)
    return Layer(cut.layer_bytes, cut.page_bytes, seconds)


def _pages(room: Room, layer: Layer, layers: int) -> int:
    return (room.memory - layers * layer.weight_bytes) // (layers * layer.page_bytes)


def _shards(cut: Cut, stages: Sequence[StageShape], slots: Sequence[Slot], pages: int) -> list[Shard]:
    spec, found, begin = cut.problem.spec, [], 0
    for index, (stage, slot) in enumerate(zip(stages, slots, strict=True)):
        layers = range(begin, begin + stage.layers)
        begin = layers.stop
        for share, node in zip(cut.shares, slot.nodes, strict=True):
            found.append(
                Shard(
                    stage=index,
                    rank=share.rank,
                    node=node,
                    layers=layers,
                    query_heads=query_heads(spec, share.rank),
                    kv_heads=key_heads(spec, share.rank),
                    experts=experts_of(spec, share.rank),
                    weight_bytes=share.weight_bytes(len(layers), first=stage.first, last=stage.last),
                    kv_bytes=pages * len(layers) * cut.page_bytes,
                    workspace_bytes=cut.workspace_bytes(share, last=stage.last),
                    usable_bytes=_usable(cut, slot),
                )
            )
    return found


def _shortage(cut: Cut, layout: Layout, slots: Sequence[Slot], context: int) -> str:
    """What the ranks of an even split would need, and what the smallest accelerator has."""
    layers = -(-cut.problem.spec.layers // len(slots))
    # The last stage has the head and the largest workspace; with one stage it has the embeddings too.
    last = max(cut.shares, key=lambda share: share.head.num_bytes + share.layer.num_bytes)
    weights = last.weight_bytes(layers, first=len(slots) == 1, last=True)
    pages = pages_of(context, cut.problem.accelerator.page_tokens) + cut.problem.accelerator.spare_pages
    kv, workspace = pages * layers * cut.page_bytes, cut.workspace_bytes(last, last=True)
    smallest = min(slots, key=lambda slot: slot.memory)
    return (
        f"{layout}: a rank needs {gibibytes(weights + kv + workspace)} ({gibibytes(weights)} of weights, "
        f"{gibibytes(workspace)} of workspace, {gibibytes(kv)} for one sequence of {context} tokens), and an "
        f"accelerator of {smallest.nodes[0]} has {gibibytes(_usable(cut, smallest))} "
        f"({cut.problem.wishes.memory_share:.0%} of {gibibytes(smallest.memory)})"
    )


def gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
