"""Who is to blame when a rank is lost: the one that is the cause, in less than 2 s, and nobody when all are well."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.shards.watch import BEAT_S, GRACE_S, LOADING_SILENCE_S, SEARCH_S, SILENCE_S, Loss, Watch


class Group:
    """Ranks that beat, except those that are stopped, under a clock of the test's."""

    def __init__(self, ranks: int = 4) -> None:
        self.now = 100.0
        self.ranks = ranks
        self.stopped: set[int] = set()
        self.watch = Watch(ranks, lambda: self.now)

    def verdict_within(self, seconds: float) -> tuple[Loss | None, float]:
        """What is found, and after how many seconds."""
        began = self.now
        while self.now - began <= seconds:
            for rank in set(range(self.ranks)) - self.stopped:
                self.watch.beat(rank, 7, 0.5)
            if (loss := self.watch.verdict()) is not None:
                return loss, self.now - began
            self.now += BEAT_S / 5
        return None, seconds


def armed() -> Group:
    group = Group()
    group.watch.arm()
    return group


def test_ranks_that_beat_are_well() -> None:
    assert armed().verdict_within(60)[0] is None
    assert armed().watch.finished == (0, 0, 0, 0)


def test_nobody_is_missed_before_it_is_to_be_heard() -> None:
    group = Group()
    group.stopped = {0, 1, 2, 3}
    assert group.verdict_within(60)[0] is None


def test_a_rank_that_loads_may_be_silent_for_longer_and_not_for_ever() -> None:
    group = Group()
    group.watch.arm(LOADING_SILENCE_S)
    group.verdict_within(5)
    group.stopped = {1}
    loss, seconds = group.verdict_within(LOADING_SILENCE_S + 1)
    assert loss is not None and loss.rank == 1 and loss.reason == "silent for 30.0 s, after 7 batches"
    assert LOADING_SILENCE_S - BEAT_S <= seconds <= LOADING_SILENCE_S
    # Once it has started it may not.
    group = Group()
    group.watch.arm(LOADING_SILENCE_S)
    group.watch.arm()
    group.stopped = {1}
    assert group.verdict_within(2)[0] is not None


def test_a_rank_that_is_stopped_is_lost_in_less_than_two_seconds() -> None:
    group = armed()
    group.verdict_within(5)
    group.stopped = {2}
    loss, seconds = group.verdict_within(2)
    assert loss is not None and (loss.rank, loss.others) == (2, ())
    assert loss.reason == "silent for 1.5 s, after 7 batches"
    assert seconds < 2


def test_a_process_that_ends_without_a_word_is_lost_at_once() -> None:
    group = armed()
    group.watch.gone(1, "killed")
    assert group.verdict_within(1) == (Loss(1, "killed"), 0.0)


def test_what_a_rank_says_is_its_reason() -> None:
    group = armed()
    group.watch.fault(3, "no memory")
    loss, seconds = group.verdict_within(1)
    assert loss == Loss(3, "no memory")
    assert GRACE_S <= seconds < GRACE_S + BEAT_S


def test_the_first_to_say_something_is_the_cause() -> None:
    group = armed()
    group.watch.fault(2, "no memory")
    group.watch.fault(0, "cannot add")
    group.watch.gone(2, "exited")
    assert group.verdict_within(1)[0] == Loss(2, "no memory", ((0, "cannot add"),))


def test_who_says_that_others_are_lost_is_not_blamed_however_early() -> None:
    group = armed()
    group.watch.fault(0, "connection closed by rank 2", is_victim=True)
    assert group.verdict_within(GRACE_S)[0] is None
    group.watch.fault(2, "no memory")
    assert group.verdict_within(1)[0] == Loss(2, "no memory", ((0, "connection closed by rank 2"),))


def test_where_nobody_else_is_to_blame_it_is_whoever_said_so_first() -> None:
    group = armed()
    group.watch.fault(1, "connection closed", is_victim=True)
    group.watch.fault(3, "connection closed too", is_victim=True)
    loss, seconds = group.verdict_within(2)
    assert loss == Loss(1, "connection closed", ((3, "connection closed too"),)) and seconds < 1.5


def test_neighbours_that_notice_first_are_not_blamed_for_a_process_that_was_killed() -> None:
    group = armed()
    group.watch.fault(0, "connection closed by rank 1", is_victim=True)
    group.now += SEARCH_S / 2
    assert group.watch.verdict() is None
    group.watch.gone(1, "killed")
    assert group.verdict_within(0) == (Loss(1, "killed", ((0, "connection closed by rank 1"),)), 0.0)


@given(after=st.floats(BEAT_S, SILENCE_S))
def test_neighbours_that_wait_in_vain_are_not_blamed_for_a_rank_that_is_stopped(after: float) -> None:
    group = armed()
    group.stopped = {1}
    group.now += BEAT_S  # it had just been heard
    found, _ = group.verdict_within(after - BEAT_S)
    if found is None:
        group.watch.fault(0, "no word from rank 1", is_victim=True)
        found, _ = group.verdict_within(SILENCE_S)
    assert found is not None and found.rank == 1


def test_who_was_not_there_to_listen_blames_nobody() -> None:
    group = armed()
    group.verdict_within(5)
    group.now += 3600  # the machine slept
    assert group.watch.verdict() is None
    assert group.verdict_within(10)[0] is None
