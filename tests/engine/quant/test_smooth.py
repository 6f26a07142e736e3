"""SmoothQuant: the model stays the same in full precision, and its outliers stop costing it in 8 bits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, OPTConfig, Qwen2Config
from transformers.configuration_utils import PretrainedConfig

from engine.forward import EagerForward
from engine.kernels.reference import ReferenceOperators
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from engine.models.loader import LoadedModel, load_parameters
from engine.quant.calibrate import activation_ranges
from engine.quant.prompts import PAGE_TOKENS, pages_of, prompt_logits
from engine.quant.quantize import quantize_int8
from engine.quant.smooth import Scaling, smoothing
from engine.quant.weights import Weight
from tests.engine.quant.checkpoints import GPT2, LLAMA, NEOX, QWEN_MOE, random_model

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LLAMA,
    "qwen2": Qwen2Config(**_SIZES, num_key_value_heads=2, intermediate_size=128),
    "opt": OPTConfig(**_SIZES, ffn_dim=128),
    "opt post-norm": OPTConfig(**_SIZES, ffn_dim=128, do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt gelu": OPTConfig(**_SIZES, ffn_dim=128, activation_function="gelu"),
    "neox": NEOX,
    "neox sequential": GPTNeoXConfig(**_SIZES, intermediate_size=128, use_parallel_residual=False),
    "gpt2": GPT2,
    "qwen2 moe": QWEN_MOE,
}
PROMPTS = [[(7 * i + seed) % 96 for i in range(24)] for seed in range(4)]


def scaled(weight: Weight, scaling: Scaling | None) -> Tensor:
    assert isinstance(weight, Tensor)
    if scaling is None:
        return weight
    if scaling.rows is not None:
        weight = weight * scaling.rows.view(-1, *[1] * (weight.dim() - 1))
    return weight if scaling.columns is None else weight * scaling.columns


def logits(loaded: LoadedModel, prompt: Sequence[int]) -> Tensor:
    decoder = Decoder(loaded.part, dict(loaded.parameters), ReferenceOperators(), loaded.dtype)
    cache = PagedKVCache(loaded.spec, pages_of(len(prompt)), PAGE_TOKENS, loaded.dtype)
    return prompt_logits(EagerForward(decoder, cache), prompt)


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_does_not_change_the_model(name: str, tmp_path: Path) -> None:
    random_model(CONFIGS[name]).save_pretrained(tmp_path)
    plain, folded = load_parameters(tmp_path), load_parameters(tmp_path)
    factors = smoothing(plain.spec, activation_ranges(tmp_path, PROMPTS, 24), 0.5)
    changed = set()
    for parameter, weight in plain.parameters.items():
        full = folded.parameters[parameter] = scaled(weight, factors.get(parameter))
        if not torch.equal(full, scaled(weight, None)):
            changed.add(parameter)
    assert {"layers.0.qkv.weight", "layers.0.out.weight"} <= changed
    assert ("layers.0.mlp_norm.weight" in changed) == (name not in ("opt post-norm", "qwen2 moe"))
    assert ("layers.1.mlp_out.weight" in changed) == (name in ("llama", "qwen2", "opt", "opt post-norm"))
    torch.testing.assert_close(logits(folded, PROMPTS[0]), logits(plain, PROMPTS[0]), rtol=1e-4, atol=1e-4)


def test_ranges_are_those_of_the_inputs(tmp_path: Path) -> None:
    """The first layer's norm of known embeddings is known."""
    model = random_model(LLAMA)
    model.save_pretrained(tmp_path)
    ranges = activation_ranges(tmp_path, PROMPTS, 24)["layers.0.qkv.weight"]
    with torch.no_grad():
        layer = model.model.layers[0]
        seen = layer.input_layernorm(model.model.embed_tokens(torch.tensor(PROMPTS))).flatten(0, 1)
        weight = torch.cat([getattr(layer.self_attn, f"{part}_proj").weight for part in "qkv"])
    torch.testing.assert_close(ranges.inputs, seen.abs().amax(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranges.weight, weight.abs().amax(0))


def test_outlier_channels_cost_less_after_smoothing(tmp_path: Path) -> None:
    """Two channels of every norm are large, as in models of some size: per-token scales then lose all the others."""
    model = random_model(LLAMA)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[3, 40]] *= 60
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight[:, [3, 40]] /= 60
    model.save_pretrained(tmp_path)
    plain = load_parameters(tmp_path)
    factors = smoothing(plain.spec, activation_ranges(tmp_path, PROMPTS, 24), 0.5)

    def error(factors: dict[str, Scaling]) -> float:
        eight = load_parameters(tmp_path)
        for parameter, weight in plain.parameters.items():
            full = scaled(weight, factors.get(parameter))
            is_linear = parameter.startswith("layers.") and full.dim() == 2
            eight.parameters[parameter] = quantize_int8(full) if is_linear else full
        expected = logits(plain, PROMPTS[1])
        return float((logits(eight, PROMPTS[1]) - expected).norm() / expected.norm())

    assert error(factors) < 0.5 * error({})
