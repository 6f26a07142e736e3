"""llama.cpp through its C interface: its batches, filled as a continuous-batching server fills them.

Every step holds one token of each running sequence and as much of the waiting prompts as fits; greedy tokens are taken
from the logits. A context is made for the size of the workload, outside its time.
"""

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from llama_cpp import llama_cpp  # type: ignore[import-not-found,unused-ignore]
from numpy.typing import NDArray

from .wire import Item, Load, Timeline, bytes_of_files, serve

BATCH_TOKENS = 2048
"""Tokens of one call (its n_batch)."""
_CELLS = 256
"""A context's length per sequence is rounded up to this."""
_LONG = 1024
"""From this length on each sequence gets a cache of its own."""


@dataclass(slots=True)
class Row:
    """A running sequence."""

    index: int
    tokens: NDArray[np.int32]
    """The prompt, then the last token drawn."""
    left: int
    """Output tokens still to draw."""
    position: int = 0
    """Tokens whose keys and values are in the context."""
    begin: int = 0
    """Tokens of `tokens` that have been handed over."""


@dataclass(slots=True)
class Filling:
    """One batch while it is put together."""

    arrays: "Arrays"
    count: int = 0
    ends: list[tuple[int, int]] = field(default_factory=list)
    """(slot, place in the batch) of every sequence that draws a token."""

    def put(self, slot: int, row: Row) -> None:
        """As many of a row's tokens as still fit."""
        fits = min(len(row.tokens) - row.begin, BATCH_TOKENS - self.count)
        if fits == 0:
            return
        places = slice(self.count, self.count + fits)
        self.arrays.token[places] = row.tokens[row.begin : row.begin + fits]
        self.arrays.position[places] = np.arange(row.position, row.position + fits)
        self.arrays.slot[places] = self.arrays.addresses[slot]
        self.arrays.wanted[places] = 0
        row.begin += fits
        row.position += fits
        self.count += fits
        if row.begin == len(row.tokens):
            self.arrays.wanted[self.count - 1] = 1
            self.ends.append((slot, self.count - 1))


class Arrays:
    """The memory that a llama_batch points to."""

    def __init__(self, num_slots: int) -> None:
        self.token = np.zeros(BATCH_TOKENS, np.int32)
        self.position = np.zeros(BATCH_TOKENS, np.int32)
        self.wanted = np.zeros(BATCH_TOKENS, np.int8)
        self.slot = np.zeros(BATCH_TOKENS, np.uint64)
        self._ones = np.ones(BATCH_TOKENS, np.int32)
        self._ids = np.arange(num_slots, dtype=np.int32)
        self.addresses = self._ids.ctypes.data + 4 * np.arange(num_slots, dtype=np.uint64)
        """Where the id of each sequence stands: llama_batch wants a pointer for every token."""

    def batch(self, count: int) -> Any:
        def pointer(array: NDArray[Any], kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        return llama_cpp.llama_batch(
            n_tokens=count,
            token=pointer(self.token, ctypes.c_int32),
            embd=None,
            pos=pointer(self.position, ctypes.c_int32),
            n_seq_id=pointer(self._ones, ctypes.c_int32),
            seq_id=pointer(self.slot, ctypes.POINTER(ctypes.c_int32)),
            logits=pointer(self.wanted, ctypes.c_int8),
        )


class LlamaCpp:
    version = version("llama-cpp-python")

    def __init__(self, load: Load) -> None:
        llama_cpp.llama_backend_init()
        self._load = load
        self.weight_bytes = bytes_of_files(load.model)
        self._model = llama_cpp.llama_model_load_from_file(load.model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {load.model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._size = (0, 0)

    def prepare(self, items: Sequence[Item]) -> None:
        longest = max(len(item.prompt) + item.output_tokens for item in items)
        size = (min(len(items), self._load.max_sequences), -(-longest // _CELLS) * _CELLS)
        if size == self._size:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, length = size
        params.n_ctx = params.n_seq_max * length
        # One cache for all lets a call mix prompts and single tokens, but each token scans every sequence's cells.
        # Caches of their own are scanned alone, but split a call where its sequences bring unequal numbers of tokens.
        params.kv_unified = length < _LONG
        params.n_batch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._load.threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {size[0]} sequences of {length} tokens")
        self._size = size

    def run(self, items: Sequence[Item], timeline: Timeline) -> None:
        memory = llama_cpp.llama_get_memory(self._context)
        slots = self._size[0]
        waiting = deque(
            Row(index, np.array(item.prompt, np.int32), item.output_tokens) for index, item in enumerate(items)
        )
        arrays, running, free = Arrays(slots), dict[int, Row](), list(range(slots))
        while waiting or running:
            filling = Filling(arrays)
            for slot, row in running.items():
                filling.put(slot, row)
            while waiting and free and filling.count < BATCH_TOKENS:
                slot = free.pop()
                running[slot] = waiting.popleft()
                filling.put(slot, running[slot])
            failed = llama_cpp.llama_decode(self._context, arrays.batch(filling.count))
            if failed:
                raise RuntimeError(f"llama_decode returned {failed}")
            drawn = [(slot, self._greedy(place)) for slot, place in filling.ends]
            timeline.note((running[slot].index, [token]) for slot, token in drawn)
            for slot, token in drawn:
                row = running[slot]
                row.tokens, row.begin, row.left = np.array([token], np.int32), 0, row.left - 1
                if row.left == 0:
                    del running[slot]
                    free.append(slot)
                    llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)

    def _greedy(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
