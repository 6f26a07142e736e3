"""Calibration prompts: from a text, from the built-in one, or made up where there is no tokenizer."""

from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.models.directory import load_spec
from engine.models.tiny import PATH
from engine.quant.texts import NUM_PROMPTS, PROMPT_TOKENS, calibration_prompts
from tests.engine.quant.checkpoints import LLAMA, random_model

SPEC = load_spec(PATH)


def test_the_built_in_text_fills_prompts_of_the_models_own_tokens() -> None:
    prompts = calibration_prompts(PATH, SPEC, None)
    assert 4 < len(prompts) <= NUM_PROMPTS
    assert {len(prompt) for prompt in prompts[:-1]} == {PROMPT_TOKENS}
    tokens = [token for prompt in prompts for token in prompt]
    assert min(tokens) >= 0 and max(tokens) < SPEC.vocab_size
    assert len(set(tokens)) > 300


def test_a_text_is_read_in_order_and_as_it_is(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    file = tmp_path / "text.txt"
    file.write_text("The cat and the dog went home. " * 100, encoding="utf-8")
    prompts = calibration_prompts(PATH, SPEC, file)
    text = Tokenizer.from_file(str(PATH / "tokenizer.json")).decode([token for prompt in prompts for token in prompt])
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_text_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError) as raised:
        calibration_prompts(PATH, SPEC, file)
    assert str(raised.value).startswith(f"{file}: ")


def test_without_a_tokenizer_tokens_are_random_unless_a_text_was_asked_for(tmp_path: Path) -> None:
    random_model(LLAMA).save_pretrained(tmp_path)
    spec = load_spec(tmp_path)
    prompts = calibration_prompts(tmp_path, spec, None)
    assert {len(prompt) for prompt in prompts} == {spec.max_position}
    assert {token for prompt in prompts for token in prompt} == set(range(spec.vocab_size))
    file = tmp_path / "text.txt"
    file.write_text("text")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        calibration_prompts(tmp_path, spec, file)
