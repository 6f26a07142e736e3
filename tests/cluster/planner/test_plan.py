"""Whole plans: the bytes of known models, layouts that an expert would choose, and what never happens."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.planner.form import Form
from cluster.planner.kinds import A100, CPU, H100
from cluster.planner.layout import Layout, Plan, Problem, Wishes
from cluster.planner.nodes import Node, parse_nodes
from cluster.planner.plan import NoLayout, plan
from cluster.planner.survey import take_stock
from cluster.planner.usual import usual_layers
from engine.models.spec import ExpertsSpec, ModelSpec
from tests.cluster.planner.models import GPT3_175B, LLAMA2_7B, LLAMA3_70B, LLAMA31_405B, LLAMA32_1B, MIXTRAL_8X7B

BF16 = Form("bfloat16")
MIB = 2**20


def problem(spec: ModelSpec, nodes: str, form: Form = BF16, **wishes: object) -> Problem:
    return Problem(spec, form, parse_nodes(nodes), H100, Wishes(**wishes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [(LLAMA2_7B, 6_738_415_616), (LLAMA3_70B, 70_553_706_496), (MIXTRAL_8X7B, 46_702_792_704)],
)
def test_one_rank_holds_the_published_number_of_parameters(spec: ModelSpec, parameters: int) -> None:
    (shard,) = plan(problem(spec, "1x200GiB")).shards
    assert shard.weight_bytes == 2 * parameters
    assert shard.layers == range(spec.layers)


def test_tensor_ranks_of_llama_hold_equal_shares_and_all_norms() -> None:
    shards = plan(problem(LLAMA2_7B, "8x80GiB", tensor=8, pipeline=1)).shards
    norms = 2 * (2 * 32 + 1) * 4096
    whole = 2 * 6_738_415_616
    assert {shard.weight_bytes for shard in shards} == {(whole - norms) // 8 + norms}
    assert {shard.query_heads.count for shard in shards} == {shard.kv_heads.count for shard in shards} == {4}


def test_pages_are_counted_to_the_byte() -> None:
    found = plan(problem(LLAMA3_70B, "8x80GiB", tensor=4, pipeline=2))
    for shard in found.shards:
        token = len(shard.layers) * 2 * 2 * 128 * 2  # keys and values of 2 heads of 128 in 2 bytes
        assert shard.kv_bytes == (found.pages + 1) * 256 * token
    assert found.kv_tokens == 256 * found.pages
    assert found.sequences == min(128, found.kv_tokens // 4096)


def test_ranks_beyond_the_heads_of_keys_hold_copies() -> None:
    found = plan(problem(LLAMA3_70B, "16x80GiB", tensor=16, pipeline=1))
    assert [shard.kv_heads.start for shard in found.shards] == [rank // 2 for rank in range(16)]
    assert any("8 heads of keys and values for 16 ranks" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("spec", "nodes", "expected"),
    [
        # Fits on one: copies, rather than ranks that wait for each other.
        (LLAMA2_7B, "1x80GiB", {(Layout(1, 1), 1)}),
        (LLAMA2_7B, "8x80GiB", {(Layout(1, 1), 8)}),
        (LLAMA2_7B, "8*8x80GiB", {(Layout(1, 1), 64)}),
        # Fits in a node: tensor ranks inside it.
        (LLAMA2_7B, "2x12GiB", {(Layout(2, 1), 1)}),
        (LLAMA3_70B, "8x80GiB", {(Layout(4, 1), 2), (Layout(8, 1), 1)}),
        (LLAMA3_70B, "4x80GiB", {(Layout(4, 1), 1)}),
        (LLAMA3_70B, "8*8x80GiB", {(Layout(4, 1), 16), (Layout(8, 1), 8)}),
        # Does not: stages between nodes, tensor ranks inside each.
        (LLAMA3_70B, "4*2x48GiB", {(Layout(2, 2), 2), (Layout(2, 4), 1)}),
        (LLAMA3_70B, "2*4x24GiB", {(Layout(4, 2), 1)}),
        (LLAMA31_405B, "2*8x80GiB", {(Layout(8, 2), 1)}),
        # No two accelerators on a node: stages alone.
        (LLAMA3_70B, "8*1x40GiB", {(Layout(1, stages), 1) for stages in (5, 6, 7, 8)}),
    ],
)
def test_layouts_are_those_of_an_expert(spec: ModelSpec, nodes: str, expected: set[tuple[Layout, int]]) -> None:
    found = plan(problem(spec, nodes))
    assert (found.layout, found.replicas) in expected


@pytest.mark.parametrize("prefer", ["throughput", "latency"])
@pytest.mark.parametrize("nodes", ["2x80GiB", "8x80GiB", "8x24GiB"])
def test_experts_are_cut_as_no_rank_then_waits_for_a_busier_one(nodes: str, prefer: str) -> None:
    found = plan(problem(MIXTRAL_8X7B, nodes, prefer=prefer))
    assert found.layout.expert == 1 and found.layout.pipeline == 1
    assert {shard.experts.count for shard in found.shards} == {8}
    whole = plan(problem(MIXTRAL_8X7B, nodes, tensor=found.layout.tensor, pipeline=1, expert=2))
    assert found.prediction.lone_token_seconds < whole.prediction.lone_token_seconds


def test_experts_are_whole_if_asked_for() -> None:
    found = plan(problem(MIXTRAL_8X7B, "8x80GiB", tensor=8, pipeline=1, expert=8))
    held = [expert for shard in found.shards for expert in range(shard.experts.start, shard.experts.end)]
    assert held == list(range(8))


def test_more_ranks_than_experts_cut_them() -> None:
    found = plan(problem(MIXTRAL_8X7B, "16x24GiB", tensor=16, pipeline=1, expert=8))
    assert [shard.experts.start for shard in found.shards] == [rank // 2 for rank in range(16)]
    whole = plan(problem(MIXTRAL_8X7B, "16x24GiB", tensor=16, pipeline=1, expert=1))
    assert sum(s.weight_bytes for s in found.shards) == sum(s.weight_bytes for s in whole.shards)


def test_latency_is_bought_with_more_ranks() -> None:
    fast = plan(problem(LLAMA2_7B, "8x80GiB", prefer="latency"))
    many = plan(problem(LLAMA2_7B, "8x80GiB"))
    assert fast.layout.tensor > many.layout.tensor
    assert fast.prediction.lone_token_seconds < many.prediction.lone_token_seconds / 2
    assert fast.layout.pipeline == 1


def test_latency_is_not_bought_with_throughput_that_costs_none() -> None:
    found = plan(problem(LLAMA3_70B, "8*1x40GiB", prefer="latency"))
    for rival in found.rivals:
        if rival.lone_token_seconds <= 1.1 * found.prediction.lone_token_seconds:
            assert rival.tokens_per_second <= 1.2 * found.tokens_per_second, rival


@pytest.mark.parametrize(
    ("spec", "nodes", "wishes"),
    [
        (LLAMA3_70B, "2*8x24GiB", {"tensor": 8, "pipeline": 2}),
        (LLAMA31_405B, "2*8x80GiB", {"tensor": 8, "pipeline": 2}),
        (replace(LLAMA2_7B, vocab_size=128256, kv_heads=8), "4x80GiB", {"tensor": 1, "pipeline": 4}),
        # A head as large as four layers, which decodes wait for longer than its arithmetic takes.
        (LLAMA32_1B, "2x80GiB", {"tensor": 1, "pipeline": 2}),
    ],
)
def test_stages_have_the_layers_that_replicas_deal_out_by_themselves(
    spec: ModelSpec, nodes: str, wishes: dict[str, int]
) -> None:
    found = plan(problem(spec, nodes, **wishes))
    assert found.layers == usual_layers(spec, found.layout.pipeline)


def test_layers_are_dealt_out_otherwise_where_that_makes_room_for_more_sequences() -> None:
    spec, wishes = replace(LLAMA2_7B, vocab_size=128256, kv_heads=8), {"tensor": 1, "pipeline": 2}
    few = plan(problem(spec, "2*1x12GiB", sequences=4, **wishes))
    assert few.sequences == 4 and few.layers == usual_layers(spec, 2) == (17, 15)
    many = plan(problem(spec, "2*1x12GiB", **wishes))
    assert many.sequences < 128 and many.layers == (16, 16)


def test_what_caps_the_number_of_sequences_is_said() -> None:
    capped = plan(problem(LLAMA3_70B, "8x80GiB", tensor=8, pipeline=1))
    assert capped.sequences == 128
    (reason,) = [reason for reason in capped.reasons if "--max-sequences" in reason]
    assert f"its pages would hold {capped.kv_tokens // 4096}" in reason
    tight = plan(problem(LLAMA3_70B, "2x80GiB"))
    assert tight.sequences < 128 and not any("--max-sequences" in reason for reason in tight.reasons)


def test_a_slow_link_makes_tensor_ranks_slower() -> None:
    given = problem(LLAMA3_70B, "8x80GiB", tensor=8, pipeline=1)
    slow = replace(H100, rates=replace(H100.rates, in_node=H100.rates.between_nodes))
    assert plan(replace(given, accelerator=slow)).tokens_per_second < plan(given).tokens_per_second


def test_small_nodes_do_not_shrink_the_pools_of_large_ones_unless_that_pays() -> None:
    mixed = plan(problem(LLAMA2_7B, "a=8x80GiB,b=1x15GiB"))
    assert (mixed.layout, mixed.replicas) == (Layout(1, 1), 8)
    assert mixed.pages == plan(problem(LLAMA2_7B, "8x80GiB")).pages
    assert {shard.node for shard in mixed.shards} == {"a"}


def test_stages_on_nodes_of_different_memory_hold_what_fits() -> None:
    found = plan(problem(LLAMA3_70B, "a=2x80GiB,b=2x48GiB", tensor=2, pipeline=2))
    first, second = ({len(s.layers) for s in found.shards if s.stage == stage} for stage in (0, 1))
    assert min(first) > max(second)
    assert [shard.node for shard in found.shards] == ["a", "a", "b", "b"]


def test_tensor_ranks_cross_nodes_only_if_they_are_asked_to() -> None:
    found = plan(problem(LLAMA2_7B, "4*2x80GiB", tensor=8, pipeline=1))
    assert [shard.node for shard in found.shards] == [f"node{1 + rank // 2}" for rank in range(8)]
    assert any("between nodes, as asked for" in reason for reason in found.reasons)
    for unasked in take_stock(problem(LLAMA2_7B, "4*2x80GiB"), 4096).plans:
        stages = {shard.stage for shard in unasked.shards}
        assert all(len({s.node for s in unasked.shards if s.stage == stage}) == 1 for stage in stages)


def test_quantized_weights_leave_more_room() -> None:
    full = plan(problem(LLAMA2_7B, "1x24GiB", replicas=1))
    eight = plan(problem(LLAMA2_7B, "1x24GiB", Form("bfloat16", "w8a8"), replicas=1))
    four = plan(problem(LLAMA2_7B, "1x24GiB", Form("bfloat16", "w4a16", group=128), replicas=1))
    assert full.sequences < eight.sequences < four.sequences


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            problem(LLAMA2_7B, "8x80GiB", tensor=3),
            [
                "tensor parallel 3 cannot be",
                "32 heads cannot be divided among 3 ranks",
                "8 x 80 GiB",
                "nearest layouts that work: TP4 x PP1, TP2 x PP1",
            ],
        ),
        (
            problem(LLAMA2_7B, "8x80GiB", tensor=16),
            ["tensor parallel 16 cannot be", "it needs 16 accelerators", "there are 8 accelerators", "TP8 x PP1"],
        ),
        (
            problem(LLAMA2_7B, "64x80GiB", pipeline=40),
            ["pipeline parallel 40 cannot be", "32 layers are too few for 40 stages", "TP1 x PP32"],
        ),
        (
            problem(LLAMA2_7B, "a=3x80GiB,b=1x80GiB", tensor=2, pipeline=2),
            ["it needs 2 groups of 2 accelerators, and the nodes have 1", "a: 3 x 80 GiB, b: 1 x 80 GiB"],
        ),
        (
            problem(LLAMA2_7B, "8x80GiB", replicas=9),
            ["replicas 9 cannot be", "it needs 9 accelerators for 9 replicas", "TP1 x PP1"],
        ),
        (problem(LLAMA2_7B, "8x80GiB", tensor=2, expert=2), ["the model has no experts", "TP2 x PP1"]),
        (problem(MIXTRAL_8X7B, "8x80GiB", tensor=8, expert=3), ["8 experts cannot be divided among 3 groups"]),
        (
            problem(LLAMA3_70B, "1x80GiB"),
            [
                "TP1 x PP1: a rank needs",
                "131.42 GiB of weights",
                "has 72.00 GiB (90% of 80.00 GiB)",
                "with quantization w8a8 TP1 x PP1 works here",
                "with 2 times these nodes TP",
            ],
        ),
        (
            problem(LLAMA2_7B, "1x16GiB", context=4096),
            ["for one sequence of 4096 tokens", "sequences of 2048 tokens work here"],
        ),
        (problem(LLAMA2_7B, "1x80GiB", context=5000), ["the model is made for at most 4096"]),
        (
            problem(LLAMA2_7B, "8x80GiB", Form("bfloat16", "w4a16", group=128), tensor=32),
            ["it needs 32 accelerators"],
        ),
        (
            problem(replace(LLAMA2_7B, intermediate=11040), "1x80GiB", Form("bfloat16", "w4a16", group=64)),
            ["quantization w4a16: 11040 input channels are no multiple of the group of 64", "a group of 32 fits"],
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(given: Problem, said: list[str]) -> None:
    with pytest.raises(NoLayout) as refused:
        plan(given)
    message = str(refused.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_the_layouts_that_are_offered_work() -> None:
    with pytest.raises(NoLayout) as refused:
        plan(problem(LLAMA3_70B, "2*8x80GiB", tensor=3, pipeline=2))
    assert refused.value.nearest
    for layout in refused.value.nearest:
        found = plan(problem(LLAMA3_70B, "2*8x80GiB", tensor=layout.tensor, pipeline=layout.pipeline))
        assert found.layout == layout


def test_sequences_get_shorter_where_the_memory_holds_no_longer_ones() -> None:
    found = plan(problem(LLAMA2_7B, "1x16GiB"))
    assert found.context == 2048
    assert any("longer ones do not fit" in reason for reason in found.reasons)


# -- whatever the model and the machines -------------------------------------------------------------------------------


@st.composite
def small_models(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    experts = ExpertsSpec(draw(st.sampled_from([2, 4, 6])), 2, draw(st.integers(16, 64)), True)
    return replace(
        LLAMA2_7B,
        vocab_size=draw(st.integers(50, 4000)),
        hidden=64,
        layers=draw(st.integers(1, 9)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        head_dim=16,
        intermediate=draw(st.integers(16, 300)),
        max_position=draw(st.sampled_from([256, 1024])),
        tied_embeddings=draw(st.booleans()),
        experts=draw(st.sampled_from([None, experts])),
    )


FORMS = st.sampled_from(
    [Form("bfloat16"), Form("float32"), Form("bfloat16", "w8a8", int8_kv=True), Form("bfloat16", "fp8")]
)
KINDS = st.sampled_from([A100, CPU])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    nodes = tuple(
        Node(f"n{index}", draw(st.integers(1, 4)), draw(st.integers(1, 40)) * MIB)
        for index in range(draw(st.integers(1, 3)))
    )
    wishes = Wishes(
        context=draw(st.sampled_from([None, 64, 256])), sequences=draw(st.integers(1, 16)), batch_tokens=128
    )
    return Problem(draw(small_models()), draw(FORMS), nodes, draw(KINDS), wishes)


def all_plans(given: Problem) -> tuple[Plan, ...]:
    return take_stock(given, given.wishes.context or 256).plans


@settings(max_examples=60)
@given(problems())
def test_no_rank_ever_holds_more_than_its_accelerator(given: Problem) -> None:
    memory = {node.name: node.memory for node in given.nodes}
    for found in all_plans(given):
        for shard in found.shards:
            assert shard.num_bytes <= shard.usable_bytes <= memory[shard.node]
        assert found.sequences >= 1
        assert found.kv_tokens >= found.sequences * found.context
        assert found.replicas * found.layout.ranks <= given.num_accelerators


@settings(max_examples=60)
@given(problems())
def test_every_layer_is_on_one_stage_and_every_byte_on_some_rank(given: Problem) -> None:
    whole = sum(
        given.form.weight_bytes(name, shape, given.spec) for name, shape in given.spec.parameter_shapes().items()
    )
    for found in all_plans(given):
        assert len(found.shards) == found.layout.ranks
        first = [shard for shard in found.shards if shard.rank.rank == 0]
        assert [layer for shard in first for layer in shard.layers] == list(range(given.spec.layers))
        held = sum(shard.weight_bytes for shard in found.shards)
        # A part may have sizes that 8-bit floats know where the whole has not.
        if given.form.conversion != "fp8" or found.layout.tensor == 1:
            assert held >= whole
        if found.layout.tensor == 1 and not (given.spec.tied_embeddings and found.layout.pipeline > 1):
            assert held == whole


@settings(max_examples=60)
@given(problems(), st.integers(0, 30), st.data())
def test_more_memory_never_means_fewer_sequences(given: Problem, more: int, data: st.DataObject) -> None:
    plans = all_plans(given)
    assume(plans)
    small = data.draw(st.sampled_from(plans))
    layout = small.layout
    wishes = replace(
        given.wishes,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        expert=layout.expert,
        replicas=small.replicas,
        context=small.context,
    )
    nodes = tuple(replace(node, memory=node.memory + more * MIB) for node in given.nodes)
    large = plan(replace(given, nodes=nodes, wishes=wishes))
    assert large.layout == layout
    assert large.sequences >= small.sequences


@settings(max_examples=60)
@given(problems(), st.data())
def test_degrees_that_fit_are_obeyed(given: Problem, data: st.DataObject) -> None:
    plans = all_plans(given)
    assume(plans)
    layout = data.draw(st.sampled_from(plans)).layout
    names = data.draw(st.sets(st.sampled_from(["tensor", "pipeline", "expert"])))
    wished = {name: getattr(layout, name) for name in names}
    context = given.wishes.context or 256
    found = plan(replace(given, wishes=replace(given.wishes, **wished, context=context)))
    assert {name: getattr(found.layout, name) for name in names} == wished


@settings(max_examples=40)
@given(problems(), st.sampled_from([None, 1, 2, 3, 5]), st.sampled_from([None, 1, 2, 7]))
def test_there_is_a_plan_or_a_reason(given: Problem, tensor: int | None, pipeline: int | None) -> None:
    asked = replace(given, wishes=replace(given.wishes, tensor=tensor, pipeline=pipeline))
    try:
        found = plan(asked)
    except NoLayout as refused:
        assert str(refused).count("; ") >= 2, "what fails, what there is, and what would work"
    else:
        assert tensor in (None, found.layout.tensor) and pipeline in (None, found.layout.pipeline)
        assert all(found.reasons) and found.prediction.tokens_per_second > 0


def test_a_large_cluster_is_planned_in_seconds() -> None:
    found = plan(problem(LLAMA31_405B, "8*8x80GiB"))
    assert found.replicas * found.layout.ranks <= 64
    assert plan(problem(GPT3_175B, "8*8x80GiB")).layout.tensor <= 8
