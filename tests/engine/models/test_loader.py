"""Loading: what ends up where, and what it costs in memory."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.kernels.reference import ReferenceOperators
from engine.models.decoder import Decoder
from engine.models.directory import load_eos_token_ids, load_spec
from engine.models.families import family_of
from engine.models.loader import load_parameters
from engine.models.source import resolve_model
from tests.engine.models.checkpoints import edit_config, edit_tensors
from tests.engine.models.harness import CONFIGS, Driver, make_model, random_tokens


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
