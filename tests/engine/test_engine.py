"""What an engine tells of the iteration that runs, to those who watch it from another thread."""

from engine.batch import Batch, StepOutput
from tests.engine.fake_tier import Contents, FakeTier
from tests.engine.fakes import run_to_end
from tests.engine.rig import Rig, request


def test_the_tokens_of_an_iteration_are_told_while_it_runs() -> None:
    for depth in (1, 3):
        rig = Rig(max_batch_tokens=16, depth=depth)
        told: list[int] = []
        run = rig.runner.run

        def watched(batch: Batch, rig: Rig = rig, told: list[int] = told, run=run) -> StepOutput:
            told.append(rig.engine.step_tokens)
            return run(batch)

        rig.runner.run = watched
        rig.engine.add(request("long", list(range(40)), max_tokens=5))
        rig.engine.add(request("short", [1, 2], max_tokens=9))
        run_to_end(rig.engine)
        ran = [batch.num_tokens for batch in rig.runner.batches]
        if depth == 1:
            assert told == ran
        assert all(tokens >= own for tokens, own in zip(told, ran, strict=True))
        assert max(told) <= depth * 16


def test_an_iteration_that_only_waits_for_pages_runs_no_token() -> None:
    contents: Contents = {}
    for delay in (0, 3):
        tier = FakeTier(contents, delay=lambda delay=delay: delay)
        rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
        rig.engine.add(request("x", list(range(18)), max_tokens=1))
        rig.step()
        assert rig.engine.step_tokens == (0 if delay else 18)
        run_to_end(rig.engine, rig.streams)
