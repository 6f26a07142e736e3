"""Chat templates: what Hugging Face ones expect, and what an untrusted one may not do."""

import json
from pathlib import Path

import pytest

from deployments.chat_template import ChatTemplate, read_chat_template
from engine.errors import InvalidRequest, ModelError
from tests.deployments.api.tiny import TEMPLATE

HI = [{"role": "user", "content": "hi"}]


def template(source: str = TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"}, origin="chat_template.jinja")


def test_renders_turns_and_opens_the_answer():
    assert template().render(HI) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template().render(HI, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_continuing_leaves_the_last_message_open():
    turns = [*HI, {"role": "assistant", "content": "once upon"}]
    text = template().render(turns, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nonce upon")


def test_continuing_needs_a_last_message_with_text():
    with pytest.raises(InvalidRequest) as caught:
        template().render([{"role": "assistant", "content": None}], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_special_tokens_and_variables_reach_the_template():
    text = template("{{ bos_token }}{{ tone }}{{ messages | length }}").render(
        HI, variables={"tone": "kind", "bos_token": "forged", "messages": []}
    )
    assert text == "<s>kind1"


def test_a_refusal_is_told_in_the_templates_own_words():
    with pytest.raises(InvalidRequest, match="tool turns are not known") as caught:
        template().render([{"role": "tool", "content": "42"}])
    assert caught.value.param == "messages"


def test_hugging_face_extras_work():
    source = (
        "{% generation %}{{ messages[0] | tojson }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    )
    assert json.loads(template(source).render([{"role": "user", "content": "<é>"}])) == {
        "role": "user",
        "content": "<é>",
    }


def test_a_template_cannot_reach_into_the_process():
    with pytest.raises(InvalidRequest):
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(HI)


def test_the_file_wins_over_the_configuration(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "old", "bos_token": {"content": "<s>"}})
    )
    found = read_chat_template(tmp_path)
    assert found is not None
    assert found.render(HI) == "old"
    (tmp_path / "chat_template.jinja").write_text("new{{ bos_token }}")
    found = read_chat_template(tmp_path)
    assert found is not None
    assert found.render(HI) == "new<s>"


def test_of_named_templates_the_default_is_taken(tmp_path: Path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = read_chat_template(tmp_path)
    assert found is not None
    assert found.render(HI) == "plain"


def test_a_directory_may_have_none(tmp_path: Path):
    assert read_chat_template(tmp_path) is None


def test_a_broken_template_is_found_at_start():
    with pytest.raises(ModelError, match=r"chat_template\.jinja.*not valid Jinja"):
        template("{% if %}")
