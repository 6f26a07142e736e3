"""What a model can serve at all, and the check of a request against it. Pure; the gateway and the engine share it."""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.sequence import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that come from the model and the KV memory."""

    max_model_len: int
    """Tokens of one sequence, prompt and output together."""
    vocab_size: int

    def max_output(self, request: Request) -> int:
        """Output tokens of one sample at most: what the request asks for, or all that its prompt leaves."""
        asked = request.params.max_tokens
        return self.max_model_len - len(request.prompt_token_ids) if asked is None else asked


def check_request(request: Request, limits: Limits) -> None:
    """Raises InvalidRequest, naming the parameter, if the request can never be served."""
    params, prompt = request.params, request.prompt_token_ids
    if not prompt:
        raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
    _check_tokens(prompt, limits, "prompt")
    _check_tokens(params.logit_bias or (), limits, "logit_bias")
    _check_tokens(params.allowed_token_ids or (), limits, "allowed_token_ids")
    _check_tokens(params.stop_token_ids, limits, "stop_token_ids")
    room = limits.max_model_len - len(prompt)
    if room < 1:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limits.max_model_len} tokens, and the prompt alone has "
            f"{len(prompt)}; shorten it to at most {limits.max_model_len - 1}",
            param="prompt",
            code="context_length_exceeded",
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limits.max_model_len} tokens, but {len(prompt)} in the prompt "
            f"and max_tokens={params.max_tokens} make {len(prompt) + params.max_tokens}; ask for at most {room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    max_tokens = limits.max_output(request)
    _check_given(request, limits, max_tokens)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens ({params.min_tokens}) must not be more than max_tokens ({max_tokens})", param="min_tokens"
        )


def _check_given(request: Request, limits: Limits, max_tokens: int) -> None:
    if not request.given:
        return
    if len(request.given) != request.params.n or not request.open_samples:
        raise InvalidRequest(
            f"{len(request.given)} samples were given, {len(request.open_samples)} of them unfinished; expected "
            f"{request.params.n} with at least one unfinished",
            param="given",
        )
    for tokens in request.given:
        _check_tokens(tokens or (), limits, "given")
        if len(tokens or ()) >= max_tokens:
            raise InvalidRequest(
                f"an unfinished sample was given {len(tokens or ())} tokens of at most {max_tokens}", param="given"
            )


def _check_tokens(token_ids: Iterable[int], limits: Limits, param: str) -> None:
    worst = max(token_ids, default=-1)
    lowest = min(token_ids, default=0)
    if worst >= limits.vocab_size or lowest < 0:
        bad = worst if worst >= limits.vocab_size else lowest
        raise InvalidRequest(
            f"token id {bad} is not in the vocabulary of {limits.vocab_size} tokens (0 to {limits.vocab_size - 1})",
            param=param,
        )
