"""Makes the built-in model from nothing: held-out file, tokenizer, training on generated text, saved weights, figures.

    python -m engine.models.tiny.train --minutes 50

One CPU is enough. The result is an ordinary Hugging Face directory; a usable checkpoint is written every few minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.models.tiny import PATH, evaluate
from engine.models.tiny.corpus import documents
from engine.models.tiny.corpus.chats import IM_END, IM_START

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2560
CONTEXT = 2048
HELDOUT_SEED = 990_001
HELDOUT_BYTES = 150_000
# Rows of a batch and their length, always 2048 tokens. Short rows are cheaper, so the first half of the budget takes
# them; then come whole stories, and some rows that teach positions up to CONTEXT.
FIRST, SECOND, LONG = (8, 256), (4, 512), (1, 2048)
LONG_SHARE = 0.1
# Letters with one leading space or mark, single digits (so that sums are learnt digit by digit), other marks, blanks.
SPLIT = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    out: Path
    minutes: float
    steps: int
    seed: int
    threads: int
    rate: float
    resume: bool


def write_heldout(path: Path) -> None:
    """The fixed held-out documents: JSON lines, from a split and a seed that training never uses."""
    lines: list[str] = []
    seen: set[str] = set()
    size = 0
    for text in documents(HELDOUT_SEED, "heldout"):
        if text in seen:
            continue
        seen.add(text)
        lines.append(json.dumps({"text": text}))
        size += len(lines[-1]) + 1
        if size > HELDOUT_BYTES:
            break
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_tokenizer(seed: int, count: int = 20_000) -> Tokenizer:
    """A byte-level BPE without any normalisation: decoding gives back exactly what was encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(seed), count), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, with the chat template inside the latter."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    ).save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"chat_template": CHAT_TEMPLATE, "add_bos_token": False}
    # The name that every version of transformers knows.
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh Llama of under four million parameters."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """One safetensors file in bfloat16, with its configurations."""
    config = model.config
    copy = LlamaForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
    )
    copy.save_pretrained(out)
    # Some writers of safetensors keep the file to its owner; an installed package is read by everyone.
    (out / "model.safetensors").chmod(0o644)


def write_figures(out: Path, figures: dict[str, float]) -> None:
    """What was measured, beside the weights."""
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


class Packer:
    """Packs tokenised documents into rows. Every row begins at the beginning of a document, as every prompt does."""

    def __init__(self, tokenizer: Tokenizer, seed: int, short_until: float = 0.5) -> None:
        self.tokenizer = tokenizer
        boundary = tokenizer.token_to_id(END_OF_TEXT)
        assert boundary is not None
        self.boundary: int = boundary
        self.source = self._tokens(documents(seed))
        self.rng = random.Random(seed)
        self.short_until = short_until

    def _tokens(self, texts: Iterator[str]) -> Iterator[list[int]]:
        while chunk := list(islice(texts, 500)):
            for encoding in self.tokenizer.encode_batch(chunk, add_special_tokens=False):
                yield encoding.ids

    def row(self, length: int) -> list[int]:
        """`length + 1` tokens: inputs and, one further, targets. Half of the rows begin with the boundary token."""
        row = [self.boundary] if self.rng.random() < 0.5 else []
        while len(row) <= length:
            row += next(self.source)
            row.append(self.boundary)
        return row[: length + 1]

    def batch(self, done: float) -> torch.Tensor:
        """One batch, of the shape that suits a share `done` of the budget."""
        rows, length = FIRST if done < self.short_until else LONG if self.rng.random() < LONG_SHARE else SECOND
        return torch.tensor([self.row(length) for _ in range(rows)])


def optimizers_for(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which needs fewer tokens, and AdamW for the embedding and the norms."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.6 * rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def schedule(done: float, step: int) -> float:
    """The share of the peak rate after a share `done` of the budget: warm-up, then a cosine down to one fiftieth."""
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def loss_function(model: LlamaForCausalLM) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean cross-entropy of all tokens; matrix products in bfloat16, master weights in float32."""

    def loss(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    return loss


def fit(model: LlamaForCausalLM, packer: Packer, options: Options, before: dict[str, float]) -> dict[str, float]:
    """Train until the budget of steps or minutes is spent; saves as it goes. Figures include those of runs `before`."""

    def save() -> dict[str, float]:
        figures = {
            "steps": step + before.get("steps", 0),
            "tokens": tokens + before.get("tokens", 0),
            "minutes": round((time.perf_counter() - started) / 60 + before.get("minutes", 0.0), 2),
        }
        save_model(model, options.out)
        write_figures(options.out, figures)
        return figures

    loss_of = loss_function(model)
    optimizers = optimizers_for(model, options.rate)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    started = saved = time.perf_counter()
    step, tokens, running = 0, 0, 0.0
    while True:
        minutes = (time.perf_counter() - started) / 60
        done = max(step / options.steps if options.steps else 0.0, minutes / options.minutes)
        if done >= 1:
            break
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(done, step)
        rows = packer.batch(done)
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + rows.shape[0] * (rows.shape[1] - 1)
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0:
            print(
                f"step {step}  loss {running:.3f}  {tokens / 60 / minutes:.0f} tokens/s  {minutes:.1f} min", flush=True
            )
        if time.perf_counter() - saved > 180:
            save()
            saved = time.perf_counter()
    return save()


def parse() -> Options:
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--out", type=Path, default=PATH, help="directory for the result")
    parser.add_argument("--minutes", type=float, default=45, help="time budget")
    parser.add_argument("--steps", type=int, default=0, help="step budget; 0 for the time budget alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on with the model and the tokenizer in --out")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write_heldout(evaluate.HELDOUT)
    before: dict[str, float] = {}
    if options.resume:
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
        before = json.loads((options.out / "training.json").read_text(encoding="utf-8"))
    else:
        tokenizer = train_tokenizer(options.seed)
        save_tokenizer(tokenizer, options.out)
        model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {tokenizer.get_vocab_size()} tokens in the vocabulary")
    packer = Packer(tokenizer, options.seed, short_until=0.0 if options.resume else 0.5)
    figures = fit(model, packer, options, before)
    value, count = evaluate.heldout_perplexity(options.out)
    print(f"held-out perplexity {value:.3f} over {count} tokens")
    figures |= {"perplexity": round(value, 4), "heldout_tokens": count, "parameters": parameters}
    write_figures(options.out, figures | {"threads": options.threads, "seed": options.seed})
    evaluate.samples(options.out)


if __name__ == "__main__":
    main()
