"""`manta serve` as a user runs it: a real model on a private Ray, Ctrl-C, and everything that can be wrong at start."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import kill, killpg
from pathlib import Path
from threading import Event

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.ports import free_ports
from tests.compiled import compiled_library
from tests.deployments.app.processes import below
from tests.deployments.app.reconnecting import CREATED, Client, exact, rounded, text_of
from tests.deployments.fakes import write_fake_model
from tests.deployments.streams.clients import RESUMABLE

COMMAND = [sys.executable, "-m", "deployments.cli.main", "serve"]
ROOT = Path(__file__).parents[3]
START_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights that has never learnt to stop."""
    directory = tmp_path_factory.mktemp("models") / "random-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    write_fake_model(directory)
    return directory


class Server:
    """A running `manta serve`, in a process group of its own as a shell would start it."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output: list[str] = []

    def wait_for(self, text: str) -> None:
        """Reads what it prints until a line has `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if text in line:
                return
        raise AssertionError("".join(self.output))

    def interrupt(self) -> None:
        """What Ctrl-C does: the whole foreground group gets the signal."""
        killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> int:
        assert self.process.stdout is not None
        self.output.extend(self.process.stdout)
        return self.process.wait(60)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[Server, str]]:
    (port,) = free_ports(1)
    running = Server(*arguments, "--device", "cpu", "--port", str(port))
    try:
        yield running, f"http://127.0.0.1:{port}"
    finally:
        if running.process.poll() is None:
            running.process.terminate()
            running.process.wait(60)


@pytest.fixture
def server(model: Path) -> Iterator[tuple[Server, str]]:
    with serving(str(model), "--max-model-len", "256") as running:
        yield running


def test_serves_a_model_and_leaves_nothing_behind(server: tuple[Server, str], model: Path) -> None:
    running, url = server
    running.wait_for("curl")
    running.wait_for("-d")
    printed = "".join(running.output)
    assert url in printed
    assert re.search(r"KV .* pages", printed), "the resolved KV memory is printed"

    # The printed command is meant to be pasted.
    command = printed[printed.index("curl") :].replace("\\\n", " ")
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == model.name
    texts = {
        client.completions.create(model=model.name, prompt="hello", max_tokens=20, temperature=0).choices[0].text
        for _ in range(2)
    }
    assert len(texts) == 1
    found = []
    for salt in (None, None, "mine"):
        answer = client.completions.create(
            model=model.name, prompt="x" * 40, max_tokens=1, extra_body={"cache_salt": salt}
        )
        found.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert found == [0, 32, 0], "two pages of 16 tokens hold what the last token needs"

    started = below(running.process.pid)
    directories = {part for part in " ".join(started.values()).split("/") if part.startswith("manta-")}
    assert any("haproxy" in command for command in started.values())
    running.interrupt()
    assert running.finish() == 0, "".join(running.output)
    time.sleep(0.2)
    assert [command for pid, command in started.items() if _command_of(pid) == command] == []
    assert directories and not any(list(Path("/tmp").glob(name)) for name in directories)


def test_the_built_in_model_ends_at_one_gateway_what_it_began_at_another() -> None:
    compiled_library()
    with serving("--replicas", "2", "--gateways", "2") as (running, url):
        running.wait_for("curl")
        messages = [{"role": "user", "content": "Tell me a story about a cat."}]
        base = {"model": "manta-tiny", "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        base |= {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}
        ((story, _, _),) = text_of(asyncio.run(Client(url, "/v1/chat/completions", base, "first").run()))
        kinds = {
            "greedy": base,
            "seeded": {**base, "temperature": 0.8, "n": 2, "seed": 7},
            "logprobs": {**base, "logprobs": True, "top_logprobs": 2},
            "stopped": {**base, "stop": ["no such words", story[len(story) * 2 // 3 :][:12]]},
            "drawn": {**base, "temperature": 0.8, "n": 2},
        }

        def clients() -> list[Client]:
            bodies = [(f"{kind}-{number}", body) for kind, body in kinds.items() for number in range(2)]
            return [Client(url, "/v1/chat/completions", body, name, RESUMABLE) for name, body in bodies]

        async def run(kill_one: bool) -> list[Client]:
            asked = clients()
            running_clients = [asyncio.create_task(client.run()) for client in asked]
            if kill_one:
                victim = gateways()[0]
                while min(len(client.data) for client in asked) < 10:
                    await asyncio.sleep(0.01)
                kill(victim, signal.SIGKILL)
            return list(await asyncio.gather(*running_clients))

        def gateways() -> list[int]:
            return [pid for pid, command in below(running.process.pid).items() if ":Gateway" in command]

        wanted = {client.name: text_of(client) for client in asyncio.run(run(kill_one=False))}
        assert len(wanted["stopped-0"][0][0]) < len(story) == len(wanted["greedy-0"][0][0])
        done = asyncio.run(run(kill_one=True))
        assert any(client.connections > 1 for client in done), "no stream was at the gateway that was killed"
        for client in done:
            if not client.name.startswith("drawn"):
                assert text_of(client) == wanted[client.name]
            numbers = [int(event_id.rpartition(":")[2]) for event_id in client.ids]
            assert numbers == list(range(1, len(numbers) + 1))
            if client.connections > 1:
                # What is kept of it was generated in part again, from the seed that was drawn at first.
                again = httpx.get(f"{url}/v1/streams/{client.ids[0].partition(':')[0]}", timeout=60).text.splitlines()
                kept = [CREATED.sub("", line[6:]) for line in again if line.startswith("data: ")]
                if client.name.startswith("logprobs"):
                    assert kept[-1] == client.data[-1]
                    assert list(map(rounded, kept[:-1])) == list(map(exact, client.data[:-1]))
                else:
                    assert kept == client.data


def test_the_built_in_model_answers_in_english_on_two_replicas_and_stops_by_itself() -> None:
    with serving("--replicas", "2") as (running, url):
        running.wait_for("curl")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(question: str) -> tuple[str, str | None]:
            messages = [{"role": "user", "content": question}]
            chunks = client.chat.completions.create(
                model="manta-tiny", messages=messages, temperature=0, stream=True, max_tokens=400
            )
            choices = [chunk.choices[0] for chunk in chunks]
            return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason

        def ask_together() -> None:
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, ["What is 3 plus 4?"] * 8))
            assert set(answers) == {("3 plus 4 is 7.", "stop")}

        ask_together()
        story, reason = ask("Tell me a story about a cat.")
        assert reason == "stop"
        assert "cat" in story and len(story.split()) > 30

        def generated() -> list[float]:
            exposition = urllib.request.urlopen(f"{url}/metrics").read().decode()
            return [
                float(n) for n in re.findall(r"^manta:generation_tokens_total{.*} (\S+)$", exposition, re.MULTILINE)
            ]

        # Replicas push what they counted once a second; one that the gateway has not met yet takes the next requests.
        deadline = time.monotonic() + 30.0
        while (len(generated()) < 2 or not all(generated())) and time.monotonic() < deadline:
            time.sleep(1.2)
            ask_together()
        assert len(generated()) == 2 and all(generated()), "both replicas took their share"

        def tell_again() -> str:
            chunks = client.chat.completions.create(
                model="manta-tiny",
                messages=[{"role": "user", "content": "Tell me a story about a cat."}],
                temperature=0,
                stream=True,
                max_tokens=400,
            )
            text = ""
            for number, chunk in enumerate(chunks):
                text += chunk.choices[0].delta.content or ""
                if number == 10:
                    for replica in busy_replicas():
                        kill(replica, signal.SIGKILL)
            return text

        def busy_replicas() -> list[int]:
            """Both: one of them tells the story, and then there is none until one has been started anew."""
            return [pid for pid, command in below(running.process.pid).items() if ":LLMReplica" in command]

        assert tell_again() == story, "it was interrupted, or went on with other words"

        # The terminal is closed: the group is hung up, and nobody reads the output any more.
        started = below(running.process.pid)
        assert running.process.stdout is not None
        running.process.stdout.close()
        killpg(running.process.pid, signal.SIGHUP)
        running.process.wait(60)
        time.sleep(0.2)
        assert [command for pid, command in started.items() if _command_of(pid) == command] == []


@pytest.mark.parametrize("by_whom", ["terminal", "supervisor"])
def test_stopping_lets_streams_finish_for_a_while_and_then_tells_them(by_whom: str) -> None:
    with serving("--drain-timeout", "2") as (running, url):
        running.wait_for("curl")

        admitted = Event()

        def ask(max_tokens: int, n: int, admitted: Event) -> list[str]:
            """The events of a stream."""
            body = {"model": "manta-tiny", "prompt": "One day", "max_tokens": max_tokens, "n": n}
            body |= {"stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                assert response.status_code == 200
                admitted.set()
                return [line[6:] for line in response.iter_lines() if line.startswith("data: ")]

        def running_requests() -> float:
            exposition = httpx.get(f"{url}/metrics").text
            return sum(map(float, re.findall(r"^manta:num_requests_running{.*} (\S+)$", exposition, re.MULTILINE)))

        with ThreadPoolExecutor(3) as pool:
            endless = pool.submit(ask, 1900, 64, Event())
            while not running_requests():
                time.sleep(0.1)
            brief = pool.submit(ask, 10, 1, admitted)
            assert admitted.wait(30)
            begun = time.monotonic()
            if by_whom == "terminal":
                running.interrupt()
            else:
                running.process.terminate()
            time.sleep(0.5)
            refused = httpx.post(f"{url}/v1/completions", json={"model": "manta-tiny", "prompt": "One day"})
            assert refused.status_code == 503 and "stopping" in refused.text
            assert brief.result()[-1] == "[DONE]"
            assert json.loads(endless.result()[-1])["error"]["message"] == "the server is stopping"
            assert 2.0 <= time.monotonic() - begun < 10.0
        assert running.finish() == 0, "".join(running.output)
        assert time.monotonic() - begun < 40.0
        assert "1 requests were not finished after 2 s" in "".join(running.output)


def test_interrupted_while_starting_leaves_nothing_behind(server: tuple[Server, str]) -> None:
    running, _ = server
    running.wait_for("Starting")
    deadline = time.monotonic() + START_S
    while not any("raylet" in command for command in below(running.process.pid).values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = below(running.process.pid)
    running.interrupt()
    assert running.finish() == 130, "".join(running.output)
    assert [command for pid, command in started.items() if _command_of(pid) == command] == []


def test_missing_tensor_is_one_line_and_exit_code_2(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (port,) = free_ports(1)
    code, error = _fails(str(tmp_path), "--port", str(port))
    assert code == 2
    assert "model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' is missing" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["/nowhere/at/all"], "no such directory"),
        (["--replicas", "0"], "replicas"),
        (["--dtype", "int3"], "engine.dtype"),
        (["--kv-memory", "lots"], "engine.kv.memory"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--tensor-parallel", "3"], "8 heads cannot be divided among 3 ranks; nearest layouts that work: TP4 x PP1"),
        (["--tensor-parallel", "8", "--quantization", "w4a16"], "no multiple of the group of 64; nearest"),
        (["--pipeline-parallel", "9"], "5 layers are too few for 9 stages"),
    ],
)
def test_bad_argument_is_one_line_and_exit_code_2(arguments: list[str], reason: str) -> None:
    code, error = _fails(*arguments)
    assert code == 2
    assert reason in error
    assert len(error.splitlines()) == 1


def test_port_in_use_is_said_so(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, error = _fails(str(model), "--port", str(port))
    assert code == 2
    assert f"127.0.0.1:{port}" in error and "in use" in error


def test_config_file_may_be_that_of_serve_deploy(tmp_path: Path) -> None:
    from deployments.cli.serve import configure

    config = configure(ROOT / "examples" / "serve.yaml", {"replicas": 3, "engine.kv.memory": "2GiB"})
    assert config.engine.model == "manta-tiny"
    assert (config.replicas, config.engine.kv.memory) == (3, 2 * 2**30)


def _fails(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a `manta serve` that cannot start."""
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=START_S)
    return done.returncode, done.stderr


def _command_of(pid: int) -> str | None:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return None
