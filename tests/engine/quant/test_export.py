"""Quantized copies of a model directory: what is in them, that they load as they should and are never half."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelError
from engine.models.loader import load_parameters
from engine.quant.config import Scheme
from engine.quant.export import Exporter, Target
from engine.quant.quantize import THOROUGH, quantize_int4
from engine.quant.smooth import Scaling
from engine.quant.weights import Int4Weight, Int8Weight
from engine.quant.writer import Entry, SafetensorsWriter
from tests.engine.quant.checkpoints import GPT2, LLAMA, MIXTRAL, NEOX, QWEN_MOE, random_model

SCHEMES: tuple[Scheme, ...] = ("w8a8", "w4a16")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    random_model(LLAMA).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize("kind", ["llama", "neox", "mixtral", "qwen-moe"])
def test_8_bits_read_back_as_they_are_quantized_at_load(kind: str, tmp_path: Path) -> None:
    configs = {"llama": LLAMA, "neox": NEOX, "mixtral": MIXTRAL, "qwen-moe": QWEN_MOE}
    random_model(configs[kind]).save_pretrained(tmp_path / "model")
    Exporter(tmp_path / "model", Target("w8a8")).write(tmp_path / "out")
    read = load_parameters(tmp_path / "out", quantization="w8a8").parameters
    for name, expected in load_parameters(tmp_path / "model", quantization="w8a8").parameters.items():
        found = read[name]
        if isinstance(expected, Int8Weight):
            assert isinstance(found, Int8Weight)
            assert torch.equal(found.values, expected.values)
            assert torch.equal(found.scale, expected.scale)
        else:
            assert isinstance(found, Tensor) and isinstance(expected, Tensor)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("group", [32, 64])
def test_4_bits_read_back_as_they_are_searched(group: int, model: Path, tmp_path: Path) -> None:
    full = load_parameters(model).parameters
    report = Exporter(model, Target("w4a16", group)).write(tmp_path / "out")
    read = load_parameters(tmp_path / "out").parameters
    squares = [0.0, 0.0]
    for name, weight in full.items():
        assert isinstance(weight, Tensor)
        found = read[name]
        if not isinstance(found, Int4Weight):
            assert isinstance(found, Tensor) and torch.equal(found, weight)
            continue
        expected = quantize_int4(weight, group, THOROUGH)
        assert found.group == group
        assert torch.equal(found.dequantize(), expected.dequantize())
        squares[0] += float((found.dequantize() - weight).square().sum())
        squares[1] += float(weight.float().square().sum())
    assert report.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert report.num_quantized == len(report.errors) == 14


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_copy_is_a_model_directory_of_its_own(scheme: Scheme, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "some" / "out"
    advanced: list[None] = []
    exporter = Exporter(model, Target(scheme))
    report = exporter.write(out, advance=lambda: advanced.append(None))
    assert len(advanced) == exporter.num_tensors == len(load_file(model / "model.safetensors"))
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").exists()
    assert oct(out.stat().st_mode)[-3:] == "755"
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == ["lm_head"]
    assert config == json.loads((model / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert report.bytes_before == sum(t.nbytes for t in load_file(model / "model.safetensors").values())
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_routers_are_named_as_not_quantized(tmp_path: Path) -> None:
    """Others hold them as linear layers."""
    random_model(QWEN_MOE).save_pretrained(tmp_path / "model")
    Exporter(tmp_path / "model", Target("w8a8")).write(tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    layers = [f"model.layers.{index}.mlp.{name}" for index in range(2) for name in ("gate", "shared_expert_gate")]
    assert ignored == ["lm_head", *layers]


def test_experts_in_one_tensor_are_refused_with_what_to_do(tmp_path: Path) -> None:
    random_model(MIXTRAL).save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(ModelError, match=r"holds all experts at once.*quantize such a model as it is loaded"):
        Exporter(tmp_path, Target("w8a8"))


def test_smoothing_is_folded_into_what_is_written(model: Path, tmp_path: Path) -> None:
    rows, columns = 2.0 ** torch.randint(-3, 4, (128,)), 2.0 ** torch.randint(-3, 4, (64,))
    factors = {
        "layers.0.qkv.weight": Scaling(rows, columns),
        "layers.0.attention_norm.weight": Scaling(1 / columns),
    }
    Exporter(model, Target("w8a8"), factors).write(tmp_path / "out")
    before, after = load_parameters(model).parameters, load_parameters(tmp_path / "out").parameters
    norm, qkv = before["layers.0.attention_norm.weight"], before["layers.0.qkv.weight"]
    found = after["layers.0.qkv.weight"]
    assert isinstance(norm, Tensor) and isinstance(qkv, Tensor) and isinstance(found, Int8Weight)
    assert torch.equal(after["layers.0.attention_norm.weight"], norm / columns)  # type: ignore[arg-type]
    expected = qkv.float() * rows[:, None] * columns
    assert bool(((found.dequantize() - expected).abs() <= 0.51 * found.scale[:, None]).all())


def test_an_interrupted_copy_leaves_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Exporter(model, Target("w8a8")).write(out, advance=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_failed_replacement_leaves_the_old_copy(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Exporter(model, Target("w8a8")).write(out)
    before = (out / "model.safetensors").read_bytes()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = torch.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj.*row 5"):
        Exporter(model, Target("w4a16")).write(out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_only_a_model_directory_is_replaced_and_only_by_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Exporter(model, Target("w8a8")).write(out)
    with pytest.raises(ModelError, match="exists; --force"):
        Exporter(model, Target("w4a16")).write(out)
    Exporter(model, Target("w4a16")).write(out, force=True)
    assert isinstance(load_parameters(out).parameters["layers.0.qkv.weight"], Int4Weight)
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(ModelError, match="is no model directory"):
        Exporter(model, Target("w4a16")).write(home, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model", "out"]


def test_what_cannot_be_copied_is_said_at_once(model: Path, tmp_path: Path) -> None:
    Exporter(model, Target("w8a8")).write(tmp_path / "out")
    with pytest.raises(ModelError, match="quantized already"):
        Exporter(tmp_path / "out", Target("w4a16"))
    with pytest.raises(ModelError, match=r"group of 128; a group of 32 or 64 fits"):
        Exporter(model, Target("w4a16", 128))
    random_model(GPT2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"\[in, out\].*--quantization w8a8"):
        Exporter(tmp_path / "gpt2", Target("w8a8"))


def test_saved_constants_are_left_out(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {name: torch.ones(8)}, model / "model.safetensors")
    Exporter(model, Target("w8a8")).write(tmp_path / "out")
    assert name not in load_file(tmp_path / "out" / "model.safetensors")


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randint(-128, 128, (7,), dtype=torch.int8),
        "c": torch.randn(2, 2, 2).bfloat16(),
        "d": torch.tensor([1, 2**40]),
        "e": torch.randint(-(2**31), 2**31, (1, 9), dtype=torch.int32),
    }
    entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "file", entries) as writer:
        for name, tensor in tensors.items():
            writer.begin(name)
            for row in tensor.split(1):
                writer.rows(row)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
