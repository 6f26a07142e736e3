"""The journal of one request: tokens given, reasons, usage counted once."""

import pytest

from deployments.journal import Journal, Usage
from engine.sampling_params import SamplingParams
from engine.sequence import Request


def journal(n: int = 1) -> Journal:
    return Journal(Request("r", (1, 2, 3), SamplingParams(n=n)))


def test_holds_what_is_needed_to_continue_a_sample_elsewhere():
    given = journal()
    given.give(0, (10, 11))
    given.give(0, (12,))
    assert given.request.prompt_token_ids + given.token_ids(0) == (1, 2, 3, 10, 11, 12)


def test_a_prompt_counts_once_however_many_samples_grow_from_it():
    given = journal(n=3)
    for sample in range(3):
        given.give(sample, (7, 8))
    assert given.usage == Usage(prompt_tokens=3, completion_tokens=6)
    assert given.usage.total_tokens == 9


def test_is_done_when_the_last_sample_is():
    given = journal(n=2)
    given.finish(1, "length")
    assert not given.done
    given.finish(0, "stop")
    assert given.done
    assert (given.reason(0), given.reason(1)) == ("stop", "length")


def test_a_finished_sample_takes_no_more_tokens():
    given = journal()
    given.finish(0, "stop")
    with pytest.raises(AssertionError):
        given.give(0, (1,))


def test_usages_add_up():
    assert Usage(1, 2) + Usage(3, 4) == Usage(4, 6)
