"""The input of an offline run: a JSONL file of prompts, each with its own id and sampling parameters.

Owns the format and its checks. Reads line by line, so that a file may be larger than memory; knows no tokenizer and
no engine.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine.sampling_params import SamplingParams, TokenId

_HASH_DIGITS = 12


class PromptError(ValueError):
    """A line that cannot be run; the message does not repeat the line's number."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: str = Field(min_length=1)
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that the model's chat template makes a prompt of."""

    messages: tuple[Message, ...]


StopStrings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=16)]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for every line that does not say otherwise."""

    model: str
    params: SamplingParams
    stop: tuple[str, ...] = ()
    seed: int | None = None
    """Each prompt's own seed is derived from this one and the prompt's id: the order of the lines does not matter."""

    def fingerprint(self, line: bytes) -> str:
        """Hash of a line together with everything in here."""
        params = self.params.model_dump_json(exclude_defaults=True)
        return _digest(line, json.dumps([self.model, params, self.stop, self.seed]).encode())


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the file, checked as far as that is possible without the model."""

    number: int
    """Line number, from 1."""
    id: str
    fingerprint: str
    """Hash of everything that the result depends on: the line, the defaults and the model's name."""
    content: str | tuple[int, ...] | Conversation
    params: SamplingParams
    stop: tuple[str, ...]
    include_stop: bool
    """Whether a stop string that ends the text stays in it."""


class _Line(BaseModel):
    """A line as it is written. What is not named here must be a sampling parameter."""

    model_config = ConfigDict(extra="allow")

    id: Annotated[str, Field(min_length=1, max_length=512)] | int | None = None
    prompt: str | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)] | None = None
    params: dict[str, Any] = {}
    stop: str | StopStrings | None = None
    max_completion_tokens: int | None = None
    include_stop_str_in_output: bool = False

    def content(self) -> str | tuple[int, ...] | Conversation:
        """What to continue. Raises PromptError unless exactly one kind is given."""
        given: dict[str, str | tuple[int, ...] | Conversation] = {}
        if self.prompt is not None:
            given["prompt"] = self.prompt
        if self.messages is not None:
            given["messages"] = Conversation(self.messages)
        if self.token_ids is not None:
            given["token_ids"] = self.token_ids
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise PromptError(f'exactly one of "prompt", "messages" and "token_ids" is needed, found {found}')
        return next(iter(given.values()))


_STOP = TypeAdapter(str | StopStrings | None)


class PromptFile:
    """A file of prompts that can be read any number of times."""

    def __init__(self, path: Path, defaults: Defaults) -> None:
        self.path = path
        self._defaults = defaults

    def read(self) -> Iterator[Prompt | tuple[int, PromptError]]:
        """Every prompt in order, and for a bad line its number and what is wrong with it. Blank lines are skipped."""
        seen: dict[str, int] = {}
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    prompt = parse_line(raw, number, self._defaults)
                    if prompt.id in seen:
                        raise PromptError(f'id "{prompt.id}" is already used by line {seen[prompt.id]}')
                except PromptError as error:
                    yield number, error
                else:
                    seen[prompt.id] = number
                    yield prompt

    def prompts(self) -> Iterator[Prompt]:
        """The prompts of a file that was found to be without bad lines."""
        for item in self.read():
            if not isinstance(item, Prompt):
                number, error = item
                raise PromptError(f"{self.path}, line {number}: {error}")
            yield item


def parse_line(raw: bytes, number: int, defaults: Defaults) -> Prompt:
    """One line of the file. Raises PromptError that says which field is wrong and what would be right."""
    line = _validated(raw)
    overrides = {**line.params, **(line.model_extra or {})}
    for name, value in (("stop", line.stop), ("max_tokens", line.max_completion_tokens)):
        if value is not None:
            overrides[name] = value
    stop = _stop_strings(overrides.pop("stop", defaults.stop))
    prompt_id = str(line.id) if line.id is not None else f"{number}-{_digest(raw.strip())}"
    return Prompt(
        number=number,
        id=prompt_id,
        fingerprint=defaults.fingerprint(raw.strip()),
        content=line.content(),
        params=_sampling(overrides, defaults, prompt_id),
        stop=stop,
        include_stop=line.include_stop_str_in_output,
    )


def _validated(raw: bytes) -> _Line:
    try:
        value = json.loads(raw)
    except UnicodeDecodeError as error:
        raise PromptError(f"not UTF-8 (byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise PromptError(f"not JSON: {reason}") from None
    if not isinstance(value, Mapping):
        raise PromptError(f'expected an object such as {{"prompt": "..."}}, found {type(value).__name__}')
    try:
        return _Line.model_validate(value)
    except ValidationError as error:
        raise PromptError(_first_reason(error)) from None


def _sampling(overrides: dict[str, Any], defaults: Defaults, prompt_id: str) -> SamplingParams:
    unknown = overrides.keys() - SamplingParams.model_fields.keys()
    if unknown:
        known = ", ".join(SamplingParams.model_fields)
        raise PromptError(f'unknown field "{min(unknown)}"; sampling parameters are {known}')
    base = defaults.params.model_dump(exclude_unset=True)
    if defaults.seed is not None:
        base["seed"] = int(_digest(prompt_id.encode(), str(defaults.seed).encode()), 16)
    try:
        return SamplingParams.model_validate(base | overrides)
    except ValidationError as error:
        raise PromptError(_first_reason(error)) from None


def _stop_strings(value: Any) -> tuple[str, ...]:
    try:
        stop = _STOP.validate_python(value)
    except ValidationError as error:
        raise PromptError(f"stop: {_first_reason(error)}") from None
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else stop


def _first_reason(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in detail["loc"])
    return f"{where}: {detail['msg']}" if where else str(detail["msg"])


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:_HASH_DIGITS]
