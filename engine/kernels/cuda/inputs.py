"""A step's integers on their way to the device: seven small arrays, one block of memory, one copy.

Copying each array by itself costs a launch and a staging copy every time, which at one sequence is a good part of what
the host does in a step. Knows no graph and no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kernels.operators import AttentionLayout

ALIGNMENT = 16
"""Bytes; kernels load four integers at once where an array begins at such an address."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How large the arrays of a step are."""

    tokens: int
    sequences: int
    columns: int
    """Of the page table."""

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each array, in their order in memory; the page table is last, so that it can be cut."""
        return {
            "token_ids": (torch.int64, (self.tokens,)),
            "positions": (torch.int64, (self.tokens,)),
            "contexts": (torch.int64, (self.tokens,)),
            "slots": (torch.int64, (self.tokens,)),
            "cu_seq_q": (torch.int32, (self.sequences + 1,)),
            "context_lens": (torch.int32, (self.sequences,)),
            "page_table": (torch.int32, (self.sequences, self.columns)),
        }

    def offsets(self) -> tuple[dict[str, int], int]:
        """Where each array begins, and where the last one ends, in bytes."""
        begins: dict[str, int] = {}
        end = 0
        for name, (dtype, shape) in self.fields().items():
            begins[name] = -(-end // ALIGNMENT) * ALIGNMENT
            end = begins[name] + dtype.itemsize * torch.Size(shape).numel()
        return begins, end


class StepMemory:
    """One block of memory and the arrays in it."""

    def __init__(self, shape: StepShape, memory: Tensor) -> None:
        """`memory` is [at least `num_bytes` of the shape] uint8."""
        self.shape = shape
        self.memory = memory
        begins, self.num_bytes = shape.offsets()
        self.arrays: Mapping[str, Tensor] = {
            name: memory[begins[name] : begins[name] + dtype.itemsize * torch.Size(size).numel()].view(dtype).view(size)
            for name, (dtype, size) in shape.fields().items()
        }

    @staticmethod
    def on_host(shape: StepShape, device: torch.device) -> "StepMemory":
        """New memory to fill for a copy to `device`: pinned for a GPU, from torch's cache of such blocks."""
        num_bytes = shape.offsets()[1]
        return StepMemory(shape, torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda"))

    @staticmethod
    def on_device(shape: StepShape, device: torch.device) -> "StepMemory":
        """New memory, zeros."""
        return StepMemory(shape, torch.zeros(shape.offsets()[1], dtype=torch.uint8, device=device))


def upload(token_ids: Tensor, layout: AttentionLayout, device: torch.device) -> tuple[Tensor, AttentionLayout]:
    """A step as the host laid it out, on the device. The host's tensors may be reused as soon as this returns.

    Wanted tokens have their rows ([R] int64) in place of token ids.
    """
    shape = StepShape(len(token_ids), len(layout.lens), layout.page_table.shape[1])
    host = StepMemory.on_host(shape, device)
    for name, array in host.arrays.items():
        array.copy_(token_ids if name == "token_ids" else getattr(layout, name))
    arrays = StepMemory(shape, host.memory.to(device, non_blocking=True)).arrays
    return arrays["token_ids"], _placed(layout, arrays)


class DecodeInputs:
    """The arrays of a step of one token a sequence, always at the same addresses on the device.

    A step of fewer sequences than it is run with is filled up with rows of one token each, at the first slot of a page
    that is nobody's: what they write and read there does not matter, and they read no page but this one.
    """

    def __init__(
        self, max_sequences: int, columns: int, page_tokens: int, spare_page: int, device: torch.device
    ) -> None:
        shape = StepShape(max_sequences, max_sequences, columns)
        self._shape = shape
        self._page_tokens = page_tokens
        self._spare_page = spare_page
        self._host = StepMemory.on_host(shape, device)
        self._device = StepMemory.on_device(shape, device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        """When the device has read the host's memory, which the next step then writes."""
        self._host.arrays["cu_seq_q"].copy_(torch.arange(max_sequences + 1))
        self._fill_up(0, max_sequences)
        self._copy(max_sequences)

    def fits(self, layout: AttentionLayout) -> bool:
        """Whether a step has one token of each sequence, and no more sequences and pages than there is room for."""
        return (
            len(layout.lens) <= self._shape.sequences
            and layout.page_table.shape[1] <= self._shape.columns
            and layout.cu_seq_q.shape[0] - 1 == len(layout.positions)
            and max(layout.query_lens) == 1
        )

    def fill(self, token_ids: Tensor, layout: AttentionLayout, rows: int) -> None:
        """Puts a step that fits, laid out on the host, on the device as `rows` sequences."""
        if self._copied is not None:
            self._copied.synchronize()
        count, host = len(token_ids), self._host.arrays
        host["token_ids"][:count] = token_ids
        host["positions"][:count] = layout.positions
        host["contexts"][:count] = layout.contexts
        host["slots"][:count] = layout.slots
        host["context_lens"][:count] = layout.context_lens
        host["page_table"][:count, : layout.page_table.shape[1]] = layout.page_table
        if count < rows:
            self._fill_up(count, rows)
        self._copy(rows)

    def step(self, rows: int) -> tuple[Tensor, AttentionLayout]:
        """Token ids and layout on the device of a step of `rows` sequences; the host's lengths are upper bounds."""
        arrays = self._device.arrays
        layout = AttentionLayout(
            positions=arrays["positions"][:rows],
            contexts=arrays["contexts"][:rows],
            slots=arrays["slots"][:rows],
            cu_seq_q=arrays["cu_seq_q"][: rows + 1],
            context_lens=arrays["context_lens"][:rows],
            page_table=arrays["page_table"][:rows],
            page_tokens=self._page_tokens,
            query_lens=(1,) * rows,
            lens=(self._shape.columns * self._page_tokens,) * rows,
        )
        return arrays["token_ids"][:rows], layout

    def _fill_up(self, begin: int, end: int) -> None:
        """Makes rows `begin` to `end` of the host harmless."""
        host = self._host.arrays
        host["token_ids"][begin:end] = 0
        host["positions"][begin:end] = 0
        host["contexts"][begin:end] = 1
        host["slots"][begin:end] = self._spare_page * self._page_tokens
        host["context_lens"][begin:end] = 1
        host["page_table"][begin:end] = self._spare_page

    def _copy(self, rows: int) -> None:
        used = self._host.num_bytes - self._host.arrays["page_table"][rows:].nbytes
        self._device.memory[:used].copy_(self._host.memory[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _placed(layout: AttentionLayout, arrays: Mapping[str, Tensor]) -> AttentionLayout:
    return replace(
        layout,
        positions=arrays["positions"],
        contexts=arrays["contexts"],
        slots=arrays["slots"],
        cu_seq_q=arrays["cu_seq_q"],
        context_lens=arrays["context_lens"],
        page_table=arrays["page_table"],
    )
