"""Mixtures of experts in a config and in a checkpoint, which holds them expert by expert or all in one tensor."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from engine.models.families.family import Config, UnsupportedConfig, count, linear_pieces
from engine.models.pieces import Piece, Run
from engine.models.spec import ExpertsSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family's checkpoints call the parts of one expert, and the block that holds experts and router."""

    block: str
    gate: str
    up: str
    down: str


def experts_of(config: Config, intermediate_key: str, *, renormalised: bool) -> ExpertsSpec:
    """The routed experts. Raises UnsupportedConfig."""
    # The newer of two names for the same.
    key = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    experts, per_token = count(config, key), count(config, "num_experts_per_tok")
    if per_token > experts:
        raise UnsupportedConfig(f"num_experts_per_tok {per_token} is more than the {experts} of {key}")
    return ExpertsSpec(experts, per_token, count(config, intermediate_key), renormalised)


def expert_pieces(
    target: str, layer: str, spec: ModelSpec, names: Collection[str], parts: ExpertNames
) -> Iterator[Piece]:
    """Router and routed experts of `layer`, whose tensors transformers may have merged under names of its own."""
    experts, hidden = spec.experts, spec.hidden
    assert experts is not None
    merged = f"{layer}.mlp.experts.gate_up_proj" in names
    block = f"{layer}.{'mlp' if merged else parts.block}"
    yield from linear_pieces(f"{target}.router", f"{block}.gate", experts.count, hidden, bias=False)
    width = experts.intermediate
    if merged:
        shape = (experts.count, 2 * width, hidden)
        yield _merged(f"{target}.experts_in.weight", f"{block}.experts.gate_up_proj", shape)
        shape = (experts.count, hidden, width)
        yield _merged(f"{target}.experts_out.weight", f"{block}.experts.down_proj", shape)
        return
    for index in range(experts.count):
        source, at = f"{block}.experts.{index}", 2 * width * index
        inner, outer = f"{target}.experts_in", f"{target}.experts_out"
        yield from linear_pieces(inner, f"{source}.{parts.gate}", width, hidden, bias=False, at=at)
        yield from linear_pieces(inner, f"{source}.{parts.up}", width, hidden, bias=False, at=at + width)
        yield from linear_pieces(outer, f"{source}.{parts.down}", hidden, width, bias=False, at=hidden * index)


def _merged(target: str, source: str, shape: tuple[int, int, int]) -> Piece:
    return Piece(target, source, shape, (Run(0, 0, shape[0] * shape[1]),))
