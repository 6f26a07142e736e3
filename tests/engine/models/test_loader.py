"""Loading: what ends up where, what it costs in memory, and what each kind of broken directory is told."""

import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.kernels import ReferenceOperators
from engine.models.decoder import Decoder
from engine.models.directory import load_eos_token_ids, load_spec
from engine.models.families import family_of
from engine.models.loader import load_parameters
from engine.models.source import resolve_model
from tests.engine.models.harness import CONFIGS, Driver, make_model, random_tokens

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model(CONFIGS["llama"]).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A private copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> dict[str, str]:
    """Splits the single file in two and returns the index's weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_shard(folder: Path) -> None:
    shard(folder)
    (folder / "part-1.safetensors").unlink()


def misplace_tensor(folder: Path) -> None:
    weight_map = shard(folder)
    name = "model.norm.weight"
    weight_map[name] = "part-1.safetensors" if weight_map[name] == "part-0.safetensors" else "part-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def break_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def keep(folder: Path) -> None:
    """No damage."""


def poison(folder: Path, name: str, row: int, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[name][row].view(-1)[-1:].fill_(value))


BROKEN: dict[str, tuple[Edit, list[str]]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json", "missing"]),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), ["config.json", "expected a JSON object"]),
    "config of wrong types": (lambda p: edit_config(p, hidden_size="big"), ["config.json", "hidden_size"]),
    "other architecture": (
        lambda p: edit_config(p, architectures=["MambaForCausalLM"]),
        ["config.json", "MambaForCausalLM", "LlamaForCausalLM", "GPTNeoXForCausalLM"],
    ),
    "quantized": (lambda p: edit_config(p, quantization_config={"bits": 4}), ["config.json", "quantization_config"]),
    "odd dtype": (lambda p: edit_config(p, dtype="float64"), ["config.json", "float64", "bfloat16"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["no weights found", "model.safetensors"]),
    "pickled weights": (pickle_instead, ["pytorch_model.bin", "not supported", "save_pretrained"]),
    "truncated": (truncate, ["model.safetensors", "truncated"]),
    "missing shard": (drop_shard, ["part-1.safetensors", "missing"]),
    "misplaced tensor": (misplace_tensor, ["model.norm.weight", "missing", "part-"]),
    "index without map": (break_index, ["model.safetensors.index.json", "weight_map"]),
    "missing tensor": (
        lambda p: edit_tensors(p, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight")),
        ["model.safetensors", "model.layers.1.self_attn.k_proj.weight", "missing"],
    ),
    "wrong shape": (
        lambda p: edit_tensors(p, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        ["model.safetensors", "model.norm.weight", "(31,)", "(32,)"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory_gets_one_line_that_names_the_file(case: str, model: Path) -> None:
    """Before anything is read: parameters are not asked for here."""
    damage, expected = BROKEN[case]
    damage(model)
    with pytest.raises(ModelError) as raised:
        load_parameters(model)
    assert_names_the_file(str(raised.value), model, expected)


def shrink_later(folder: Path) -> None:
    """As a copy that another process begins anew, after the headers were read."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)


