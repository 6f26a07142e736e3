"""What a gateway makes of what the replicas say they serve."""

from dataclasses import replace

from deployments.cards import Cards
from deployments.messages import ModelCard
from engine.sampling_params import SamplingParams
from engine.sequence import Request

OLD = ModelCard("m", "/models/old", 100, 320, (0,), 1000, "old")
NEW = replace(OLD, path="/models/new", created=2000, identity="new")


def request(model: str = "old", prompt: int = 10, max_tokens: int | None = 20) -> Request:
    return Request("r", tuple(range(prompt)), SamplingParams(max_tokens=max_tokens), model=model)


def cards_of(**cards: ModelCard) -> Cards:
    found = Cards()
    for replica_id, card in cards.items():
        found.note(replica_id, card)
    return found


def test_a_replica_fits_requests_for_its_model_that_it_has_room_for() -> None:
    assert OLD.fits(request(prompt=80, max_tokens=20))
    assert not OLD.fits(request(prompt=80, max_tokens=21))
    assert not NEW.fits(request())
    assert OLD.fits(request(model="", prompt=80, max_tokens=21)), "its engine says what is wrong with that"


def test_the_newest_model_is_the_one_to_write_requests_for_in_whatever_order_they_are_heard() -> None:
    assert Cards().current is None
    assert cards_of(a=OLD, b=NEW).current == NEW
    assert cards_of(b=NEW, a=OLD).current == NEW
    renamed = replace(OLD, name="other", created=2000)
    assert cards_of(a=OLD, b=renamed).current == renamed


def test_a_replica_that_is_started_anew_does_not_change_what_clients_are_shown() -> None:
    assert cards_of(a=OLD, b=replace(OLD, created=5000)).current == OLD


def test_the_length_is_one_that_every_replica_of_the_model_has_room_for() -> None:
    cards = cards_of(a=OLD, b=replace(OLD, max_model_len=60), c=replace(NEW, created=0, max_model_len=10))
    assert cards.current == replace(OLD, max_model_len=60)
    cards.keep(["a", "c"])
    assert cards.current == OLD


def test_replicas_that_left_are_forgotten_and_the_model_is_not_while_there_is_no_other() -> None:
    cards = cards_of(a=replace(OLD, created=9000), b=NEW)
    cards.keep(["b"])
    assert cards.current == NEW, "a clock that is fast must not outlive its replica"
    cards.keep([])
    assert cards.current == NEW
    assert cards.unknown(["a", "b"]) == {"a", "b"}


def test_who_is_unknown_is_neither_fit_nor_unfit() -> None:
    cards = cards_of(a=OLD, b=NEW)
    assert (cards.fit(request()), cards.unfit(request())) == ({"a"}, {"b"})
    assert cards.unknown(["a", "b", "c"]) == {"c"}


def test_a_model_is_gone_once_every_replica_is_known_to_serve_another_one() -> None:
    cards = cards_of(a=OLD, b=NEW)
    assert cards.is_gone("old", ["b"])
    assert not cards.is_gone("old", ["a", "b"])
    assert not cards.is_gone("old", ["b", "c"]), "nobody knows what c serves"
    assert not cards.is_gone("old", []), "replicas may come"
    assert not cards.is_gone("", ["b"])
