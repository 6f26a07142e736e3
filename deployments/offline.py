"""Offline generation: prompts in, finished texts out, through an engine in this process.

Owns the loop that keeps the engine full. Knows no files, no terminal, no Ray and no HTTP.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from deployments.prompt_file import Conversation, Prompt
from deployments.samples import Sample, TextOptions
from deployments.text import TextModel
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.limits import check_request
from engine.sequence import Emission, FinishReason, Request


@dataclass(slots=True)
class Output:
    """One sample of a prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """What became of one prompt."""

    prompt: Prompt
    num_prompt_tokens: int
    outputs: tuple[Output, ...]
    error: str | None = None
    """Why the prompt failed; the outputs are worth nothing then."""

    @property
    def num_output_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)


class _Live:
    """A prompt that the engine is working on."""

    def __init__(self, prompt: Prompt, request: Request, text: TextModel) -> None:
        options = TextOptions(prompt.stop, prompt.include_stop, min_tokens=prompt.params.min_tokens)
        self.prompt = prompt
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.outputs = tuple(Output() for _ in range(prompt.params.n))
        self._samples = [Sample(index, text, options) for index in range(prompt.params.n)]

    def feed(self, emission: Emission) -> None:
        """Adds what an iteration brought. What comes for a sample that its stop string has ended is dropped."""
        sample, output = self._samples[emission.sample_index], self.outputs[emission.sample_index]
        if sample.finished:
            return
        piece = sample.feed(emission)
        output.text += piece.text
        output.token_ids += piece.token_ids
        output.finish_reason = piece.finish_reason

    @property
    def finished(self) -> bool:
        return all(sample.finished for sample in self._samples)

    def completed(self, error: str | None = None) -> Completed:
        return Completed(self.prompt, self.num_prompt_tokens, self.outputs, error)


class OfflineGenerator:
    """Feeds prompts to an engine and hands out results in the order in which they finish.

    At most `window` prompts are held at a time, however many there are: enough for the scheduler to always have one to
    admit. The engine must not be used by anything else meanwhile.
    """

    def __init__(self, engine: Engine, text: TextModel, *, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 prompt, got {window}")
        self._engine = engine
        self._text = text
        self._window = window
        self._stopping = False
        self.num_output_tokens = 0
        """Tokens drawn so far, those of unfinished prompts included."""

    def request(self, prompt: Prompt) -> Request:
        """What the engine is asked for a prompt. Raises InvalidRequest if it can never be served."""
        request = Request(prompt.id, tuple(self._token_ids(prompt)), prompt.params)
        check_request(request, self._engine.limits)
        return request

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Completed]:
        """Results as they finish. A prompt that fails is a result with an error, and disturbs no other.

        Closing the iterator aborts what is unfinished.
        """
        source = iter(prompts)
        live: dict[str, _Live] = {}
        self._stopping = False
        try:
            while not self._stopping:
                while len(live) < self._window and (prompt := next(source, None)) is not None:
                    try:
                        request = self.request(prompt)
                        self._engine.add(request)
                    except InvalidRequest as error:
                        yield Completed(prompt, 0, (), error.message)
                    else:
                        live[prompt.id] = _Live(prompt, request, self._text)
                if not live:
                    return
                for emission in self._engine.step():
                    if (completed := self._take(live, emission)) is not None:
                        yield completed
        finally:
            for request_id in live:
                self._engine.abort(request_id)

    def stop(self) -> None:
        """Ends `run` after the iteration that is under way. May be called from a signal handler."""
        self._stopping = True

    def _take(self, live: dict[str, _Live], emission: Emission) -> Completed | None:
        """Gives an emission to its prompt; the result if that finished it."""
        self.num_output_tokens += len(emission.token_ids)
        entry = live.get(emission.request_id)
        if entry is None:
            return None
        error = None
        if emission.finish_reason is FinishReason.ERROR:
            error = emission.error or "the engine gave no reason"
        else:
            entry.feed(emission)
            if not entry.finished:
                return None
        # A stop string ends a text before the engine knows, and an error ends the prompt's other samples.
        self._engine.abort(emission.request_id)
        del live[emission.request_id]
        return entry.completed(error)

    def _token_ids(self, prompt: Prompt) -> Iterable[int]:
        match prompt.content:
            case str() as text:
                return self._text.encode(text)
            case Conversation(messages):
                rendered = self._text.render_chat([message.model_dump() for message in messages])
                # The template has written out the special tokens that it wants.
                return self._text.encode(rendered, add_special_tokens=False)
            case token_ids:
                return token_ids
