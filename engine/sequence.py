"""One request and the token streams that grow from it. Bookkeeping only: the scheduler decides, the runner computes."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from engine.batch import TokenLogprob
from engine.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a stream of tokens ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    MOVED = "moved"
    """Not for clients: this engine gives the stream up, and another one can go on with it. With an error it failed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked for: token ids in, `params.n` streams of token ids out. Picklable; crosses processes."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    """Lower runs first, as in vLLM."""
    cache_salt: str | None = None
    """Requests share computed prompts only with those of the same salt."""
    given: tuple[tuple[int, ...] | None, ...] = ()
    """Of a request that goes on from another replica: per sample the tokens that it brought there, None if it finished.
    They count as its output. Empty: nothing has been brought."""
    num_scored: int = 0
    """Likewise, prompt tokens whose logprobs were reported."""
    model: str = ""
    """The identity of the model that it was written for, whose token ids these are; empty: whichever there is."""

    @property
    def open_samples(self) -> tuple[int, ...]:
        """Indices of the samples that still bring tokens."""
        if not self.given:
            return tuple(range(self.params.n))
        return tuple(index for index, tokens in enumerate(self.given) if tokens is not None)


class Emission(NamedTuple):
    """What one iteration brought for one stream of one request. Picklable; crosses processes."""

    request_id: str
    sample_index: int
    token_ids: tuple[int, ...] = ()
    """New tokens; a stop token that ended the stream is included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Parallel to `token_ids` when the request asked for logprobs, else empty."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Logprobs of the prompt's tokens from the second on, in pieces as chunks are computed; sample 0 only."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token that ended the stream, when one did."""
    error: str | None = None
    """With FinishReason.ERROR or MOVED: what went wrong."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache; with the first token of sample 0."""


class Order(NamedTuple):
    """Who comes first: priority, then arrival, then sample index. Total, so FCFS is a comparison."""

    priority: int
    arrival: int
    sample_index: int


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens being generated.

    There is no prefill or decode phase: a sequence has `num_remaining` tokens whose keys and values are not in its
    pages yet, and draws a token in the iteration that brings that number to zero. Decode is the case of one remaining
    token; recomputation after preemption is prefill of prompt and output together.
    """

    sequence_id: int
    request: Request
    order: Order
    seed: int
    stop_token_ids: frozenset[int]
    max_tokens: int
    """Output tokens at most: the request's limit, cut to what the model's length leaves."""
    tokens: list[int] = field(default_factory=list)
    """Prompt, then output."""
    root: bytes = b""
    """The key before its first page (`engine.kv.keys`): sequences of different roots share no pages."""
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are, or will be after the batches in flight, in `pages`."""
    num_indexed: int = 0
    """Tokens, from the first on, whose pages others can find."""
    num_cached: int = 0
    """Of the prompt, tokens that were found in the cache at first and are still to be reported."""
    status: Status = Status.WAITING
    in_flight: bool = False
    """In a batch that was submitted and not collected; such a sequence is neither scheduled nor preempted."""
    num_preemptions: int = 0
    num_scored: int = 0
    """Prompt tokens, from the second on, whose logprobs were reported."""
    lane: int = -1
    """Its row in the scheduler's `Lanes` while it has one."""
    keys: list[bytes] = field(default_factory=list)
    """Of its full pages, as far as anybody has asked for them."""
    num_prompt: int = field(init=False)
    max_len: int = field(init=False)
    """Tokens at most, prompt and output."""

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.prompt_token_ids)
        self.max_len = self.num_prompt + self.max_tokens

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_outstanding(self) -> int:
        """Tokens still to run through the model, if the sequence grows to `max_tokens`."""
        return self.num_remaining + self.max_tokens - self.num_output

    @property
    def sample_index(self) -> int:
        return self.order.sample_index

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Why the stream ends with `token_id`, already appended, or None if it goes on."""
        if token_id in self.stop_token_ids and self.num_output > self.request.params.min_tokens:
            return FinishReason.STOP
        if self.num_output >= self.max_tokens:
            return FinishReason.LENGTH
        return None
