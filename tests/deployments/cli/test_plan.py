"""`manta plan` as a user runs it, on directories that hold a config.json and nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.serve import configure
from deployments.config import AppConfig
from tests.deployments.cli.command import ROOT, environment, manta

LLAMA2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA3_70B: dict[str, Any] = {
    **LLAMA2_7B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


@pytest.fixture
def llama2_7b(tmp_path: Path) -> Path:
    return written(tmp_path / "llama2-7b", LLAMA2_7B)


@pytest.fixture
def llama3_70b(tmp_path: Path) -> Path:
    return written(tmp_path / "llama3-70b", LLAMA3_70B)


def written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(*arguments: object) -> dict[str, Any]:
    """What `manta plan --json` prints."""
    result = manta("plan", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    plan: dict[str, Any] = json.loads(result.stdout)
    return plan


def test_a_small_model_is_copied_to_every_accelerator(llama2_7b: Path) -> None:
    result = manta("plan", llama2_7b, "--nodes", "8x80GiB")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{llama2_7b}: 6,738,415,616 parameters in float16, 32 layers; 524,288 bytes")
    assert "layout: TP1 x PP1, 8 replicas of 1 accelerator" in lines
    (row,) = [line.split() for line in lines if re.match(r"\s+0\s+0\s+node1", line)]
    weights, pages, workspace, total, usable = (int(cell.replace(",", "")) for cell in row[6:])
    assert weights == 13_476_831_232
    assert weights + pages + workspace == total <= usable == int(0.9 * 80 * 2**30)
    assert any(line.startswith("concurrency:") for line in lines)
    assert "why:" in lines and "other layouts that fit:" in lines
    (source,) = [line for line in lines if line.startswith("       h100: ")]
    assert source.endswith("; taken for its memory (a100 has as much), --accelerator names another")


def test_the_settings_at_the_end_serve_what_is_planned(llama3_70b: Path, tmp_path: Path) -> None:
    flags = ("--nodes", "2*8x24GiB", "--kv-dtype", "int8", "--quantization", "w4a16", "--quantization-group", 128)
    flags = (*flags, "--tensor-parallel", 8, "--pipeline-parallel", 2, "--max-sequences", 64)
    text = manta("plan", llama3_70b, *flags).stdout
    settings = text.rpartition("to serve it so,")[2]
    file = tmp_path / "serve.yaml"
    file.write_text("\n".join(settings.splitlines()[1:]))
    config = configure(file, {})
    found = planned(llama3_70b, *flags)
    assert config == AppConfig.model_validate(found["serve"])
    assert config.replicas == found["replicas"] == 1
    assert (config.parallel.tensor, config.parallel.pipeline) == (8, 2)
    layers = [rank["layers"] for rank in found["ranks"] if rank["tensor_rank"] == 0]
    assert config.parallel.layers == tuple(end - begin for begin, end in layers)
    engine = config.engine
    assert (engine.model, engine.device, engine.dtype) == (str(llama3_70b), "cuda", "bfloat16")
    assert (engine.quantization, engine.quantization_group, engine.kv.dtype) == ("w4a16", 128, "int8")
    assert engine.scheduler.max_sequences == 64
    spare = found["kv_pages"] + 1
    assert engine.kv.memory == sum(rank["kv_bytes"] for rank in found["ranks"]) // spare * found["kv_pages"]


def test_stages_that_differ_are_told_where_to_go(llama3_70b: Path) -> None:
    flags = ("--tensor-parallel", 2, "--pipeline-parallel", 2)
    result = manta("plan", llama3_70b, "--nodes", "a=2x80GiB,b=2x48GiB", *flags)
    assert "  # stage by stage on a, b: name a label of each in parallel.labels" in result.stdout.splitlines()
    assert "warning: accelerators of b have 48 GiB, and h100 has 80" in result.stdout
    assert "# stage by stage" not in manta("plan", llama3_70b, "--nodes", "2*2x80GiB", *flags).stdout


def test_a_kind_that_has_other_memory_is_warned_of(llama2_7b: Path) -> None:
    assert planned(llama2_7b, "--nodes", "1x24GiB")["accelerator"] == "l4"
    (warning,) = planned(llama2_7b, "--nodes", "1x24GiB", "--accelerator", "h100")["warnings"]
    assert "24 GiB, and h100 has 80" in warning and "l4 or a10 or rtx4090 has as much" in warning


def test_a_large_model_is_cut_inside_a_node_and_staged_between_nodes(llama3_70b: Path) -> None:
    inside = planned(llama3_70b, "--nodes", "8x80GiB")
    assert inside["tensor_parallel"] in (4, 8) and inside["pipeline_parallel"] == 1
    between = planned(llama3_70b, "--nodes", "2*4x24GiB")
    assert (between["tensor_parallel"], between["pipeline_parallel"]) == (4, 2)
    assert [rank["node"] for rank in between["ranks"]] == ["node1"] * 4 + ["node2"] * 4
    layers = [rank["layers"] for rank in between["ranks"] if rank["tensor_rank"] == 0]
    assert layers[0][0] == 0 and layers[0][1] == layers[1][0] and layers[1][1] == 80
    assert sum(rank["weight_bytes"] for rank in between["ranks"]) > 141_107_412_992
    assert all(rank["bytes"] <= rank["usable_bytes"] for rank in between["ranks"])


def test_flags_override_the_choice(llama3_70b: Path) -> None:
    flags = ("--tensor-parallel", 2, "--pipeline-parallel", 4, "--replicas", 1, "--context", 2048, "--max-sequences", 8)
    plan = planned(llama3_70b, "--nodes", "8x80GiB", *flags, "--kv-dtype", "int8", "--memory-share", 0.8)
    assert (plan["tensor_parallel"], plan["pipeline_parallel"], plan["replicas"]) == (2, 4, 1)
    assert plan["context"] == 2048 and plan["sequences"] == 8
    assert plan["ranks"][0]["usable_bytes"] == int(0.8 * 80 * 2**30)
    token = 20 * 2 * 4 * (128 + 4)
    assert plan["ranks"][0]["layers"] == [0, 20]
    assert plan["ranks"][0]["kv_bytes"] == (plan["kv_pages"] + 1) * 256 * token


def test_quantization_makes_a_large_model_fit(llama3_70b: Path) -> None:
    assert manta("plan", llama3_70b, "--nodes", "1x80GiB").returncode == 2
    plan = planned(llama3_70b, "--nodes", "1x80GiB", "--quantization", "w4a16", "--quantization-group", 128)
    assert plan["tensor_parallel"] == plan["pipeline_parallel"] == plan["replicas"] == 1


def test_rates_change_what_is_predicted_and_say_where_they_come_from(llama2_7b: Path) -> None:
    usual = planned(llama2_7b, "--nodes", "2x80GiB", "--tensor-parallel", 2)
    slower = planned(llama2_7b, "--nodes", "2x80GiB", "--tensor-parallel", 2, "--accelerator", "a100")
    slowest = planned(llama2_7b, "--nodes", "2x80GiB", "--tensor-parallel", 2, "--memory-bandwidth", "100GB/s")
    assert usual["lone_token_seconds"] < slower["lone_token_seconds"] < slowest["lone_token_seconds"]
    text = manta("plan", llama2_7b, "--nodes", "2x80GiB", "--link-in-node", "32GB", "--latency-in-node", 20).stdout
    assert "links 32 GB/s and 20 us in a node" in text
    assert "as given; the others: NVIDIA H100 SXM data sheet" in text


def test_without_nodes_it_is_this_machine() -> None:
    plan = planned("manta-tiny", "--accelerator", "cpu", "--max-sequences", 4)
    assert len(plan["nodes"]) == 1 and plan["nodes"][0]["memory"] > 2**28
    assert plan["ranks"][0]["weight_bytes"] == 2 * plan["parameters"]
    assert plan["page_tokens"] == 16


def test_measured_rates_are_of_this_machine() -> None:
    result = manta("plan", "manta-tiny", "--accelerator", "cpu", "--measure")
    assert result.returncode == 0, result.stderr
    assert "cpu: measured on this machine" in result.stdout
    match = re.search(r"rates: ([\d.]+) TFLOP/s, memory ([\d.]+) GB/s", result.stdout)
    assert match is not None
    assert 0.001 < float(match[1]) < 1000 and 0.5 < float(match[2]) < 10_000


def test_a_config_file_is_enough(llama2_7b: Path) -> None:
    assert planned(llama2_7b / "config.json", "--nodes", "1x80GiB")["parameters"] == 6_738_415_616


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tensor-parallel", 3), "32 heads cannot be divided among 3 ranks; there are 8 accelerators"),
        (("--tensor-parallel", 16), "TP16 x PP1: it needs 16 accelerators; there are 8 accelerators"),
        (("--pipeline-parallel", 33), "32 layers are too few for 33 stages"),
        (("--expert-parallel", 2), "the model has no experts"),
        (("--context", 8192), "the model is made for at most 4096"),
        (("--accelerator", "tpu"), "--accelerator: 'tpu' is not one of auto, h100, h200, a100"),
        (("--prefer", "speed"), "--prefer: 'speed' is not one of throughput, latency"),
        (("--max-batch-tokens", 64), "batch_tokens is 64; it must be at least sequences (128)"),
        (("--dtype", "int3"), "--dtype: 'int3' is not one of auto"),
        (("--quantization-group", 48), "--quantization-group: 48 is not one of 32, 64, 128"),
        (("--link-in-node", "fast"), "--link-in-node: 'fast': expected bytes a second"),
        (("--accelerator", "cpu", "--quantization", "fp8"), 'quantization "fp8" needs a CUDA device'),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(llama2_7b: Path, flags: tuple[object, ...], said: str) -> None:
    result = manta("plan", llama2_7b, "--nodes", "8x80GiB", *flags)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.startswith("manta: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("nodes", ["8", "eight", "8x80GiB,,", "a=1x1GiB,a=1x1GiB", "9999*9999x1GiB"])
def test_nodes_that_are_none_are_refused(llama2_7b: Path, nodes: str) -> None:
    result = manta("plan", llama2_7b, "--nodes", nodes)
    assert result.returncode == 2
    assert result.stderr.startswith("manta: --nodes: ")


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    result = manta("plan", tmp_path, "--nodes", "8x80GiB")
    assert result.returncode == 2
    assert "config.json: missing" in result.stderr


def test_a_quantized_checkpoint_is_planned_as_it_is(tmp_path: Path) -> None:
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    folder = written(tmp_path / "gptq", {**LLAMA3_70B, "quantization_config": quantized})
    plan = planned(folder, "--nodes", "1x80GiB")
    linear = 80 * (8192 * (64 + 2 * 8) * 128 + 8192 * 8192 + 3 * 8192 * 28672)
    others = 70_553_706_496 - linear
    assert plan["ranks"][0]["weight_bytes"] == linear // 2 + linear // 128 * 5 + 2 * others
    result = manta("plan", folder, "--nodes", "1x80GiB", "--quantization", "w8a8")
    assert result.returncode == 2
    assert "quantized already" in result.stderr
    flags = ("--accelerator", "cpu", "--quantization", "w4a16", "--quantization-group", 32)
    plan, head = planned(folder, "--nodes", "1x80GiB", *flags), 128256 * 8192
    others = 2 * (others - head) + head // 2 + head // 32 * 5
    assert plan["ranks"][0]["weight_bytes"] == linear // 2 + linear // 128 * 5 + others
    assert plan["serve"]["engine"]["quantization_group"] == 32, "the head's, which is turned into 4 bits as it loads"


def test_other_machines_are_planned_without_torch(llama3_70b: Path) -> None:
    code = (
        "import sys; from deployments.cli.main import main\n"
        f"sys.argv = ['manta', 'plan', {str(llama3_70b)!r}, '--nodes', '8*8x80GiB']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('heavy:', sorted({'torch', 'transformers', 'ray', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "heavy: []", result.stdout + result.stderr
