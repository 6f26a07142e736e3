"""Which degrees a model's sizes allow, whatever the machines. Pure."""

from collections.abc import Iterable, Sequence

from cluster.planner.layout import Layout
from engine.models.spec import ModelSpec
from engine.parallel.slices import obstacle

_NEAREST = 3


def size_of(layout: Layout) -> tuple[int, int, int]:
    """Fewer ranks first, then fewer stages, then experts that are cut rather than whole, which is never slower."""
    return layout.ranks, layout.pipeline, layout.expert


def expert_degrees(spec: ModelSpec, tensor: int) -> Sequence[int]:
    """That could go with so many tensor ranks."""
    if spec.experts is None:
        return [1]
    return [degree for degree in range(1, tensor + 1) if tensor % degree == 0 and spec.experts.count % degree == 0]


def why_not(spec: ModelSpec, layout: Layout, unit: int) -> str | None:
    """What speaks against a layout in the model's own sizes, in words; None if nothing does.

    `unit` input channels stay together when a layer is cut.
    """
    if reason := obstacle(spec, layout.tensor, layout.expert, unit):
        return reason
    if layout.pipeline > spec.layers:
        return f"{spec.layers} layers are too few for {layout.pipeline} stages"
    return None


def nearest(layouts: Iterable[Layout], asked: Layout) -> tuple[Layout, ...]:
    """Of these layouts, those closest to the one that is asked for; few."""
    return tuple(sorted(layouts, key=lambda each: (asked.distance(each), size_of(each)))[:_NEAREST])


def nearest_possible(spec: ModelSpec, asked: Layout, unit: int) -> tuple[Layout, ...]:
    """The layouts closest to the one that is asked for that the model's sizes allow."""
    stages = min(asked.pipeline, spec.layers)
    found = (
        Layout(tensor, stages, expert)
        for tensor in range(1, 2 * asked.tensor + 1)
        for expert in expert_degrees(spec, tensor)
    )
    return nearest((layout for layout in found if why_not(spec, layout, unit) is None), asked)
