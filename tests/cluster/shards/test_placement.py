"""Where ranks are placed, and what is said when they cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ParallelConfig
from cluster.shards.placement import NodeRoom, NoRoom, bundle_of, fits, lay_bundles

ONE = {"CPU": 1.0}


def node(name: str, cpus: float, **labels: str) -> NodeRoom:
    return NodeRoom(name, {"CPU": cpus}, labels)


def test_the_ranks_of_a_stage_share_a_node_and_stages_are_spread() -> None:
    laid = lay_bundles(ParallelConfig(tensor=2, pipeline=2), ONE, [node("a", 2), node("b", 2)])
    assert laid.resources == ({"CPU": 2.0}, {"CPU": 2.0})
    assert laid.strategy == "SPREAD"
    assert [laid.of_rank(rank, 4) for rank in range(4)] == [0, 0, 1, 1]


def test_a_lone_stage_is_one_bundle() -> None:
    laid = lay_bundles(ParallelConfig(tensor=4), ONE, [node("a", 4)])
    assert (laid.resources, laid.strategy) == (({"CPU": 4.0},), "PACK")


def test_ranks_of_a_stage_that_no_node_has_room_for_are_packed() -> None:
    laid = lay_bundles(ParallelConfig(tensor=4), ONE, [node("a", 3), node("b", 1)])
    assert (laid.resources, laid.strategy) == ((ONE,) * 4, "PACK")
    assert [laid.of_rank(rank, 4) for rank in range(4)] == [0, 1, 2, 3]


def test_labels_say_which_nodes_are_meant() -> None:
    config = ParallelConfig(pipeline=2, labels=({"zone": "x"}, {"zone": "y"}))
    laid = lay_bundles(config, ONE, [node("a", 1, zone="x"), node("b", 1, zone="y")])
    assert laid.labels == ({"zone": "x"}, {"zone": "y"})
    with pytest.raises(NoRoom, match="on nodes with zone=x or zone=y"):
        lay_bundles(config, ONE, [node("a", 2, zone="x")])


def test_one_selector_may_be_for_all_stages() -> None:
    laid = lay_bundles(ParallelConfig(pipeline=2, labels=({"zone": "x"},)), ONE, [node("a", 2, zone="x")])
    assert laid.labels == ({"zone": "x"},) * 2


def test_a_strategy_is_obeyed() -> None:
    apart = ParallelConfig(pipeline=2, strategy="STRICT_SPREAD")
    assert lay_bundles(apart, ONE, [node("a", 1), node("b", 1)]).strategy == "STRICT_SPREAD"
    with pytest.raises(NoRoom, match="placed STRICT_SPREAD"):
        lay_bundles(apart, ONE, [node("a", 2)])
    with pytest.raises(NoRoom, match="placed STRICT_PACK"):
        lay_bundles(ParallelConfig(pipeline=2, strategy="STRICT_PACK"), ONE, [node("a", 1), node("b", 1)])


def test_a_refusal_names_what_is_asked_what_is_free_and_what_works() -> None:
    with pytest.raises(NoRoom) as refused:
        lay_bundles(ParallelConfig(tensor=4, pipeline=2), ONE, [node("10.0.0.1", 2), node("10.0.0.2", 1)])
    assert str(refused.value) == (
        "there is no room: TP4 x PP2 is 8 ranks of 1 CPU each. Free: 10.0.0.1 has 2 CPU; 10.0.0.2 has 1 CPU; "
        "nearest layouts that fit: TP2 x PP1, TP1 x PP2, TP1 x PP1"
    )


def test_a_refusal_where_nothing_fits_says_so() -> None:
    with pytest.raises(NoRoom, match=r"TP1 x PP2 is 2 ranks of 1 GPU each\. Free: a has 0 GPU; not even one rank fits"):
        lay_bundles(ParallelConfig(pipeline=2), {"GPU": 1.0}, [node("a", 8)])


def test_nothing_is_refused_where_no_node_is_known() -> None:
    assert lay_bundles(ParallelConfig(tensor=64), ONE, []).resources == ({"CPU": 64.0},)


@given(
    tensor=st.integers(1, 8),
    pipeline=st.integers(1, 4),
    cpus=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    strategy=st.sampled_from(["auto", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_what_is_laid_fits_and_what_is_refused_is_refused_with_layouts_that_fit(
    tensor: int, pipeline: int, cpus: list[int], strategy: str
) -> None:
    config = ParallelConfig.model_validate({"tensor": tensor, "pipeline": pipeline, "strategy": strategy})
    nodes = [node(str(index), count) for index, count in enumerate(cpus)]
    try:
        laid = lay_bundles(config, ONE, nodes)
    except NoRoom as refused:
        loose = sum(cpus) >= config.ranks
        assert not loose or strategy.startswith("STRICT"), "there was room"
        assert ("not even one rank fits" in str(refused)) == (max(cpus) == 0)
        return
    assert fits(laid, nodes)
    assert sum(bundle["CPU"] for bundle in laid.resources) == config.ranks <= sum(cpus)


@given(tensor=st.integers(1, 8), pipeline=st.integers(1, 8))
def test_bundles_are_stages_or_ranks(tensor: int, pipeline: int) -> None:
    ranks = tensor * pipeline
    assert [bundle_of(rank, ranks, pipeline) for rank in range(ranks)] == [rank // tensor for rank in range(ranks)]
    assert [bundle_of(rank, ranks, ranks) for rank in range(ranks)] == list(range(ranks))


def test_all_replicas_must_fit() -> None:
    config = ParallelConfig(tensor=2)
    assert lay_bundles(config, ONE, [node("a", 2), node("b", 2)], copies=2).resources == ({"CPU": 2.0},)
    with pytest.raises(NoRoom, match=r"3 replicas are asked for, and TP2 x PP1 is 2 ranks .* fit: TP1 x PP1"):
        lay_bundles(config, ONE, [node("a", 2), node("b", 2)], copies=3)
