"""How long steps take: a roofline for each stage, collectives by their bytes, pipelines by their slowest stage. Pure.

The formulas are Pope et al.'s (2022): two operations for each parameter and token; a step takes as long as the slower
of its arithmetic and of the weights and pages that it reads, plus what ranks say to each other; reduce-scatter and
all-gather of D bytes over K ranks take D / bandwidth * (K - 1) / K each, and a sum over the ranks is both. Overlap of
arithmetic and communication is not counted, nor is the host's own work between steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planner.experts import busiest_hit, busiest_load
from cluster.planner.form import Form
from cluster.planner.rates import Link, Rates
from cluster.planner.shares import Part, Share
from cluster.planner.workspace import LOGITS_BYTES
from engine.models.spec import ModelSpec

_FLOAT32_SHARE = 0.5
"""Of the rate of 16-bit products."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one batch asks for."""

    tokens: int
    sequences: int
    """Each reads its pages once, and has logits made for one token."""
    context: float
    """Tokens that a token of the batch sees, on average."""


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Where the time of a step goes, on the rank that takes longest."""

    compute: float
    weights: float
    pages: float
    wire: float

    @property
    def total(self) -> float:
        return max(self.compute, self.weights + self.pages) + self.wire

    @property
    def bound(self) -> str:
        """What a step waits for most."""
        if self.wire > max(self.compute, self.weights + self.pages):
            return "communication"
        return "arithmetic" if self.compute > self.weights + self.pages else "memory"


@dataclass(frozen=True, slots=True)
class StageShape:
    """A stage as far as its time is concerned."""

    layers: int
    first: bool
    last: bool
    crosses: bool
    """Whether its tensor ranks are on several nodes."""
    next_is_near: bool
    """Whether the next stage, of the last one the first, is on the same node."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Predicts steps of a model that is cut one way."""

    spec: ModelSpec
    form: Form
    share: Share
    """Of the rank that holds most."""
    rates: Rates

    def stage(self, stage: StageShape, step: Step) -> StepSeconds:
        """One step of one stage."""
        share, layers = self.share, stage.layers
        ends = (share.before if stage.first else Part()) + (share.after if stage.last else Part())
        macs = step.tokens * (layers * share.layer.macs + ends.macs) + layers * self._expert_macs(step.tokens)
        read = layers * (share.layer.read_bytes + self._expert_bytes(step.tokens)) + ends.read_bytes
        if stage.last:
            macs += step.sequences * share.head.macs
            read += share.head.read_bytes
        seen = visible(self.spec, step.context)
        attention = 4 * share.query_heads * self.spec.head_dim * step.tokens * seen * layers
        pages = step.sequences * seen * share.layer_kv_bytes * layers
        return StepSeconds(
            compute=2 * macs / self._product_rate() + attention / self.rates.flops,
            weights=read / self.rates.memory_bandwidth,
            pages=pages / self.rates.memory_bandwidth,
            wire=self._wire(stage, step),
        )

    def hop(self, stage: StageShape, step: Step) -> float:
        """From a stage to the next one: hidden states, each rank to its peer. After the last, only tokens."""
        link = self.rates.in_node if stage.next_is_near else self.rates.between_nodes
        hidden = step.tokens * self.spec.hidden * self.form.item_bytes
        return link.latency + (0 if stage.last else hidden / link.bandwidth)

    def _product_rate(self) -> float:
        if self.form.multiplies_int8:
            return self.rates.int8_ops
        return self.rates.flops * (_FLOAT32_SHARE if self.form.dtype == "float32" else 1.0)

    def _expert_macs(self, tokens: int) -> float:
        """Of the experts of a layer, on the rank to which most of the tokens go."""
        experts, groups = self.spec.experts, self.share.rank.expert
        if experts is None:
            return 0.0
        load = busiest_load(experts.count, experts.per_token, groups, tokens)
        return self.share.layer.expert_macs * load / (experts.count // groups)

    def _expert_bytes(self, tokens: int) -> float:
        """Of the experts of a layer that a step reads, on the rank that has most of those that any token goes to."""
        experts, groups = self.spec.experts, self.share.rank.expert
        if experts is None:
            return 0.0
        hit = busiest_hit(experts.count, experts.per_token, groups, tokens)
        return self.share.layer.expert_bytes * hit / (experts.count // groups)

    def _wire(self, stage: StageShape, step: Step) -> float:
        """A block in which attention and MLP are added up together needs one sum, the others two."""
        ranks = self.share.rank.size
        if ranks == 1:
            return 0.0
        link = self.rates.between_nodes if stage.crosses else self.rates.in_node
        hidden = step.tokens * self.spec.hidden * self.form.item_bytes
        sums = stage.layers * (1 if self.spec.block == "parallel" else 2) + (1 if stage.first else 0)
        seconds = sums * all_reduce_seconds(hidden, ranks, link)
        if stage.last:
            logits = step.sequences * self.share.vocabulary * ranks * LOGITS_BYTES
            seconds += gather_seconds(logits, ranks, link)
        return seconds


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a replica does, if its rates are right."""

    sequences: int
    """That decode at once in what follows."""
    first_token_seconds: float
    """Of a prompt that comes alone."""
    token_seconds: float
    """Between two tokens of a sequence, all sequences decoding."""
    lone_token_seconds: float
    """The same of one that is alone."""
    tokens_per_second: float
    """Output of all sequences, the time for their prompts counted."""
    slowest: StepSeconds
    """A step of the slowest stage, all sequences decoding."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked of a replica."""

    prompt: int
    output: int
    """Tokens of each sequence."""
    batch_tokens: int
    """Of a chunk of a prompt, at most."""

    @property
    def chunks(self) -> int:
        return -(-self.prompt // self.batch_tokens)


def predict(clock: Clock, stages: Sequence[StageShape], sequences: int, traffic: Traffic) -> Prediction:
    """A replica with all of its sequences decoding, and with one."""
    round_seconds, slowest = decode_round(clock, stages, sequences, traffic)
    alone, _ = decode_round(clock, stages, 1, traffic)
    first_token, occupied = _prefill(clock, stages, traffic, sequences)
    whole = traffic.output * round_seconds + sequences * occupied
    return Prediction(
        sequences=sequences,
        first_token_seconds=first_token,
        token_seconds=round_seconds,
        lone_token_seconds=alone,
        tokens_per_second=sequences * traffic.output / whole,
        slowest=slowest,
    )


def busy_seconds(clock: Clock, stage: StageShape, rows: int, traffic: Traffic) -> float:
    """How long one sequence of many keeps a stage busy, prompt and output, in decodes of so many sequences."""
    decode = clock.stage(stage, Step(rows, rows, traffic.prompt + traffic.output / 2)).total
    chunk = Step(min(traffic.prompt, traffic.batch_tokens), 1, traffic.prompt / 2)
    return traffic.output * decode / rows + traffic.chunks * clock.stage(stage, chunk).total


def decode_round(
    clock: Clock, stages: Sequence[StageShape], sequences: int, traffic: Traffic
) -> tuple[float, StepSeconds]:
    """Seconds until every sequence has one more token, and a step of the slowest stage.

    As many batches as stages are in flight, each of a part of the sequences: a stage then reads its weights once for
    each of them, and none waits but for the slowest.
    """
    batches = min(len(stages), sequences)
    rows = -(-sequences // batches)
    step = Step(rows, rows, traffic.prompt + traffic.output / 2)
    steps = [clock.stage(stage, step) for stage in stages]
    hops = [clock.hop(stage, step) if len(stages) > 1 else 0.0 for stage in stages]
    through = sum(each.total for each in steps) + sum(hops)
    slowest = max(steps, key=lambda each: each.total)
    busiest = max(each.total + hop for each, hop in zip(steps, hops, strict=True))
    return max(through, batches * busiest), slowest


def _prefill(clock: Clock, stages: Sequence[StageShape], traffic: Traffic, sequences: int) -> tuple[float, float]:
    """Seconds of a lone prompt, and how long each takes where there are so many sequences.

    The next chunk of a prompt starts when the last one is back: a sequence is in one batch at a time. Only the prompts
    of several fill the stages, which then take no longer than the slowest of them.
    """
    step = Step(min(traffic.prompt, traffic.batch_tokens), 1, traffic.prompt / 2)
    hops = [clock.hop(stage, step) if len(stages) > 1 else 0.0 for stage in stages]
    each = [clock.stage(stage, step).total + hop for stage, hop in zip(stages, hops, strict=True)]
    alone = traffic.chunks * sum(each)
    return alone, max(alone / sequences, traffic.chunks * max(each))


def visible(spec: ModelSpec, context: float) -> float:
    """Keys that a token sees of a context, averaged over layers with and without windows."""
    if not spec.windows:
        return context
    return sum(context if window is None else min(window, context) for window in spec.windows) / len(spec.windows)


def gather_seconds(num_bytes: float, ranks: int, link: Link) -> float:
    """An all-gather, or a reduce-scatter, of so many bytes in all."""
    return num_bytes / link.bandwidth * (ranks - 1) / ranks + link.latency


def all_reduce_seconds(num_bytes: float, ranks: int, link: Link) -> float:
    """A sum of so many bytes over the ranks, which all of them get."""
    return 2 * gather_seconds(num_bytes, ranks, link)
