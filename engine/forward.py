"""A model, or a stage of one, that is ready for steps: token ids and their layout in, hidden states and logits out.

Two ways to run one decoder: `EagerForward` calls its operators one by one, `ProgramForward` records them once and runs
the recording. A `Backend` is the operators together with the way to run them. Knows no batch, no sequence, no sampling.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.cpu.library import Library
from engine.kernels.cpu.operators import CpuOperators
from engine.kernels.cpu.program import Program, Recorder, StepArrays
from engine.kernels.cpu.ranks import CpuRanks
from engine.kernels.operators import AttentionLayout, Operators, RanksSum, Wanted
from engine.kernels.reference import ReferenceOperators
from engine.kv.cache import KVLayout, PagedKVCache
from engine.models.decoder import Decoder
from engine.models.rope import Rope
from engine.models.spec import LearnedPositions, ModelSpec


class Forward(Protocol):
    """A decoder over a cache. What it returns is valid until its next call.

    Where the decoder is a later stage of a model, inputs are not token ids but what the stage before it returned.
    """

    @property
    def device(self) -> torch.device:
        """Where callers put token ids, layouts and rows."""

    def hidden(self, inputs: Tensor, layout: AttentionLayout, wanted: Wanted | None = None) -> Tensor:
        """[T] int64 token ids to [R, hidden] of the wanted ones, None being all; writes keys and values of all T.

        Only a last stage is asked for some of them.
        """

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits [R, vocab] float32 of the rows ([R] int64) of what `hidden` returned. The caller may write to them."""

    def wait(self) -> None:
        """Returns once the device has computed all that was begun: from then on others, who do not wait for its steps,
        may read the pages of the cache and write to them."""


class Backend(Protocol):
    """Operators to build a decoder on, and then the way to run it."""

    @property
    def name(self) -> str:
        """For the log."""

    @property
    def operators(self) -> Operators: ...

    @property
    def kv_layout(self) -> KVLayout:
        """Of the cache that `forward` is given."""

    def forward(self, decoder: Decoder, cache: PagedKVCache) -> Forward:
        """Makes the decoder, which was built on `operators`, ready to run over a cache. Called once."""


class ReferenceBackend:
    """Plain torch, any device and dtype."""

    name = "torch"
    kv_layout = KVLayout.ROWS

    def __init__(self, ranks: RanksSum | None = None) -> None:
        self.operators = ReferenceOperators(ranks)

    def forward(self, decoder: Decoder, cache: PagedKVCache) -> "EagerForward":
        return EagerForward(decoder, cache)


class CpuBackend:
    """The C kernels, one program for all steps; float32 and bfloat16."""

    name = "C"
    kv_layout = KVLayout.WORDS

    def __init__(
        self,
        library: Library,
        threads: int,
        *,
        max_tokens: int,
        max_rows: int,
        deterministic: bool = False,
        ranks: CpuRanks | None = None,
    ) -> None:
        """`max_tokens` of one step, and `max_rows` whose logits are asked for at once."""
        self._recorder = Recorder(library, threads, max_tokens)
        self._max_rows = max_rows
        self.operators = CpuOperators(self._recorder, deterministic=deterministic, ranks=ranks)

    def forward(self, decoder: Decoder, cache: PagedKVCache) -> "ProgramForward":
        return ProgramForward(decoder, cache, self._recorder, max_rows=self._max_rows)


