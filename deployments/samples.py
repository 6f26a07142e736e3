"""From emissions to text, for one sample: detokenizes, applies stop strings, decides what the client is shown.

Pure: no clock, no transport. Knows nothing of the API's formats, only what they are made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from deployments.stops import StopMatcher
from deployments.text import TextModel
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What a client wants to see of the tokens."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """Whether stop strings and stop tokens are shown."""
    skip_special_tokens: bool = True
    stop_token_ids: tuple[int, ...] = ()
    """Stop tokens that the client named; the model's own are no news to it."""
    min_tokens: int = 0
    """Tokens in which no stop string is looked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one emission brought for one choice of the answer."""

    index: int
    """Index of the choice."""
    text: str
    token_ids: tuple[int, ...] = ()
    """Tokens given to the client; those after a stop string are not."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens whose text is shown, so without a hidden stop token."""
    offsets: tuple[int, ...] = ()
    """Parallel to `logprobs`: characters of the choice's text before each token."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string, or the id of the stop token the client named, that ended the choice."""


def joined(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces of one choice as one."""
    last = pieces[-1]
    return Piece(
        last.index,
        "".join(piece.text for piece in pieces),
        tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        tuple(chain.from_iterable(piece.offsets for piece in pieces)),
        last.finish_reason,
        last.stop_reason,
    )


class Sample:
    """One choice while it grows."""

    def __init__(self, index: int, text: TextModel, options: TextOptions) -> None:
        self._index = index
        self._options = options
        self._detokenizer = text.detokenizer(skip_special_tokens=options.skip_special_tokens)
        self._stops = StopMatcher(options.stop, include=options.include_stop)
        self._num_tokens = 0
        self._num_characters = 0
        self.finished = False

    def feed(self, emission: Emission) -> Piece:
        """What `emission` adds. Must not be called once `finished`."""
        assert not self.finished, "the sample has ended"
        shown: list[str] = []
        offsets: list[int] = []
        hidden = emission.stop_token_id is not None and not self._options.include_stop
        visible = len(emission.token_ids) - hidden
        for count, token_id in enumerate(emission.token_ids[:visible], start=1):
            offsets.append(self._num_characters)
            shown.append(self._show(self._detokenizer.push(token_id)))
            if self._stops.matched is not None:
                return self._stopped(emission, "".join(shown), count, offsets)
        if emission.finish_reason is None:
            return self._piece("".join(shown), emission.token_ids, emission, offsets)
        shown.append(self._end())
        if self._stops.matched is not None:
            return self._stopped(emission, "".join(shown), len(emission.token_ids), offsets)
        self.finished = True
        asked_for = emission.stop_token_id in self._options.stop_token_ids
        return self._piece(
            "".join(shown),
            emission.token_ids,
            emission,
            offsets,
            emission.finish_reason.value,
            emission.stop_token_id if asked_for else None,
        )

    def _show(self, text: str) -> str:
        self._num_tokens += 1
        self._num_characters += len(text)
        if self._num_tokens <= self._options.min_tokens or not text:
            return text
        return self._stops.push(text)

    def _end(self) -> str:
        """The last characters: half of one that never was completed, and what might have become a stop string."""
        rest = self._detokenizer.flush()
        shown = self._stops.push(rest) if rest else ""
        return shown + self._stops.flush()

    def _stopped(self, emission: Emission, text: str, count: int, offsets: list[int]) -> Piece:
        self.finished = True
        tokens = emission.token_ids[:count]
        return self._piece(text, tokens, emission, offsets, FinishReason.STOP.value, self._stops.matched)

    def _piece(
        self,
        text: str,
        token_ids: tuple[int, ...],
        emission: Emission,
        offsets: list[int],
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> Piece:
        logprobs = emission.logprobs[: len(offsets)]
        return Piece(
            self._index, text, token_ids, logprobs, tuple(offsets) if logprobs else (), finish_reason, stop_reason
        )
