"""What number formats cost in quality: perplexity of the built-in model, and how far the logits of a larger one move.

    python -m benchmarks.quality --model s135m

Perplexity is over the held-out text that the built-in model never read. The larger model has random weights, so only
its logits can be compared: on random prompts, with those of the checkpoint's own type.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import models
from engine.models.tiny.evaluate import engine_perplexity
from engine.quant.prompts import NumberFormats, load_forward, prompt_logits

FORMATS: dict[str, NumberFormats] = {
    "full": NumberFormats(),
    "full, KV int8": NumberFormats(kv="int8"),
    "w8a8": NumberFormats("w8a8"),
    "w8a8, KV int8": NumberFormats("w8a8", kv="int8"),
    "w4a16 g32": NumberFormats("w4a16", 32),
    "w4a16 g64": NumberFormats("w4a16", 64),
    "w4a16 g128": NumberFormats("w4a16", 128),
    "w4a16 g64, KV int8": NumberFormats("w4a16", 64, "int8"),
    "w4a8 g64": NumberFormats("w4a16", 64, activations="int8"),
    "w4a8 g64, KV int8": NumberFormats("w4a16", 64, "int8", activations="int8"),
}


@dataclass(frozen=True, slots=True)
class LogitError:
    """How far logits are from the reference's, over all rows."""

    relative: float
    """Root mean square of the difference, as a share of the spread of the reference's logits."""
    divergence: float
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    same_first: float
    """Share of rows whose most likely token is the same."""


def logit_error(found: Tensor, expected: Tensor) -> LogitError:
    """Of two [rows, vocab] float32."""
    spread = expected - expected.mean(dim=1, keepdim=True)
    log_p, log_q = expected.log_softmax(1), found.log_softmax(1)
    return LogitError(
        relative=float((found - expected).norm() / spread.norm()),
        divergence=float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
        same_first=float((found.argmax(1) == expected.argmax(1)).float().mean()),
    )


def random_prompts(path: Path, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, length)
    prompts: list[list[int]] = torch.randint(models.vocab_size(path), shape, generator=generator).tolist()
    return prompts


def all_logits(path: Path, formats: NumberFormats, prompts: Sequence[Sequence[int]]) -> Tensor:
    forward = load_forward(path, formats, max(map(len, prompts)))
    return torch.cat([prompt_logits(forward, prompt) for prompt in prompts])


def print_perplexities(formats: dict[str, NumberFormats]) -> None:
    print(f"{'manta-tiny':22}{'perplexity':>12}{'change':>10}")
    full = 0.0
    for name, chosen in formats.items():
        value, _ = engine_perplexity(chosen)
        full = full or value
        print(f"{name:22}{value:12.4f}{value / full - 1:10.2%}", flush=True)


def print_logit_errors(path: Path, formats: dict[str, NumberFormats], prompts: Sequence[Sequence[int]]) -> None:
    print(f"{path.name:22}{'logit error':>12}{'KL, nats':>12}{'same first':>12}")
    full = all_logits(path, formats["full"], prompts)
    for name, chosen in formats.items():
        if chosen.quantization == "w4a16" and not fits(path, chosen.group):
            continue
        error = logit_error(all_logits(path, chosen, prompts), full)
        print(f"{name:22}{error.relative:12.3%}{error.divergence:12.2e}{error.same_first:12.1%}", flush=True)


def fits(path: Path, group: int) -> bool:
    """Whether 4-bit groups of this size divide every layer's input."""
    from engine.models.directory import load_spec
    from engine.quant.plan import is_layer_linear

    return all(
        shape[-1] % group == 0 for name, shape in load_spec(path).parameter_shapes().items() if is_layer_linear(name)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="s135m", help=f"{', '.join(models.SHAPES)}, or a model directory")
    parser.add_argument("--prompts", type=int, default=4, help="random prompts for the larger model")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--kernels", choices=("torch", "C"), default="torch", help="what computes")
    options = parser.parse_args()
    formats = {name: replace(chosen, kernels=options.kernels) for name, chosen in FORMATS.items()}
    path = models.find(options.model)
    print_perplexities(formats)
    print()
    print_logit_errors(path, formats, random_prompts(path, options.prompts, options.length))


if __name__ == "__main__":
    main()
