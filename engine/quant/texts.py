"""What a model reads while its activations are watched: token ids of a text, or made up. Knows no tensors."""

import random
from itertools import islice
from pathlib import Path

from engine.errors import ModelError
from engine.models.spec import ModelSpec

PROMPT_TOKENS = 512
NUM_PROMPTS = 32
_CORPUS_DOCUMENTS = 64
_CORPUS_SEED = 1


def calibration_prompts(path: Path, spec: ModelSpec, file: Path | None) -> list[list[int]]:
    """At most `NUM_PROMPTS` prompts of at most `PROMPT_TOKENS` tokens of the model directory's own tokenizer.

    The text is that of `file`, or English from the built-in model's corpus. Without a tokenizer the tokens are random,
    which finds the channels that are large whatever is read. Raises ModelError.
    """
    length = min(PROMPT_TOKENS, spec.max_position)
    text = _read(file) if file else "\n\n".join(_corpus())
    tokens = _encode(path, text)
    if tokens is None and file is not None:
        raise ModelError(f"{path}: has no tokenizer.json to read {file} with; leave the calibration text out")
    if tokens is None:
        rng = random.Random(_CORPUS_SEED)
        return [[rng.randrange(spec.vocab_size) for _ in range(length)] for _ in range(NUM_PROMPTS)]
    return [tokens[at : at + length] for at in range(0, len(tokens), length)][:NUM_PROMPTS]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise ModelError(f"{file}: is empty; expected text like that which the model will read")
    return text


def _corpus() -> list[str]:
    from engine.models.tiny.corpus import documents

    return list(islice(documents(_CORPUS_SEED), _CORPUS_DOCUMENTS))


def _encode(path: Path, text: str) -> list[int] | None:
    if not (path / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids
