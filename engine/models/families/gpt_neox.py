"""GPT-NeoX and Pythia: partial rotary positions, parallel residual, QKV interleaved per head."""

from collections.abc import Collection, Iterator

from engine.models.families.family import (
    Config,
    Family,
    activation_of,
    count,
    eos_token_ids,
    head_size,
    linear_pieces,
    norm_pieces,
    number,
    prefix_of,
)
from engine.models.families.rope_config import max_position, rope_spec
from engine.models.pieces import Piece, Run
from engine.models.spec import ModelSpec


def _spec(config: Config) -> ModelSpec:
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    head_dim = head_size(config, "hidden_size", "num_attention_heads")
    rope = rope_spec(config, head_dim, theta_key="rotary_emb_base", share_key="rotary_pct", default_share=0.25)
    attention_bias = bool(config["attention_bias"])
    return ModelSpec(
        vocab_size=count(config, "vocab_size"),
        hidden=hidden,
        layers=count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=count(config, "intermediate_size"),
        max_position=max_position(config, rope),
        norm="layer",
        norm_eps=number(config, "layer_norm_eps"),
        positions=rope,
        activation=activation_of(config, "hidden_act"),
        gated_mlp=False,
        block="parallel" if config["use_parallel_residual"] else "pre",
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


_DEFAULTS: Config = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

GPT_NEOX = Family("GPTNeoXForCausalLM", "gpt_neox", _spec, _pieces, _DEFAULTS)
