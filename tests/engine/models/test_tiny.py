"""The built-in model: its tokenizer, its size, the corpus it learnt from, and that it answers and stops."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.models.tiny import PATH, evaluate
from engine.models.tiny.corpus import documents, split_of, words
from engine.models.tiny.corpus.chats import render
from engine.models.tiny.corpus.grammar import plural, polish

TOKENIZER = Tokenizer.from_file(str(PATH / "tokenizer.json"))


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return evaluate.load()


@given(st.text())
@settings(max_examples=300)
def test_tokenizer_gives_back_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["", " ", "  two  blanks\n\n", "don't", "a\tb", "naïve 東京 🙂👩‍👩‍👧", "\u0000\u202e", " 12+3"]
)
def test_tokenizer_gives_back_awkward_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_digits_stand_alone() -> None:
    assert len(TOKENIZER.encode("1234").ids) == 4


def test_the_model_is_small(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert (PATH / "model.safetensors").stat().st_size <= 8 * 2**20
    assert TOKENIZER.get_vocab_size() <= 4096


def test_configuration_agrees_with_the_tokenizer() -> None:
    config = json.loads((PATH / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((PATH / "generation_config.json").read_text(encoding="utf-8"))
    end_of_turn, end_of_text = TOKENIZER.token_to_id("<|im_end|>"), TOKENIZER.token_to_id("<|endoftext|>")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert (config["eos_token_id"], config["bos_token_id"]) == (end_of_turn, end_of_text)
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()
    assert generation["eos_token_id"] == [end_of_turn, end_of_text]


def test_corpus_is_the_same_for_the_same_seed() -> None:
    assert list(islice(documents(7), 200)) == list(islice(documents(7), 200))
    assert list(islice(documents(7), 200)) != list(islice(documents(8), 200))


def test_heldout_documents_are_never_in_training() -> None:
    heldout = set(evaluate.heldout_documents())
    assert len(heldout) > 200
    assert heldout.isdisjoint(islice(documents(1), 5000))
    assert heldout.isdisjoint(islice(documents(990_001), 5000))


def test_a_cast_belongs_to_one_split() -> None:
    sample = [f"{girl}|{boy}|the forest" for girl in words.GIRLS for boy in words.BOYS]
    share = sum(split_of(key) == "heldout" for key in sample) / len(sample)
    assert 0.01 < share < 0.04


def test_corpus_is_varied() -> None:
    texts = list(islice(documents(3), 3000))
    distinct = {word.lower() for word in re.findall(r"[A-Za-z]+", " ".join(texts))}
    assert len(distinct) >= 1500
    assert len(set(texts)) >= 0.95 * len(texts)


def test_corpus_leaves_no_template_marks() -> None:
    for text in islice(documents(4), 2000):
        assert not re.search(r"[\[\]{}]", text)


def test_articles_capitals_and_plurals() -> None:
    assert polish("a owl met a unicorn. an hour later, a old fox came") == (
        "An owl met a unicorn. An hour later, an old fox came"
    )
    assert [plural(noun) for noun in ("fox", "wolf", "cherry", "toy train", "goose")] == [
        "foxes", "wolves", "cherries", "toy trains", "geese",
    ]  # fmt: skip


def test_chat_template_is_the_format_of_the_corpus(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    turns = [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello!"), ("user", "Who are you?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render(turns)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == render(turns) + "<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", ["Hello! How are you?", "What is 3 plus 4?"])
def test_answers_in_english_and_stops(shipped: tuple[Any, Any], prompt: str) -> None:
    model, tokenizer = shipped
    text, ended = evaluate.reply(model, tokenizer, [{"role": "user", "content": prompt}], limit=100)
    assert ended
    assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9 ,.!?'\"-]+", text), text


def test_it_can_add(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    text, _ = evaluate.reply(model, tokenizer, [{"role": "user", "content": "What is 3 plus 4?"}], limit=30)
    assert "7" in text
