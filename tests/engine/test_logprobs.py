"""Log probabilities: of the tokens that were drawn, of those of a prompt, and of the likeliest ones."""

import math

import pytest
import torch

from engine.sampler import token_logprobs
from tests.engine.sample_rows import make_row, sample

pytestmark = pytest.mark.usefixtures("two_threads")


class TestLogprobs:
    def test_values_ranks_and_top_are_those_of_the_softmax(self) -> None:
        logits = torch.randn(6, 5000) * 3
        exact = torch.log_softmax(logits.double(), dim=-1)
        targets = [0, 17, 4999, *logits[3:].argmax(-1).tolist()]
        for i, entry in enumerate(token_logprobs(logits, targets, top=5)):
            assert entry.token_id == targets[i]
            assert entry.logprob == pytest.approx(float(exact[i, targets[i]]), abs=1e-6)
            assert entry.rank == int((exact[i] > exact[i, targets[i]]).sum()) + 1
            values, ids = exact[i].topk(5)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [p for _, p in entry.top] == pytest.approx(values.tolist(), abs=1e-6)

    def test_they_are_of_the_raw_logits(self) -> None:
        logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        plain = sample(logits, [make_row(temperature=0, logprobs=4)]).logprobs[0]
        row = make_row(
            temperature=0.3, top_k=1, logprobs=4, logit_bias={0: 5.0}, banned=[3], output=[1], presence_penalty=2
        )
        changed = sample(logits, [row]).logprobs[0]
        assert plain is not None and changed is not None
        assert (plain.token_id, plain.rank) == (3, 1)
        assert (changed.token_id, changed.rank) == (0, 4)
        assert changed.top == plain.top
        assert changed.logprob == plain.top[3][1]

    def test_each_row_gets_what_it_asked_for(self) -> None:
        rows = [make_row(logprobs=asked, temperature=0) for asked in (None, 0, 2, 5)]
        found = sample(torch.randn(4, 50), rows).logprobs
        assert [None if entry is None else len(entry.top) for entry in found] == [None, 0, 2, 5]

    def test_equal_logits_share_a_rank_and_are_listed_lowest_first(self) -> None:
        logits = torch.zeros(1, 1000)
        logits[0, 400] = 1.0
        entry = token_logprobs(logits, [999], top=4)[0]
        assert entry.rank == 2
        assert [token for token, _ in entry.top] == [400, 0, 1, 2]

    def test_impossible_tokens_are_not_listed(self) -> None:
        entry = token_logprobs(torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]), [1], top=4)[0]
        assert [token for token, _ in entry.top] == [0, 2]
        assert entry.logprob == -math.inf

    def test_long_prompts_are_the_same_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, targets = torch.randn(50, 300), list(range(50))
        whole = token_logprobs(logits, targets, top=2)
        monkeypatch.setattr("engine.sampling.logprobs._SCRATCH_FLOATS", 7 * 300)
        assert token_logprobs(logits, targets, top=2) == whole

    def test_wrong_targets_are_named(self) -> None:
        with pytest.raises(ValueError, match="target token 12 is not in the vocabulary of 10"):
            token_logprobs(torch.zeros(1, 10), [12], top=0)
        with pytest.raises(ValueError, match="one target for each of 2 rows"):
            token_logprobs(torch.zeros(2, 10), [1], top=0)
