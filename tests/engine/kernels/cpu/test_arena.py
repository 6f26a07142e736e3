"""Values of a program share memory exactly when they are never alive together."""

from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.cpu.arena import ALIGNMENT, Lifetime, plan_arena

lifetimes = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 12), st.integers(0, 12)).map(
        lambda drawn: Lifetime(drawn[0], min(drawn[1:]), max(drawn[1:]))
    ),
    max_size=30,
)


@given(lifetimes)
def test_values_alive_at_once_never_overlap(values: list[Lifetime]) -> None:
    arena = plan_arena(values)
    for index, value in enumerate(values):
        begin = arena.offsets[index]
        assert begin % ALIGNMENT == 0
        assert begin + value.num_bytes <= arena.num_bytes
        for other_index, other in enumerate(values[:index]):
            if other.last < value.first or value.last < other.first:
                continue
            other_begin = arena.offsets[other_index]
            assert begin + value.num_bytes <= other_begin or other_begin + other.num_bytes <= begin


@given(lifetimes)
def test_memory_is_at_most_what_it_would_be_without_sharing(values: list[Lifetime]) -> None:
    padded = sum(-(-value.num_bytes // ALIGNMENT) * ALIGNMENT for value in values)
    assert plan_arena(values).num_bytes <= padded


def test_a_chain_of_values_needs_two_places() -> None:
    chain = [Lifetime(640, index, index + 1) for index in range(50)]
    assert plan_arena(chain).num_bytes == 2 * 640
