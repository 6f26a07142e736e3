"""What the replicas say they serve, and what follows from it for a gateway: the card it shows, and who fits a request.

Books on one event loop; makes no call. An update of the model goes replica by replica, so for a while there are two
models under one name: new requests are written for the newer one, and what was begun stays with the model it began at.
"""

from collections.abc import Collection
from dataclasses import replace

from deployments.messages import ModelCard
from engine.sequence import Request


class Cards:
    """The cards of the replicas that have been heard of."""

    def __init__(self) -> None:
        self._cards: dict[str, ModelCard] = {}
        self._current: ModelCard | None = None

    @property
    def current(self) -> ModelCard | None:
        """The model to write requests for, with a length that all its replicas have room for; None if there is none.

        It is the newest replica's: whoever is started during an update is of what is wanted.
        """
        return self._current

    def note(self, replica_id: str, card: ModelCard) -> None:
        """Takes a replica's word for what it serves."""
        self._cards[replica_id] = card
        self._choose()

    def keep(self, listed: Collection[str]) -> None:
        """Forgets replicas that are not among these. What is current stays so while none is left."""
        if not self._cards.keys() <= set(listed):
            self._cards = {replica_id: card for replica_id, card in self._cards.items() if replica_id in listed}
            self._choose()

    def unknown(self, listed: Collection[str]) -> frozenset[str]:
        """Those of these replicas that have not been heard of."""
        return frozenset(listed) - self._cards.keys()

    def fit(self, request: Request) -> frozenset[str]:
        """Replicas that are known to be able to serve a request."""
        return frozenset(replica_id for replica_id, card in self._cards.items() if card.fits(request))

    def unfit(self, request: Request) -> frozenset[str]:
        """Replicas that are known to be unable to."""
        return frozenset(replica_id for replica_id, card in self._cards.items() if not card.fits(request))

    def is_gone(self, model: str, listed: Collection[str]) -> bool:
        """Whether these replicas, at least one, are all known to serve another model than that."""
        cards = [self._cards.get(replica_id) for replica_id in listed]
        return bool(model and cards) and all(card is not None and card.identity != model for card in cards)

    def _choose(self) -> None:
        newest = max(self._cards.values(), key=lambda card: card.created, default=None)
        if newest is None:
            return
        # Replicas of one model differ in when they were created: the first that was heard of stays the one shown.
        shown = newest if self._current is None or _face(newest) != _face(self._current) else self._current
        lengths = (card.max_model_len for card in self._cards.values() if card.identity == shown.identity)
        self._current = replace(shown, max_model_len=min(lengths))


def _face(card: ModelCard) -> tuple[str, str, str]:
    return card.name, card.path, card.identity
