"""The bodies of the API's requests: OpenAI's parameters and the extensions that vLLM's clients send.

Types and ranges only; what depends on the model that is served is checked in `params`. Everything has a bound. Unknown
fields are accepted, for clients are newer than servers, and named by `unknown_fields` so that they can be logged.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from deployments.api.errors import quote
from engine.errors import InvalidRequest
from engine.sampling_params import MAX_LOGPROBS, MAX_SAMPLES, TokenId

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_PROMPTS = 1024
MAX_CHOICES = 2048
"""Sequences that one request may start: prompts times samples."""
MAX_MESSAGES = 4096
MAX_LISTED_IDS = 1 << 18
MAX_BIASES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool")


def _text_of_parts(content: Any) -> Any:
    """Message content as one text; the text parts of a list are joined by newlines, as in vLLM."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'part {number} is {quote(kind or part)}; this model takes text, {{"type": "text", "text": ...}}'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Text, texts, token ids or lists of token ids, as a list of prompts."""
    prompts = [prompt] if isinstance(prompt, str) or _is_token_ids(prompt) else prompt
    if not isinstance(prompts, list) or not all(isinstance(each, str) or _is_token_ids(each) for each in prompts):
        raise ValueError("expected a text, a list of texts, a list of token ids or a list of lists of token ids")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ValueError(f"expected 1 to {MAX_PROMPTS} prompts, got {len(prompts)}")
    return prompts


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


Content = Annotated[str | None, BeforeValidator(_text_of_parts)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[StopText] | None, Field(max_length=MAX_STOPS), BeforeValidator(_listed)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts),
    WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "array"}]}),
]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_LISTED_IDS)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
BiasKey = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class Body(BaseModel):
    # Strict: "0.5" is not a number, nor true a count. Clients that send such things have a defect to be told about.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def unknown_fields(self) -> tuple[str, ...]:
        return tuple(sorted(self.model_extra or ()))


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generate(Body):
    """What both endpoints share. None stands for the default, as clients send null for what they leave alone."""

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=100.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=MAX_BIASES)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stops = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _only_what_is_served(self) -> "Generate":
        if self.response_format is not None and self.response_format.get("type") != "text":
            kind = quote(self.response_format.get("type"))
            raise InvalidRequest(
                f'response_format of type {kind} is not supported; only {{"type": "text"}} is',
                param="response_format",
                code="unsupported_parameter",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs is not available with stream: true", param="prompt_logprobs")
        return self

    @property
    def num_samples(self) -> int:
        return self.n or 1


class ChatMessage(Body):
    """One turn. Fields that are not named here reach the chat template as they are."""

    role: Annotated[str, Field(max_length=64)]
    content: Content = None

    @model_validator(mode="after")
    def _has_something_to_say(self) -> "ChatMessage":
        if self.role not in ROLES:
            raise InvalidRequest(f"unknown role {quote(self.role)}; expected one of {', '.join(ROLES)}", param="role")
        if self.content is None and self.role != "assistant":
            raise InvalidRequest(f"a message of role {self.role} must have content", param="content")
        return self

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": self.content}


class ChatRequest(Generate):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise InvalidRequest(f"{name} are not supported", param=name, code="unsupported_parameter")
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest(
                'tool_choice needs tools, which are not supported; only "none" is', param="tool_choice"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Generate):
    """POST /v1/completions"""

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.suffix:
            raise InvalidRequest("suffix is not supported", param="suffix", code="unsupported_parameter")
        if self.best_of is not None and self.best_of != self.num_samples:
            raise InvalidRequest(
                f"best_of ({self.best_of}) other than n ({self.num_samples}) is not supported",
                param="best_of",
                code="unsupported_parameter",
            )
        if len(self.prompt) * self.num_samples > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(self.prompt)} prompts with n={self.num_samples} make more than {MAX_CHOICES} choices", param="n"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1, or 0 with echo: true", param="max_tokens")
        return self
