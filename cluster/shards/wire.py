"""What a group and its ranks say to each other, written as bounded binary messages (`cluster.shards.fields`).

Knows no sockets. What comes from the other side is checked here for its form: lengths fit each other, indices point
into what they index. What only the receiver knows (its pages, its vocabulary) is the receiver's to check.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.kv.wire import WireError
from cluster.shards.fields import (
    F32,
    I32,
    I64,
    MAX_TEXT,
    U8,
    Array,
    Kind,
    array,
    bytes_of,
    distinct,
    index_in,
    items,
    pack,
    real,
    record,
    text,
    truth,
    unpack,
    whole,
)
from engine.batch import SETTINGS, Batch, Edit, PromptLogprobRow, Samples, StepOutput, StepStats, TokenLogprob

_UNKNOWN_EDIT = Edit()
_MOST = 2**31 - 1
"""Of sequences, tokens or pages: the numbers that count them have 32 bits."""
_least, _greatest = np.minimum.reduce, np.maximum.reduce


@dataclass(frozen=True, slots=True)
class Beat:
    """Rank: it lives, and has finished so many batches since its start."""

    finished: int
    waited_s: float
    """Seconds for which it had none to run, or not yet what the stage before makes of one."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Rank: it cannot go on."""

    reason: str
    is_victim: bool = False
    """Whether what it says is that it has lost others."""


@dataclass(frozen=True, slots=True)
class Alive:
    """Group: it is there. A rank that does not hear so for a while ends itself."""


