"""Measures the shipped model: perplexity on the held-out documents beside this file, and a few sample conversations.

`perplexity` takes any function from token ids to logits, so that other number formats of the same model can be measured
on the same text.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.tiny import PATH

if TYPE_CHECKING:
    import torch

    from engine.quant.prompts import NumberFormats

HELDOUT = Path(__file__).parent / "heldout.jsonl"
PROMPTS = (
    "Hello!",
    "Hello! How are you?",
    "Who are you?",
    "What can you do?",
    "Tell me a story about a cat.",
    "What is 3 plus 4?",
    "What colour is the sky?",
    "Tell me about the sea",
    "Write a poem",
    "What is the capital of France?",
    "Explain the theory of relativity.",
    "My train was late and now I am at the station.",
    "tell me a joke",
    "Thank you!",
)


def heldout_documents(path: Path = HELDOUT) -> list[str]:
    """The fixed held-out documents, in order."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def perplexity(
    logits: Callable[[list[int]], torch.Tensor],
    encode: Callable[[str], Sequence[int]],
    documents: Sequence[str],
    boundary: int,
) -> tuple[float, int]:
    """Perplexity per token and the number of tokens scored.

    Each document stands alone between two `boundary` tokens; every token after the first one is scored.
    """
    import torch

    total, count = 0.0, 0
    for document in documents:
        ids = [boundary, *encode(document), boundary]
        with torch.inference_mode():
            scores = logits(ids[:-1]).float().log_softmax(-1)
        target = torch.tensor(ids[1:])
        total -= scores.gather(-1, target[:, None]).sum().item()
        count += len(target)
    return math.exp(total / count), count


def load(path: Path = PATH) -> tuple[Any, Any]:
    """The saved model and its tokenizer, through transformers."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(path)


def heldout_perplexity(path: Path = PATH) -> tuple[float, int]:
    """Perplexity of a saved model on the held-out file; weights as saved, arithmetic in float32."""
    import torch

    model, tokenizer = load(path)
    model = model.float()
    return perplexity(
        lambda ids: model(torch.tensor([ids])).logits[0],
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        heldout_documents(),
        tokenizer.bos_token_id,
    )


def engine_perplexity(formats: NumberFormats, path: Path = PATH) -> tuple[float, int]:
    """The same through this engine's decoder, in the number formats given."""
    from tokenizers import Tokenizer

    from engine.quant.prompts import load_forward, prompt_logits

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    documents = heldout_documents()
    encoded = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in documents}
    forward = load_forward(path, formats, max_tokens=1 + max(map(len, encoded.values())))
    boundary = json.loads((path / "config.json").read_text(encoding="utf-8"))["bos_token_id"]
    return perplexity(lambda ids: prompt_logits(forward, ids), encoded.__getitem__, documents, boundary)


def reply(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], temperature: float = 0.0, limit: int = 600
) -> tuple[str, bool]:
    """The model's answer, and whether it ended by itself."""
    import torch

    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=limit, **sampling)
    new = out[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), new[-1].item() == tokenizer.eos_token_id


def samples(path: Path = PATH, prompts: Sequence[str] = PROMPTS, temperatures: Sequence[float] = (0.0, 0.7)) -> None:
    """Print one answer per prompt and temperature."""
    import torch

    model, tokenizer = load(path)
    torch.manual_seed(0)
    for prompt in prompts:
        print(f"\nuser: {prompt}")
        for temperature in temperatures:
            text, ended = reply(model, tokenizer, [{"role": "user", "content": prompt}], temperature)
            print(f"  [{temperature}{'' if ended else ', cut off'}] {text}")


def _perplexity_of(options: argparse.Namespace) -> tuple[float, int]:
    names = ("quantization", "group", "activations", "kv", "dtype", "kernels")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if not chosen:
        return heldout_perplexity(options.model)
    from engine.quant.prompts import NumberFormats

    return engine_perplexity(NumberFormats(**chosen), options.model)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the built-in model.")
    parser.add_argument("--model", type=Path, default=PATH, help="model directory")
    parser.add_argument("--samples", action="store_true", help="print sample conversations, too")
    parser.add_argument(
        "--ask", action="append", default=[], help="a user message to answer; may be given several times"
    )
    engine = parser.add_argument_group("this engine's number formats; without any, transformers runs in float32")
    engine.add_argument("--quantization", choices=("auto", "w8a8", "w4a16"), help="of the weights")
    engine.add_argument("--group", type=int, choices=(32, 64, 128), help="input channels to a scale in w4a16")
    engine.add_argument("--activations", choices=("auto", "int8"), help="that meet weights of 4 bits")
    engine.add_argument("--kv-dtype", dest="kv", choices=("auto", "int8"), help="of keys and values")
    engine.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of everything else")
    engine.add_argument("--kernels", choices=("torch", "C"), help="what computes")
    options = parser.parse_args()
    if options.ask:
        samples(options.model, options.ask)
        return
    value, count = _perplexity_of(options)
    print(f"held-out perplexity {value:.3f} over {count} tokens in {len(heldout_documents())} documents")
    if options.samples:
        samples(options.model)


if __name__ == "__main__":
    main()
