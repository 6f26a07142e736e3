"""Predicted seconds: the formulas in their limits, and beside published measurements."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.form import Form
from cluster.planner.kinds import A100, H100
from cluster.planner.rates import Link
from cluster.planner.shares import shares
from cluster.planner.timing import (
    Clock,
    StageShape,
    Step,
    Traffic,
    all_reduce_seconds,
    decode_round,
    gather_seconds,
    predict,
    visible,
)
from engine.models.spec import ModelSpec
from tests.cluster.planner.models import GPT3_175B, LLAMA2_7B, LLAMA3_70B, MIXTRAL_8X7B

BF16 = Form("bfloat16")


def clock(spec: ModelSpec, tensor: int = 1, expert: int = 1, kind=A100) -> Clock:
    return Clock(spec, BF16, shares(spec, BF16, tensor, expert)[0], kind.rates)


def stages(layers: int, count: int) -> list[StageShape]:
    each = layers // count
    return [StageShape(each, first=i == 0, last=i == count - 1, crosses=False, next_is_near=True) for i in range(count)]


@given(st.floats(1, 1e9), st.integers(2, 64))
def test_a_sum_takes_both_halves_of_a_ring(num_bytes: float, ranks: int) -> None:
    link = Link(100e9, 0.0)
    assert gather_seconds(num_bytes, ranks, link) == pytest.approx(num_bytes / 100e9 * (ranks - 1) / ranks)
    assert all_reduce_seconds(num_bytes, ranks, link) == pytest.approx(2 * gather_seconds(num_bytes, ranks, link))
    # 1D weight-stationary (Pope et al., 2022): 2 B L E / bandwidth, however many ranks there are.
    assert all_reduce_seconds(num_bytes, 10**6, link) == pytest.approx(2 * num_bytes / 100e9, rel=1e-5)


def test_a_lone_decode_reads_every_weight_but_the_embeddings_once() -> None:
    (whole,) = stages(32, 1)
    step = clock(LLAMA2_7B).stage(whole, Step(1, 1, 0.0))
    read = 2 * (6_738_415_616 - 32000 * 4096)
    assert step.weights == pytest.approx(read / A100.rates.memory_bandwidth)
    assert step.bound == "memory" and step.wire == 0
    assert step.total == step.weights


def test_a_prompt_costs_two_operations_for_each_parameter_and_token() -> None:
    (whole,) = stages(80, 1)
    step = clock(LLAMA3_70B).stage(whole, Step(1024, 0, 0.0))
    layers = 70_553_706_496 - 2 * 128256 * 8192
    assert step.compute == pytest.approx(2 * layers * 1024 / A100.rates.flops, rel=1e-3)
    assert step.bound == "arithmetic"


def test_keys_and_values_are_read_once_for_each_sequence() -> None:
    (whole,) = stages(80, 1)
    step = clock(LLAMA3_70B).stage(whole, Step(16, 16, 1000.0))
    assert step.pages == pytest.approx(16 * 1000 * 327_680 / A100.rates.memory_bandwidth)


def test_windows_bound_what_is_read() -> None:
    assert visible(replace(LLAMA2_7B, layers=2, windows=(100, None)), 1000.0) == 550.0
    assert visible(LLAMA2_7B, 1000.0) == 1000.0


def test_a_lone_token_reads_the_experts_that_it_goes_to() -> None:
    (whole,) = stages(32, 1)
    experts = 32 * 8 * 3 * 4096 * 14336
    others = 46_702_792_704 - experts - 32000 * 4096
    one = clock(MIXTRAL_8X7B).stage(whole, Step(1, 1, 0.0))
    assert one.weights == pytest.approx(2 * (others + experts / 4) / A100.rates.memory_bandwidth)
    many = clock(MIXTRAL_8X7B).stage(whole, Step(256, 256, 0.0))
    assert many.weights == pytest.approx(2 * (others + experts) / A100.rates.memory_bandwidth)
    # Two of eight experts a token.
    assert many.compute == pytest.approx(2 * 256 * (others + experts / 4) / A100.rates.flops, rel=1e-3)


def test_whole_experts_are_slower_for_one_stream_and_hardly_for_many() -> None:
    whole, cut = clock(MIXTRAL_8X7B, 8, 8), clock(MIXTRAL_8X7B, 8, 1)
    (stage,) = stages(32, 1)
    one, many = Step(1, 1, 0.0), Step(128, 128, 0.0)
    assert whole.stage(stage, one).weights > 1.5 * cut.stage(stage, one).weights
    assert whole.stage(stage, many).weights == pytest.approx(cut.stage(stage, many).weights, rel=0.01)
    # Tokens are never spread evenly, and all ranks wait for the one that has most of them.
    assert 1 < whole.stage(stage, many).compute / cut.stage(stage, many).compute < 1.3


@pytest.mark.parametrize(("groups", "experts"), [(2, 10 / 7), (4, 8 / 7)])
def test_the_busiest_rank_reads_more_experts_than_its_share(groups: int, experts: float) -> None:
    ticks, (stage,) = clock(MIXTRAL_8X7B, groups, groups), stages(32, 1)
    share = ticks.share
    others = 32 * share.layer.read_bytes + share.after.read_bytes + share.head.read_bytes
    read = others + 32 * experts * 3 * 4096 * 14336 * 2
    assert ticks.stage(stage, Step(1, 1, 0.0)).weights == pytest.approx(read / A100.rates.memory_bandwidth)


def test_a_parallel_block_needs_one_sum_in_place_of_two() -> None:
    step, (stage,) = Step(64, 64, 0.0), stages(32, 1)
    serial = clock(LLAMA2_7B, 8).stage(stage, step).wire
    parallel = clock(replace(LLAMA2_7B, block="parallel"), 8).stage(stage, step).wire
    assert 0.5 < parallel / serial < 0.55


def test_a_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    traffic = Traffic(1000, 1000, 1024)
    even, uneven = stages(80, 4), stages(80, 4)
    uneven[1], uneven[2] = replace(uneven[1], layers=30), replace(uneven[2], layers=10)
    ticks = clock(LLAMA3_70B, 2)
    assert decode_round(ticks, uneven, 64, traffic)[0] > 1.3 * decode_round(ticks, even, 64, traffic)[0]
    # One sequence passes every stage, and fills none of the others meanwhile.
    alone, step = decode_round(ticks, even, 1, traffic)
    assert 3.7 * step.total < alone < 4.1 * step.total


def test_a_chunk_of_a_lone_prompt_waits_until_the_last_one_is_back() -> None:
    ticks, four = clock(LLAMA3_70B, 2), stages(80, 4)
    short = predict(ticks, four, 1, Traffic(1024, 8, 1024)).first_token_seconds
    long = predict(ticks, four, 1, Traffic(8 * 1024, 8, 1024)).first_token_seconds
    # Eight times as many chunks, each through all four stages, and more attention besides.
    assert 8 < long / short < 1.25 * 8


def test_prompts_of_several_fill_the_stages_and_that_of_one_does_not() -> None:
    ticks, four, traffic = clock(LLAMA3_70B, 2), stages(80, 4), Traffic(4096, 1, 1024)
    alone = predict(ticks, four, 1, traffic)
    seconds = alone.first_token_seconds + alone.lone_token_seconds
    assert alone.tokens_per_second == pytest.approx(1 / seconds)
    assert predict(ticks, four, 16, traffic).tokens_per_second > 3 * alone.tokens_per_second


# FasterTransformer's guide: GPT-3 175B on eight A100 of 80 GB, float16; milliseconds of a whole request.
@pytest.mark.parametrize(
    ("batch", "prompt", "output", "published"),
    [(1, 128, 8, 488.9), (8, 128, 8, 750.0), (16, 128, 8, 1037.0), (32, 128, 8, 1547.0), (1, 512, 32, 1720.0)],
)
def test_an_engine_of_2022_takes_no_less_than_predicted_and_about_twice_at_most(
    batch: int, prompt: int, output: int, published: float
) -> None:
    ticks, (whole,) = clock(GPT3_175B, 8), stages(96, 1)
    prefill = ticks.stage(whole, Step(batch * prompt, batch, prompt / 2)).total
    decode = ticks.stage(whole, Step(batch, batch, prompt + output / 2)).total
    predicted = 1e3 * (prefill + (output - 1) * decode)
    assert 0.45 < predicted / published < 1.1


def test_faster_accelerators_are_faster() -> None:
    (whole,) = stages(80, 1)
    for step in (Step(1, 1, 100.0), Step(1024, 1, 512.0)):
        old, new = (clock(LLAMA3_70B, 8, kind=kind).stage(whole, step).total for kind in (A100, H100))
        assert new < old
