"""Fits the token router to Ray Serve's request router. Owns no decision: those are `deployments.router`'s.

Serve pickles this module by value into every process that holds a handle, so nothing may compare a class of this
module by identity; what it shares with the rest lives in `deployments.router` and `deployments.messages`.
"""

from collections.abc import Iterable

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.messages import Abort, Attach, Describe, Submit
from deployments.router import Ledger, ReplicaGone


class TokenRequestRouter(RequestRouter):
    """Ranks replicas for a `Submit`; sends any other call to the replica that it names and to no other.

    It takes none of Serve's mixins: FIFO hands a chosen replica to whichever call waits longest, which would send
    pinned calls astray. The base class gives each call the replica that was chosen for it.
    """

    _ledger: Ledger | None = None
    """That of the gateway in this process, which comes with each of its requests."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._tell(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._tell(self.curr_replicas.values())

    def _tell(self, replicas: Iterable[RunningReplica]) -> None:
        if self._ledger is not None:
            self._ledger.update_list([replica.replica_id.unique_id for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        call = pending_request.args[0] if pending_request is not None and pending_request.args else None
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        match call:
            case Attach() | Abort() | Describe(replica_id=str()):
                assert pending_request is not None
                return self._pinned(str(call.replica_id), replicas, pending_request)
            case Submit(outstanding=Ledger() as ledger):
                self._ledger = ledger
                self._tell(candidate_replicas)
                ranked = ledger.place(call.request.request_id, call.cost, list(replicas), call.unfit)
                return [[replicas[replica_id]] for replica_id in ranked]
            case _:
                return [candidate_replicas]

    def _pinned(
        self, replica_id: str, replicas: dict[str, RunningReplica], pending_request: PendingRequest
    ) -> list[list[RunningReplica]]:
        if replica_id in replicas:
            return [[replicas[replica_id]]]
        # An exception raised here would be logged and lost, and an empty answer is retried for ever. So the call is
        # failed by its own future; the candidates that are returned only end the router's loop, which looks at the
        # future before it uses them.
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGone(f"replica {replica_id} is gone"))
            self._remove_pending_request_from_indices(pending_request)
        return [list(replicas.values())]
