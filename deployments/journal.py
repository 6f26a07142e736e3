"""What a client has been given of one request: all that is needed to count it, and to continue it elsewhere.

Holds token ids only; knows neither text nor where the tokens came from.
"""

from dataclasses import dataclass

from engine.sequence import Request


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or more requests, as they are billed: a prompt counts once however many samples grow from it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompts that were in a replica's cache."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


class Journal:
    """The tokens given so far, per sample. Tokens beyond a stop string were not given and are not in here."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._token_ids: list[list[int]] = [[] for _ in range(request.params.n)]
        self._reasons: list[str | None] = [None] * request.params.n
        self._unfinished = request.params.n
        self.cached_tokens = 0
        """Of the prompt, as the replica reported it."""

    def give(self, sample_index: int, token_ids: tuple[int, ...]) -> None:
        """Records tokens that a sample brought. A finished sample takes no more."""
        assert self._reasons[sample_index] is None, "the sample is finished"
        self._token_ids[sample_index].extend(token_ids)

    def finish(self, sample_index: int, reason: str) -> None:
        """Records why a sample ended; once."""
        assert self._reasons[sample_index] is None, "the sample is finished"
        self._reasons[sample_index] = reason
        self._unfinished -= 1

    def token_ids(self, sample_index: int) -> tuple[int, ...]:
        return tuple(self._token_ids[sample_index])

    def reason(self, sample_index: int) -> str | None:
        return self._reasons[sample_index]

    @property
    def done(self) -> bool:
        return self._unfinished == 0

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt_token_ids), sum(map(len, self._token_ids)), self.cached_tokens)
