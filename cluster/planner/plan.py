"""The layout of a model on some machines, with its reasons; or why there is none. Pure, and all that callers need."""

from collections.abc import Sequence
from dataclasses import replace

from cluster.planner.kinds import mismatches
from cluster.planner.layout import Plan, Problem
from cluster.planner.reasons import reasons
from cluster.planner.refusal import NoLayout, check, refusal
from cluster.planner.survey import choose, contexts, take_stock

__all__ = ["NoLayout", "plan"]

_RIVALS = 4


def plan(problem: Problem) -> Plan:
    """The best layout (`cluster.planner.survey`). Raises NoLayout."""
    check(problem)
    for context in contexts(problem):
        survey = take_stock(problem, context)
        if survey.plans:
            return _explained(problem, survey.plans)
    raise refusal(problem, survey)


def _explained(problem: Problem, plans: Sequence[Plan]) -> Plan:
    taken = choose(plans, problem.wishes.prefer)
    others = [each.as_rival() for each in plans if each is not taken]
    if problem.wishes.prefer == "throughput":
        others.sort(key=lambda rival: -rival.tokens_per_second)
    else:
        others.sort(key=lambda rival: rival.lone_token_seconds)
    warnings = tuple(mismatches(problem.nodes, problem.accelerator))
    return replace(taken, reasons=reasons(problem, taken), warnings=warnings, rivals=tuple(others[:_RIVALS]))
