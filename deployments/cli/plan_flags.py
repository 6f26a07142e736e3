"""From the flags of `manta plan` to the planner's nouns. Whatever is wrong with one is a CommandError that names it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.planner.form import Choices, Form, form_of
from cluster.planner.kinds import ACCELERATORS, guessed
from cluster.planner.layout import Wishes
from cluster.planner.nodes import Node, parse_nodes
from cluster.planner.rates import Accelerator, Link
from deployments.cli.errors import CommandError, ExitCode
from deployments.cli.plan_machine import measured, this_machine
from engine.config import parse_bytes
from engine.models.directory import CONFIG, check_scheme, find_quantization, load_spec, read_json
from engine.models.source import resolve_model
from engine.models.spec import ModelSpec
from engine.quant.plan import GROUPS

_AUTO = "auto"


def machines(nodes: str | None, accelerator: str, *, measure: bool) -> tuple[tuple[Node, ...], Accelerator]:
    """The nodes to plan for and the kind of their accelerators; without --nodes, this machine."""
    name = one_of("--accelerator", accelerator, (_AUTO, *ACCELERATORS))
    given: tuple[Node, ...]
    if nodes is None:
        here, found = this_machine()
        given, name = (here,), found if name == _AUTO else name
        if name is None:
            raise _wrong("--accelerator", f"this machine's is none of {', '.join(ACCELERATORS)}: name the nearest")
    else:
        try:
            given = parse_nodes(nodes)
        except ValueError as error:
            raise _wrong("--nodes", str(error)) from None
    kind = guessed(given) if name == _AUTO else ACCELERATORS[name]
    return given, measured(kind) if measure else kind


@dataclass(frozen=True, slots=True)
class RateFlags:
    """Rates that were given; None are those of the kind."""

    tflops: float | None = None
    memory_bandwidth: str | None = None
    link_in_node: str | None = None
    link_between_nodes: str | None = None
    latency_in_node: float | None = None
    latency_between_nodes: float | None = None

    def applied_to(self, kind: Accelerator) -> Accelerator:
        """The kind with these rates; in 8 bits it is as much faster or slower as in 16."""
        if self == RateFlags():
            return kind
        rates = kind.rates
        flops = rates.flops if self.tflops is None else self.tflops * 1e12
        bandwidth = _a_second("--memory-bandwidth", self.memory_bandwidth)
        in_node = _link("--link-in-node", rates.in_node, self.link_in_node, self.latency_in_node)
        between = rates.between_nodes
        between = _link("--link-between-nodes", between, self.link_between_nodes, self.latency_between_nodes)
        changed = replace(
            rates,
            flops=flops,
            int8_ops=rates.int8_ops * flops / rates.flops,
            memory_bandwidth=bandwidth or rates.memory_bandwidth,
            in_node=in_node,
            between_nodes=between,
        )
        return kind.with_rates(changed, f"as given; the others: {kind.source}")


def _link(flag: str, link: Link, bandwidth: str | None, latency_us: float | None) -> Link:
    return Link(_a_second(flag, bandwidth) or link.bandwidth, link.latency if latency_us is None else latency_us / 1e6)


def _a_second(flag: str, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        size = parse_bytes(value.removesuffix("/s"))
    except ValueError:
        size = None
    if not isinstance(size, int) or size < 1:
        raise _wrong(flag, f'{value!r}: expected bytes a second, such as "360GB"')
    return float(size)


def read_model(model: str, revision: str | None, choices: Choices) -> tuple[ModelSpec, Form]:
    """What the model is and in what form it would be held, by config.json alone. Raises ModelError too."""
    file = Path(model).expanduser()
    # Of a hub model nothing else is fetched.
    folder = file.parent if file.name == CONFIG and file.is_file() else resolve_model(model, revision, (CONFIG,))
    layout = find_quantization(folder)
    match choices.quantization:
        case "w8a8" | "w4a16" as scheme:
            check_scheme(folder, layout, scheme)
    spec = load_spec(folder)
    try:
        return spec, form_of(read_json(folder / CONFIG), layout, choices)
    except ValueError as error:
        raise CommandError(f"{folder / CONFIG}: {error}", ExitCode.BAD_INPUT) from None


def wishes(**given: Any) -> Wishes:
    """Raises CommandError for a value that is out of range."""
    try:
        return Wishes(**given)
    except ValueError as error:
        raise CommandError(str(error), ExitCode.BAD_INPUT) from None


def group(size: int) -> int:
    if size not in GROUPS:
        raise _wrong("--quantization-group", f"{size} is not one of {', '.join(map(str, GROUPS))}")
    return size


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> Any:
    """The value, whose type is then that of the choice."""
    if value not in allowed:
        raise _wrong(flag, f"{value!r} is not one of {', '.join(allowed)}")
    return value


def _wrong(flag: str, reason: str) -> CommandError:
    return CommandError(f"{flag}: {reason}", ExitCode.BAD_INPUT)
