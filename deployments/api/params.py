"""From a request body to what the engine and the text side are asked for, checked against the model that is served.

Pure. Everything that an engine would refuse is refused here, before a response has begun.
"""

import sys
from collections.abc import Mapping

from deployments.api.schema import ChatRequest, CompletionRequest, Generate
from deployments.messages import ModelCard
from deployments.samples import TextOptions
from engine.errors import InvalidRequest
from engine.limits import Limits, check_request
from engine.sampling_params import SamplingParams
from engine.sequence import Request

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""


def chat_params(body: ChatRequest, room: int) -> SamplingParams:
    """The sampling parameters of a conversation; `room` tokens fit behind its prompt."""
    # As much as fits is decided here: not every replica may have room for as much.
    limit = max(1, room) if body.token_limit is None else body.token_limit
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _params(body, limit, logprobs, body.prompt_logprobs)


def completion_params(body: CompletionRequest, room: int) -> SamplingParams:
    """The sampling parameters of completions; `room` tokens fit behind the longest prompt."""
    # max_tokens 0 scores the prompt: the engine has to draw a token to do that, and nobody is shown it. The default
    # asks for less where less fits; what is asked for explicitly has to fit.
    limit = max(1, min(COMPLETION_MAX_TOKENS, room) if body.max_tokens is None else body.max_tokens)
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, body.logprobs)
    return _params(body, limit, body.logprobs, prompt_logprobs)


def check(request: Request, card: ModelCard, fields: Mapping[str, str]) -> None:
    """Raises InvalidRequest if the model can never serve it. `fields`: what the API calls an engine's parameter."""
    try:
        check_request(request, Limits(card.max_model_len, card.vocab_size))
    except InvalidRequest as error:
        field = fields.get(error.param or "", error.param)
        raise type(error)(error.message, param=field, code=error.code) from error


def text_options(body: Generate) -> TextOptions:
    return TextOptions(
        stop=tuple(body.stop or ()),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=body.min_tokens or 0,
    )


def _params(body: Generate, limit: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
    bias = {int(token_id): value for token_id, value in (body.logit_bias or {}).items()}
    given = {
        "temperature": body.temperature,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        # 0 is in OpenAI's range and means what any share below the first token's means: that token alone.
        "top_p": None if body.top_p is None else max(body.top_p, sys.float_info.min),
        # -1 is how vLLM's clients spell "all".
        "top_k": None if body.top_k is None else max(body.top_k, 0),
    }
    return SamplingParams(
        n=body.num_samples,
        max_tokens=limit,
        logit_bias=bias or None,
        # Each once: then they are no more than the vocabulary has, which every step goes through.
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **{name: value for name, value in given.items() if value is not None},
    )
