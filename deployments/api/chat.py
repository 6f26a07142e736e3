"""POST /v1/chat/completions: conversations in, OpenAI's chat completions or chunks of them out."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.api.connection import read_body, request_id_of, unless_disconnected
from deployments.api.envelope import Chunks, dumps, extras, finite, prompt_logprobs_json, quoted, usage_json
from deployments.api.generation import Generation, whole
from deployments.api.params import chat_params, check, text_options
from deployments.api.schema import ChatRequest
from deployments.api.service import Served, Service
from deployments.api.sse import EventStream
from deployments.samples import Piece
from deployments.text import TextModel
from engine.batch import TokenLogprob
from engine.sequence import Request


async def create_chat_completion(service: Service, http: HttpRequest) -> Response:
    """Answers one conversation. Raises what `errors.describe` knows, as long as nothing has been sent."""
    meter = service.meter()
    body = ChatRequest.model_validate_json(await read_body(http, service.config.max_body_bytes))
    service.note_unknown_fields(body)
    served = await service.model(body.model)
    prompt = await _prompt(body, served)
    answer_id = f"chatcmpl-{request_id_of(http.scope)}"
    request = Request(answer_id, tuple(prompt), chat_params(body), body.priority or 0, body.cache_salt)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    check(request, served.card, {"prompt": "messages", "max_tokens": limit})
    generation = Generation(service.backend, served.text, [request], text_options(body), meter)
    writer = _Writer(body, served, generation, answer_id)
    if body.stream:
        return EventStream(writer.events(service))
    with service.admitted():
        pieces = await unless_disconnected(http.receive, whole(generation))
    return Response(dumps(writer.completion(pieces)), media_type="application/json")


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

    def __init__(self, body: ChatRequest, served: Served, generation: Generation, answer_id: str) -> None:
        self._body = body
        self._text = served.text
        self._generation = generation
        self._id = answer_id
        self._created = int(time.time())
        self._model = served.card.name
        self._with_ids = bool(body.return_token_ids)

    def _identity(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def completion(self, pieces: list[Piece]) -> dict[str, Any]:
        """The whole answer; one piece per choice."""
        prompt = self._generation.requests[0].prompt_token_ids
        answer: dict[str, Any] = {
            **self._identity("chat.completion"),
            "choices": [self._choice(piece) for piece in pieces],
            "usage": usage_json(self._generation.usage),
        }
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs_json(
                self._text, prompt, self._generation.prompt_logprobs[0], self._body.prompt_logprobs
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

    async def events(self, service: Service) -> AsyncGenerator[bytes]:
        """The framed events, [DONE] included; the first one comes with the first token."""
        body, generation = self._body, self._generation
        chunks = Chunks(self._identity("chat.completion.chunk"), body.stream_options, lambda: generation.usage)
        opened: set[int] = set()
        with service.admitted():
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    if piece.index not in opened:
                        opened.add(piece.index)
                        yield chunks.chunk(self._role(piece.index))
                    if piece.text or piece.logprobs or (self._with_ids and piece.token_ids):
                        yield chunks.chunk(self._delta(piece))
                    if piece.finish_reason is not None:
                        yield chunks.chunk(_end(piece))
            yield chunks.end()

    def _role(self, index: int) -> str:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._with_ids:
            choice["prompt_token_ids"] = self._generation.requests[0].prompt_token_ids
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
