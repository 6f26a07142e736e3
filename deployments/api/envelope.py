"""The JSON around every answer, encoded by hand where it is written once per token.

A chunk is a constant head, a choice, and a constant tail; only the choice is encoded per token.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from deployments.api.schema import StreamOptions
from deployments.journal import Usage
from deployments.samples import Piece
from deployments.text import TextModel
from engine.batch import TokenLogprob

DONE = "data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI writes this."""

# ASCII only: some clients split event streams at every Unicode line break, which JSON would leave as it is.
quoted = encode_basestring_ascii


def dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class Chunks:
    """Encodes the events of one streamed answer, numbered from 1 if a client may come back for the rest."""

    def __init__(
        self,
        identity: dict[str, Any],
        options: StreamOptions | None,
        usage: Callable[[], Usage],
        stream_id: str | None = None,
    ) -> None:
        """`identity`: id, object, created and model, as they stand in every chunk. `usage` tells the usage so far."""
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous = self._include_usage and options is not None and bool(options.continuous_usage_stats)
        self._head = "data: " + dumps(identity)[:-1] + ',"choices":['
        self._tail = '],"usage":null}\n\n' if self._include_usage else "]}\n\n"
        self._usage = usage
        self._stream_id = stream_id
        self._num_events = 0

    def chunk(self, choice: str) -> bytes:
        """One event with one choice, given as JSON."""
        return self._with_usage(choice) if self._continuous else self._event(self._head + choice + self._tail)

    def end(self) -> Iterator[bytes]:
        """What ends the stream: the usage in an event without choices, if the client asked for it, and [DONE]."""
        if self._include_usage:
            yield self._with_usage("")
        yield self._event(DONE)

    def _with_usage(self, choice: str) -> bytes:
        return self._event(f'{self._head}{choice}],"usage":{dumps(usage_json(self._usage()))}}}\n\n')

    def _event(self, data: str) -> bytes:
        if self._stream_id is None:
            return data.encode("ascii")
        self._num_events += 1
        return f"id: {self._stream_id}:{self._num_events}\n{data}".encode("ascii")


def extras(piece: Piece, return_token_ids: bool) -> dict[str, Any]:
    """What vLLM adds to a choice."""
    added: dict[str, Any] = {}
    if piece.stop_reason is not None:
        added["stop_reason"] = piece.stop_reason
    if return_token_ids:
        added["token_ids"] = piece.token_ids
    return added


def prompt_logprobs_json(
    text: TextModel, prompt: Sequence[int], logprobs: Sequence[TokenLogprob], top: int
) -> list[dict[str, Any] | None]:
    """vLLM's form: per prompt token a map from token id to logprob, rank and text; None for the first token."""
    rows: list[dict[str, Any] | None] = [None] if prompt else []
    for entry in logprobs:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:top], start=1)}
        ranked[entry.token_id] = (entry.logprob, entry.rank)
        rows.append(
            {
                str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": text.token_text(token_id)}
                for token_id, (logprob, rank) in ranked.items()
            }
        )
    return rows
