"""Random-weight models to measure speed with: the real shapes and sizes, no download, the same bytes on every machine.

`python -m benchmarks.models s135m` writes a Hugging Face directory (config, bf16 safetensors, tokenizer) once, under
`$MANTA_MODELS` or `~/.cache/manta/models`; one whose config is of another version is written again. Knows no engine;
the text such a model writes means nothing.
"""

import argparse
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
BOS, EOS, PAD = range(3)
MAX_POSITIONS = 16384
WEIGHT_STD = 0.02
_DRAW_ELEMENTS = 2**24
"""Elements drawn and written at a time: a tensor never exists as a whole."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama model with tied embeddings; field names are those of its Hugging Face config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        return sum(rows * columns for rows, columns in _tensors(self).values())


SHAPES = {
    # So narrow that an iteration is nearly all fixed cost, whatever its number of tokens: what a large model is to an
    # accelerator whose time goes into reading weights.
    "thin": Shape(32, 8, 1, 1, 64, 512),
    "s135m": Shape(576, 30, 9, 3, 1536, 49152),
    "m1b": Shape(2048, 16, 32, 8, 8192, 128256),
}


def cache_directory() -> Path:
    """Where the models are written: `$MANTA_MODELS`, or `~/.cache/manta/models`."""
    given = os.environ.get("MANTA_MODELS")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "manta" / "models"


def ensure(name: str, *, seed: int = 0) -> Path:
    """Directory of a model, written first if it is not there or is not what this module writes now.

    Raises KeyError for an unknown name.
    """
    shape = SHAPES[name]
    target = cache_directory() / (name if seed == 0 else f"{name}-seed{seed}")
    if not _is_current(target, shape):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: an interrupted run leaves no half model under the final name.
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            write(partial, shape, seed=seed)
            partial.chmod(0o755)
            _replace(target, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


def _is_current(directory: Path, shape: Shape) -> bool:
    try:
        return bool(json.loads((directory / "config.json").read_text()) == _config(shape))
    except (OSError, ValueError):
        return False


def _replace(target: Path, partial: Path) -> None:
    """Gives `partial` the name of `target`, whose outdated files stay readable for whoever has them open."""
    if target.is_dir():
        outdated = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        target.rename(outdated / target.name)
        partial.rename(target)
        shutil.rmtree(outdated)
    else:
        partial.rename(target)


def find(name: str) -> Path:
    """A model of this module by name, or any other by its directory. Exits with a message if it is neither."""
    if name in SHAPES:
        return ensure(name)
    path = Path(name)
    if not (path / "config.json").is_file():
        raise SystemExit(f"{name}: neither one of {', '.join(SHAPES)} nor a directory with a config.json")
    return path


def vocab_size(path: Path) -> int:
    """Size of the vocabulary of a model directory."""
    return int(json.loads((path / "config.json").read_text())["vocab_size"])


def write(directory: Path, shape: Shape, *, seed: int) -> None:
    """Writes config, weights and tokenizer of a random model into an existing directory."""
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
    _write_weights(directory / "model.safetensors", shape, seed)
    _write_tokenizer(directory, shape.vocab_size)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def _tensors(shape: Shape) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns) of every weight; a vector counts as a single row and is a norm."""
    hidden, kv = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": (1, hidden),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (1, hidden),
            f"{prefix}.mlp.gate_proj.weight": (shape.intermediate_size, hidden),
            f"{prefix}.mlp.up_proj.weight": (shape.intermediate_size, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, shape.intermediate_size),
        }
    return tensors | {"model.norm.weight": (1, hidden)}


def _write_weights(path: Path, shape: Shape, seed: int) -> None:
    """The safetensors layout: header length (u64, little endian), JSON header, then the tensors end to end.

    Written by hand so that memory stays at one piece of one tensor, whatever the model's size.
    """
    tensors = _tensors(shape)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in tensors.items():
        begin, end = end, end + 2 * rows * columns
        dims = [columns] if rows == 1 else [rows, columns]
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (rows, columns) in tensors.items():
            for piece in _values(name, rows * columns, seed):
                file.write(piece.view(torch.uint8).numpy().data)


def _values(name: str, count: int, seed: int) -> Iterator[torch.Tensor]:
    """The elements of one tensor in bf16, in pieces. A norm is ones; the rest depends on seed and name alone."""
    if "norm" in name:
        yield torch.ones(count, dtype=torch.bfloat16)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    for begin in range(0, count, _DRAW_ELEMENTS):
        size = min(_DRAW_ELEMENTS, count - begin)
        yield torch.empty(size).normal_(0.0, WEIGHT_STD, generator=generator).to(torch.bfloat16)


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer in which every id of the model is a token.

    Text is encoded byte by byte (there are no merges); the ids above the bytes are made-up words, so that whatever a
    random model draws can be decoded, streamed and searched for stop strings like any other model's text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*SPECIAL_TOKENS, *alphabet]
    entries += islice(_words(), max(0, vocab_size - len(entries)))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries[:vocab_size])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
        "model_max_length": MAX_POSITIONS,
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _words() -> Iterator[str]:
    """Distinct words, short ones first: " ba", " be", ..., " baba", ... (the space as byte-level BPE spells it)."""
    syllables = ["".join(pair) for pair in product("bdfghjklmnprstvwyz", "aeiou")]
    for length in range(1, 5):
        for parts in product(syllables, repeat=length):
            yield "Ġ" + "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES), metavar="NAME", help=", ".join(sorted(SHAPES)))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.names:
        path = ensure(name, seed=arguments.seed)
        size = (path / "model.safetensors").stat().st_size
        print(f"{name}: {SHAPES[name].num_parameters / 1e6:.1f} M parameters, {size / 2**20:.0f} MiB in {path}")


if __name__ == "__main__":
    main()
