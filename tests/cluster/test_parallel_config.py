"""How a replica is cut, as it is written in a file and on the command line."""

import pytest

from cluster.config import ParallelConfig
from deployments.cli.errors import CommandError
from deployments.cli.serve import configure


def test_one_rank_is_the_default() -> None:
    assert configure(None, {}).parallel.ranks == 1


def test_degrees_multiply_but_for_experts() -> None:
    chosen = {"parallel.tensor": 4, "parallel.pipeline": 2, "parallel.expert": 2}
    assert configure(None, chosen).parallel.ranks == 8


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"parallel.tensor": 0}, r"parallel\.tensor"),
        ({"parallel.tensor": 4, "parallel.expert": 3}, r"expert \(3\) must divide tensor \(4\).* tensor 6 would do"),
        ({"parallel.expert": 2}, r"expert \(2\) must divide tensor \(1\).* tensor 2 would do"),
        ({"parallel.strategy": "TIGHT"}, r"parallel\.strategy"),
        ({"parallel.pipeline": 3, "parallel.layers": [4, 4]}, "given for 2 stages, and there are 3"),
        ({"parallel.pipeline": 2, "parallel.layers": [5, 0]}, r"parallel\.layers"),
    ],
)
def test_what_cannot_be_is_refused_by_name(chosen: dict[str, object], reason: str) -> None:
    with pytest.raises(CommandError, match=reason):
        configure(None, chosen)


def test_labels_are_for_each_stage_or_for_all() -> None:
    ParallelConfig(pipeline=3, labels=({"zone": "a"},))
    with pytest.raises(ValueError, match="given for 2 stages, and there are 3"):
        ParallelConfig(pipeline=3, labels=({"zone": "a"}, {"zone": "b"}))
