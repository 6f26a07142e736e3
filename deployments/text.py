"""Between text and token ids: the tokenizer of a model directory, its chat template and incremental detokenization.

Reads `tokenizer.json` with the tokenizers library alone: neither torch nor transformers is imported, which keeps a
gateway small and its start fast. Only a directory without that file pays for transformers, once, to convert it.

Every token has fixed bytes, and text is those bytes decoded as UTF-8. That holds for the two kinds of tokenizer that
decoder models have, byte-level BPE and SentencePiece with byte fallback, and makes detokenization exact and O(1) per
token: there is no window to decode again, and no guess whether U+FFFD is a character or the half of one.
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from deployments.chat_template import ChatTemplate, Message, read_chat_template
from engine.errors import InvalidRequest, ModelError


class TextModel:
    """Tokenizer and chat template of one model. Immutable; may be used from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None = None, *, origin: str = "tokenizer"
    ) -> None:
        """`origin` names the tokenizer in errors. Raises ModelError for a kind of tokenizer it cannot decode."""
        self._tokenizer = tokenizer
        self._template = template
        self._spelling = _spelling(tokenizer, origin)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = dict(self._added)

    @classmethod
    def load(cls, path: str | Path) -> "TextModel":
        """Reads a model directory. Raises ModelError naming the file that is missing or wrong."""
        directory = Path(path)
        if not directory.is_dir():
            raise ModelError(f"{directory}: no such model directory")
        tokenizer = _read_tokenizer(directory)
        # Truncation and padding are a training set's business; a server must see the prompt as it is.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, read_chat_template(directory), origin=str(directory))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`; `add_special_tokens` adds what the model's tokenizer adds by itself (BOS, say)."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text for a conversation. Raises InvalidRequest if the model has no template or it refuses."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): "
                "use /v1/completions, or add a template to the model directory",
                param="messages",
                code="chat_template_missing",
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special ones spelled out; empty for an id that no token has (a padded vocabulary)."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._spelling.token_bytes(token)
        return known

    def token_text(self, token_id: int) -> str:
        r"""A readable, unambiguous name of one token: its text, or `bytes:\xe2\x82` for a part of a character."""
        spelled = self.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def detokenizer(self, *, skip_special_tokens: bool = True, at_start: bool = False) -> "Detokenizer":
        """A new stream of text. `at_start`: the first token begins the whole text rather than continuing a prompt."""
        return Detokenizer(self, skip_special_tokens, self._spelling.leading_spaces if at_start else 0)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens, at_start=True)
        return "".join(map(stream.push, token_ids)) + stream.flush()


class Detokenizer:
    """Text of one growing token sequence. Bytes of an unfinished character are held back until it is complete."""

    def __init__(self, model: TextModel, skip_special_tokens: bool, leading_spaces: int) -> None:
        self._model = model
        self._skip_special = skip_special_tokens
        self._leading_spaces = leading_spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, maybe none."""
        if self._skip_special and self._model.is_special(token_id):
            return ""
        return self._strip(self._decoder.decode(self._model.token_bytes(token_id)))

    def flush(self) -> str:
        """At the end of the sequence: U+FFFD if it ends within a character."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        """Drops the spaces that SentencePiece puts before the first word."""
        while self._leading_spaces and text:
            if text[0] == " ":
                text = text[1:]
                self._leading_spaces -= 1
            else:
                self._leading_spaces = 0
        return text


class _Spelling(Protocol):
    """How a tokenizer writes bytes as the characters of its tokens."""

    leading_spaces: int

    def token_bytes(self, token: str) -> bytes: ...


class _ByteLevel:
    """GPT-2's alphabet: each byte is one printable character."""

    leading_spaces = 0

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(0x100) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}

    def token_bytes(self, token: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:  # A token that was added as plain text.
            return token.encode()


class _ByteFallback:
    """SentencePiece: U+2581 is a space, and `<0xE2>` a byte that no other token covers."""

    def __init__(self, leading_spaces: int) -> None:
        self.leading_spaces = leading_spaces

    def token_bytes(self, token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def _spelling(tokenizer: Tokenizer, origin: str) -> _Spelling:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _ByteLevel()
    if kinds == ["Metaspace"]:
        return _ByteFallback(leading_spaces=0 if steps[0].get("prepend_scheme") == "never" else 1)
    if "ByteFallback" in kinds or "Replace" in kinds:
        strips = [step for step in steps if step["type"] == "Strip" and step.get("content") == " "]
        return _ByteFallback(leading_spaces=strips[0].get("start", 0) if strips else 0)
    raise ModelError(
        f"{origin}: cannot decode a tokenizer of kind {'+'.join(kinds)}; "
        "supported are byte-level BPE and SentencePiece (Metaspace or byte fallback)"
    )


def _read_tokenizer(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises bare Exception for whatever is wrong with the file.
            raise ModelError(f"{file}: not a readable tokenizer: {error}") from error
    older = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
    if not any((directory / name).is_file() for name in older):
        raise ModelError(f"{file}: missing; the tokenizer must be there, or as one of {', '.join(older)}")
    from transformers import AutoTokenizer  # Imports torch, so only for directories that cannot do without.

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True).backend_tokenizer
    except Exception as error:
        raise ModelError(f"{directory}: cannot convert the tokenizer files to tokenizer.json: {error}") from error
