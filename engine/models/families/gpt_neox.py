"""GPT-NeoX and Pythia: partial rotary positions, parallel residual, QKV interleaved per head."""

from collections.abc import Collection, Iterator

from engine.models.families.family import (
    Config,
    Family,
    activation_of,
    eos_token_ids,
    linear_pieces,
    norm_pieces,
    prefix_of,
)
from engine.models.families.rope_config import max_position, rope_spec
from engine.models.pieces import Piece, Run
from engine.models.spec import ModelSpec

_DEFAULT_ROTARY_SHARE = 0.25


def _spec(config: Config) -> ModelSpec:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    rope = rope_spec(config, hidden // heads, _DEFAULT_ROTARY_SHARE)
    attention_bias = bool(config.get("attention_bias", True))
    return ModelSpec(
        vocab_size=int(config["vocab_size"]),
        hidden=hidden,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=int(config["intermediate_size"]),
        max_position=max_position(config, rope),
        norm="layer",
        norm_eps=float(config["layer_norm_eps"]),
        positions=rope,
        activation=activation_of(config, "hidden_act"),
        gated_mlp=False,
        block="parallel" if config.get("use_parallel_residual", True) else "pre",
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=True,
        tied_embeddings=bool(config["tie_word_embeddings"]),
        eos_token_ids=eos_token_ids(config),
        bos_token_id=config.get("bos_token_id"),
    )


def _pieces(spec: ModelSpec, names: Collection[str]) -> Iterator[Piece]:
    prefix = prefix_of(names, "embed_in.weight", ("gpt_neox.", ""))
    yield Piece.whole("embed.weight", f"{prefix}embed_in.weight", (spec.vocab_size, spec.hidden))
    for index in range(spec.layers):
        target, source = f"layers.{index}", f"{prefix}layers.{index}"
        yield from norm_pieces(f"{target}.attention_norm", f"{source}.input_layernorm", spec)
        yield from _interleaved_qkv_pieces(f"{target}.qkv", f"{source}.attention.query_key_value", spec)
        linears = {
            "out": ("attention.dense", spec.hidden, spec.hidden, spec.out_bias),
            "mlp_in": ("mlp.dense_h_to_4h", spec.intermediate, spec.hidden, True),
            "mlp_out": ("mlp.dense_4h_to_h", spec.hidden, spec.intermediate, True),
        }
        for name, (theirs, rows, columns, bias) in linears.items():
            yield from linear_pieces(f"{target}.{name}", f"{source}.{theirs}", rows, columns, bias=bias)
        yield from norm_pieces(f"{target}.mlp_norm", f"{source}.post_attention_layernorm", spec)
    yield from norm_pieces("final_norm", f"{prefix}final_layer_norm", spec)
    if not spec.tied_embeddings:
        head = "lm_head.weight" if "lm_head.weight" in names else "embed_out.weight"
        yield Piece.whole("head.weight", head, (spec.vocab_size, spec.hidden))


def _interleaved_qkv_pieces(target: str, source: str, spec: ModelSpec) -> Iterator[Piece]:
    """The checkpoint's rows go head by head, each with its query, key and value; ours are all queries, keys, values."""
    runs = tuple(
        Run(
            source=(head * 3 + part) * spec.head_dim,
            target=(part * spec.heads + head) * spec.head_dim,
            rows=spec.head_dim,
        )
        for head in range(spec.heads)
        for part in range(3)
    )
    yield Piece(f"{target}.weight", f"{source}.weight", (spec.qkv_rows, spec.hidden), runs)
    if spec.qkv_bias:
        yield Piece(f"{target}.bias", f"{source}.bias", (spec.qkv_rows,), runs)


GPT_NEOX = Family("GPTNeoXForCausalLM", "gpt_neox", _spec, _pieces)