Message = Batch | StepOutput | Beat | Fault | Alive


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises WireError for one that is no such message, or is longer than MAX_BYTES."""
    match message:
        case Batch():
            content = [0, *_batch_fields(message)]
        case StepOutput():
            content = [1, *_output_fields(message)]
        case Beat(finished, waited_s):
            content = [2, finished, float(waited_s)]
        case Fault(reason, is_victim):
            content = [3, reason[:MAX_TEXT], is_victim]
        case Alive():
            content = [4]
    return pack(type(message).__name__, content)


def decode(data: bytes) -> Message:
    """The message that was encoded. Raises WireError for anything that `encode` does not write."""
    return unpack(data, _KINDS)


# -- batches ---------------------------------------------------------------------------------------------------------


def _batch_fields(batch: Batch) -> list[Any]:
    samples = batch.samples
    ids = np.array(batch.sequence_ids, I64)
    longs = (ids, batch.token_ids, batch.positions, samples.rows, samples.positions)
    ints = (batch.cu_seq_q, batch.context_lens, batch.page_table)
    return [
        batch.step,
        len(ids),
        len(batch.token_ids),
        len(samples),
        batch.page_table.shape[1],
        b"".join([bytes_of(numbers, I64) for numbers in longs]),
        b"".join([bytes_of(numbers, I32) for numbers in ints]),
        bytes_of(samples.settings, SETTINGS),
        [[index, *_edit_fields(edit)] for index, edit in samples.edits.items()],
        [[index, top] for index, top in samples.logprobs.items()],
        [[row.row, np.array(row.targets, I64).tobytes(), row.top] for row in batch.prompt_logprobs],
    ]


def _edit_fields(edit: Edit) -> list[Any]:
    return [
        _id_bytes(edit.bias_ids),
        bytes_of(edit.bias, F32),
        *((None, None) if edit.allowed is None else _set_fields(edit.allowed)),
        _id_bytes(edit.banned),
        float(edit.repetition_penalty),
        float(edit.frequency_penalty),
        float(edit.presence_penalty),
        _id_bytes(edit.seen),
        bytes_of(edit.counts, F32),
    ]


def _id_bytes(ids: Array) -> bytes:
    """Token ids, which no vocabulary needs more than 32 bits for."""
    narrow = ids.astype(I32)
    if ids.dtype != I64 or not np.array_equal(narrow, ids):
        raise WireError(f"{len(ids)} token ids of {ids.dtype}, one of which has no place in 32 bits")
    return narrow.tobytes()


def _set_fields(ids: Array) -> tuple[bytes | None, bytes | None]:
    """Token ids one by one, or a bit for each up to the last of them, whichever is shorter; ids that are not in
    ascending order are listed, to arrive in theirs."""
    if not len(ids) or ids[0] < 0 or ids[-1] // 8 >= I32.itemsize * len(ids) or not (ids[1:] > ids[:-1]).all():
        return _id_bytes(ids), None
    bits = np.zeros(int(ids[-1]) + 1, np.bool_)
    bits[ids] = True
    return None, np.packbits(bits, bitorder="little").tobytes()


def without_edits(batch: Batch) -> Batch:
    """For whoever does not draw: that rows are edited is what counts there, and not how."""
    edits = dict.fromkeys(batch.samples.edits, _UNKNOWN_EDIT)
    return replace(batch, samples=replace(batch.samples, edits=edits)) if edits else batch


def _read_batch(
    step: Any,
    num_sequences: Any,
    num_tokens: Any,
    num_rows: Any,
    width: Any,
    longs: Any,
    ints: Any,
    settings: Any,
    edits: Any,
    logprobs: Any,
    prompt_logprobs: Any,
) -> Batch:
    # Each rank reads this before it computes, with caches that its weights have emptied: few operations, each on all
    # numbers of a kind, are what makes it quick.
    count, tokens, rows, columns = (whole(value, _MOST) for value in (num_sequences, num_tokens, num_rows, width))
    ids, token_ids, positions, which, drawn_at = _parts(longs, I64, (count, tokens, tokens, rows, rows))
    ends, contexts, table = _parts(ints, I32, (count + 1, count, count * columns))
    lengths = ends[1:] - ends[:-1]
    if not count or ends[0] != 0 or ends[-1] != tokens or _least(lengths) < 1:
        raise WireError(f"{count} sequences whose tokens begin at {ends[:4].tolist()}..., of {tokens} tokens")
    if _least(contexts - lengths) < 0:
        raise WireError("a sequence attends to fewer keys than it has tokens")
    if rows and _greatest(which) >= count:
        raise WireError(f"a token is to be drawn for a sequence beyond the {count} of the batch")
    edited = [_read_edit(rows, *record(fields, 11)) for fields in items(edits)]
    reported = [record(fields, 2) for fields in items(logprobs)]
    return Batch(
        step=whole(step),
        sequence_ids=tuple(ids.tolist()),
        token_ids=token_ids,
        positions=positions,
        cu_seq_q=ends,
        context_lens=contexts,
        page_table=table.reshape(count, columns),
        samples=Samples(
            rows=which,
            positions=drawn_at,
            settings=array(settings, SETTINGS, rows),
            edits=distinct(edited),
            logprobs=distinct([(index_in(index, rows), whole(top)) for index, top in reported]),
        ),
        prompt_logprobs=tuple(_read_prompt_row(row, lengths) for row in items(prompt_logprobs)),
    )


def _parts(value: Any, dtype: np.dtype[Any], lengths: tuple[int, ...]) -> list[Array]:
    """Arrays that were written one behind the other, none of whose numbers is below 0."""
    numbers = array(value, dtype, sum(lengths))
    if len(numbers) and _least(numbers) < 0:
        raise WireError(f"a number below 0 among {lengths}")
    ends = accumulate(lengths)
    return [numbers[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def _read_edit(
    num_rows: int,
    index: Any,
    bias_ids: Any,
    bias: Any,
    allowed: Any,
    allowed_bits: Any,
    banned: Any,
    repetition_penalty: Any,
    frequency_penalty: Any,
    presence_penalty: Any,
    seen: Any,
    counts: Any,
) -> tuple[int, Edit]:
    biased, history = _read_ids(bias_ids), _read_ids(seen)
    return index_in(index, num_rows), Edit(
        bias_ids=biased,
        bias=array(bias, F32, len(biased)),
        allowed=_read_set(allowed, allowed_bits),
        banned=_read_ids(banned),
        repetition_penalty=real(repetition_penalty),
        frequency_penalty=real(frequency_penalty),
        presence_penalty=real(presence_penalty),
        seen=history,
        counts=array(counts, F32, len(history)),
    )


def _read_ids(value: Any) -> NDArray[np.int64]:
    return array(value, I32).astype(np.int64)


def _read_set(ids: Any, bits: Any) -> NDArray[np.int64] | None:
    if bits is None:
        return None if ids is None else _read_ids(ids)
    if ids is not None:
        raise WireError("allowed tokens are given twice")
    return np.flatnonzero(np.unpackbits(array(bits, U8), bitorder="little"))


def _read_prompt_row(fields: Any, lengths: NDArray[np.int64]) -> PromptLogprobRow:
    row, targets, top = record(fields, 3)
    at, ids = index_in(row, len(lengths)), array(targets, I64)
    if len(ids) > lengths[at]:
        raise WireError(f"logprobs of {len(ids)} tokens are wanted of a chunk of {lengths[at]}")
    return PromptLogprobRow(at, tuple(ids.tolist()), whole(top))


# -- outputs ---------------------------------------------------------------------------------------------------------


def _output_fields(output: StepOutput) -> list[Any]:
    stats = output.stats
    return [
        output.step,
        np.array(output.token_ids, I64).tobytes(),
        output.logprobs,
        output.prompt_logprobs,
        [stats.num_tokens, stats.num_sequences, float(stats.seconds)],
        [[row, reason[:MAX_TEXT]] for row, reason in output.failed.items()],
    ]


def _read_output(step: Any, token_ids: Any, logprobs: Any, prompt_logprobs: Any, stats: Any, failed: Any) -> StepOutput:
    drawn: list[int] = array(token_ids, I64).tolist()
    reported = [None if each is None else _read_logprob(each) for each in items(logprobs)]
    if len(reported) != len(drawn):
        raise WireError(f"{len(drawn)} tokens, but {len(reported)} logprobs")
    scored = [tuple(_read_logprob(each) for each in items(row)) for row in items(prompt_logprobs)]
    num_tokens, num_sequences, seconds = record(stats, 3)
    rows = [record(each, 2) for each in items(failed)]
    return StepOutput(
        step=whole(step),
        token_ids=drawn,
        logprobs=reported,
        prompt_logprobs=scored,
        stats=StepStats(whole(num_tokens), whole(num_sequences), real(seconds)),
        failed=distinct([(index_in(row, len(drawn)), text(reason)) for row, reason in rows]),
    )


def _read_logprob(fields: Any) -> TokenLogprob:
    token_id, logprob, rank, top = record(fields, 4)
    pairs = [record(each, 2) for each in items(top)]
    others = tuple((whole(other), real(value)) for other, value in pairs)
    return TokenLogprob(whole(token_id), real(logprob), whole(rank), others)


_KINDS: tuple[Kind[Message], ...] = (
    ("Batch", 11, _read_batch),
    ("StepOutput", 6, _read_output),
    ("Beat", 2, lambda finished, waited_s: Beat(whole(finished), real(waited_s))),
    ("Fault", 2, lambda reason, is_victim: Fault(text(reason), truth(is_victim))),
    ("Alive", 0, Alive),
)
"""By kind, which is the place in this table: the message, how many fields it has, and what reads them."""
