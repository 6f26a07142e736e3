"""Pool sizes from budgets, and the messages when a budget is too small."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.sizing import plan_kv

DEFAULTS = {"bytes_per_token": 100, "page_tokens": 16, "max_sequences": 8, "model_max_len": 2048}


def test_auto_length_is_the_models_when_the_budget_allows() -> None:
    plan = plan_kv(budget_bytes=10**9, max_model_len="auto", **DEFAULTS)
    assert plan.max_model_len == 2048
    assert plan.num_pages == 8 * 2048 // 16


def test_auto_length_shrinks_to_the_budget() -> None:
    plan = plan_kv(budget_bytes=100_000, max_model_len="auto", **DEFAULTS)
    assert plan.max_model_len == 62 * 16
    assert plan.num_bytes <= 100_000


def test_too_small_a_budget_says_what_would_be_right() -> None:
    with pytest.raises(ValueError, match=r"needs 102400 bytes .* lower max_model_len to 992"):
        plan_kv(budget_bytes=100_000, max_model_len=1024, **DEFAULTS)
    with pytest.raises(ValueError, match="less than one page"):
        plan_kv(budget_bytes=1_599, max_model_len="auto", **DEFAULTS)


def test_a_length_beyond_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the 2048 this model was made for"):
        plan_kv(budget_bytes=10**9, max_model_len=4096, **DEFAULTS)


@given(
    budget=st.integers(1, 10**7),
    per_token=st.integers(1, 1000),
    page_tokens=st.integers(1, 64),
    max_sequences=st.integers(1, 64),
    model_max_len=st.integers(2, 4096),
)
def test_one_sequence_of_the_full_length_always_fits(
    budget: int, per_token: int, page_tokens: int, max_sequences: int, model_max_len: int
) -> None:
    if budget < per_token * page_tokens:
        return
    plan = plan_kv(
        budget_bytes=budget,
        bytes_per_token=per_token,
        page_tokens=page_tokens,
        max_sequences=max_sequences,
        model_max_len=model_max_len,
        max_model_len="auto",
    )
    assert plan.num_pages * page_tokens >= plan.max_model_len
    assert plan.num_bytes <= budget
