"""GPT-2: learned positions, LayerNorm, and projections stored as [in, out] (Conv1D) with QKV merged already."""

from collections.abc import Collection, Iterator

from engine.models.families.family import (
    Config,
    Family,
    activation_of,
    eos_token_ids,
    linear_pieces,
    norm_pieces,
    prefix_of,
    require,
)
from engine.models.pieces import Piece
from engine.models.spec import LearnedPositions, ModelSpec


def _spec(config: Config) -> ModelSpec:
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    hidden, heads = int(config["n_embd"]), int(config["n_head"])
    return ModelSpec(
        vocab_size=int(config["vocab_size"]),
        hidden=hidden,
        layers=int(config["n_layer"]),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=int(config.get("n_inner") or 4 * hidden),
        max_position=int(config["n_positions"]),
        norm="layer",
        norm_eps=float(config["layer_norm_epsilon"]),
        positions=LearnedPositions(rows=int(config["n_positions"])),
        activation=activation_of(config, "activation_function"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
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


GPT2 = Family("GPT2LMHeadModel", "gpt2", _spec, _pieces)
