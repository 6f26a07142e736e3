"""How layers are dealt out to stages where nobody says: what plans start from and replicas do by themselves. Pure."""

from cluster.planner.form import Form
from cluster.planner.shares import shares
from cluster.planner.stages import Layer, Room, split
from engine.models.spec import ModelSpec

DRAWN_SHARE = 0.5
"""Of the tokens that go through the layers, those that go through the head: of a prompt it is the last one alone, and
as many tokens are read as are written."""


def usual_layers(spec: ModelSpec, stages: int) -> tuple[int, ...]:
    """Of each stage, so that the slowest one has least arithmetic to do; where that does not go, the first ones have
    one more.

    Arithmetic is what a layer and the head are compared by because it is the model's alone, the same on every machine.
    It is counted, not timed: where steps of decodes wait for memory, each reads the whole head, which then weighs up to
    twice as much. A plan, which knows rates and room, may deal layers out otherwise (`parallel.layers`).
    """
    rooms = [Room(spec.layers, 0.0)] * (stages - 1) + [Room(spec.layers, DRAWN_SHARE * head_in_layers(spec))]
    return split(spec.layers, rooms, Layer(weight_bytes=1, page_bytes=0, seconds=1.0), range(1)).layers


def head_in_layers(spec: ModelSpec) -> float:
    """How many layers have as much arithmetic as the head has, for a token that goes through both."""
    (share,) = shares(spec, Form("bfloat16"), 1, 1)
    experts = 0.0 if spec.experts is None else share.layer.expert_macs * spec.experts.per_token / spec.experts.count
    return share.head.macs / (share.layer.macs + experts)
