"""config.json, read without transformers, means what transformers takes it for, whatever it leaves out."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from engine.errors import ModelError
from engine.models.directory import load_spec
from engine.models.families import UnsupportedConfig, family_of

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GPT2LMHeadModel": "gpt2",
    "OPTForCausalLM": "opt",
    "GPTNeoXForCausalLM": "gpt_neox",
}
_SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 0.7},
]
_COMMON: dict[str, list[Any]] = {
    "vocab_size": [97, 32000],
    "tie_word_embeddings": [True, False],
    "bos_token_id": [None, 0, 5],
    "eos_token_id": [None, 0, 2, [2, 7]],
    "transformers_version": ["4.38.0", "5.23.0"],
    "torch_dtype": ["float16", "bfloat16"],
}
_ROPE: dict[str, list[Any]] = {
    "hidden_size": [256, 4096],
    "num_hidden_layers": [1, 30],
    "num_attention_heads": [8, 32],
    "intermediate_size": [96, 11008],
    "max_position_embeddings": [2048, 4096],
    "rope_theta": [10000.0, 500000],
    "rope_scaling": [None, *_SCALINGS],
    "hidden_act": ["silu", "gelu"],
}
_LLAMA: dict[str, list[Any]] = {
    "num_key_value_heads": [None, 2, 8],
    "head_dim": [None, 64],
    "rms_norm_eps": [1e-5, 1e-6],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "rope_parameters": [{"rope_theta": 1e6, "rope_type": "default"}],
}
_QWEN: dict[str, list[Any]] = {
    "use_sliding_window": [True, False],
    "sliding_window": [None, 128],
    "max_window_layers": [0, 1, 28],
}
_EXPERTS: dict[str, list[Any]] = {
    "num_experts_per_tok": [1, 2, 9],
    "output_router_logits": [True, False],
    "router_aux_loss_coef": [0.001],
}
_QWEN_MOE: dict[str, list[Any]] = {
    **_EXPERTS,
    "num_experts": [0, 8, 60],
    "moe_intermediate_size": [64],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [None, [], [0]],
}
CHOICES: dict[str, dict[str, list[Any]]] = {
    "llama": _ROPE | _LLAMA,
    "mistral": _ROPE | _LLAMA | {"sliding_window": [None, 128]},
    "mixtral": _ROPE | _LLAMA | _EXPERTS | {"sliding_window": [None, 128], "num_local_experts": [4, 8]},
    "qwen2": {key: values for key, values in (_ROPE | _LLAMA | _QWEN).items() if key != "head_dim"},
    "qwen3": _ROPE | _LLAMA | _QWEN,
    "qwen2_moe": {key: values for key, values in (_ROPE | _LLAMA | _QWEN | _QWEN_MOE).items() if key != "head_dim"}
    | {"shared_expert_intermediate_size": [128], "qkv_bias": [True, False]},
    "qwen3_moe": _ROPE | _LLAMA | _QWEN | _QWEN_MOE,
    "gpt2": {
        "n_embd": [96, 768],
        "n_head": [4, 12],
        "n_layer": [1, 12],
        "n_positions": [128],
        "n_inner": [None, 100],
        "activation_function": ["gelu_new", "relu"],
        "layer_norm_epsilon": [1e-5, 1e-6],
        "scale_attn_weights": [True, False],
    },
    "opt": {
        "hidden_size": [96, 768],
        "num_attention_heads": [4, 12],
        "num_hidden_layers": [1, 12],
        "ffn_dim": [100],
        "max_position_embeddings": [128],
        "do_layer_norm_before": [True, False],
        "enable_bias": [True, False],
        "word_embed_proj_dim": [None, 48],
        "activation_function": ["relu", "gelu"],
        "_remove_final_layer_norm": [True, False],
    },
    "gpt_neox": _ROPE
    | {
        "num_attention_heads": [8, 32],
        "layer_norm_eps": [1e-5, 1e-6],
        "rotary_pct": [0.25, 1.0],
        "rotary_emb_base": [10000, 50000],
        "use_parallel_residual": [True, False],
        "attention_bias": [True, False],
    },
}


@st.composite
def configs(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """A config.json with some of the keys that it may have."""
    model_type = ARCHITECTURES[architecture]
    keys = {key: st.sampled_from(values) for key, values in (_COMMON | CHOICES[model_type]).items()}
    chosen = draw(st.fixed_dictionaries({}, optional=keys))
    return {"architectures": [architecture], "model_type": model_type, **chosen}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=150)
@given(data=st.data())
def test_means_what_transformers_takes_it_for(architecture: str, data: st.DataObject) -> None:
    config = data.draw(configs(architecture))
    family = family_of(architecture)
    assert family is not None
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            theirs = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        except StrictDataclassError:
            reject()
        try:
            expected = family.read(theirs)
        except (UnsupportedConfig, ValueError):
            with pytest.raises(ModelError):
                load_spec(Path(folder))
        else:
            assert load_spec(Path(folder)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number of at least 1"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 3}, "hidden_size 4096 is not a multiple of num_attention_heads 3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "not a valid configuration"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, object], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | changes))
    with pytest.raises(ModelError) as raised:
        load_spec(tmp_path)
    assert str(raised.value).startswith(f"{file}: ")
    assert expected in str(raised.value)


def test_an_engine_starts_without_transformers() -> None:
    """Its import and its configuration classes take longer than reading a small model."""
    code = "import sys, engine.build; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
