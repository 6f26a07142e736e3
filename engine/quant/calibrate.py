"""What ranges a model's activations take on some text: runs it once, in full precision, and watches its layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.forward import EagerForward
from engine.kernels.operators import Linear
from engine.kernels.reference import ReferenceOperators
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from engine.models.loader import load_parameters
from engine.models.spec import Activation
from engine.quant.plan import is_layer_linear
from engine.quant.prompts import PAGE_TOKENS, pages_of, prompt_layout
from engine.quant.smooth import Ranges, column_ranges
from engine.quant.weights import Weight

_ROWS = 1024


class RecordingOperators(ReferenceOperators):
    """Reference operators that remember the largest magnitude of each input channel of the weights they are told."""

    def __init__(self, names: Mapping[int, str]) -> None:
        """`names` of weights by their `id`: operators are not told names."""
        super().__init__()
        self._names = names
        self.largest: dict[str, Tensor] = {}
        """[in] float32 by name."""

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        gate: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Linear:
        run = super().linear(weight, bias, gate=gate, out_dtype=out_dtype)
        name = self._names.get(id(weight))
        if name is None:
            return run
        largest = self.largest[name] = torch.zeros(weight.shape[1])

        def recording(x: Tensor) -> Tensor:
            torch.maximum(largest, x.abs().amax(dim=0).to(torch.float32), out=largest)
            return run(x)

        return recording


def activation_ranges(
    path: Path, prompts: Iterable[Sequence[int]], max_tokens: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Ranges]:
    """Ranges of the input and of the weight of every linear layer but experts, by parameter name.

    Runs prompts of at most `max_tokens` tokens; calls `advance` after each. Needs memory for the whole model in its
    own type. Raises ModelError.
    """
    loaded = load_parameters(path)
    linears = {name: weight for name, weight in loaded.parameters.items() if _is_watched(name)}
    weights = {name: column_ranges(_blocks(weight), weight.shape[1]) for name, weight in linears.items()}
    operators = RecordingOperators({id(weight): name for name, weight in linears.items()})
    decoder = Decoder(loaded.part, loaded.parameters, operators, loaded.dtype)
    forward = EagerForward(decoder, PagedKVCache(loaded.spec, pages_of(max_tokens), PAGE_TOKENS, loaded.dtype))
    with torch.inference_mode():
        for prompt in prompts:
            forward.hidden(torch.tensor(prompt), prompt_layout(len(prompt)))
            advance()
    return {name: Ranges(operators.largest[name], weights[name]) for name in linears}


def _is_watched(parameter: str) -> bool:
    """Experts are not: each sees a few of the tokens, and nothing before them is theirs alone to take a factor."""
    return is_layer_linear(parameter) and "experts_" not in parameter


def _blocks(weight: Weight) -> Iterable[Tensor]:
    assert isinstance(weight, Tensor)
    return weight.split(_ROWS)