class EagerForward:
    """Runs operator by operator, on whatever device the cache is on."""

    def __init__(self, decoder: Decoder, cache: PagedKVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._rope = make_rope(decoder.spec, self.device)

    @property
    def device(self) -> torch.device:
        return self._cache.pages.device

    @torch.inference_mode()
    def hidden(self, inputs: Tensor, layout: AttentionLayout, wanted: Wanted | None = None) -> Tensor:
        # The reference attention gathers whole pages: a weight of zero does not hide what an earlier owner left there.
        self._cache.clear(opened_pages(layout))
        return self._decoder.forward(inputs, layout, cos_sin(self._rope, layout), self._cache, wanted)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return self._decoder.logits(hidden[rows])

    def wait(self) -> None:
        finish(self.device)


class ProgramForward:
    """Records a decoder whose operators work into `recorder`, and runs the recording (`engine.kernels.cpu.program`)."""

    def __init__(self, decoder: Decoder, cache: PagedKVCache, recorder: Recorder, *, max_rows: int) -> None:
        """Steps have at most `recorder.capacity` tokens, and logits are asked for at most `max_rows` rows at once."""
        rope = make_rope(decoder.spec, self.device)
        self._eager_rope: Rope | None = None
        self._angles: Tensor | None = None
        if rope is not None and not self._record_angles(rope, recorder):
            self._eager_rope = rope
        angles = None if rope is None else recorder.empty(recorder.capacity, rope.dim, dtype=torch.float32)
        self.program = self._record_stage(decoder, cache, recorder, angles)
        self.head = self._record_head(decoder, recorder, max_rows) if decoder.part.place.is_last else None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def hidden(self, inputs: Tensor, layout: AttentionLayout, wanted: Wanted | None = None) -> Tensor:
        angles = self._angles if self._eager_rope is None else cos_sin(self._eager_rope, layout)
        token_ids = None if self.program.inputs else inputs
        for values in self.program.inputs:
            values[: len(inputs)].copy_(inputs)
        step = StepArrays(len(inputs), token_ids, layout, angles)
        rows = None if wanted is None else StepArrays(len(wanted.rows), layout=wanted.layout, rows=wanted.rows)
        return self.program.run(step, rows)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        assert self.head is not None, "a stage that is not the last makes no logits"
        assert not len(hidden) or hidden.data_ptr() == self.program.output.data_ptr(), "what the last step returned"
        return self.head.run(StepArrays(len(rows), rows=rows))

    def wait(self) -> None:
        """Each call has computed all when it returns."""

    def _record_stage(
        self, decoder: Decoder, cache: PagedKVCache, recorder: Recorder, angles: Tensor | None
    ) -> Program:
        """Everything but the head. A later stage takes hidden states, and one that is not the last keeps all."""
        layout, place = _placeholder(recorder, cache.page_tokens), decoder.part.place
        wanted = Wanted(recorder.rows, layout) if place.is_last else None
        if place.is_first:
            return recorder.program(decoder.forward(recorder.token_ids, layout, angles, cache, wanted))
        received = recorder.empty(recorder.capacity, decoder.spec.hidden, dtype=decoder.dtype)
        return recorder.program(decoder.forward(received, layout, angles, cache, wanted), inputs=(received,))

    def _record_head(self, decoder: Decoder, recorder: Recorder, max_rows: int) -> Program:
        picked = CpuOperators(recorder).take_rows(self.program.output, recorder.rows[:max_rows])
        return recorder.program(decoder.logits(picked))

    def _record_angles(self, rope: Rope, recorder: Recorder) -> bool:
        """Makes the rotary angles a part of the program, unless they depend on more than positions."""
        frequencies = rope.fixed_frequencies
        if frequencies is None:
            return False
        self._angles = torch.empty(recorder.capacity, rope.dim)
        recorder.emit(
            "rotary_angles",
            StepArrays(recorder.capacity),
            inverse_frequencies=frequencies,
            pairs=len(frequencies),
            amplitude=rope.amplitude,
            cos_sin=self._angles,
        )
        return True


def make_rope(spec: ModelSpec, device: torch.device) -> Rope | None:
    """The rotary positions of a model; None if it has learned ones."""
    return None if isinstance(spec.positions, LearnedPositions) else Rope(spec.positions, device)


def cos_sin(rope: Rope | None, layout: AttentionLayout) -> Tensor | None:
    return None if rope is None else rope.cos_sin(layout.positions, layout.contexts)


def finish(device: torch.device) -> None:
    """Waits until a device has computed all that this thread has given it; a CPU has done so already."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def opened_pages(layout: AttentionLayout) -> Tensor:
    """[N] int64 pages that this step begins to write and does not fill; other slots hold what was there before."""
    last = layout.context_lens.to(torch.int64) - 1
    first_written = last + 1 - torch.diff(layout.cu_seq_q)
    column = last // layout.page_tokens
    is_opened = (column * layout.page_tokens >= first_written) & (last % layout.page_tokens < layout.page_tokens - 1)
    return layout.page_table.gather(1, column.unsqueeze(1)).squeeze(1)[is_opened].to(torch.int64)


def _placeholder(recorder: Recorder, page_tokens: int) -> AttentionLayout:
    """A layout without contents; a program takes them from each step."""
    nothing = torch.empty(0, dtype=torch.int64, device="meta")
    return AttentionLayout(
        positions=recorder.positions,
        contexts=nothing,
        slots=nothing,
        cu_seq_q=nothing,
        context_lens=nothing,
        page_table=nothing,
        page_tokens=page_tokens,
        query_lens=(),
        lens=(),
    )
