"""Tokenizers of both kinds: exact round trips, and detokenization that splits no character."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from deployments.text import TextModel
from engine.errors import InvalidRequest, ModelError
from tests.deployments.api.tiny import SPECIALS, TEMPLATE, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
TEXT = TextModel(BYTE_LEVEL)
IDS = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40)


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's kind: U+2581 for spaces, one in front of the text, and a token per byte for what is not covered."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "h", "i", "\u2581hi", "\u2581there"]
    scores = [(word, -float(rank)) for rank, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def streamed(text: TextModel, ids: list[int], **options: bool) -> list[str]:
    stream = text.detokenizer(**options)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@given(st.text(max_size=60))
def test_streaming_the_tokens_of_a_text_gives_the_text(text):
    assert "".join(streamed(TEXT, TEXT.encode(text))) == text


@given(IDS, st.booleans())
def test_streaming_any_tokens_gives_what_the_tokenizer_decodes_at_once(ids, skip):
    assert "".join(streamed(TEXT, ids, skip_special_tokens=skip)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text(alphabet="aé語😀", max_size=20))
def test_no_piece_ever_holds_a_part_of_a_character(text):
    assert not any("\ufffd" in piece for piece in streamed(TEXT, TEXT.encode(text)))


def test_a_sequence_that_ends_within_a_character_ends_with_a_replacement():
    ids = TEXT.encode("a😀")[:-1]
    assert streamed(TEXT, ids)[-1] == "\ufffd"


def test_an_endless_run_of_broken_bytes_is_not_held_back():
    stray = BYTE_LEVEL.token_to_id("\u0142")  # The byte 0xA0, which continues a character that was never begun.
    assert "".join(streamed(TEXT, [stray] * 50)[:-1]) == "\ufffd" * 50


def test_special_tokens_are_shown_on_request_only():
    ids = [*TEXT.encode("hi"), BYTE_LEVEL.token_to_id(SPECIALS[1])]
    assert "".join(streamed(TEXT, ids)) == "hi"
    assert "".join(streamed(TEXT, ids, skip_special_tokens=False)) == "hi<|im_end|>"


def test_an_id_beyond_the_tokenizer_has_no_text():
    assert TEXT.decode([10**6]) == ""


def test_a_token_that_is_a_part_of_a_character_is_named_by_its_bytes():
    names = [TEXT.token_text(token_id) for token_id in TEXT.encode("😀")]
    assert "".join(names).replace("bytes:", "") == r"\xf0\x9f\x98\x80"


@given(st.text(alphabet="hi tre😀ß", max_size=30))
def test_sentencepiece_texts_survive_streaming(text):
    tokenizer = sentencepiece_tokenizer()
    model = TextModel(tokenizer)
    assert "".join(streamed(model, model.encode(text), at_start=True)) == text
    assert model.decode(model.encode(text)) == tokenizer.decode(tokenizer.encode(text).ids)


def test_a_continuation_keeps_the_space_before_its_first_word():
    model = TextModel(sentencepiece_tokenizer())
    hi = model.encode("hi", add_special_tokens=False)
    assert "".join(streamed(model, hi)) == " hi"
    assert "".join(streamed(model, hi, at_start=True)) == "hi"


def test_special_tokens_of_the_tokenizer_are_added_on_request():
    model = TextModel(sentencepiece_tokenizer())
    assert model.encode("hi")[0] == 1
    assert 1 not in model.encode("hi", add_special_tokens=False)


def test_a_directory_is_read_without_torch_and_transformers(tmp_path: Path):
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    program = (
        "import sys\n"
        "from deployments.text import TextModel\n"
        f"text = TextModel.load({str(tmp_path)!r})\n"
        "assert text.decode(text.encode('hello 😀')) == 'hello 😀'\n"
        "assert text.has_chat_template\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_directory_of_older_files_is_converted(tmp_path: Path):
    vocabulary = {token: token_id for token_id, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    text = TextModel.load(tmp_path)
    assert text.decode(text.encode("hello 😀")) == "hello 😀"


def test_missing_and_broken_files_are_named(tmp_path: Path):
    with pytest.raises(ModelError, match="no such model directory"):
        TextModel.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        TextModel.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer"):
        TextModel.load(tmp_path)
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: expected a JSON object"):
        TextModel.load(tmp_path)


def test_a_kind_of_tokenizer_that_cannot_be_streamed_is_refused_at_start():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        TextModel(tokenizer, origin="/models/bert")


def test_without_a_chat_template_the_error_says_where_it_would_be():
    with pytest.raises(InvalidRequest, match=r"chat_template\.jinja"):
        TEXT.render_chat([{"role": "user", "content": "hi"}])
