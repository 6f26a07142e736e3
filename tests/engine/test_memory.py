"""Memory that is handed out again: never while a tensor lies in it."""

import sys

import pytest
import torch

from engine.memory import Recycler

LARGE = 8 * 2**20


def test_memory_comes_back_once_its_tensor_is_gone() -> None:
    recycler = Recycler()
    first = recycler.empty((LARGE,), torch.uint8)
    address = first.data_ptr()
    del first
    again = recycler.empty((LARGE // 4, 1), torch.float32)
    assert again.data_ptr() == address and again.shape == (LARGE // 4, 1)


def test_a_view_keeps_its_memory() -> None:
    recycler = Recycler()
    view = recycler.empty((2, LARGE), torch.uint8)[1, 5:].view(torch.uint8)
    view.fill_(7)
    recycler.empty((2, LARGE), torch.uint8).fill_(1)
    assert view.eq(7).all()


def test_memory_is_not_handed_out_by_the_number_of_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter may borrow references and not count them, as CPython 3.14 does with those of local names."""
    monkeypatch.setattr(sys, "getrefcount", lambda _: 3)
    recycler = Recycler()
    first = recycler.empty((LARGE,), torch.uint8).fill_(7)
    recycler.empty((LARGE,), torch.uint8).fill_(1)
    assert first.eq(7).all()


def test_a_small_tensor_does_not_hold_a_large_block() -> None:
    recycler = Recycler()
    address = recycler.empty((4 * LARGE,), torch.uint8).data_ptr()
    assert recycler.empty((LARGE,), torch.uint8).data_ptr() != address


def test_no_more_is_kept_than_allowed() -> None:
    recycler = Recycler(kept_bytes=LARGE)
    kept, other = recycler.empty((LARGE,), torch.uint8), recycler.empty((LARGE,), torch.uint8)
    kept.fill_(1)
    other.fill_(2)
    addresses = {kept.data_ptr(), other.data_ptr()}
    assert len(addresses) == 2 and kept.eq(1).all()
    del other
    assert recycler.empty((LARGE,), torch.uint8).data_ptr() != kept.data_ptr()
