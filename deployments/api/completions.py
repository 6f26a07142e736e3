"""POST /v1/completions: texts or token ids in, continuations out; with echo, the scoring of given texts as well."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.api.connection import read_body, request_id_of, unless_disconnected
from deployments.api.envelope import Chunks, dumps, extras, finite, prompt_logprobs_json, quoted, usage_json
from deployments.api.generation import Generation, whole
from deployments.api.meter import RequestMeter
from deployments.api.params import check, completion_params, text_options
from deployments.api.schema import CompletionRequest
from deployments.api.service import Served, Service
from deployments.api.streams import Answering, Streams
from deployments.journal import Usage
from deployments.messages import ModelCard
from deployments.samples import Piece
from deployments.streams.keeper import Record
from deployments.streams.messages import StreamSpec
from deployments.text import TextModel
from engine.batch import TokenLogprob
from engine.sequence import Request

KIND = "completions"


async def create_completion(service: Service, streams: Streams, http: HttpRequest) -> Response:
    """Continues every prompt. Raises what `errors.describe` knows, as long as nothing has been sent."""
    meter = service.meter()
    raw = await read_body(http, service.config.max_body_bytes)
    body = CompletionRequest.model_validate_json(raw)
    service.note_unknown_fields(body)
    served = await service.model(body.model)
    prompts = [await _token_ids(prompt, body, served) for prompt in body.prompt]
    answer_id = f"cmpl-{request_id_of(http.scope)}"
    for number, request in enumerate(_requests(body, answer_id, prompts, [body.seed] * len(prompts), served.card)):
        check(request, served.card, {"prompt": f"prompt[{number}]"} if len(prompts) > 1 else {})
    spec = StreamSpec.draw(KIND, raw, prompts, body.seed, answer_id, served.card)
    if body.stream:
        return streams.respond(http.headers, spec, lambda record: _Writer(service, served, body, spec, meter, record))
    writer = _Writer(service, served, body, spec, meter)
    with service.admitted():
        pieces = await unless_disconnected(http.receive, whole(writer.generation))
    return Response(dumps(writer.completion(pieces)), media_type="application/json")


async def rewrite_completion(service: Service, record: Record, meter: RequestMeter) -> Answering:
    """The continuation of prompts that began elsewhere. Raises ModelError for a model whose files are gone."""
    body = CompletionRequest.model_validate_json(record.spec.body)
    return _Writer(service, await service.with_text(record.spec.card), body, record.spec, meter, record)


def _requests(
    body: CompletionRequest,
    answer_id: str,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int | None],
    card: ModelCard,
) -> list[Request]:
    params = completion_params(body, card.max_model_len - max(map(len, prompts)))
    return [
        Request(
            f"{answer_id}-{number}",
            tuple(prompt),
            params.model_copy(update={"seed": seed}),
            body.priority or 0,
            body.cache_salt,
            model=card.identity,
        )
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


async def _token_ids(prompt: str | list[int], body: CompletionRequest, served: Served) -> list[int]:
    if isinstance(prompt, str):
        return await served.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
    return prompt


class _Writer:
    """Writes one answer, whole or in chunks."""

    def __init__(
        self,
        service: Service,
        served: Served,
        body: CompletionRequest,
        spec: StreamSpec,
        meter: RequestMeter,
        record: Record | None = None,
    ) -> None:
        """`record`: of the stream, if it is kept."""
        self._body = body
        self._text = served.text
        self._stream_id = None if record is None else record.stream_id
        log = None if record is None else record.log
        requests = _requests(body, spec.answer_id, spec.prompts, spec.seeds, served.card)
        self.generation = Generation(service.backend, served.text, requests, text_options(body), meter, log)
        self._identity = {
            "id": spec.answer_id,
            "object": "text_completion",
            "created": spec.created,
            "model": served.card.name,
        }
        self._with_ids = bool(body.return_token_ids)
        self._scoring = body.max_tokens == 0
        self._skip_special = body.skip_special_tokens is not False

    @property
    def usage(self) -> Usage:
        usage = self.generation.usage
        return replace(usage, completion_tokens=0) if self._scoring else usage

    def completion(self, pieces: list[Piece]) -> dict[str, Any]:
        """The whole answer; one piece per choice."""
        return {
            **self._identity,
            "choices": [self._choice(piece, first=True) for piece in pieces],
            "usage": usage_json(self.usage),
        }

    async def events(self) -> AsyncGenerator[bytes]:
        """The framed events, [DONE] included; the first one comes with the first token."""
        body = self._body
        chunks = Chunks(self._identity, body.stream_options, lambda: self.usage, self._stream_id)
        opened: set[int] = set()
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                first = piece.index not in opened
                opened.add(piece.index)
                if first and (body.echo or self._with_ids):
                    yield chunks.chunk(dumps(self._choice(piece, first=True)))
                elif piece.text or piece.finish_reason or piece.logprobs or self._with_ids:
                    yield chunks.chunk(self._delta(piece))
        for event in chunks.end():
            yield event

    def _delta(self, piece: Piece) -> str:
        """A choice of a chunk; the plain case, which is almost every token, is written by hand."""
        if piece.finish_reason is None and not piece.logprobs and not self._with_ids:
            return f'{{"index":{piece.index},"text":{quoted(piece.text)},"logprobs":null,"finish_reason":null}}'
        return dumps(self._choice(piece, first=False))

    def _choice(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """`first`: nothing of this choice has been written yet, so what belongs to its prompt comes along."""
        body = self._body
        number = piece.index // body.num_samples
        if self._scoring:
            piece = replace(piece, text="", token_ids=(), logprobs=(), offsets=(), finish_reason="length")
        echo = self._prompt_text(number) if body.echo else ""
        logprobs = None
        if body.logprobs is not None:
            rows = _Logprobs(self._text, body.logprobs)
            if body.echo and first:
                rows.add_prompt(
                    self.generation.requests[number].prompt_token_ids,
                    self.generation.prompt_logprobs[number],
                    self._skip_special,
                )
            rows.add(piece.logprobs, (offset + len(echo) for offset in piece.offsets))
            logprobs = rows.json()
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": (echo if first else "") + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            **extras(piece, self._with_ids),
        }
        if first:
            choice |= self._about_prompt(number)
        return choice

    def _about_prompt(self, number: int) -> dict[str, Any]:
        prompt = self.generation.requests[number].prompt_token_ids
        about: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs_json(
                self._text, prompt, self.generation.prompt_logprobs[number], self._body.prompt_logprobs
            )
        if self._with_ids:
            about["prompt_token_ids"] = prompt
        return about

    def _prompt_text(self, number: int) -> str:
        prompt = self._body.prompt[number]
        return prompt if isinstance(prompt, str) else self._text.decode(prompt, skip_special_tokens=self._skip_special)


class _Logprobs:
    """OpenAI's form for completions: parallel lists over the tokens."""

    def __init__(self, text: TextModel, top: int) -> None:
        self._text = text
        self._top = top
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, prompt: tuple[int, ...], logprobs: Iterable[TokenLogprob], skip_special: bool) -> None:
        """The prompt's own tokens; nothing predicts the first one."""
        stream = self._text.detokenizer(skip_special_tokens=skip_special, at_start=True)
        offset = 0
        for token_id in prompt:
            self._offsets.append(offset)
            offset += len(stream.push(token_id))
        self._tokens.append(self._text.token_text(prompt[0]))
        self._logprobs.append(None)
        self._tops.append(None)
        for entry in logprobs:
            self._add_entry(entry)

    def add(self, logprobs: Iterable[TokenLogprob], offsets: Iterable[int]) -> None:
        for entry in logprobs:
            self._add_entry(entry)
        self._offsets.extend(offsets)

    def _add_entry(self, entry: TokenLogprob) -> None:
        name = self._text.token_text(entry.token_id)
        self._tokens.append(name)
        self._logprobs.append(finite(entry.logprob))
        # The token itself is always among them; under its own name it comes once.
        tops = {self._text.token_text(token_id): finite(logprob) for token_id, logprob in entry.top[: self._top]}
        self._tops.append(tops | {name: finite(entry.logprob)})

    def json(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
