"""The measure of what a number format costs in logits."""

import pytest
import torch

from benchmarks.quality import logit_error


def test_equal_logits_have_no_error() -> None:
    logits = torch.randn(5, 11)
    error = logit_error(logits, logits.clone())
    assert (error.relative, error.same_first) == (0.0, 1.0)
    assert error.divergence == pytest.approx(0.0, abs=1e-7)


def test_errors_are_shares_of_the_spread_and_divergence_is_in_nats() -> None:
    expected = torch.tensor([[1.0, -1.0], [101.0, 99.0]])
    found = expected + torch.tensor([[0.5, -0.5], [-2.0, 2.0]])
    error = logit_error(found, expected)
    assert error.relative == pytest.approx((0.5**2 + 2**2) ** 0.5 / 2**0.5)
    assert error.same_first == 0.5
    p, q = expected.softmax(1).double(), found.softmax(1).double()
    assert error.divergence == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
