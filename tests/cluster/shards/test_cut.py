"""How a model is cut into ranks: every layer is somewhere, once, and no rank is asked for more than it has room for."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ParallelConfig
from cluster.planner.usual import DRAWN_SHARE, head_in_layers
from cluster.shards.cut import check_degrees, places_of, plan_group
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.models.directory import channel_unit, load_spec
from engine.models.tiny import PATH
from engine.parallel.place import Place, RankFacts
from engine.parallel.slices import TensorRank
from tests.cluster.planner import models

FACTS = RankFacts(100, 16, 16 * 512, 10**6, 2048, 1000, (2,), b"x")


@given(tensor=st.integers(1, 4), stages=st.integers(1, 8), more=st.integers(0, 30), vocabulary=st.integers(1, 300_000))
def test_every_layer_is_in_one_stage_and_no_cut_has_a_faster_slowest_one(
    tensor: int, stages: int, more: int, vocabulary: int
) -> None:
    layers = stages + more
    spec = replace(models.LLAMA2_7B, layers=layers, vocab_size=vocabulary)
    places = places_of(ParallelConfig(tensor=tensor, pipeline=stages), spec)
    assert [place.rank for place in places] == list(range(tensor * stages))
    assert [place.answers for place in places] == [rank == (stages - 1) * tensor for rank in range(tensor * stages)]
    assert all(place.world == len(places) for place in places)
    for rank in range(tensor):
        parts = [place.layers for place in places if place.tensor.rank == rank]
        assert [layer for part in parts for layer in part] == list(range(layers))
    besides = [0.0] * (stages - 1) + [DRAWN_SHARE * head_in_layers(spec)]
    slowest = max(len(part) + more for part, more in zip(parts, besides, strict=True))
    # As many layers as each stage could have and be faster than that: too few, or not even one.
    faster = [math.ceil(slowest - more - 1e-9) - 1 for more in besides]
    assert min(faster) < 1 or sum(faster) < layers


def test_the_head_takes_the_place_of_as_many_layers_as_take_as_long() -> None:
    """128,256 rows beside layers of 61 million parameters, of half of the tokens."""
    assert head_in_layers(models.LLAMA32_1B) == pytest.approx(4.32, abs=0.01)
    places = places_of(ParallelConfig(pipeline=2), models.LLAMA32_1B)
    assert [len(place.layers) for place in places] == [9, 7]


def test_of_a_mixture_those_experts_count_that_a_token_goes_through() -> None:
    dense = head_in_layers(replace(models.LLAMA2_7B, intermediate=2 * 14336, kv_heads=8))
    assert head_in_layers(models.MIXTRAL_8X7B) == pytest.approx(dense, rel=0.001)


def test_a_place_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="stage 2 of 2"):
        Place(2, 2, range(3), TensorRank())
    with pytest.raises(ValueError, match="consecutive"):
        Place(0, 2, range(0), TensorRank())


def test_all_ranks_get_what_the_one_with_least_room_has() -> None:
    kv = plan_group([FACTS, replace(FACTS, num_pages=70), FACTS], EngineConfig())
    assert (kv.num_pages, kv.max_model_len) == (70, 70 * 16)


def test_a_length_that_the_one_with_least_room_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="lower max_model_len to 160"):
        plan_group([FACTS, replace(FACTS, num_pages=10)], EngineConfig(max_model_len=500))


def test_no_more_pages_are_asked_for_than_sequences_can_use() -> None:
    config = EngineConfig.model_validate({"max_model_len": 32, "scheduler": {"max_sequences": 4}})
    assert plan_group([FACTS], config).num_pages == 8


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [({"tensor": 3}, "heads cannot be divided among 3 ranks"), ({"pipeline": 99}, "layers are too few for 99 stages")],
)
def test_a_model_that_cannot_be_cut_so_is_refused_in_words(degrees: dict, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_degrees(models.LLAMA2_7B, ParallelConfig(**degrees))


@pytest.mark.parametrize(
    ("degrees", "nearest"),
    [
        ({"tensor": 3}, "TP4 x PP1, TP2 x PP1, TP1 x PP1"),
        ({"pipeline": 99}, "TP1 x PP32, TP2 x PP32"),
        ({"tensor": 12, "pipeline": 2}, "TP16 x PP2, TP8 x PP2, TP4 x PP2"),
    ],
)
def test_layouts_that_work_are_offered(degrees: dict, nearest: str) -> None:
    with pytest.raises(ModelError, match=f"; nearest layouts that work: {nearest}$"):
        check_degrees(models.LLAMA2_7B, ParallelConfig(**degrees))


def test_channels_that_share_a_scale_are_not_cut_apart() -> None:
    spec, eight = load_spec(PATH), ParallelConfig(tensor=8)
    check_degrees(spec, eight, channel_unit(PATH, "w8a8", 64))
    with pytest.raises(ModelError, match="no multiple of the group of 64; nearest layouts that work: TP4"):
        check_degrees(spec, eight, channel_unit(PATH, "w4a16", 64))


def test_layers_are_dealt_out_as_asked() -> None:
    asked = ParallelConfig(tensor=2, pipeline=3, layers=(20, 8, 4))
    check_degrees(models.LLAMA2_7B, asked)
    places = places_of(asked, models.LLAMA2_7B)
    assert [place.layers for place in places[::2]] == [range(20), range(20, 28), range(28, 32)]
    assert [place.layers for place in places[1::2]] == [place.layers for place in places[::2]]


def test_layers_that_are_not_the_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"parallel.layers: 20 \+ 8 are 28 layers, and the model has 32"):
        check_degrees(models.LLAMA2_7B, ParallelConfig(pipeline=2, layers=(20, 8)))