POISONED: dict[str, tuple[Edit, Edit, list[str]]] = {
    "NaN": (lambda p: poison(p, "model.layers.1.mlp.down_proj.weight", 5, torch.nan), keep, ["down_proj", "row 5"]),
    "infinity": (lambda p: poison(p, "model.layers.0.mlp.up_proj.weight", 7, -torch.inf), keep, ["up_proj", "row 7"]),
    "NaN in a vector": (lambda p: poison(p, "model.norm.weight", 3, torch.nan), keep, ["model.norm.weight", "row 3"]),
    "shorter by now": (keep, shrink_later, ["model.safetensors", "cut off"]),
    "gone by now": (keep, lambda p: (p / "model.safetensors").unlink(), ["model.safetensors", "cannot be read"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", POISONED)
def test_values_that_cannot_be_read_are_named_when_a_decoder_takes_them(
    case: str, dtype: torch.dtype, model: Path
) -> None:
    before, after, expected = POISONED[case]
    before(model)
    loaded = load_parameters(model, dtype)
    after(model)
    with pytest.raises(ModelError) as raised:
        Decoder(loaded.part, loaded.parameters, ReferenceOperators(), loaded.dtype)
    assert_names_the_file(str(raised.value), model, expected)


def assert_names_the_file(message: str, folder: Path, expected: list[str]) -> None:
    assert "\n" not in message
    assert str(folder) in message
    for part in expected:
        assert part in message


UNSUPPORTED: dict[str, tuple[str, dict[str, object], str]] = {
    "activation": ("llama", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
    "rope type": ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral'"),
    "rope parameter": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor'"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    "norm without weights": ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    "layers without experts": ("qwen2-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
    "some layers without experts": ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers [1] is not supported"),
    "more experts than there are": ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than the 6"),
    "heads that do not divide": ("qwen3", {"num_key_value_heads": 3}, "kv_heads (3)"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unimplemented_options_are_refused_not_ignored(case: str, tmp_path: Path) -> None:
    name, changes, expected = UNSUPPORTED[case]
    config = copy.deepcopy(CONFIGS[name])
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    if name == "gpt2":
        config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=re.escape(expected)) as raised:
        load_spec(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such directory"):
        load_spec(tmp_path / "nowhere")


def test_older_rope_keys_mean_the_same(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "linear", "factor": 2.0}
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0, "rope_scaling": scaling}))
    old = load_spec(model)
    edit_config(model, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0})
    assert old == load_spec(model)
    assert old.max_position == 256


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_fill_every_row_of_every_parameter_once(name: str, tmp_path: Path) -> None:
    """Parameters are allocated uninitialised, so a row that no piece fills would be garbage."""
    model = make_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    spec = load_spec(tmp_path)
    family = family_of(model.config.architectures[0])
    assert family is not None
    filled = {target: torch.zeros(shape) for target, shape in spec.parameter_shapes().items()}
    for piece in family.pieces(spec, names):
        parameter = filled[piece.target].T if piece.transposed else filled[piece.target]
        for run in piece.runs:
            parameter[run.target : run.target + run.rows] += 1
    assert [target for target, count in filled.items() if not (count == 1).all()] == []


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    make_model(CONFIGS["qwen2"]).save_pretrained(tmp_path)
    tied, spec = load_parameters(tmp_path), load_spec(tmp_path)
    Decoder(tied.part, tied.parameters, ReferenceOperators(), tied.dtype)
    expected = sum(torch.Size(shape).numel() for shape in spec.parameter_shapes().values()) * 4
    assert "head.weight" not in spec.parameter_shapes()
    assert tied.num_bytes == expected


def test_run_dtype_is_the_checkpoints_unless_chosen(model: Path) -> None:
    assert load_parameters(model).dtype == torch.float32
    assert load_parameters(model, "bfloat16").dtype == torch.bfloat16
    edit_config(model, dtype="bfloat16")
    assert load_parameters(model).dtype == torch.bfloat16
    loaded = load_parameters(model, torch.float16)
    assert loaded.dtype == torch.float16
    assert {weight.dtype for weight in loaded.parameters.values() if isinstance(weight, torch.Tensor)} == {
        torch.float16
    }


def test_float16_checkpoints_run_in_bfloat16_on_a_cpu_unless_told(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(model, dtype="float16")
    with caplog.at_level(logging.INFO):
        assert load_parameters(model).dtype == torch.bfloat16
    assert [record.getMessage() for record in caplog.records if "float16" in record.message] == [
        f"{model}: a float16 checkpoint runs in bfloat16, which CPUs have instructions for"
    ]
    assert load_parameters(model, "float16").dtype == torch.float16
    assert load_parameters(model, device="meta").dtype == torch.float16


def test_float32_checkpoints_run_in_bfloat16_on_a_gpu_unless_told(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is taken to the device before a decoder takes it, so this needs none."""
    with caplog.at_level(logging.INFO):
        assert load_parameters(model, device="cuda").dtype == torch.bfloat16
    assert [record.getMessage() for record in caplog.records if "float32" in record.message] == [
        f"{model}: a float32 checkpoint runs in bfloat16: no CUDA kernel computes in float32"
    ]
    assert load_parameters(model, "float32", device="cuda").dtype == torch.float32


def test_4_bits_of_a_float16_checkpoint_run_in_bfloat16_on_a_gpu(model: Path) -> None:
    """Else its kernel could not multiply by them, and they would be made dense."""
    edit_config(model, dtype="float16")
    assert load_parameters(model, device="cuda").dtype == torch.float16
    assert load_parameters(model, device="cuda", quantization="w8a8").dtype == torch.float16
    assert load_parameters(model, device="cuda", quantization="w4a16", group=16).dtype == torch.bfloat16


def test_unused_tensors_are_logged_but_saved_constants_are_not(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "value_head.weight": torch.ones(4)}
    edit_tensors(model, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.WARNING):
        load_parameters(model)
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records if "not used" in record.message] == [
        "1 tensors are not used: value_head.weight"
    ]


def test_names_without_the_usual_prefix_load_too(tmp_path: Path) -> None:
    """Checkpoints saved from the base model: "h.0..." for GPT-2, "decoder.layers.0..." for OPT."""
    for name, prefix in {"gpt2": "transformer.", "opt": "model."}.items():
        folder = tmp_path / name
        make_model(CONFIGS[name]).save_pretrained(folder)
        expected = last_logits(folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({key.removeprefix(prefix): value for key, value in tensors.items()}, folder / "model.safetensors")
        assert torch.equal(last_logits(folder), expected)


def last_logits(folder: Path) -> torch.Tensor:
    driver = Driver(folder, "torch")
    stream = driver.start(random_tokens(9))
    driver.step([(stream, 9)])
    return stream.logits[-1]


def test_eos_comes_from_the_generation_config_first(model: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    edit_config(model, eos_token_id=5)
    assert load_eos_token_ids(model) == (5,)
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_eos_token_ids(model) == (7, 8)
    (model / "generation_config.json").write_text("{}")
    edit_config(model, eos_token_id=None)
    assert load_eos_token_ids(model) == ()


def test_resolve_prefers_a_local_directory_and_explains_what_it_is_not(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(str(model)) == model
    assert resolve_model("manta-tiny").name
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(model / "config.json"))
    for name in ("no-such-model", "./no/such", "/no/such/dir"):
        with pytest.raises(ModelError, match=re.escape(f"{name}: no such directory")):
            resolve_model(name)


def test_hub_is_asked_only_for_hub_ids(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision))
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern for pattern in allow_patterns)
        if hub_id == "gone/model":
            raise OSError("no route\nto the hub")
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("some/model", "v2") == model
    with pytest.raises(ModelError) as raised:
        resolve_model("gone/model")
    assert str(raised.value) == "gone/model: no such directory, and the hub did not deliver it: no route"
    assert asked == [("some/model", "v2"), ("gone/model", None)]


_ARITHMETIC_BYTES = 48 * 2**20
"""Temporaries of a few million elements, and what the heap keeps of them: less than any matrix of the model in full."""

_SLICE_BYTES = 16 * 2**20
"""Of the file, at most, that is in memory beside what has been read."""

_MEASURE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from engine.models.directory import load_spec
from engine.models.loader import load_parameters
load_spec(Path(sys.argv[1]))  # Imports what is imported late; it does not grow with the model.
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
def peak(take):
    loaded = load_parameters(Path(sys.argv[1]), quantization=sys.argv[2])
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = take(loaded.parameters)
    return (kib("VmHWM") - before) * 1024, loaded.num_bytes
def drop(parameters):
    for name in list(parameters):
        parameters.pop(name)
print(*peak(drop), *peak(dict))
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some 250 MiB."""
    folder = tmp_path_factory.mktemp("medium")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    spec, family = load_spec(folder), family_of("LlamaForCausalLM")
    assert family is not None
    tensors = {p.source: torch.ones(p.shape, dtype=torch.bfloat16) for p in family.pieces(spec, frozenset())}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of peak memory")
@pytest.mark.parametrize("quantization", ["auto", "w8a8", "w4a16"])
def test_loading_peaks_a_little_above_the_weights(medium: Path, quantization: str) -> None:
    """Nothing of the file counts on top, and what is taken and dropped, as who packs it does, makes room for the next.

    Quantized weights never exist in full precision; what their arithmetic needs on top does not grow with them.
    """
    command = [sys.executable, "-c", _MEASURE, str(medium), quantization]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    dropped_peak, dropped, kept_peak, kept = map(int, done.stdout.split())
    file = (medium / "model.safetensors").stat().st_size
    largest = 2 * 4096 * 1024 * 2
    share = {"auto": 1.01, "w8a8": 0.6, "w4a16": 0.4}[quantization]
    assert dropped == kept < share * file
    spare = _SLICE_BYTES + (0 if quantization == "auto" else _ARITHMETIC_BYTES)
    assert kept_peak <= 1.02 * kept + spare
    assert dropped_peak <= 2 * share * largest + spare
