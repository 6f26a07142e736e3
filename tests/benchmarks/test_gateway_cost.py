"""The gateway-cost benchmark streams whole answers, and reports to the store those that it says it does."""

import asyncio

import pytest

from benchmarks import gateway_cost
from deployments.streams import keeper


@pytest.mark.parametrize("resumable", [False, True])
def test_the_cost_has_both_sides(monkeypatch: pytest.MonkeyPatch, resumable: bool) -> None:
    monkeypatch.setattr(keeper, "PERIOD_S", 0.001)
    monkeypatch.setattr(keeper, "LEAST_PERIOD_S", 0.0)
    gateway, store = asyncio.run(gateway_cost.measure(2, 50, 2, kept=True, resumable=resumable))
    assert gateway > 0 and store > 0
    assert asyncio.run(gateway_cost.measure(2, 50, 1, kept=False, resumable=False))[1] == 0
