"""Llama 1 to 3, and the config and names that Mistral and Qwen share with it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from engine.models.families.family import (
    Config,
    Family,
    activation_of,
    count,
    eos_token_ids,
    head_size,
    linear_pieces,
    merged_qkv_pieces,
    norm_pieces,
    number,
    prefix_of,
)
from engine.models.families.rope_config import max_position, rope_spec
from engine.models.pieces import Piece
from engine.models.spec import ModelSpec


def llama_like_spec(config: Config, windows: Sequence[int | None] = ()) -> ModelSpec:
    """The common part: RMSNorm before attention and MLP, rotary positions, gated MLP, grouped-query attention."""
    heads = count(config, "num_attention_heads")
    has_head_dim = config.get("head_dim") is not None
    head_dim = count(config, "head_dim") if has_head_dim else head_size(config, "hidden_size", "num_attention_heads")
    has_kv_heads = config.get("num_key_value_heads") is not None
    rope = rope_spec(config, head_dim)
    return ModelSpec(
        vocab_size=count(config, "vocab_size"),
        hidden=count(config, "hidden_size"),
        layers=count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=count(config, "num_key_value_heads") if has_kv_heads else heads,
        head_dim=head_dim,
        intermediate=count(config, "intermediate_size"),
        max_position=max_position(config, rope),
        norm="rms",
        norm_eps=number(config, "rms_norm_eps"),
        positions=rope,
        activation=activation_of(config, "hidden_act"),
        gated_mlp=True,
        windows=tuple(windows),
        tied_embeddings=bool(config["tie_word_embeddings"]),
        eos_token_ids=eos_token_ids(config),
        bos_token_id=config.get("bos_token_id"),
    )


def window_everywhere(config: Config) -> list[int | None]:
    """`sliding_window` on every layer, where there is one."""
    if not config.get("sliding_window"):
        return []
    return [count(config, "sliding_window")] * count(config, "num_hidden_layers")


def dense_mlp(target: str, layer: str, spec: ModelSpec, names: Collection[str]) -> Iterator[Piece]:
    """The MLP of a layer's checkpoint tensors."""
    return gated_mlp_pieces(f"{target}.mlp", f"{layer}.mlp", spec.hidden, spec.intermediate, bias=spec.mlp_bias)


def llama_like_pieces(
    spec: ModelSpec,
    names: Collection[str],
    mlp: Callable[[str, str, ModelSpec, Collection[str]], Iterator[Piece]] = dense_mlp,
) -> Iterator[Piece]:
    """`mlp` gives what follows attention, of a layer of ours and one of the checkpoint, in order of use."""
    prefix = prefix_of(names, "embed_tokens.weight", ("model.", ""))
    attention = spec.heads * spec.head_dim
    yield Piece.whole("embed.weight", f"{prefix}embed_tokens.weight", (spec.vocab_size, spec.hidden))
    for index in range(spec.layers):
        target, source = f"layers.{index}", f"{prefix}layers.{index}"
        yield from norm_pieces(f"{target}.attention_norm", f"{source}.input_layernorm", spec)
        yield from merged_qkv_pieces(f"{target}.qkv", f"{source}.self_attn", spec)
        if spec.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield Piece.whole(f"{target}.{name}.weight", f"{source}.self_attn.{name}.weight", (spec.head_dim,))
        yield from linear_pieces(
            f"{target}.out", f"{source}.self_attn.o_proj", spec.hidden, attention, bias=spec.out_bias
        )
        yield from norm_pieces(f"{target}.mlp_norm", f"{source}.post_attention_layernorm", spec)
        yield from mlp(target, source, spec, names)
    yield from norm_pieces("final_norm", f"{prefix}norm", spec)
    if not spec.tied_embeddings:
        yield Piece.whole("head.weight", "lm_head.weight", (spec.vocab_size, spec.hidden))


def gated_mlp_pieces(target: str, source: str, hidden: int, width: int, *, bias: bool) -> Iterator[Piece]:
    """Separate gate_proj, up_proj and down_proj under `source`, as `{target}_in` and `{target}_out`."""
    yield from linear_pieces(f"{target}_in", f"{source}.gate_proj", width, hidden, bias=bias)
    yield from linear_pieces(f"{target}_in", f"{source}.up_proj", width, hidden, bias=bias, at=width)
    yield from linear_pieces(f"{target}_out", f"{source}.down_proj", hidden, width, bias=bias)


def _spec(config: Config) -> ModelSpec:
    attention_bias = bool(config.get("attention_bias"))
    return replace(
        llama_like_spec(config),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
    )


LLAMA_LIKE_DEFAULTS: Config = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA = Family("LlamaForCausalLM", "llama", _spec, llama_like_pieces, LLAMA_LIKE_DEFAULTS)
