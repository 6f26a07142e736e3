"""Replicas of several ranks each behind the application: they answer as one would, and are lost and replaced whole."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from cluster.ports import free_ports
from deployments.text import TextModel
from tests.cluster.shards.fake_ranks import letter
from tests.deployments.app.application import Application, scenario
from tests.deployments.app.processes import below
from tests.deployments.fakes import write_fake_model
from tests.engine.fakes import next_token

ROOT = Path(__file__).parents[3]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
RANKS = 4
TOKENS = 120


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """Two replicas of two tensor ranks each."""
    model = tmp_path_factory.mktemp("model")
    write_fake_model(model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.deployments.app.server", str(model), str(port), "1", "2", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            application = Application(f"http://127.0.0.1:{port}", process, TextModel.load(model), str(model))
            application.wait_for("ready")
            yield application
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(60)


def expected(application: Application, prompt: str, count: int) -> str:
    """What the ranks draw after a prompt, with seed 0."""
    tokens = application._text.encode(prompt)
    drawn: list[int] = []
    for _ in range(count):
        drawn.append(letter(next_token([*tokens, *drawn])))
    return application._text.decode(drawn)


async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
    stream = await client.completions.create(model="fake", prompt=prompt, max_tokens=TOKENS, seed=0, stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def all_ranks(application: Application) -> list[int]:
    await application.until(lambda: len(application.ranks()) == RANKS and len(application.replicas()) == 2, 60)
    return application.ranks()


@scenario
async def test_a_replica_of_several_ranks_answers(application: Application) -> None:
    assert len(application.ranks()) == RANKS
    client = application.client()
    prompts = ["hello", "world", "abc"]
    answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    assert answers == [expected(application, prompt, TOKENS) for prompt in prompts]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_outlive_a_rank(application: Application, number: signal.Signals) -> None:
    """No client sees that a rank was lost, and its whole group with it; another replica takes its place."""

    @scenario
    async def strike(application: Application) -> None:
        before = await all_ranks(application)
        client = application.client()
        prompts = [f"stream {letter}" for letter in "abcdef"]
        answers = [asyncio.create_task(ask(client, prompt)) for prompt in prompts]
        await asyncio.sleep(0.8)
        assert not any(answer.done() for answer in answers)
        os.kill(before[1], number)
        assert await asyncio.gather(*answers) == [expected(application, prompt, TOKENS) for prompt in prompts]
        await application.until(lambda: before[1] not in application.ranks())
        after = await all_ranks(application)
        assert len(set(before) & set(after)) == RANKS - 2, "the group is lost whole, and no other"

    strike(application)


@scenario
async def test_a_rank_that_is_lost_while_nobody_asks_is_replaced(application: Application) -> None:
    before = await all_ranks(application)
    os.kill(before[0], signal.SIGSTOP)
    await application.until(lambda: before[0] not in application.ranks())
    after = await all_ranks(application)
    assert len(set(before) & set(after)) == RANKS - 2
    client = application.client()
    assert await ask(client, "again") == expected(application, "again", TOKENS)


@scenario
async def test_replicas_that_are_not_wanted_any_more_take_their_ranks_with_them(application: Application) -> None:
    await all_ranks(application)
    application.deploy(num_replicas=1)
    await application.until(lambda: len(application.ranks()) == 2 and len(application.replicas()) == 1)
    # Their sockets go with them.
    await application.until(lambda: len(sockets(application)) == 1)


def sockets(application: Application) -> list[Path]:
    """Folders of sockets of all groups of the application, which are below its Ray's directory."""
    for pid in below(application.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        for word in command.split("\0"):
            if word.startswith("--raylet_socket_name="):
                return list(Path(word.partition("=")[2]).parent.glob("ranks-*"))
    raise AssertionError("no raylet is found")
