"""A Llama checkpoint as a GGUF file, in bf16 or quantized by llama.cpp itself.

    python -m workers.to_gguf DIR OUT TYPE

No vocabulary is written: prompts and answers are token ids. Memory stays at one tensor, whatever the model's size.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from llama_cpp import llama_cpp  # type: ignore[import-not-found,unused-ignore]
from numpy.typing import NDArray

FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(file: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """(name, bits of the bf16 values) of every tensor of a safetensors file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{file}: {name} is {entry['dtype']}, expected BF16")
        begin, end = entry["data_offsets"]
        values = np.memmap(file, np.uint16, "r", 8 + length + begin, ((end - begin) // 2,))
        yield name, values.reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def interleaved(rows: NDArray[np.uint16], num_heads: int) -> NDArray[np.uint16]:
    """Query or key weights [heads * head_dim, hidden] with each head's two halves interleaved row by row.

    llama.cpp rotates neighbouring channels where the checkpoint rotates a channel and the one half a head away.
    """
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def write_bf16(directory: Path, target: Path) -> None:
    """Writes a Hugging Face Llama directory as one GGUF file: matrices bf16, norms float32."""
    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=False)
    _describe(writer, config)
    for file in sorted(directory.glob("*.safetensors")):
        for name, bits in tensors(file):
            if bits.ndim == 1:
                values = (bits.astype(np.uint32) << 16).view(np.float32)
                writer.add_tensor(gguf_name(name), values)
                continue
            if "q_proj" in name or "k_proj" in name:
                bits = interleaved(bits, heads if "q_proj" in name else kv_heads)
            writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def quantize(source: Path, target: Path, name: str) -> None:
    """By llama.cpp's own quantizer; every matrix in the one type, the embedding too, which is its fastest form."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[name]
    params.pure = True
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if failed:
        raise RuntimeError(f"llama_model_quantize to {name} returned {failed}")


def main() -> None:
    directory, target, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if name == "bf16":
        write_bf16(directory, target)
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch) / "bf16.gguf"
        write_bf16(directory, whole)
        quantize(whole, target, name)


if __name__ == "__main__":
    main()
