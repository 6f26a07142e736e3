"""What the rank at a place in a replica holds of a model. Pure: names and numbers, no tensors, no files.

A replica is stages of consecutive layers, each on as many tensor ranks. The first stage has the embeddings, the last
one the final norm and the head; tied embeddings are on both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from engine.models.spec import ModelSpec
from engine.parallel.place import Place
from engine.parallel.slices import Slice, experts_of, key_heads, obstacle, query_heads, slice_of

_BEFORE = ("project_in", "position")
_AFTER = ("final_norm", "project_out", "head")
_BEHIND_A_SUM = ("out", "mlp_out", "shared_out")
"""Layers of which ranks make partial sums: a bias counts once, so that one rank has it."""


class Held(NamedTuple):
    """A parameter of which a rank has some."""

    name: str
    """In the whole model."""
    slice: Slice


@dataclass(frozen=True, slots=True)
class Part:
    """What the rank at a place holds of a model."""

    whole: ModelSpec
    place: Place
    unit: int = 1
    """Input channels that stay together, see `slice_of`."""

    @classmethod
    def all_of(cls, spec: ModelSpec) -> "Part":
        return cls(spec, Place.alone(spec.layers))

    def check(self) -> None:
        """Raises ValueError, in words, for degrees or layers that the model cannot be cut into."""
        tensor, layers = self.place.tensor, self.place.layers
        if reason := obstacle(self.whole, tensor.size, tensor.expert, self.unit):
            raise ValueError(f"tensor parallel {tensor.size}, expert parallel {tensor.expert}: {reason}")
        if layers.start < 0 or layers.stop > self.whole.layers:
            raise ValueError(f"stage {self.place.stage} has layers {layers}; the model has {self.whole.layers}")
        if self.place.is_first != (layers.start == 0) or self.place.is_last != (layers.stop == self.whole.layers):
            raise ValueError(f"stage {self.place.stage} of {self.place.stages} cannot have {layers} of the layers")

    @property
    def spec(self) -> ModelSpec:
        """The rank's own model: its layers and heads. Vocabulary, experts and inner channels are those of the whole."""
        whole, tensor, layers = self.whole, self.place.tensor, self.place.layers
        return replace(
            whole,
            layers=len(layers),
            heads=query_heads(whole, tensor).count,
            kv_heads=key_heads(whole, tensor).count,
            windows=whole.windows[layers.start : layers.stop],
        )

    @property
    def vocabulary(self) -> range:
        """The token ids whose embeddings and logits are here."""
        rows = self._embeddings.rows
        return range(rows[0].start, rows[0].end) if rows else range(0)

    @property
    def vocabulary_rows(self) -> int:
        """Those of `vocabulary`, and of the padding that makes it as many on every rank."""
        return self._embeddings.shape[0]

    @property
    def _embeddings(self) -> Slice:
        name = "embed.weight"
        return slice_of(name, self.whole.parameter_shapes()[name], self.whole, self.place.tensor)

    @property
    def experts(self) -> range:
        """Those of which a part or all is here."""
        held = experts_of(self.whole, self.place.tensor)
        return range(held.start, held.end)

    def parameters(self) -> Iterator[tuple[str, Held]]:
        """Every parameter of the rank's own model, by its name there, in the order of use."""
        layers = self.place.layers
        for name, shape in self.whole.parameter_shapes().items():
            own = name
            if name.startswith("layers."):
                _, number, rest = name.split(".", 2)
                if int(number) not in layers:
                    continue
                own = f"layers.{int(number) - layers.start}.{rest}"
            if self._is_here(name):
                yield own, Held(name, slice_of(name, shape, self.whole, self.place.tensor, self.unit))

    def _is_here(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        module = module.rpartition(".")[2]
        if kind == "bias" and module in _BEHIND_A_SUM:
            return self.place.tensor.rank == 0
        if module == "embed":
            return self.place.is_first or (self.place.is_last and self.whole.tied_embeddings)
        if module in _BEFORE:
            return self.place.is_first
        return self.place.is_last if module in _AFTER else True
