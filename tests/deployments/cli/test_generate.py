"""`manta generate` as a process: results, resumption after a kill, and refusals before anything runs."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import MAX_POSITIONS, Shape, write
from deployments.cli.errors import CommandError
from deployments.cli.generate import count_left, left
from deployments.prompt_file import Defaults, PromptFile
from deployments.result_file import ResultFile
from engine.sampling_params import SamplingParams
from tests.deployments.cli.command import MANTA, ROOT, environment, manta

SHAPE = Shape(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=512,
)
NUM_PROMPTS = 20
SAMPLING = ["--max-tokens", "32", "--seed", "7"]
OPTIONS = [*SAMPLING, "--dtype", "float32", "--kv-memory", "16MiB", "--max-sequences", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    write(directory, SHAPE, seed=0)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"story {i}", "ignore_eos": True}) + "\n" for i in range(NUM_PROMPTS))
    )
    return path


def arguments(model: Path, prompts: Path, out: Path) -> list[str]:
    return ["generate", str(model), "--prompts", str(prompts), "--out", str(out), *OPTIONS]


def started(model: Path, prompts: Path, out: Path) -> subprocess.Popen[str]:
    """A run that has written at least four results and has not ended."""
    process = subprocess.Popen(
        [*MANTA, *arguments(model, prompts, out)], stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def results(out: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines), "a prompt was done twice"
    return by_id


def test_kill_9_in_the_middle_and_continue(model: Path, prompts: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    process = started(model, prompts, out)
    process.kill()
    process.wait()
    before = out.read_bytes()
    assert 4 <= before.count(b"\n") < NUM_PROMPTS
    # The kill may not have hit a write; a cut one is what it would have left.
    out.write_bytes(before + b'{"id": "24-ab", "fingerp')

    continued = manta(*arguments(model, prompts, out))
    assert continued.returncode == 0, continued.stderr
    assert "dropped a last line" in continued.stderr
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert len(results(out)) == NUM_PROMPTS

    # The same run, never interrupted, gives the same texts.
    assert manta(*arguments(model, prompts, whole)).returncode == 0
    assert results(out) == results(whole)
    for line in results(whole).values():
        assert line["usage"]["completion_tokens"] == 32
        assert line["finish_reason"] == "length"

    again = manta(*arguments(model, prompts, out))
    assert again.returncode == 0
    assert f"{NUM_PROMPTS} prompts are done" in again.stderr


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    process = started(model, prompts, out)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert 4 <= len(results(out)) < NUM_PROMPTS


def test_every_kind_of_line_and_a_prompt_that_is_too_long(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines: list[dict[str, Any]] = [
        {"id": "text", "prompt": "hello", "max_tokens": 3},
        {"id": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        {"id": "ids", "token_ids": [5, 6, 7], "n": 2, "temperature": 1},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = [*arguments(model, prompts, out), "--max-tokens", 5, "--token-ids", "--ignore-eos"]
    assert manta(*run).returncode == 0
    found = results(out)
    assert found["text"]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert len(found["text"]["token_ids"]) == 3
    assert found["chat"]["usage"]["prompt_tokens"] == len("user: hi\nassistant:")
    assert found["ids"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
    assert found["ids"]["samples"][0]["text"] != found["ids"]["samples"][1]["text"]

    with prompts.open("a") as file:
        file.write(json.dumps({"id": "long", "token_ids": [5] * (MAX_POSITIONS + 1)}) + "\n")
    refused = manta(*run)
    assert refused.returncode == 2
    assert "line 4: " in refused.stderr and "maximum context length" in refused.stderr
    assert results(out) == found


def test_bad_lines_are_listed_and_nothing_runs(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"prompt": 3}\n{"prompt": "x", "temprature": 1}\n')
    result = manta(*arguments(model, prompts, out))
    assert result.returncode == 2
    assert f"{prompts}, line 2: prompt" in result.stderr
    assert f'{prompts}, line 3: unknown field "temprature"' in result.stderr
    assert result.stderr.splitlines()[-1] == f"manta: {prompts}: 2 bad lines; nothing was run"
    assert not out.exists()


class Run:
    """A prompt file and its results, without a model between them."""

    def __init__(self, directory: Path) -> None:
        self.prompts, self.out = directory / "in.jsonl", directory / "out.jsonl"

    def left(self, *lines: dict[str, Any], finish: int = 0, **options: Any) -> int:
        """Prompts that are left to do, after which the first `finish` of them are done."""
        self.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = PromptFile(self.prompts, Defaults("tiny", SamplingParams(**options)))
        with ResultFile(self.out) as results:
            num_left = count_left(file, results)
            for prompt in list(left(file, results))[:finish]:
                results.append({"id": prompt.id, "fingerprint": prompt.fingerprint, "text": "done"})
            return num_left


@pytest.mark.parametrize("ids", [[{}, {}, {}], [{"id": "q0"}, {"id": "q1"}, {"id": "q2"}]], ids=["numbered", "named"])
def test_a_changed_prompt_file_is_refused_and_a_longer_one_is_not(ids: list[dict[str, str]], tmp_path: Path) -> None:
    run = Run(tmp_path)
    one, two, three = ({**own, "prompt": text} for own, text in zip(ids, ("one", "two", "three"), strict=True))
    assert run.left(one, two, finish=2) == 2
    assert run.left(one, two) == 0
    assert run.left(one, two, three) == 1
    for changed in ([one, {**two, "prompt": "2"}], [one], [{**one, "temperature": 0}, two]):
        with pytest.raises(CommandError, match="choose another --out") as refusal:
            run.left(*changed)
        assert refusal.value.exit_code == 2
    with pytest.raises(CommandError, match="choose another --out"):
        run.left(one, two, temperature=0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--temperature", "-1"], "--temperature -1.0: "),
        (["--dtype", "int3"], "--dtype int3: "),
        (["--kv-memory", "lots"], "--kv-memory lots: "),
        (["--max-sequences", "0"], "--max-sequences 0: "),
        (["--max-model-len", "many"], "--max-model-len many: "),
        (["--stop", ""], "--stop: "),
        (["--out", "/nowhere/out.jsonl"], "--out /nowhere/out.jsonl: No such file"),
        (["--prompts", "/nowhere/in.jsonl"], "--prompts /nowhere/in.jsonl: No such file"),
    ],
)
def test_a_bad_flag_is_named(model: Path, prompts: Path, tmp_path: Path, changes: list[str], words: str) -> None:
    result = manta(*arguments(model, prompts, tmp_path / "out.jsonl"), *changes)
    assert result.returncode == 2
    assert result.stderr.startswith(f"manta: {words}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_that_is_not_there_is_bad_input(prompts: Path, tmp_path: Path) -> None:
    result = manta(*arguments(tmp_path / "missing", prompts, tmp_path / "out.jsonl"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "missing" in result.stderr


def test_the_prompt_file_cannot_be_the_output(model: Path, prompts: Path) -> None:
    before = prompts.read_bytes()
    result = manta(*arguments(model, prompts, prompts))
    assert result.returncode == 2
    assert prompts.read_bytes() == before
