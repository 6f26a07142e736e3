"""The routing rule in numbers, and the books that one gateway keeps."""

import pickle
from collections import Counter

from deployments.router import AVOID_S, REPORT_LIFETIME_S, Ledger, choose

REPLICAS = ["a", "b", "c"]


def place(ledger: Ledger, request_id: str, cost: int, replicas: list[str]) -> list[str]:
    """As a request that was just sent is placed."""
    ledger.expect(request_id)
    return ledger.place(request_id, cost, replicas)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_fewest_outstanding_tokens_come_first() -> None:
    assert choose(REPLICAS, {"a": 300, "b": 100, "c": 200}, "r") == ["b", "c", "a"]


def test_replica_without_an_entry_has_nothing_to_do() -> None:
    assert choose(REPLICAS, {"a": 1, "c": 1}, "r")[0] == "b"


def test_no_candidates_no_choice() -> None:
    assert choose([], {"a": 1}, "r") == []


def test_equals_are_shared_out_between_requests() -> None:
    first = Counter(choose(REPLICAS, {}, f"request-{i}")[0] for i in range(3000))
    assert all(abs(first[replica] - 1000) < 150 for replica in REPLICAS)


def test_same_request_sees_equals_in_the_same_order() -> None:
    assert choose(REPLICAS, {}, "r") == choose(list(reversed(REPLICAS)), {}, "r")


def test_burst_of_equal_requests_spreads_evenly() -> None:
    ledger = Ledger()
    first = Counter(place(ledger, f"r{i}", 100, ["a", "b"])[0] for i in range(32))
    assert first == {"a": 16, "b": 16}
    assert dict(ledger) == {"a": 1600, "b": 1600}


def test_one_long_request_outweighs_many_short_ones() -> None:
    ledger = Ledger()
    busy = place(ledger, "long", 1000, ["a", "b"])[0]
    assert all(place(ledger, f"short-{i}", 100, ["a", "b"])[0] != busy for i in range(10))


def test_request_counts_once_however_often_it_is_placed() -> None:
    ledger = Ledger()
    for _ in range(3):
        place(ledger, "r", 100, ["a"])
    assert ledger["a"] == 100


def test_request_moves_to_the_replica_that_took_it() -> None:
    ledger = Ledger()
    ranked = place(ledger, "r", 100, ["a", "b"])
    ledger.assign("r", ranked[1])
    assert dict(ledger) == {ranked[1]: 100}


def test_generated_tokens_and_finished_requests_are_written_off() -> None:
    ledger = Ledger()
    place(ledger, "r", 100, ["a"])
    ledger.spend("r", 30)
    assert ledger["a"] == 70
    ledger.spend("r", 1000)
    assert ledger.get("a", 0) == 0
    ledger.release("r")
    ledger.release("r")
    assert dict(ledger) == {}


def test_other_gateways_load_is_what_the_replica_reports_beyond_our_own() -> None:
    ledger = Ledger()
    place(ledger, "r", 100, ["a"])
    ledger.observe("a", 350)
    assert ledger["a"] == 350
    ledger.release("r")
    assert ledger["a"] == 250


def test_aborted_request_in_a_late_report_is_not_taken_for_other_gateways_load() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    place(ledger, "aborted", 9000, ["a"])
    ledger.spend("aborted", 100)
    ledger.release("aborted")
    ledger.observe("a", 8950)
    assert ledger["a"] == 50
    clock.now += REPORT_LIFETIME_S + 0.1
    ledger.observe("a", 8950)
    assert ledger["a"] == 8950


def test_report_that_lags_behind_our_own_books_is_not_a_credit() -> None:
    ledger = Ledger()
    place(ledger, "r", 100, ["a"])
    ledger.observe("a", 0)
    assert ledger["a"] == 100


def test_old_report_is_not_believed() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.observe("a", 500)
    assert place(ledger, "r1", 10, ["a", "b"])[0] == "b"
    clock.now += REPORT_LIFETIME_S + 0.1
    assert ledger["a"] == 0
    assert place(ledger, "r2", 10, ["a", "b"])[0] == "a"


def test_replica_that_refuses_comes_last_for_a_while_but_remains_a_choice() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    place(ledger, "long", 1000, ["b"])
    ledger.avoid("a")
    assert place(ledger, "r1", 10, ["a", "b"]) == ["b", "a"]
    assert place(ledger, "r2", 10, ["a"]) == ["a"]
    clock.now += AVOID_S + 0.1
    assert place(ledger, "r3", 10, ["a", "b"]) == ["a", "b"]


def test_dead_replica_leaves_no_report() -> None:
    ledger = Ledger()
    ledger.observe("a", 500)
    ledger.forget("a")
    assert "a" not in ledger


def test_ledger_does_not_travel() -> None:
    ledger = Ledger()
    place(ledger, "r", 100, ["a"])
    assert pickle.loads(pickle.dumps(ledger)) == {}


def test_the_place_of_a_request_that_got_no_answer_comes_last_for_a_while() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    silent = place(ledger, "r", 100, ["a", "b"])[0]
    ledger.avoid_place_of("r")
    ledger.avoid_place_of("unknown")
    ledger.release("r")
    assert all(place(ledger, f"r{i}", 1000, ["a", "b"])[-1] == silent for i in range(5))
    clock.now += AVOID_S + 1
    assert place(ledger, "later", 1, ["a", "b"])[0] == silent


def test_a_replica_that_is_on_the_list_no_more_is_leaving() -> None:
    ledger = Ledger()
    assert not ledger.is_leaving("a"), "nothing is known yet"
    ledger.update_list(["a", "b"])
    assert not ledger.is_leaving("a")
    ledger.update_list(["b"])
    assert ledger.is_leaving("a") and not ledger.is_leaving("b")


def test_there_is_a_place_as_long_as_some_replica_on_the_list_takes_requests() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    assert not ledger.has_place(REPLICAS)
    ledger.update_list(["a", "b"])
    ledger.avoid("a")
    assert ledger.has_place(REPLICAS)
    ledger.avoid("b")
    assert not ledger.has_place(REPLICAS)
    clock.now += AVOID_S + 0.1
    assert ledger.has_place(REPLICAS)
    ledger.update_list([])
    assert not ledger.has_place(REPLICAS)


def test_only_a_replica_that_can_serve_a_request_is_a_place_for_it() -> None:
    ledger = Ledger()
    ledger.update_list(["a", "b"])
    assert ledger.has_place({"b", "c"})
    assert not ledger.has_place({"c"})
    assert not ledger.has_place(frozenset())


def test_replicas_that_cannot_serve_a_request_come_last_even_behind_those_that_are_avoided() -> None:
    ledger = Ledger()
    place(ledger, "long", 1000, ["c"])
    ledger.avoid("c")
    assert ledger.place("r", 10, ["a", "b", "c"], {"a"}) == ["b", "c", "a"]
    assert ledger.place("r", 10, ["a"], {"a"}) == ["a"], "what is known may be wrong"


def test_a_request_that_was_given_up_before_it_is_placed_is_never_booked() -> None:
    ledger = Ledger()
    ledger.expect("r")
    ledger.release("r")
    assert ledger.place("r", 100, ["a"]) == ["a"]
    assert dict(ledger) == {}
