"""Why a layout was taken, in the numbers that decided it. Pure; owns words, decides nothing."""

from cluster.planner.layout import Plan, Problem
from cluster.planner.nodes import slots
from cluster.planner.replica import gibibytes, pages_of
from cluster.planner.shares import shares
from cluster.planner.survey import USUAL_CONTEXT
from engine.parallel.slices import key_heads


def reasons(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """One line for each choice that the layout makes."""
    lines = [
        _memory(problem),
        _tensor(problem, plan),
        _pipeline(problem, plan),
        _experts(problem, plan),
        _kv_heads(problem, plan),
        _replicas(problem, plan),
        _bound(plan),
        _sequences(problem, plan),
        _context(problem, plan),
    ]
    return tuple(line for line in lines if line)


def _memory(problem: Problem) -> str:
    (whole,) = shares(problem.spec, problem.form, 1, 1)
    weights = whole.weight_bytes(problem.spec.layers, first=True, last=True)
    usable = max(node.memory for node in problem.nodes) * problem.wishes.memory_share
    fewest = -(-weights // max(1, int(usable)))
    return (
        f"memory: {gibibytes(weights)} of weights in {problem.form.name}, {gibibytes(usable)} usable of the largest "
        f"accelerator: at least {fewest} for the weights alone"
    )


def _tensor(problem: Problem, plan: Plan) -> str:
    tensor, slowest = plan.layout.tensor, plan.prediction.slowest
    if tensor == 1:
        return "" if plan.layout.ranks > 1 else "TP1 x PP1: one accelerator holds a replica, and waits for no other"
    crosses = len({shard.node for shard in plan.shards if shard.stage == 0}) > 1
    link = problem.accelerator.rates.between_nodes if crosses else problem.accelerator.rates.in_node
    where = "between nodes, as asked for: no node has so many accelerators" if crosses else "inside a node"
    sums = "one sum" if problem.spec.block == "parallel" else "two sums"
    return (
        f"TP{tensor} {where}: {sums} a layer over links of {link.bandwidth / 1e9:.4g} GB/s take "
        f"{_milliseconds(slowest.wire)} of a step of {_milliseconds(slowest.total)}"
    )


def _pipeline(problem: Problem, plan: Plan) -> str:
    stages = plan.layout.pipeline
    if stages == 1:
        return ""
    nodes = len({shard.node for shard in plan.shards})
    where = f"over {nodes} nodes" if nodes > 1 else "inside a node"
    return (
        f"PP{stages} {where}, layers {' + '.join(map(str, plan.layers))}: the first stage has the embeddings besides, "
        f"the last one the head; hidden states cross once a step, and {stages} batches are in flight"
    )


def _experts(problem: Problem, plan: Plan) -> str:
    experts = problem.spec.experts
    if experts is None or plan.layout.tensor == 1:
        return ""
    cut = plan.layout.tensor // plan.layout.expert
    if plan.layout.expert == 1:
        return f"EP1: every rank holds 1/{cut} of each of {experts.count} experts; all of them read the same"
    held = experts.count // plan.layout.expert
    ranks = "a rank" if cut == 1 else f"{cut} ranks"
    return (
        f"EP{plan.layout.expert}: {held} whole experts to {ranks}; activations are on every rank already, so that "
        "experts need no exchange of their own and their results are added up with the same sum"
    )


def _kv_heads(problem: Problem, plan: Plan) -> str:
    if plan.layout.tensor <= problem.spec.kv_heads:
        return ""
    copies = plan.layout.tensor // problem.spec.kv_heads
    held = key_heads(problem.spec, plan.shards[0].rank).count
    return (
        f"{problem.spec.kv_heads} heads of keys and values for {plan.layout.tensor} ranks: each holds {held}, "
        f"{copies} ranks the same one"
    )


def _replicas(problem: Problem, plan: Plan) -> str:
    used = plan.replicas * plan.layout.ranks
    idle = problem.num_accelerators - used
    places = len(slots(problem.nodes, plan.layout.tensor)) // plan.layout.pipeline
    line = f"{plan.replicas} of these replicas on {used} of {problem.num_accelerators} accelerators"
    if plan.replicas < places and problem.wishes.replicas is None:
        return f"{line}: the others have less memory, and with them every replica would have fewer pages"
    return f"{line}, {idle} idle" if idle else line


def _bound(plan: Plan) -> str:
    step = plan.prediction.slowest
    return (
        f"a step of {plan.sequences} streams waits for {step.bound}: weights {_milliseconds(step.weights)}, keys and "
        f"values {_milliseconds(step.pages)}, arithmetic {_milliseconds(step.compute)}, communication "
        f"{_milliseconds(step.wire)}"
    )


def _sequences(problem: Problem, plan: Plan) -> str:
    if plan.sequences < problem.wishes.sequences:
        return ""
    room = plan.pages // pages_of(plan.context, plan.page_tokens)
    more = f": its pages would hold {room:,}" if room > plan.sequences else ""
    return f"{plan.sequences} sequences a replica, limited by --max-sequences{more}"


def _context(problem: Problem, plan: Plan) -> str:
    if problem.wishes.context is not None or plan.context == min(USUAL_CONTEXT, problem.spec.max_position):
        return ""
    return f"sequences of {plan.context} tokens: longer ones do not fit beside the weights"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
