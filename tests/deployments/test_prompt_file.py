"""Prompt files: their formats, and bad lines named before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.prompt_file import Conversation, Defaults, Prompt, PromptError, PromptFile, parse_line
from engine.sampling_params import SamplingParams

DEFAULTS = Defaults("tiny", SamplingParams(max_tokens=8, temperature=0.5), stop=("##",))


def parse(line: Any, number: int = 1, defaults: Defaults = DEFAULTS) -> Prompt:
    return parse_line(json.dumps(line).encode(), number, defaults)


def reason(line: Any) -> str:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(PromptError) as error:
        parse_line(raw, 1, DEFAULTS)
    return str(error.value)


def test_the_three_kinds_of_prompt() -> None:
    assert parse({"prompt": "hi"}).content == "hi"
    assert parse({"token_ids": [3, 4]}).content == (3, 4)
    conversation = parse({"messages": [{"role": "user", "content": "hi"}]}).content
    assert isinstance(conversation, Conversation)
    assert [(m.role, m.content) for m in conversation.messages] == [("user", "hi")]


def test_a_line_overrides_the_defaults_at_the_top_or_in_params() -> None:
    prompt = parse({"prompt": "hi", "temperature": 0, "params": {"top_k": 5}, "stop": "!"})
    assert prompt.params == SamplingParams(max_tokens=8, temperature=0.0, top_k=5)
    assert prompt.stop == ("!",)
    assert parse({"prompt": "hi"}).stop == ("##",)
    assert parse({"prompt": "hi", "stop": []}).stop == ()
    assert parse({"prompt": "hi", "max_completion_tokens": 3}).params.max_tokens == 3
    assert parse({"prompt": "hi", "logit_bias": {"17": -100}}).params.logit_bias == {17: -100.0}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({}, "exactly one of"),
        ({"prompt": "a", "token_ids": [1]}, "found prompt and token_ids"),
        ({"prompt": 7}, "prompt: Input should be a valid string"),
        ({"token_ids": []}, "token_ids: "),
        ({"token_ids": [-1]}, "token_ids.0: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"prompt": "a", "temprature": 1}, 'unknown field "temprature"'),
        ({"prompt": "a", "temperature": -1}, "temperature: "),
        ({"prompt": "a", "stop": [""]}, "stop"),
        (["a"], "expected an object"),
        (b'{"prompt": ', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: Any, words: str) -> None:
    assert words in reason(line)


def test_an_id_of_its_own_or_one_that_changes_with_the_line() -> None:
    assert parse({"id": "q1", "prompt": "a"}).id == "q1"
    assert parse({"id": 7, "prompt": "a"}).id == "7"
    first = parse({"prompt": "a"}, number=4).id
    assert first.startswith("4-")
    assert first != parse({"prompt": "b"}, number=4).id


def test_the_fingerprint_depends_on_line_options_and_model() -> None:
    line = {"id": "q1", "prompt": "a"}
    others = [
        Defaults("other", DEFAULTS.params, DEFAULTS.stop),
        Defaults("tiny", SamplingParams(max_tokens=9, temperature=0.5), DEFAULTS.stop),
        Defaults("tiny", DEFAULTS.params, ()),
        Defaults("tiny", DEFAULTS.params, DEFAULTS.stop, seed=1),
    ]
    fingerprints = {parse(line, defaults=defaults).fingerprint for defaults in [DEFAULTS, *others]}
    fingerprints.add(parse({"id": "q1", "prompt": "b"}).fingerprint)
    assert len(fingerprints) == 6
    assert parse(line).fingerprint == parse(line, number=9).fingerprint


def test_one_seed_gives_every_prompt_its_own() -> None:
    seeded = Defaults("tiny", SamplingParams(), seed=5)
    one, two = (parse({"id": name, "prompt": "a"}, defaults=seeded).params.seed for name in ("x", "y"))
    assert one is not None and two is not None and one != two
    assert parse({"id": "x", "prompt": "a"}, number=8, defaults=seeded).params.seed == one
    assert parse({"id": "x", "prompt": "a", "seed": 3}, defaults=seeded).params.seed == 3


def test_a_file_reports_bad_lines_by_number_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n\n{"prompt": 1}\n{"id": "a", "prompt": "y"}\n{"prompt": "z"}')
    items = list(PromptFile(path, DEFAULTS).read())
    assert [item[0] for item in items if isinstance(item, tuple)] == [3, 4]
    assert "already used by line 1" in str([item[1] for item in items if isinstance(item, tuple)][1])
    assert [item.number for item in items if isinstance(item, Prompt)] == [1, 5]


@given(st.binary(max_size=200))
def test_no_line_raises_anything_else(raw: bytes) -> None:
    try:
        parse_line(raw, 1, DEFAULTS)
    except PromptError as error:
        assert str(error)
