"""`manta chat` on a pipe and on a pseudo-terminal, against a scripted endpoint."""

import io
import os
import pty
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from deployments.cli.chat import Conversation, printable
from deployments.cli.client import Client, EndpointError
from tests.deployments.cli.command import MANTA, ROOT, environment, manta
from tests.deployments.cli.endpoint import Endpoint

PATIENCE_S = 120.0
"""After which something will not happen any more. On a busy machine a command may take tens of seconds to start."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        yield endpoint


class Terminal:
    """`manta chat` behind a pseudo-terminal."""

    def __init__(self, url: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*MANTA, "chat", "--url", url],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(TERM="dumb"),
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str) -> None:
        """Waits until `text` is shown after what was expected before."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; the terminal shows {self.seen!r}"
            try:
                self.seen += os.read(self._master, 4096).decode()
            except OSError:
                raise AssertionError(f"the command ended; the terminal shows {self.seen!r}") from None
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            os.close(self._master)


def test_a_piped_question_is_answered_on_stdout(endpoint: Endpoint) -> None:
    result = manta("chat", "--url", endpoint.url, "--system", "Be brief.", "--temperature", 0, text="hello there\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "hello there \n", "")
    [body] = endpoint.bodies
    assert body["model"] == "tiny"
    assert body["temperature"] == 0
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello there"},
    ]


def test_the_api_key_is_sent_and_never_shown(endpoint: Endpoint) -> None:
    result = manta("--debug", "chat", "--url", endpoint.url, text="refuse", MANTA_API_KEY="secret-7")
    assert endpoint.authorizations == ["Bearer secret-7"]
    assert result.returncode == 1
    assert "secret-7" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("refuse", "no such luck"),
        ("break", "the replica is gone"),
        ("cut", "the stream ended before the answer did"),
    ],
)
def test_a_question_that_fails_ends_with_its_reason(endpoint: Endpoint, question: str, reason: str) -> None:
    result = manta("chat", "--url", endpoint.url, text=question)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert reason in result.stderr


def test_nobody_listening_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        result = manta("chat", "--url", url, text="hello")
    assert result.returncode == 1
    assert result.stderr.startswith(f"manta: cannot reach {url}: ")
    assert result.stderr.count("\n") == 1


def test_an_unknown_model_is_bad_input_and_says_what_is_served(endpoint: Endpoint) -> None:
    result = manta("chat", "--url", endpoint.url, "--model", "huge", text="hello")
    assert result.returncode == 2
    assert "tiny, other" in result.stderr


def test_a_conversation_in_a_terminal(endpoint: Endpoint) -> None:
    terminal = Terminal(endpoint.url)
    terminal.expect("> ")
    terminal.type("first question\n")
    terminal.expect("first question \r\n> ")
    terminal.type("second\n")
    terminal.expect("second \r\n> ")
    assert [turn["role"] for turn in endpoint.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    terminal.type("/reset\n")
    terminal.expect("(a new conversation)\r\n> ")
    terminal.type("third\n")
    terminal.expect("third \r\n> ")
    assert len(endpoint.bodies[-1]["messages"]) == 1
    terminal.type("refuse\n")
    terminal.expect("no such luck")
    terminal.expect("> ")
    terminal.type("fourth\n")
    terminal.expect("fourth \r\n> ")
    # The refused question is not in the conversation any more.
    assert [turn["content"].strip() for turn in endpoint.bodies[-1]["messages"]] == ["third", "third", "fourth"]
    terminal.type("\x04")
    assert terminal.close() == 0


def test_ctrl_c_stops_an_answer_and_closes_its_stream(endpoint: Endpoint) -> None:
    terminal = Terminal(endpoint.url)
    terminal.expect("> ")
    terminal.type("slow\n")
    terminal.expect("tick tick tick")
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.expect("[stopped]")
    terminal.expect("> ")
    deadline = time.monotonic() + PATIENCE_S
    while not endpoint.num_disconnects and time.monotonic() < deadline:
        time.sleep(0.02)
    assert endpoint.num_disconnects == 1
    terminal.type("still here?\n")
    terminal.expect("still here? \r\n> ")
    terminal.type("/exit\n")
    assert terminal.close() == 0


def test_ctrl_c_in_a_pipe_ends_with_130(endpoint: Endpoint) -> None:
    with subprocess.Popen(
        [*MANTA, "chat", "--url", endpoint.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"slow")
        process.stdin.close()
        assert process.stdout.read(5) == b"tick "
        process.send_signal(signal.SIGINT)
        # To the end of the stream: a pipe that nobody empties could hold the command up.
        assert set(process.stdout.read().split()) <= {b"tick"}
        assert process.wait(PATIENCE_S) == 130


def test_what_was_said_before_a_failure_is_taken_back(endpoint: Endpoint) -> None:
    client = Client(endpoint.url)
    conversation = Conversation(None, {"model": "tiny"})
    out = io.StringIO()
    conversation.ask(client, "one", out)
    with pytest.raises(EndpointError):
        conversation.ask(client, "break", out)
    assert [turn["content"] for turn in conversation.turns] == ["one", "one "]
    client.close()


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\tc\n\x9bd é") == "a]0;titleb\tc\nd é"
