"""Whatever the launcher refuses the replica would refuse too, and what it cannot be sure of it lets through."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.configuration_utils import PretrainedConfig

from deployments import model_check
from deployments.cli.errors import CommandError, ExitCode
from deployments.model_check import check_model, may_have_gpu
from engine.config import EngineConfig
from engine.devices import choose_device
from engine.errors import ModelError
from engine.kernels.cpu.features import ALL
from engine.models.loader import load_parameters
from engine.models.source import resolve_model
from tests.deployments.cli.command import manta
from tests.engine.models.harness import CONFIGS, make_model


def save(config: PretrainedConfig, folder: Path) -> Path:
    make_model(config).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def asking(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig.model_validate({"model": str(folder), **settings})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_group_that_does_not_fit_is_refused_in_the_replicas_words(name: str, tmp_path: Path) -> None:
    folder = save(CONFIGS[name], tmp_path)
    with pytest.raises(ModelError, match="are no multiple of the group of 64") as early:
        check_model(asking(folder, quantization="w4a16", quantization_group=64))
    with pytest.raises(ModelError) as late:
        load_parameters(folder, quantization="w4a16", group=64)
    assert str(early.value) == str(late.value)
    assert check_model(asking(folder, quantization="w8a8")) == folder


def test_experts_in_one_tensor_are_judged_as_those_apart(tmp_path: Path) -> None:
    make_model(CONFIGS["mixtral"]).save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(ModelError, match=r"down_proj.*48 input channels are no multiple of the group of 32") as early:
        check_model(asking(tmp_path, quantization="w4a16", quantization_group=32))
    with pytest.raises(ModelError) as late:
        load_parameters(tmp_path, quantization="w4a16", group=32)
    assert str(early.value) == str(late.value)


def test_a_group_that_fits_is_let_through() -> None:
    built_in = resolve_model("manta-tiny")
    for group in (32, 64, 128):
        assert check_model(EngineConfig(quantization="w4a16", quantization_group=group)) == built_in


@pytest.mark.parametrize(
    "broken",
    [
        lambda folder: edit_config(folder, intermediate_size=96),
        lambda folder: (folder / "model.safetensors").write_bytes(b"no header"),
    ],
    ids=["config that contradicts the weights", "weights that cannot be read"],
)
def test_what_cannot_be_told_early_is_left_to_the_replica(broken: Any, tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path)
    broken(folder)
    check_model(asking(folder, quantization="w4a16", quantization_group=64))
    with pytest.raises(ModelError):
        load_parameters(folder, quantization="w4a16", group=64)


def test_a_model_that_config_json_does_not_settle_is_refused_in_the_replicas_words(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path)
    edit_config(folder, intermediate_size=None)
    with pytest.raises(ModelError, match="intermediate_size is None") as early:
        check_model(asking(folder))
    with pytest.raises(ModelError) as late:
        load_parameters(folder)
    assert str(early.value) == str(late.value)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def test_a_quantized_checkpoint_cannot_be_quantized_otherwise(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path)
    edit_config(folder, quantization_config=GPTQ)
    with pytest.raises(ModelError, match="quantized already, to w4a16; it cannot be loaded as w8a8") as early:
        check_model(asking(folder, quantization="w8a8"))
    with pytest.raises(ModelError) as late:
        load_parameters(folder, quantization="w8a8")
    assert str(early.value) == str(late.value)
    # Its groups are its own: those that the configuration would make do not have to fit.
    check_model(asking(folder, quantization="w4a16", quantization_group=128))
    check_model(asking(folder))


@pytest.mark.parametrize("quantization", ["auto", "w8a8"])
def test_activations_of_8_bits_are_refused_without_weights_of_4(quantization: str, tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path)
    with pytest.raises(ModelError, match='"w8a8" has such activations by itself') as early:
        check_model(asking(folder, quantization=quantization, activations="int8"))
    with pytest.raises(ModelError) as late:
        load_parameters(folder, quantization=quantization, int8_activations=True)
    assert str(early.value) == str(late.value)
    edit_config(folder, quantization_config=GPTQ)
    check_model(asking(folder, activations="int8"))


NEEDS_GPU: list[dict[str, str]] = [
    {"device": "cuda"},
    {"quantization": "fp8"},
    {"device": "cuda", "quantization": "fp8"},
    {"device": "cpu", "quantization": "fp8"},
]


@pytest.mark.parametrize("settings", NEEDS_GPU, ids=str)
def test_a_device_that_is_not_there_is_refused(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(model_check, "may_have_gpu", lambda: False)
    config = EngineConfig.model_validate(settings)
    with pytest.raises(CommandError, match=r"CUDA device|GPU only") as refused:
        check_model(config)
    assert refused.value.exit_code == ExitCode.BAD_INPUT
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose_device(config, frozenset())


@pytest.mark.parametrize("settings", NEEDS_GPU[:3], ids=str)
def test_where_there_may_be_a_gpu_nothing_is_refused(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "may_have_gpu", lambda: True)
    check_model(EngineConfig.model_validate(settings))


def test_activations_of_8_bits_are_for_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="choose device cpu"):
        choose_device(EngineConfig(quantization="w4a16", activations="int8"), ALL)


def test_fp8_is_refused_on_a_cpu_even_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "may_have_gpu", lambda: True)
    with pytest.raises(CommandError, match="GPU only"):
        check_model(EngineConfig(device="cpu", quantization="fp8"))


def test_no_gpu_that_torch_sees_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert may_have_gpu() or not torch.cuda.is_available()
    for build, num_devices, expected in (
        ("2.13.0+cpu", 1, False),
        ("2.13.0+cu128", 1, True),
        ("2.13.0+cu128", 0, False),
        ("2.13.0", 1, True),
        ("2.13.0", 0, False),
        ("2.13.0+rocm6.4", 0, True),
    ):
        monkeypatch.setattr(model_check, "version", lambda _, build=build: build)
        monkeypatch.setattr(model_check, "_num_cuda_devices", lambda number=num_devices: number)
        assert may_have_gpu() == expected, (build, num_devices)


class Driver:
    """What libcuda answers."""

    def __init__(self, status: int, count: int) -> None:
        self.status, self.count = status, count

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0


@pytest.mark.parametrize(("status", "count", "expected"), [(0, 2, 2), (0, 0, 0), (100, 7, 0)])
def test_the_driver_is_asked_for_its_devices(
    status: int, count: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(status, count))
    assert model_check._num_cuda_devices() == expected


def test_the_launcher_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"], tmp_path)
    code = f"""
import sys
from deployments.launcher import check_model
from engine.config import EngineConfig
from engine.errors import ModelError
try:
    check_model(EngineConfig(model={str(folder)!r}, quantization="w4a16"))
except ModelError:
    print(sorted({{"torch", "transformers", "ray"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(may_have_gpu(), reason="there may be a GPU")
def test_the_command_says_it_before_ray_starts() -> None:
    result = manta("serve", "--device", "cuda")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith('manta: device "cuda" needs a CUDA device')
    assert result.stderr.count("\n") == 1
