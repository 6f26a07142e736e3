"""Every layout that a model's sizes, the machines and the wishes allow, laid out and predicted; and the best of them.

Pure. Tensor ranks stay inside a node unless they are asked for beyond it. Of layouts that are nearly as good as the
best, the one with the smallest replicas is taken: predictions are no better than that, and a small replica is lost
alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from cluster.planner.degrees import expert_degrees, size_of, why_not
from cluster.planner.layout import Layout, Plan, Preference, Problem
from cluster.planner.nodes import Slot, slots
from cluster.planner.replica import Cut, DoesNotFit, lay_out
from engine.parallel.slices import obstacle

NEARLY = 0.15
"""Share of the best by which a layout may fall short and still be taken for as good."""
USUAL_CONTEXT = 4096
"""Tokens that sequences are planned with where nobody says and the model is made for as many."""
SHORTEST_CONTEXT = 256


class Impossible(Exception):
    """A layout that the model or the machines rule out, whatever they hold."""


@dataclass(frozen=True, slots=True)
class Survey:
    """All layouts for one length of sequences."""

    plans: tuple[Plan, ...]
    shortages: tuple[str, ...]
    """Of the others, what those need that do not fit, fewest ranks and, of as many, most whole experts first."""
    obstacles: tuple[str, ...]
    """And what rules the rest out."""


def contexts(problem: Problem) -> Iterator[int]:
    """The lengths of sequences to plan for, until one fits."""
    context = problem.wishes.context
    if context is not None:
        yield context
        return
    context = min(USUAL_CONTEXT, problem.spec.max_position)
    yield context
    while context // 2 >= SHORTEST_CONTEXT:
        context //= 2
        yield context


def take_stock(problem: Problem, context: int) -> Survey:
    """Every layout within the wishes, planned or refused."""
    plans: list[Plan] = []
    shortages: list[tuple[Layout, str]] = []
    obstacles: list[str] = []
    cut = cache(lambda tensor, expert: Cut.of(problem, tensor, expert))
    for layout in _layouts(problem):
        try:
            plans += _place(problem, layout, context, cut)
        except DoesNotFit as failure:
            shortages.append((layout, str(failure)))
        except Impossible as failure:
            obstacles.append(str(failure))
    shortages.sort(key=lambda each: (each[0].ranks, -each[0].expert))
    return Survey(tuple(plans), tuple(text for _, text in shortages), tuple(obstacles))


def choose(plans: Sequence[Plan], prefer: Preference) -> Plan:
    """The one with the smallest replicas of those that are nearly as good as the best.

    Where one stream's latency is preferred, only those nearly as fast as the fastest are compared: of these, too, one
    that gives a fraction of the throughput is no bargain.
    """
    if prefer == "latency":
        fastest = min(plan.prediction.lone_token_seconds for plan in plans)
        plans = [plan for plan in plans if plan.prediction.lone_token_seconds <= (1 + NEARLY) * fastest]
    most = max(plan.tokens_per_second for plan in plans)
    near = [plan for plan in plans if plan.tokens_per_second >= (1 - NEARLY) * most]
    return min(near, key=lambda plan: (*size_of(plan.layout), -plan.tokens_per_second))


def _layouts(problem: Problem) -> Iterator[Layout]:
    """What is asked for, whether or not it can be; else whatever the model's sizes allow."""
    wishes = problem.wishes
    largest = max(node.accelerators for node in problem.nodes)
    is_asked = wishes.tensor is not None or wishes.expert is not None
    for tensor in [wishes.tensor] if wishes.tensor else range(1, largest + 1):
        for expert in [wishes.expert] if wishes.expert else expert_degrees(problem.spec, tensor):
            if is_asked or obstacle(problem.spec, tensor, expert, problem.form.unit) is None:
                yield from (Layout(tensor, pipeline, expert) for pipeline in _pipeline_degrees(problem, tensor))


def _pipeline_degrees(problem: Problem, tensor: int) -> Sequence[int]:
    if problem.wishes.pipeline is not None:
        return [problem.wishes.pipeline]
    # One at least, so that a degree of tensor ranks that is too large is refused and not passed over.
    return range(1, max(1, min(problem.spec.layers, len(slots(problem.nodes, tensor)))) + 1)


def _place(problem: Problem, layout: Layout, context: int, cut: Callable[[int, int], Cut]) -> list[Plan]:
    """The layout with each number of replicas that could be best. Raises Impossible, or DoesNotFit for even one.

    Replicas take the largest accelerators first and share one configuration, so the last of them decides what all
    have: with fewer replicas that may be more.
    """
    if reason := _impossible(problem, layout):
        raise Impossible(f"{layout}: {reason}")
    places, stages = slots(problem.nodes, layout.tensor), layout.pipeline
    groups = [places[start : start + stages] for start in range(0, len(places) - stages + 1, stages)]
    wanted = problem.wishes.replicas
    plans: list[Plan] = []
    for index in [wanted - 1] if wanted else _last_of_each_kind(groups):
        first_like_it = next(group for group in groups if _kind(group) == _kind(groups[index]))
        try:
            plans.append(lay_out(cut(layout.tensor, layout.expert), layout, first_like_it, context, index + 1))
        except DoesNotFit:
            if not plans:
                raise
            break
    return plans


def _kind(group: Sequence[Slot]) -> tuple[int, ...]:
    return tuple(slot.memory for slot in group)


def _last_of_each_kind(groups: Sequence[Sequence[Slot]]) -> list[int]:
    ends = [index for index in range(len(groups) - 1) if _kind(groups[index]) != _kind(groups[index + 1])]
    return [*ends, len(groups) - 1]


def _impossible(problem: Problem, layout: Layout) -> str | None:
    """What speaks against a layout before any byte is counted."""
    spec, replicas = problem.spec, problem.wishes.replicas or 1
    if reason := why_not(spec, layout, problem.form.unit):
        return reason
    for_all = "" if replicas == 1 else f" for {replicas} replicas"
    if layout.ranks * replicas > problem.num_accelerators:
        return f"it needs {layout.ranks * replicas} accelerators{for_all}"
    places, needed = len(slots(problem.nodes, layout.tensor)), layout.pipeline * replicas
    if places < needed:
        return f"it needs {needed} groups of {layout.tensor} accelerators{for_all}, and the nodes have {places}"
    return None
