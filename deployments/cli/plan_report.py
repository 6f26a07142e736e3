"""A plan as text for people and as JSON for programs. Decides nothing."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from cluster.planner.layout import Plan, Problem, Shard
from cluster.planner.nodes import describe
from deployments.cli.plan_serve import as_yaml
from engine.parallel.slices import Run

_COLUMNS = ("stage", "ranks", "node", "layers", "heads", "kv heads", "weights", "pages", "workspace", "sum", "usable")
_LEFT = ("ranks", "node")


def text(name: str, problem: Problem, plan: Plan, settings: Mapping[str, Any]) -> str:
    """What `manta plan` prints: sizes, the layout with every rank's bytes, predictions, reasons, other layouts, and the
    settings that make it so."""
    return "\n".join(
        [
            *_facts(name, problem),
            *(f"warning: {warning}" for warning in plan.warnings),
            "",
            f"layout: {plan.layout}, {_count(plan.replicas, 'replica')} of {_count(plan.layout.ranks, 'accelerator')}",
            *_table(problem, plan),
            "",
            *_capacity(plan),
            *_predictions(plan),
            "",
            "why:",
            *(f"  {reason}" for reason in plan.reasons),
            *_rivals(plan),
            "",
            *_settings(plan, settings),
        ]
    )


def as_json(name: str, problem: Problem, plan: Plan, settings: Mapping[str, Any]) -> str:
    """The same; sizes are bytes and times are seconds."""
    prediction = plan.prediction
    return json.dumps(
        {
            "model": name,
            "parameters": _num_parameters(problem),
            "nodes": [
                {"name": node.name, "accelerators": node.accelerators, "memory": node.memory} for node in problem.nodes
            ],
            "accelerator": problem.accelerator.name,
            "tensor_parallel": plan.layout.tensor,
            "pipeline_parallel": plan.layout.pipeline,
            "expert_parallel": plan.layout.expert,
            "replicas": plan.replicas,
            "ranks": [_rank(shard) for shard in plan.shards],
            "kv_pages": plan.pages,
            "page_tokens": plan.page_tokens,
            "kv_tokens": plan.kv_tokens,
            "context": plan.context,
            "sequences": plan.sequences,
            "first_token_seconds": prediction.first_token_seconds,
            "token_seconds": prediction.token_seconds,
            "lone_token_seconds": prediction.lone_token_seconds,
            "tokens_per_second": plan.tokens_per_second,
            "reasons": plan.reasons,
            "warnings": plan.warnings,
            "others": [
                {
                    "layout": str(rival.layout),
                    "replicas": rival.replicas,
                    "sequences": rival.sequences,
                    "tokens_per_second": rival.tokens_per_second,
                    "lone_token_seconds": rival.lone_token_seconds,
                }
                for rival in plan.rivals
            ],
            "serve": settings,
        },
        indent=2,
    )


def _rank(shard: Shard) -> dict[str, Any]:
    return {
        "stage": shard.stage,
        "tensor_rank": shard.rank.rank,
        "node": shard.node,
        "layers": [shard.layers.start, shard.layers.stop],
        "query_heads": [shard.query_heads.start, shard.query_heads.end],
        "kv_heads": [shard.kv_heads.start, shard.kv_heads.end],
        "experts": [shard.experts.start, shard.experts.end],
        "weight_bytes": shard.weight_bytes,
        "kv_bytes": shard.kv_bytes,
        "workspace_bytes": shard.workspace_bytes,
        "bytes": shard.num_bytes,
        "usable_bytes": shard.usable_bytes,
    }


def _num_parameters(problem: Problem) -> int:
    return sum(math.prod(shape) for shape in problem.spec.parameter_shapes().values())


def _facts(name: str, problem: Problem) -> Iterator[str]:
    spec, form, kind = problem.spec, problem.form, problem.accelerator
    experts = "" if spec.experts is None else f", {spec.experts.per_token} of {spec.experts.count} experts a token"
    kv = spec.layers * form.layer_kv_bytes(spec.kv_heads, spec.head_dim)
    yield (
        f"{name}: {_num_parameters(problem):,} parameters in {form.name}, {spec.layers} layers{experts}; "
        f"{kv:,} bytes of keys and values a token ({'int8' if form.int8_kv else form.dtype})"
    )
    yield f"nodes: {describe(problem.nodes)}"
    rates = kind.rates
    yield (
        f"rates: {rates.flops / 1e12:.4g} TFLOP/s, memory {rates.memory_bandwidth / 1e9:.4g} GB/s, links "
        f"{rates.in_node.bandwidth / 1e9:.4g} GB/s and {1e6 * rates.in_node.latency:.3g} us in a node, "
        f"{rates.between_nodes.bandwidth / 1e9:.4g} GB/s and {1e6 * rates.between_nodes.latency:.3g} us between nodes"
    )
    yield f"       {kind.name}: {kind.source}"


def _table(problem: Problem, plan: Plan) -> Iterator[str]:
    """A line for neighbouring ranks that hold the same number of bytes, of every stage."""
    with_experts = problem.spec.experts is not None
    columns = (*_COLUMNS[:6], "experts", *_COLUMNS[6:]) if with_experts else _COLUMNS
    rows: list[tuple[str, ...]] = [columns]
    for _, group in groupby(plan.shards, key=_alike):
        shards = list(group)
        first, last = shards[0], shards[-1]
        rows.append(
            (
                str(first.stage),
                _span(first.rank.rank, last.rank.rank),
                first.node,
                _span(first.layers.start, first.layers.stop - 1),
                str(first.query_heads.count),
                str(first.kv_heads.count),
                *([_experts(first.experts, plan)] if with_experts else []),
                *(f"{size:,}" for size in (first.weight_bytes, first.kv_bytes, first.workspace_bytes)),
                f"{first.num_bytes:,}",
                f"{first.usable_bytes:,}",
            )
        )
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    for row in rows:
        cells = zip(columns, row, widths, strict=True)
        yield "  " + "  ".join(c.ljust(w) if name in _LEFT else c.rjust(w) for name, c, w in cells).rstrip()
    yield "  bytes; usable is the share of an accelerator's memory that ranks may take"


def _alike(shard: Shard) -> tuple[object, ...]:
    sizes = (shard.weight_bytes, shard.kv_bytes, shard.workspace_bytes, shard.usable_bytes)
    return shard.stage, shard.node, sizes


def _experts(experts: Run, plan: Plan) -> str:
    cut = plan.layout.tensor // plan.layout.expert
    return str(experts.count) if cut == 1 else f"{experts.count} x 1/{cut}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _capacity(plan: Plan) -> Iterator[str]:
    yield (
        f"concurrency: {plan.pages:,} pages of {plan.page_tokens} tokens a replica hold {plan.kv_tokens:,} tokens: "
        f"{plan.sequences} sequences of {plan.context:,} tokens at once, {plan.replicas * plan.sequences} in all"
    )


def _predictions(plan: Plan) -> Iterator[str]:
    prediction = plan.prediction
    yield (
        f"predicted: {1e3 * prediction.first_token_seconds:.1f} ms to the first token after {plan.context // 2:,} of "
        f"prompt, {1e3 * prediction.token_seconds:.2f} ms between tokens of {plan.sequences} streams "
        f"({1e3 * prediction.lone_token_seconds:.2f} ms of one alone), {plan.tokens_per_second:,.0f} tokens/s in all"
    )


def _rivals(plan: Plan) -> Sequence[str]:
    if not plan.rivals:
        return ()
    lines = [
        f"  {rival.layout}, {_count(rival.replicas, 'replica')}: {rival.tokens_per_second:,.0f} tokens/s in all, "
        f"{rival.sequences} sequences a replica, {1e3 * rival.lone_token_seconds:.2f} ms a token alone"
        for rival in plan.rivals
    ]
    return ("", "other layouts that fit:", *lines)


def _settings(plan: Plan, settings: Mapping[str, Any]) -> Iterator[str]:
    yield "to serve it so, these settings in a file for `manta serve --config`, or as the args of a Serve config:"
    if len({shard.usable_bytes for shard in plan.shards}) > 1:
        nodes = [" and ".join(dict.fromkeys(s.node for s in g)) for _, g in groupby(plan.shards, key=lambda s: s.stage)]
        yield f"  # stage by stage on {', '.join(nodes)}: name a label of each in parallel.labels"
    yield from (f"  {line}" for line in as_yaml(settings).splitlines())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
