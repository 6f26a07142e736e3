"""`manta chat`: a conversation in the terminal, streamed from an OpenAI-compatible endpoint."""

import sys
import unicodedata
from contextlib import closing, suppress
from typing import Annotated, Any, TextIO

import typer

from deployments.cli.client import DEFAULT_URL, Client, EndpointError
from deployments.cli.errors import CommandError, ExitCode

HELP = """\
/reset        forget the conversation
/system TEXT  forget it and start again with this system prompt
/help         this list
/exit         leave (so does Ctrl-D)
Ctrl-C stops the answer that is being written."""


class Conversation:
    """The turns so far, and how the next answer is asked for."""

    def __init__(self, system: str | None, options: dict[str, Any]) -> None:
        self.options = options
        self._system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self._system}] if self._system else []
        return head + self.turns

    def ask(self, client: Client, question: str, out: TextIO) -> None:
        """Puts a question and writes the answer to `out` as it arrives.

        KeyboardInterrupt ends the answer and is raised again; what was written of it stays in the conversation. A
        question without any answer is taken back, so that it cannot spoil the next one.
        """
        self.turns.append({"role": "user", "content": question})
        answer: list[str] = []
        failed = False
        try:
            with closing(client.chat(self.messages, self.options)) as pieces:
                for piece in pieces:
                    answer.append(piece)
                    out.write(printable(piece))
                    out.flush()
        except (EndpointError, CommandError):
            failed = True
            raise
        finally:
            if answer:
                out.write("\n")
                out.flush()
            if failed or not answer:
                self.turns.pop()
            else:
                self.turns.append({"role": "assistant", "content": "".join(answer)})

    def reset(self, system: str | None = None) -> None:
        """Forgets every turn, and takes a new system prompt if one is given."""
        self.turns.clear()
        self._system = system or self._system


def printable(text: str) -> str:
    """The text without control characters: a model must not be able to move the cursor or rename the window."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def talk(conversation: Conversation, client: Client) -> None:
    """Reads questions from the terminal until the user leaves."""
    # Importing readline gives input() its line editing and history.
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            continue
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/help":
                print(HELP)
            case "/reset":
                conversation.reset()
                print("(a new conversation)")
            case "/system" if rest.strip():
                conversation.reset(rest.strip())
                print("(a new conversation with this system prompt)")
            case _ if command.startswith("/"):
                print(f"unknown command {command}\n{HELP}")
            case _:
                try:
                    conversation.ask(client, line, sys.stdout)
                except KeyboardInterrupt:
                    print("[stopped]")
                except (EndpointError, CommandError) as error:
                    print(f"[{error}]", file=sys.stderr)


def chat(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Served model name; default: the first one served.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the randomness.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends an answer; may be repeated.")] = None,
) -> None:
    """Talk to a served model in the terminal.

    With a terminal: a conversation; /help lists its commands, Ctrl-C stops
    an answer, Ctrl-D leaves. Without one: standard input is one question, and
    the answer is printed.

    The environment variable MANTA_API_KEY, if set, is sent as the API key.

    Examples:

      manta chat --system "You are terse."

      echo "Tell me a story." | manta chat --temperature 0
    """
    wanted: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
        "stop": stop or None,
    }
    options = {name: value for name, value in wanted.items() if value is not None}
    with closing(Client(url)) as client:
        try:
            options["model"] = client.choose_model(model)
            conversation = Conversation(system, options)
            if sys.stdin.isatty():
                print(f"{options['model']} at {client.url}. /help lists commands, Ctrl-D leaves.")
                talk(conversation, client)
            else:
                answer_once(conversation, client, sys.stdin.read())
        except EndpointError as error:
            raise CommandError(f"{client.url}: {error}") from None


def answer_once(conversation: Conversation, client: Client, question: str) -> None:
    """Answers one question on standard output, for use in a pipe."""
    if not question.strip():
        raise CommandError("standard input is empty: expected a question", ExitCode.BAD_INPUT)
    conversation.ask(client, question.strip(), sys.stdout)
