"""What is said when a model cannot be laid out as asked: what was asked, what there is, and what would work. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from cluster.planner.degrees import nearest
from cluster.planner.layout import Layout, Plan, Problem, Wishes
from cluster.planner.nodes import Node, describe
from cluster.planner.replica import gibibytes
from cluster.planner.survey import Survey, choose, contexts, take_stock
from engine.quant.config import Scheme
from engine.quant.plan import group_obstacle, head_group, kind_of

_MULTIPLES = (2, 4, 8, 16)
_SMALLER_FORMS: tuple[Scheme, ...] = ("w8a8", "w4a16")


class NoLayout(Exception):
    """There is no layout as asked for: one line that says why, and the nearest layouts that work."""

    def __init__(self, message: str, nearest: tuple[Layout, ...] = ()) -> None:
        super().__init__(message)
        self.nearest = nearest


def check(problem: Problem) -> None:
    """Raises NoLayout for what no machine could change: a context or a group that the model is not made for."""
    context, longest = problem.wishes.context, problem.spec.max_position
    if context is not None and context > longest:
        raise NoLayout(f"sequences of {context} tokens: the model is made for at most {longest}")
    if reason := _group_obstacle(problem):
        raise NoLayout(f"quantization w4a16: {reason}")


def refusal(problem: Problem, survey: Survey) -> NoLayout:
    """For a survey without plans. What the layout with most ranks lacks, all of them lack."""
    reason = (*survey.shortages[-1:], *survey.obstacles, "no layout")[0]
    works_here = _nearest(problem)
    works = f"nearest layouts that work: {', '.join(map(str, works_here))}" if works_here else _advice(problem)
    number = problem.num_accelerators
    count = "there is 1 accelerator" if number == 1 else f"there are {number} accelerators"
    there = f"{count}, on {describe(problem.nodes)}"
    return NoLayout(f"{_asked(problem.wishes)}{reason}; {there}; {works}", works_here)


def _asked(wishes: Wishes) -> str:
    degrees = {
        "tensor parallel": wishes.tensor,
        "pipeline parallel": wishes.pipeline,
        "expert parallel": wishes.expert,
        "replicas": wishes.replicas,
    }
    named = [f"{name} {value}" for name, value in degrees.items() if value is not None]
    return f"{', '.join(named)} cannot be: " if named else ""


def _group_obstacle(problem: Problem) -> str | None:
    """Why full weights cannot be turned into 4 bits in the group asked for, as loading them would say."""
    spec, form = problem.spec, problem.form
    if form.conversion != "w4a16" or form.checkpoint is not None:
        return None
    shapes = spec.parameter_shapes()
    # A head that the group does not fit is none: it is then in 8 bits.
    columns = {shape[1] for name, shape in shapes.items() if kind_of(name, spec, form.conversion, None) == "int4"}
    return next((reason for each in sorted(columns) if (reason := group_obstacle(form.group, each, columns))), None)


def _free(problem: Problem) -> Problem:
    """The same without the wishes for degrees."""
    return replace(problem, wishes=replace(problem.wishes, tensor=None, pipeline=None, expert=None, replicas=None))


def _nearest(problem: Problem) -> tuple[Layout, ...]:
    free = _free(problem)
    if free == problem:
        return ()
    wishes = problem.wishes
    asked = Layout(wishes.tensor or 1, wishes.pipeline or 1, wishes.expert or 1)
    return nearest({plan.layout for plan in _plans(free)}, asked)


def _advice(problem: Problem) -> str:
    """What would have to change for the model to fit."""
    free = _free(problem)
    if problem.wishes.context is not None:
        shorter = replace(free, wishes=replace(free.wishes, context=None))
        if plans := _plans(shorter):
            return f"sequences of {plans[0].context} tokens work here"
    ideas = [_smaller_form(free), _more_nodes(free)]
    return "; ".join(idea for idea in ideas if idea) or f"the weights alone take {gibibytes(_weight_bytes(problem))}"


def _smaller_form(problem: Problem) -> str:
    if problem.form.conversion is not None or problem.form.checkpoint is not None:
        return ""
    for scheme in _SMALLER_FORMS:
        in_groups = head_group(scheme, problem.form.group, problem.accelerator.device)
        smaller = replace(problem, form=replace(problem.form, conversion=scheme, head_group=in_groups))
        if _group_obstacle(smaller) is None and (plans := _plans(smaller)):
            return f"with quantization {scheme} {choose(plans, problem.wishes.prefer).layout} works here"
    return ""


def _more_nodes(problem: Problem) -> str:
    for multiple in _MULTIPLES:
        if plans := _plans(replace(problem, nodes=_copies(problem.nodes, multiple))):
            return f"with {multiple} times these nodes {choose(plans, problem.wishes.prefer).layout} works"
    return ""


def _copies(nodes: Sequence[Node], multiple: int) -> tuple[Node, ...]:
    return tuple(replace(node, name=f"{node.name}.{copy}") for copy in range(multiple) for node in nodes)


def _plans(problem: Problem) -> tuple[Plan, ...]:
    return next((plans for context in contexts(problem) if (plans := take_stock(problem, context).plans)), ())


def _weight_bytes(problem: Problem) -> int:
    shapes = problem.spec.parameter_shapes()
    return sum(problem.form.weight_bytes(name, shape, problem.spec) for name, shape in shapes.items())
