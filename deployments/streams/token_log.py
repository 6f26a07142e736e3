"""The tokens of one streamed answer in the order in which the client gets them: what its events are made of.

Holds token ids and what came with them, compactly; knows neither text, nor events, nor who keeps it. A plain token is
eight bytes, in memory and on the wire.
"""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason

_NO_TOKEN = 0xFFFF_FFFF
_EXTRA_BYTES = 200
_LOGPROB_BYTES = 120
_TOP_BYTES = 100
"""What these take in a process, roughly: the bounds on memory need an estimate, not an account."""


class Extra(NamedTuple):
    """What came with a token beside its id, or without a token."""

    logprob: TokenLogprob | None
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_token_id: int | None
    cached_tokens: int

    @property
    def num_bytes(self) -> int:
        rows = (*self.prompt_logprobs, *(() if self.logprob is None else (self.logprob,)))
        return _EXTRA_BYTES + sum(_LOGPROB_BYTES + _TOP_BYTES * len(row.top) for row in rows)


@dataclass(frozen=True, slots=True)
class LogPart:
    """Consecutive entries of a log, on their way to another process."""

    words: "array[int]"
    """Per entry: choice << 32 | token id."""
    extras: tuple[tuple[int, Extra], ...]
    """Those entries that are more than a token id, with their places in `words`."""

    def __len__(self) -> int:
        return len(self.words)


class TokenLog:
    """A growing sequence of entries: an emission of at most one token, and the choice of the answer it belongs to."""

    def __init__(self) -> None:
        self._words = array("Q")
        self._extras: list[tuple[int, Extra]] = []
        """Ascending by the place of the entry."""
        self._extra_bytes = 0

    @classmethod
    def of(cls, part: LogPart) -> "TokenLog":
        """The log that begins, and ends, with these entries."""
        log = cls()
        log.extend(part)
        return log

    def __len__(self) -> int:
        return len(self._words)

    @property
    def num_bytes(self) -> int:
        """Memory it takes, estimated."""
        return self._words.itemsize * len(self._words) + self._extra_bytes

    def append(self, choice: int, emission: Emission) -> None:
        """Adds what came for a choice. Which request and sample that was is not kept: the choice tells."""
        assert len(emission.token_ids) <= 1, "an entry is one token"
        token = emission.token_ids[0] if emission.token_ids else _NO_TOKEN
        if (
            emission.logprobs
            or emission.finish_reason is not None
            or emission.cached_tokens
            or emission.prompt_logprobs
            or token == _NO_TOKEN
        ):
            self._add_extra(
                len(self._words),
                Extra(
                    emission.logprobs[0] if emission.logprobs else None,
                    emission.prompt_logprobs,
                    emission.finish_reason,
                    emission.stop_token_id,
                    emission.cached_tokens,
                ),
            )
        self._words.append(choice << 32 | token)

    def __iter__(self) -> Iterator[tuple[int, Emission]]:
        """Choices and emissions; the emissions name neither request nor sample."""
        extras = iter(self._extras)
        place, extra = next(extras, (sys.maxsize, None))
        for index, word in enumerate(self._words):
            choice, token = word >> 32, word & _NO_TOKEN
            tokens = () if token == _NO_TOKEN else (token,)
            if index < place or extra is None:
                yield choice, Emission("", 0, tokens)
                continue
            logprobs = () if extra.logprob is None else (extra.logprob,)
            yield (
                choice,
                Emission(
                    "",
                    0,
                    tokens,
                    logprobs,
                    extra.prompt_logprobs,
                    extra.finish_reason,
                    extra.stop_token_id,
                    cached_tokens=extra.cached_tokens,
                ),
            )
            place, extra = next(extras, (sys.maxsize, None))

    def since(self, start: int) -> LogPart:
        """The entries from `start` on."""
        first = bisect_left(self._extras, start, key=itemgetter(0))
        extras = tuple((place - start, extra) for place, extra in self._extras[first:])
        return LogPart(self._words[start:], extras)

    def extend(self, part: LogPart, skip: int = 0) -> None:
        """Adds entries from elsewhere, without the first `skip`."""
        offset = len(self._words) - skip
        for place, extra in part.extras:
            if place >= skip:
                self._add_extra(offset + place, extra)
        self._words.extend(part.words[skip:])

    def copy(self) -> "TokenLog":
        return TokenLog.of(self.since(0))

    def _add_extra(self, place: int, extra: Extra) -> None:
        self._extras.append((place, extra))
        self._extra_bytes += extra.num_bytes
