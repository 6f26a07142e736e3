"""POST /v1/chat/completions: conversations in, OpenAI's chat completions or chunks of them out."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.api.connection import read_body, request_id_of, unless_disconnected
from deployments.api.envelope import Chunks, dumps, extras, finite, prompt_logprobs_json, quoted, usage_json
from deployments.api.generation import Generation, whole
from deployments.api.meter import RequestMeter
from deployments.api.params import chat_params, check, text_options
from deployments.api.schema import ChatRequest
from deployments.api.service import Served, Service
from deployments.api.streams import Answering, Streams
from deployments.samples import Piece
from deployments.streams.keeper import Record
from deployments.streams.messages import StreamSpec
from deployments.text import TextModel
from engine.batch import TokenLogprob
from engine.sequence import Request

KIND = "chat"


async def create_chat_completion(service: Service, streams: Streams, http: HttpRequest) -> Response:
    """Answers one conversation. Raises what `errors.describe` knows, as long as nothing has been sent."""
    meter = service.meter()
    raw = await read_body(http, service.config.max_body_bytes)
    body = ChatRequest.model_validate_json(raw)
    service.note_unknown_fields(body)
    served = await service.model(body.model)
    prompt = await _prompt(body, served)
    spec = StreamSpec.draw(KIND, raw, [prompt], body.seed, f"chatcmpl-{request_id_of(http.scope)}", served.card)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    check(_request(body, spec), served.card, {"prompt": "messages", "max_tokens": limit})
    if body.stream:
        return streams.respond(http.headers, spec, lambda record: _Writer(service, served, body, spec, meter, record))
    writer = _Writer(service, served, body, spec, meter)
    with service.admitted():
        pieces = await unless_disconnected(http.receive, whole(writer.generation))
    return Response(dumps(writer.completion(pieces)), media_type="application/json")


async def rewrite_chat(service: Service, record: Record, meter: RequestMeter) -> Answering:
    """The answer to a conversation that began elsewhere. Raises ModelError for a model whose files are gone."""
    body = ChatRequest.model_validate_json(record.spec.body)
    return _Writer(service, await service.with_text(record.spec.card), body, record.spec, meter, record)


def _request(body: ChatRequest, spec: StreamSpec) -> Request:
    prompt, card = tuple(spec.prompts[0]), spec.card
    params = chat_params(body, card.max_model_len - len(prompt)).model_copy(update={"seed": spec.seeds[0]})
    return Request(spec.answer_id, prompt, params, body.priority or 0, body.cache_salt, model=card.identity)


async def _prompt(body: ChatRequest, served: Served) -> list[int]:
    continued = bool(body.continue_final_message)
    wants_answer = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    text = served.text.render_chat(
        [message.for_template() for message in body.messages],
        add_generation_prompt=wants_answer,
        continue_final_message=continued,
        variables=body.chat_template_kwargs,
    )
    # A template writes the special tokens itself.
    return await served.encode(text, add_special_tokens=bool(body.add_special_tokens))


class _Writer:
    """Writes one answer, whole or in chunks."""

    def __init__(
        self,
        service: Service,
        served: Served,
        body: ChatRequest,
        spec: StreamSpec,
        meter: RequestMeter,
        record: Record | None = None,
    ) -> None:
        """`record`: of the stream, if it is kept."""
        self._body = body
        self._text = served.text
        self._spec = spec
        self._stream_id = None if record is None else record.stream_id
        log = None if record is None else record.log
        self.generation = Generation(
            service.backend, served.text, [_request(body, spec)], text_options(body), meter, log
        )
        self._model = served.card.name
        self._with_ids = bool(body.return_token_ids)

    def _identity(self, kind: str) -> dict[str, Any]:
        return {"id": self._spec.answer_id, "object": kind, "created": self._spec.created, "model": self._model}

    def completion(self, pieces: list[Piece]) -> dict[str, Any]:
        """The whole answer; one piece per choice."""
        prompt = self.generation.requests[0].prompt_token_ids
        answer: dict[str, Any] = {
            **self._identity("chat.completion"),
            "choices": [self._choice(piece) for piece in pieces],
            "usage": usage_json(self.generation.usage),
        }
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs_json(
                self._text, prompt, self.generation.prompt_logprobs[0], self._body.prompt_logprobs
            )
        if self._with_ids:
            answer["prompt_token_ids"] = prompt
        return answer

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": logprobs_json(self._text, piece.logprobs) if self._body.logprobs else None,
            "finish_reason": piece.finish_reason,
            **extras(piece, self._with_ids),
        }

    async def events(self) -> AsyncGenerator[bytes]:
        """The framed events, [DONE] included; the first one comes with the first token."""
        generation = self.generation
        identity = self._identity("chat.completion.chunk")
        chunks = Chunks(identity, self._body.stream_options, lambda: generation.usage, self._stream_id)
        opened: set[int] = set()
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                if piece.index not in opened:
                    opened.add(piece.index)
                    yield chunks.chunk(self._role(piece.index))
                if piece.text or piece.logprobs or (self._with_ids and piece.token_ids):
                    yield chunks.chunk(self._delta(piece))
                if piece.finish_reason is not None:
                    yield chunks.chunk(_end(piece))
        for event in chunks.end():
            yield event

    def _role(self, index: int) -> str:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._with_ids:
            choice["prompt_token_ids"] = self.generation.requests[0].prompt_token_ids
        return dumps(choice)

    def _delta(self, piece: Piece) -> str:
        logprobs = dumps(logprobs_json(self._text, piece.logprobs)) if piece.logprobs else "null"
        ids = f',"token_ids":{dumps(piece.token_ids)}' if self._with_ids else ""
        return (
            f'{{"index":{piece.index},"delta":{{"content":{quoted(piece.text)}}},"logprobs":{logprobs},'
            f'"finish_reason":null{ids}}}'
        )


def _end(piece: Piece) -> str:
    return dumps(
        {
            "index": piece.index,
            "delta": {},
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            **extras(piece, return_token_ids=False),
        }
    )


def logprobs_json(text: TextModel, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """OpenAI's chat form: each token with its bytes and the most probable ones beside it."""
    return {
        "content": [
            {
                **_token(text, entry.token_id, entry.logprob),
                "top_logprobs": [_token(text, token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in logprobs
        ]
    }


def _token(text: TextModel, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": text.token_text(token_id), "logprob": finite(logprob), "bytes": list(text.token_bytes(token_id))}
