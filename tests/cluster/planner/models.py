"""Well-known models, by what their config.json says."""

from dataclasses import replace

from engine.models.spec import ExpertsSpec, LearnedPositions, ModelSpec, RopeSpec

LLAMA2_7B = ModelSpec(
    vocab_size=32000,
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    intermediate=11008,
    max_position=4096,
    norm="rms",
    norm_eps=1e-5,
    positions=RopeSpec(theta=10000.0, rotary_dim=128),
    activation="silu",
    gated_mlp=True,
)
LLAMA3_70B = replace(
    LLAMA2_7B, vocab_size=128256, hidden=8192, layers=80, heads=64, kv_heads=8, intermediate=28672, max_position=8192
)
LLAMA32_1B = replace(LLAMA3_70B, hidden=2048, layers=16, heads=32, head_dim=64, intermediate=8192)
LLAMA31_405B = replace(LLAMA3_70B, hidden=16384, layers=126, heads=128, intermediate=53248, max_position=131072)
MIXTRAL_8X7B = replace(
    LLAMA2_7B,
    kv_heads=8,
    intermediate=14336,
    max_position=32768,
    experts=ExpertsSpec(count=8, per_token=2, intermediate=14336, renormalised=True),
)
GPT3_175B = ModelSpec(
    vocab_size=51200,
    hidden=12288,
    layers=96,
    heads=96,
    kv_heads=96,
    head_dim=128,
    intermediate=49152,
    max_position=2048,
    norm="layer",
    norm_eps=1e-5,
    positions=LearnedPositions(rows=2048),
    activation="gelu",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied_embeddings=True,
)
