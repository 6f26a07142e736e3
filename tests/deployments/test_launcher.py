"""What `manta serve` says, in one line, of a model that could not be served."""

import traceback
from collections.abc import Callable

import pytest
from ray.exceptions import RayTaskError

from cluster.shard_group import ShardLost
from cluster.shards.placement import NoRoom
from deployments.cli.errors import ExitCode
from deployments.launcher import failure_of
from engine.errors import ModelError, RanksLost


def traceback_of(run: Callable[[], None]) -> str:
    try:
        run()
    except Exception:
        return traceback.format_exc()
    raise AssertionError("nothing was raised")


def message_of(error: Exception) -> str:
    """What Serve reports of a replica whose constructor raised this: a traceback in an error of its own, in Ray's."""

    def construct() -> None:
        raise error

    def initialize() -> None:
        raise RuntimeError(traceback_of(construct)) from None

    raised = RayTaskError(
        "initialize_and_get_metadata", traceback_of(initialize), RuntimeError("x"), "ray::R", 1, "::1"
    )
    return f"A replica failed to start with exception. Retrying 0 more time(s). Error:\n{raised.as_instanceof_cause()}"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ShardLost(1, "10.0.0.7, process 55", "its process has ended"),
            "ShardLost: rank 1 on 10.0.0.7, process 55 is lost: its process has ended",
        ),
        (RanksLost("rank 0 met nobody"), "RanksLost: rank 0 met nobody"),
        (
            ValueError("kv.memory (5 bytes) is less than one page"),
            "ValueError: kv.memory (5 bytes) is less than one page",
        ),
        (MemoryError(), "MemoryError"),
        (RuntimeError("first line\nsecond: line\n  third"), "RuntimeError: first line"),
        (KeyError("a"), "KeyError: 'a'"),
    ],
)
def test_the_reason_is_the_exception_that_the_constructor_raised(error: Exception, line: str) -> None:
    failure = failure_of(message_of(error))
    assert str(failure) == f"the model could not be served: {line}"
    assert failure.exit_code != ExitCode.BAD_INPUT


@pytest.mark.parametrize("error", [ModelError("config.json: is not there"), NoRoom("there is no room: TP8")])
def test_what_was_asked_for_wrongly_is_said_as_it_is(error: Exception) -> None:
    failure = failure_of(message_of(error))
    assert (str(failure), failure.exit_code) == (str(error), ExitCode.BAD_INPUT)


def test_the_latest_of_several_deployments_and_causes_counts() -> None:
    def chained() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ShardLost(0, "a", "no memory") from error

    message = f"{message_of(ValueError('before'))}\n{traceback_of(chained)}\nDeployment is updating"
    assert str(failure_of(message)) == "the model could not be served: ShardLost: rank 0 on a is lost: no memory"


def test_a_message_without_a_traceback_is_told_as_it_is() -> None:
    assert str(failure_of("")) == "the model could not be served: no reason given"
    assert str(failure_of("The actor died")) == "the model could not be served: The actor died"
    message = "ray.exceptions.ActorDiedError: it died\nSee logs"
    assert str(failure_of(message)) == "the model could not be served: ActorDiedError: it died"
