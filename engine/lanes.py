"""What an iteration needs of every running sequence, as columns that are kept from one iteration to the next.

Laying a decode step out is then a few gathers, whatever the number of sequences, in place of a walk over all their
tokens and pages. Knows neither the order of the sequences nor which of them run next; imports no torch.
"""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.batch import SETTINGS, Edit, edit_of, settings_of
from engine.sequence import Sequence

_FIRST_LANES = 8
_FIRST_PAGES = 8

Scalar = TypeVar("Scalar", bound=np.generic)


class Group(NamedTuple):
    """S sequences that run together, with what stays as it is for as long as they do. Batches share these arrays."""

    sequences: list[Sequence]
    sequence_ids: tuple[int, ...]
    lanes: NDArray[np.int64]
    """[S]."""
    settings: NDArray[np.void]
    """[S] of SETTINGS."""
    rows: NDArray[np.int64]
    """[S] 0, 1, 2 and so on."""
    one_each: NDArray[np.int32]
    """[S + 1] where each begins on the flat axis when each has one token there."""


class Lanes:
    """Columns over the running sequences, one lane each; free lanes hold leftovers that nobody reads.

    Invariant: for a sequence in a lane, `length` is the number of its tokens and `last_token` the last of them, and its
    row of `page_table` is its pages, then zeros.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self.last_token = np.zeros(_FIRST_LANES, np.int64)
        self.length = np.zeros(_FIRST_LANES, np.int64)
        self.settings = np.zeros(_FIRST_LANES, SETTINGS)
        self._special = np.zeros(_FIRST_LANES, bool)
        """Whether the sequence asks for more than draws from its plain logits."""
        self.page_table = np.zeros((_FIRST_LANES, _FIRST_PAGES), np.int32)
        self._num_special = 0
        self._free = list(range(_FIRST_LANES - 1, -1, -1))
        self._edits: dict[int, _Edits] = {}
        self._group: Group | None = None
        """The last one that was asked for; None once a sequence has come or gone."""

    @property
    def num_taken(self) -> int:
        return len(self.length) - len(self._free)

    def enter(self, sequence: Sequence) -> None:
        """Gives the sequence a lane, with all that it has so far."""
        if not self._free:
            self._add_lanes()
        sequence.lane = lane = self._free.pop()
        params = sequence.request.params
        self.last_token[lane] = sequence.tokens[-1]
        self.length[lane] = len(sequence.tokens)
        self.settings[lane] = settings_of(params, sequence.seed, sequence.sample_index)
        self._make_wide(len(sequence.pages))
        self.page_table[lane] = 0
        self.page_table[lane, : len(sequence.pages)] = sequence.pages
        if edited := _Edits.wanted(sequence):
            self._edits[lane] = _Edits(sequence)
        self._special[lane] = edited or params.logprobs is not None or params.prompt_logprobs is not None
        self._num_special += int(self._special[lane])
        self._group = None

    def leave(self, sequence: Sequence) -> None:
        """Takes the sequence's lane back. It must not be in flight."""
        self._num_special -= int(self._special[sequence.lane])
        self._edits.pop(sequence.lane, None)
        self._free.append(sequence.lane)
        sequence.lane = -1
        self._group = None

    def group(self, sequences: list[Sequence]) -> Group:
        """Of these sequences in this order. Most iterations run those of the one before, and get the same object."""
        if self._group is None or self._group.sequences != sequences:
            lanes = np.array([sequence.lane for sequence in sequences])
            self._group = Group(
                sequences,
                tuple([sequence.sequence_id for sequence in sequences]),
                lanes,
                self.settings[lanes],
                np.arange(len(lanes)),
                np.arange(len(lanes) + 1, dtype=np.int32),
            )
        return self._group

    def add_page(self, sequence: Sequence) -> None:
        """Notes the page that the sequence was given last."""
        count = len(sequence.pages)
        self._make_wide(count)
        self.page_table[sequence.lane, count - 1] = sequence.pages[-1]

    def append(self, lanes: NDArray[np.int64], token_ids: list[int]) -> None:
        """Notes one more token in each of these lanes."""
        self.last_token[lanes] = token_ids
        self.length[lanes] += 1
        if self._edits:
            for lane, token_id in zip(lanes.tolist(), token_ids, strict=True):
                if lane in self._edits:
                    self._edits[lane].append(token_id)

    def pages(self, lanes: NDArray[np.int64], context_lens: NDArray[np.int32]) -> NDArray[np.int32]:
        """[S, P] a copy of the page tables of these lanes, wide enough for the longest of these contexts."""
        # `argmax` and `take` are one C function each. After a forward pass the caches hold nothing of Python, and the
        # general machinery behind `max` and an index of two dimensions takes ten times as long as when it is warm.
        longest = int(context_lens[context_lens.argmax()])
        return self.page_table[:, : -(-longest // self._page_tokens)].take(lanes, axis=0)

    def special_among(self, lanes: NDArray[np.int64]) -> list[int]:
        """Indices of those of these lanes whose sequences ask for more than draws from their plain logits."""
        return np.flatnonzero(self._special[lanes]).tolist() if self._num_special else []

    def edit(self, sequence: Sequence) -> Edit | None:
        """How the logits of the sequence's next token are changed, if they are."""
        edits = self._edits.get(sequence.lane)
        return None if edits is None else edits.now(sequence)

    def _add_lanes(self) -> None:
        count = len(self.length)
        self._free.extend(range(2 * count - 1, count - 1, -1))
        self.last_token, self.length = _doubled(self.last_token), _doubled(self.length)
        self.settings, self._special = _doubled(self.settings), _doubled(self._special)
        self.page_table = _doubled(self.page_table)

    def _make_wide(self, pages: int) -> None:
        while pages > self.page_table.shape[1]:
            self.page_table = np.ascontiguousarray(_doubled(self.page_table.T).T)


class _Edits:
    """The edits of one sequence, with the counts of its tokens kept up to date."""

    def __init__(self, sequence: Sequence) -> None:
        params, prompt = sequence.request.params, sequence.request.prompt_token_ids
        self._whole = edit_of(params, sequence.stop_token_ids, prompt, sequence.tokens[len(prompt) :])
        self._unbanned = self._whole._replace(banned=self._whole.banned[:0])
        self._counted = params.needs_history
        self._places = {token: place for place, token in enumerate(self._whole.seen.tolist())}
        self._seen, self._counts = self._whole.seen, self._whole.counts

    @staticmethod
    def wanted(sequence: Sequence) -> bool:
        """Whether the sequence's logits are changed at any time."""
        params = sequence.request.params
        banned = params.min_tokens > 0 and bool(sequence.stop_token_ids)
        return bool(banned or params.needs_history or params.logit_bias or params.allowed_token_ids is not None)

    def append(self, token_id: int) -> None:
        if not self._counted:
            return
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._seen):
            self._seen, self._counts = _doubled(self._seen), _doubled(self._counts)
        self._seen[place] = token_id
        self._counts[place] += 1

    def now(self, sequence: Sequence) -> Edit | None:
        edit = self._whole if sequence.num_output < sequence.request.params.min_tokens else self._unbanned
        if self._counted:
            count = len(self._places)
            # Copies: the batch must not change with the next token.
            edit = edit._replace(seen=self._seen[:count].copy(), counts=self._counts[:count].copy())
        return edit if edit.changes else None


def _doubled(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """With as many zeros behind it as it has rows."""
    return np.concatenate((array, np.zeros_like(array)))
