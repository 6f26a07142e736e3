"""A model's chat template: messages in, the prompt's text out.

Owns the Jinja environment, which offers what Hugging Face templates expect (`raise_exception`, `strftime_now`, `tojson`
without HTML escapes, loop controls, the `generation` block) and nothing else: templates come with the model and are
not trusted, so they run in Jinja's immutable sandbox. Knows no tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest, ModelError

Message = Mapping[str, Any]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template with the model's special tokens bound to it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, origin: str) -> None:
        """`origin` names the file in errors. Raises ModelError if `source` is not a Jinja template."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{origin}: the chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens written out in it.

        `continue_final_message` leaves the last message open, for the model to go on with it; `variables` cannot
        replace the messages or the special tokens. Raises InvalidRequest with the template's own words if it refuses
        the messages (an unknown role, say).
        """
        ours = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._template.render({**(variables or {}), **self._special_tokens, **ours})
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return _open_last(text, messages[-1].get("content")) if continue_final_message else text


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The template of a model directory, or None if it has none.

    Looks where Hugging Face models keep it: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` (a
    template, or a list of named ones of which "default" is taken). Raises ModelError for a file that cannot be read.
    """
    config_file = directory / "tokenizer_config.json"
    config = _read_json(config_file)
    special = _read_json(directory / "special_tokens_map.json") | config
    tokens = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(special.get(name))) is not None}
    jinja_file = directory / "chat_template.jinja"
    if jinja_file.is_file():
        return ChatTemplate(jinja_file.read_text(encoding="utf-8"), tokens, origin=str(jinja_file))
    source = config.get("chat_template")
    if isinstance(source, list):
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    return ChatTemplate(source, tokens, origin=str(config_file)) if isinstance(source, str) else None


def _open_last(text: str, content: Any) -> str:
    """Cuts what the template wrote after the last message's content."""
    last = content.strip() if isinstance(content, str) else ""
    start = text.rfind(last) if last else -1
    if start < 0:
        raise InvalidRequest(
            "continue_final_message needs a last message whose text the chat template writes out unchanged",
            param="continue_final_message",
        )
    end = start + len(last)
    # A template that keeps the content's trailing space keeps it open too; one that strips it has none to keep.
    trailing = content[len(content.rstrip()) :]
    return text[:end] + (trailing if text.startswith(trailing, end) else "")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training masks; for a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the name and kind of Jinja's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(loaded).__name__}")
    return loaded
