"""Which replicas there are and what each serves: follows Serve's list of them, and asks those on it.

Makes the calls that fill `deployments.cards`. Knows no request and no stream.
"""

import asyncio
import logging
from contextlib import suppress

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.backend import NotReady
from deployments.background import Background
from deployments.cards import Cards
from deployments.messages import Describe, Described, ModelCard, Unavailable
from deployments.router import Ledger, ReplicaGone

logger = logging.getLogger(__name__)

CARD_TIMEOUT_S = 2.0
ASK_AGAIN_S = 1.0
"""Before a replica that did not say what it serves is asked again."""


class Roster:
    """The replicas behind a handle, as far as they are known."""

    def __init__(self, replicas: DeploymentHandle, ledger: Ledger, background: Background) -> None:
        """`ledger`: where the router writes down whom Serve lists."""
        self._card_call = replicas.options(method_name="card")
        self._ledger = ledger
        self._background = background
        self.cards = Cards()
        self._asked: set[str] = set()
        """Replicas that are being asked for their cards."""

    async def card(self) -> ModelCard:
        """The model that new requests are for; see `Cards.current`. Raises NotReady while no replica has loaded one."""
        self.look_around()
        if self.cards.current is None:
            await self._ask()
        assert self.cards.current is not None
        return self.cards.current

    async def has_ready(self) -> bool:
        """Whether some replica takes requests now."""
        for replica_id in (None, *(self._ledger.listed or ())):
            with suppress(NotReady, ReplicaGone):
                await self._ask(replica_id)
                return True
        return False

    def is_gone(self, model: str) -> bool:
        """Whether Serve lists replicas, and all of them are known to serve another model than that."""
        return self.cards.is_gone(model, self._ledger.listed or ())

    def look_around(self) -> None:
        """Keeps up with Serve's list of replicas: forgets the cards of those that have left, and asks those that are
        new, beside whatever else goes on."""
        listed = self._ledger.listed
        if listed is None:
            return
        self.cards.keep(listed)
        for replica_id in self.cards.unknown(listed) - self._asked:
            self._asked.add(replica_id)
            self._background.spawn(self._get_to_know(replica_id))

    async def _get_to_know(self, replica_id: str) -> None:
        try:
            await self._ask(replica_id)
        except Exception as error:
            logger.debug("Replica %s does not say what it serves: %s", replica_id, error)
            await asyncio.sleep(ASK_AGAIN_S)
        finally:
            self._asked.discard(replica_id)

    async def _ask(self, replica_id: str | None = None) -> None:
        """Has a replica, or whichever answers, say what it serves. Raises NotReady, or ReplicaGone for one by name."""

        async def ask() -> Described | Unavailable:
            answer: Described | Unavailable = await self._card_call.remote(Describe(replica_id))
            return answer

        try:
            answer = await self._background.call(ask(), CARD_TIMEOUT_S)
        except (TimeoutError, RayActorError, BackPressureError, DeploymentUnavailableError) as error:
            raise NotReady("the model is loading") from error
        if isinstance(answer, Unavailable):
            raise NotReady(f"replica {answer.replica_id} takes no requests")
        self.cards.note(answer.replica_id, answer.card)
