"""Which of the streams that go on from elsewhere others wait for, and for how long."""

import time
from dataclasses import replace

from engine.policy import LEAST_CHUNK
from engine.returning import Returning
from engine.sampling_params import SamplingParams
from engine.sequence import Order, Request, Sequence
from tests.engine.fake_tier import FakeTier
from tests.engine.fakes import run_to_end
from tests.engine.rig import Rig, expected, left_behind, request

PATIENCE_S = 0.25


class Setting:
    """Streams of which a test says what they wait for, and a clock that it turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.loading: set[Sequence] = set()
        self.returning = Returning(lambda sequence: sequence in self.loading, PATIENCE_S, lambda: self.now)

    def stream(self, remaining: int) -> Sequence:
        made = Sequence(0, Request("r", (1,), SamplingParams()), Order(0, 0, 0), 0, frozenset(), 1)
        made.tokens = [1] * remaining
        self.returning.add([made])
        return made


def test_near_are_those_that_have_little_left_and_those_whose_pages_are_on_their_way() -> None:
    setting = Setting()
    little, much, loads = setting.stream(LEAST_CHUNK), setting.stream(LEAST_CHUNK + 1), setting.stream(5000)
    setting.loading.add(loads)
    assert setting.returning.near([little, much, loads]) == [little, loads]
    setting.returning.discard(little)
    assert setting.returning.near([little, much, loads]) == [loads]


def test_nobody_waits_long_for_pages_that_do_not_come() -> None:
    setting = Setting()
    early, late = setting.stream(5000), setting.stream(5)
    setting.loading.add(early)
    assert setting.returning.near([early]) == [early]
    setting.now += PATIENCE_S
    setting.loading.add(late)
    assert setting.returning.near([early, late]) == [early, late]
    setting.now += 0.01
    assert setting.returning.near([early, late]) == [late], "it has little left, but that cannot be computed yet"
    setting.now += PATIENCE_S
    assert setting.returning.near([early, late]) == []
    setting.loading.clear()
    assert setting.returning.near([early, late]) == [late], "what there was to wait for is here"


def test_those_that_decode_wait_for_the_near_ones_for_a_while_and_then_until_none_is() -> None:
    setting = Setting()
    assert not setting.returning.come_first([])
    near = [setting.stream(5)]
    assert setting.returning.come_first(near)
    setting.now += PATIENCE_S
    near.append(setting.stream(5))
    assert not setting.returning.come_first(near), "whoever came later"
    setting.now += PATIENCE_S
    assert not setting.returning.come_first(near)
    assert not setting.returning.come_first([])
    assert setting.returning.come_first(near), "others decoded meanwhile"


def test_others_go_on_while_a_load_hangs() -> None:
    stem, answer = list(range(50)), expected(list(range(50)), 4)
    contents = left_behind(request("cut", stem, max_tokens=2))
    tier = FakeTier(contents, delay=lambda: 10**9)
    rig = Rig(num_pages=400, page_tokens=4, max_batch_tokens=200, tier=tier, max_stall_s=0.001)
    rig.engine.add(replace(request("cut", stem, max_tokens=4), given=(tuple(answer[:2]),)))
    rig.engine.add(request("long", [90] * 300, max_tokens=2))
    rig.engine.add(request("decodes", [80], max_tokens=9))
    rig.step()
    time.sleep(0.01)
    for _ in range(20):
        rig.step()
    assert rig.streams.tokens["long", 0] == expected([90] * 300, 2)
    assert rig.streams.tokens["decodes", 0] == expected([80], 9)
    assert ("cut", 0) not in rig.streams.tokens
    tier.hurry()
    assert run_to_end(rig.engine, rig.streams).tokens["cut", 0] == answer[2:]
    rig.check_nothing_left()
