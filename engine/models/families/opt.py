"""OPT: learned positions at an offset of 2, ReLU; the 350M model normalises after and projects its embeddings."""

from collections.abc import Collection, Iterator

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
    prefix_of,
    require,
)
from engine.models.pieces import Piece
from engine.models.spec import LearnedPositions, ModelSpec

_POSITION_OFFSET = 2


def _spec(config: Config) -> ModelSpec:
    require(config, "layer_norm_elementwise_affine", True)
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    bias, norm_first = bool(config["enable_bias"]), bool(config["do_layer_norm_before"])
    max_position = count(config, "max_position_embeddings")
    return ModelSpec(
        vocab_size=count(config, "vocab_size"),
        hidden=hidden,
        layers=count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_size(config, "hidden_size", "num_attention_heads"),
        intermediate=count(config, "ffn_dim"),
        max_position=max_position,
        norm="layer",
        norm_eps=1e-5,
        positions=LearnedPositions(rows=max_position + _POSITION_OFFSET, offset=_POSITION_OFFSET),
        activation=activation_of(config, "activation_function"),
        gated_mlp=False,
        block="pre" if norm_first else "post",
        final_norm=norm_first and not config.get("_remove_final_layer_norm"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        embedding_dim=count(config, "word_embed_proj_dim") if config.get("word_embed_proj_dim") else hidden,
        tied_embeddings=bool(config["tie_word_embeddings"]),
        eos_token_ids=eos_token_ids(config),
        bos_token_id=config.get("bos_token_id"),
    )


def _pieces(spec: ModelSpec, names: Collection[str]) -> Iterator[Piece]:
    prefix = prefix_of(names, "embed_tokens.weight", ("model.decoder.", "decoder.", ""))
    assert isinstance(spec.positions, LearnedPositions)
    width = spec.embedding_dim or spec.hidden
    yield Piece.whole("embed.weight", f"{prefix}embed_tokens.weight", (spec.vocab_size, width))
    yield Piece.whole("position.weight", f"{prefix}embed_positions.weight", (spec.positions.rows, spec.hidden))
    if width != spec.hidden:
        yield from linear_pieces("project_in", f"{prefix}project_in", spec.hidden, width, bias=False)
        yield from linear_pieces("project_out", f"{prefix}project_out", width, spec.hidden, bias=False)
    for index in range(spec.layers):
        target, source = f"layers.{index}", f"{prefix}layers.{index}"
        yield from norm_pieces(f"{target}.attention_norm", f"{source}.self_attn_layer_norm", spec)
        yield from merged_qkv_pieces(f"{target}.qkv", f"{source}.self_attn", spec)
        linears = {
            "out": ("self_attn.out_proj", spec.hidden, spec.hidden),
            "mlp_in": ("fc1", spec.intermediate, spec.hidden),
            "mlp_out": ("fc2", spec.hidden, spec.intermediate),
        }
        for name, (theirs, rows, columns) in linears.items():
            yield from linear_pieces(f"{target}.{name}", f"{source}.{theirs}", rows, columns, bias=spec.mlp_bias)
        yield from norm_pieces(f"{target}.mlp_norm", f"{source}.final_layer_norm", spec)
    if spec.final_norm:
        yield from norm_pieces("final_norm", f"{prefix}final_layer_norm", spec)
    if not spec.tied_embeddings:
        yield Piece.whole("head.weight", "lm_head.weight", (spec.vocab_size, width))


_DEFAULTS: Config = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
}

OPT = Family("OPTForCausalLM", "opt", _spec, _pieces, _DEFAULTS)
