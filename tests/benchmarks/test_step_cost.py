"""The step-cost benchmark measures a whole engine, with the batch that it claims."""

import pytest

from benchmarks import step_cost


@pytest.mark.parametrize("churn", [0.0, 0.25])
def test_the_parts_are_parts_of_the_step(churn: float) -> None:
    cost = step_cost.measure_steps(8, 20, churn=churn)
    assert cost.sequences == 8
    assert min(cost.plan, cost.runner, cost.commit) > 0
    assert max(cost.plan, cost.runner, cost.commit) < cost.step


@pytest.mark.parametrize("name", step_cost.SAMPLING)
@pytest.mark.parametrize("flat", [False, True])
def test_every_way_of_sampling_can_be_measured(name: str, flat: bool) -> None:
    assert step_cost.measure_sampling(4, 600, name, 2, flat=flat) > 0
