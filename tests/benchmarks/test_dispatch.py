"""The benchmark of dispatch measures what it says."""

from benchmarks.dispatch import measure


def test_every_batch_reaches_every_rank_after_it_was_sent_and_before_it_is_answered() -> None:
    times = measure(ranks=2, sequences=4, context=64, steps=20, pause_s=0.001)
    assert len(times) == 20
    for each in times:
        assert 0 < each.first <= each.last
        assert each.first < each.answer
