"""How long iterations take in which prompts are computed, and how much of a prompt streams need not feel.

Learns from what iterations took, whatever else ran on the machine meanwhile. Knows no clock and no sequence.
"""

from engine.kv.costs import LEAST_TOKENS
from engine.policy import LEAST_CHUNK, unfelt_tokens

_FORGET = 0.5
"""Weight of what was known when an iteration comes: neighbours on the same cores come and go within a few."""
_SHORT_S = 0.02
"""Of prompts in an iteration, not worth to be cut any shorter."""
_LEAST_BESIDE = 32
"""Tokens that cost little more than reading the weights, which the decodes beside them do anyway."""


class Pace:
    """Tokens that an iteration may spend on prompts beside streams that decode."""

    def __init__(self, max_stall_s: float | None) -> None:
        """`max_stall_s`: what such an iteration should take at most; None is no limit."""
        self._max_stall_s = max_stall_s
        self._token_seconds: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """An iteration of so many tokens took so long; those of few tokens cost what reading the weights costs."""
        if tokens < LEAST_TOKENS:
            return
        latest = seconds / tokens
        known = latest if self._token_seconds is None else self._token_seconds
        self._token_seconds = _FORGET * known + (1 - _FORGET) * latest

    def least_tokens(self) -> int:
        """Of a prompt, beside streams that decode: fewer would make it wait and spare nobody anything."""
        if not self._token_seconds:
            return LEAST_CHUNK
        return max(_LEAST_BESIDE, int(_SHORT_S / self._token_seconds))

    def tokens(self, most: int) -> int:
        """Of a prompt, beside streams that decode; until anything is known no more than tell something.

        An engine that has only gone on with others' streams would keep all of them waiting for seconds to find out.
        """
        if self._max_stall_s is None:
            return most
        if self._token_seconds is None:
            return min(most, LEAST_CHUNK)
        return unfelt_tokens(most, self._token_seconds, self._max_stall_s)
