"""GPT-2: learned positions, LayerNorm, and projections stored as [in, out] (Conv1D) with QKV merged already."""

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
    require,
)
from engine.models.pieces import Piece
from engine.models.spec import LearnedPositions, ModelSpec


def _spec(config: Config) -> ModelSpec:
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    hidden, heads = count(config, "n_embd"), count(config, "n_head")
    return ModelSpec(
        vocab_size=count(config, "vocab_size"),
        hidden=hidden,
        layers=count(config, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_size(config, "n_embd", "n_head"),
        intermediate=count(config, "n_inner") if config.get("n_inner") else 4 * hidden,
        max_position=count(config, "n_positions"),
        norm="layer",
        norm_eps=number(config, "layer_norm_epsilon"),
        positions=LearnedPositions(rows=count(config, "n_positions")),
        activation=activation_of(config, "activation_function"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=bool(config["tie_word_embeddings"]),
        attention_scale=None if config["scale_attn_weights"] else 1.0,
        eos_token_ids=eos_token_ids(config),
        bos_token_id=config.get("bos_token_id"),
    )


def _pieces(spec: ModelSpec, names: Collection[str]) -> Iterator[Piece]:
    prefix = prefix_of(names, "wte.weight", ("transformer.", ""))
    assert isinstance(spec.positions, LearnedPositions)
    yield Piece.whole("embed.weight", f"{prefix}wte.weight", (spec.vocab_size, spec.hidden))
    yield Piece.whole("position.weight", f"{prefix}wpe.weight", (spec.positions.rows, spec.hidden))
    for index in range(spec.layers):
        target, source = f"layers.{index}", f"{prefix}h.{index}"
        linears = {
            "qkv": ("attn.c_attn", spec.qkv_rows, spec.hidden),
            "out": ("attn.c_proj", spec.hidden, spec.hidden),
            "mlp_in": ("mlp.c_fc", spec.intermediate, spec.hidden),
            "mlp_out": ("mlp.c_proj", spec.hidden, spec.intermediate),
        }
        for name, (theirs, rows, columns) in linears.items():
            yield from linear_pieces(
                f"{target}.{name}", f"{source}.{theirs}", rows, columns, bias=True, transposed=True
            )
        yield from norm_pieces(f"{target}.attention_norm", f"{source}.ln_1", spec)
        yield from norm_pieces(f"{target}.mlp_norm", f"{source}.ln_2", spec)
    yield from norm_pieces("final_norm", f"{prefix}ln_f", spec)
    if not spec.tied_embeddings:
        yield Piece.whole("head.weight", "lm_head.weight", (spec.vocab_size, spec.hidden))


_DEFAULTS: Config = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

GPT2 = Family("GPT2LMHeadModel", "gpt2", _spec, _pieces, _DEFAULTS)
