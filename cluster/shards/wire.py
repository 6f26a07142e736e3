"""What a group and its ranks say to each other, written as bounded binary messages (`cluster.shards.fields`).

Knows no sockets. What comes from the other side is checked here for its form: lengths fit each other, indices point
into what they index. What only the receiver knows (its pages, its vocabulary) is the receiver's to check.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import ge, sub
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
    bounded,
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
_HEAD = struct.Struct("<6Iq")
"""Of a batch: a zero, which begins no other message; how many sequences, tokens and rows there are, how many pages
there is room for in each sequence, and how many bytes of msgpack at the end; the step. A multiple of 8 bytes, so that
the numbers after it lie where a processor wants them."""


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
            return _write_batch(message)
        case StepOutput():
            content = [0, *_output_fields(message)]
        case Beat(finished, waited_s):
            content = [1, finished, float(waited_s)]
        case Fault(reason, is_victim):
            content = [2, reason[:MAX_TEXT], is_victim]
        case Alive():
            content = [3]
    return pack(type(message).__name__, content)


def decode(data: bytes | bytearray) -> Message:
    """The message that was encoded; the arrays of a batch are views of its bytes. Raises WireError for anything that
    `encode` does not write."""
    if not data.startswith(b"\0"):
        return unpack(data, _KINDS)
    try:
        return _read_batch(bounded("Batch", data))
    except WireError as error:
        raise WireError(f"Batch: {error}") from None


# -- batches ---------------------------------------------------------------------------------------------------------

# Every rank reads a batch before it computes, with caches that its weights, or whoever had the processor while it
# waited, have emptied: what counts is how much code it runs through, and not how often. So the checks are made on plain
# integers, which takes 23 us then for 32 sequences, and 64 with numpy's operations on arrays; for 256 it is the same.

_Rest = tuple[dict[int, Edit], dict[int, int], tuple[PromptLogprobRow, ...]]
"""Edits, logprobs and logprobs of prompts, which few batches have."""


def _write_batch(batch: Batch) -> bytes:
    samples = batch.samples
    ids = np.array(batch.sequence_ids, I64)
    rest = b""
    if samples.edits or samples.logprobs or batch.prompt_logprobs:
        rest = pack("Batch", _rest_fields(batch))
    try:
        counts = len(ids), len(batch.token_ids), len(samples), batch.page_table.shape[1]
        head = _HEAD.pack(0, *counts, len(rest), batch.step)
    except struct.error as error:
        raise WireError(f"a Batch that cannot be written: {error}") from None
    longs = (ids, batch.token_ids, batch.positions, samples.rows, samples.positions)
    ints = (batch.cu_seq_q, batch.context_lens, batch.page_table)
    numbers = [bytes_of(each, I64) for each in longs]
    numbers.append(bytes_of(samples.settings, SETTINGS))
    numbers += [bytes_of(each, I32) for each in ints]
    return bounded("Batch", b"".join((head, *numbers, rest)))


def _rest_fields(batch: Batch) -> list[Any]:
    return [
        0,
        [[index, *_edit_fields(edit)] for index, edit in batch.samples.edits.items()],
        [[index, top] for index, top in batch.samples.logprobs.items()],
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


def _read_batch(data: bytes | bytearray) -> Batch:
    if len(data) < _HEAD.size:
        raise WireError(f"{len(data)} bytes")
    _, count, tokens, rows, columns, num_rest, step = _HEAD.unpack_from(data)
    longs = (count, tokens, tokens, rows, rows)
    ints = (count + 1, count, count * columns)
    settings_at = _HEAD.size + I64.itemsize * sum(longs)
    ints_at = settings_at + SETTINGS.itemsize * rows
    rest_at = ints_at + I32.itemsize * sum(ints)
    if len(data) != rest_at + num_rest:
        raise WireError(f"{len(data)} bytes where {rest_at + num_rest} are announced")
    # A number is below 0 if the greatest bit of its last byte is set.
    if step < 0 or not (data[_HEAD.size + 7 : settings_at : 8] + data[ints_at + 3 : rest_at : 4]).isascii():
        raise WireError("a number below 0")
    ids, token_ids, positions, which, drawn_at = _views(data, _HEAD.size, I64, longs)
    ends, contexts, table = _views(data, ints_at, I32, ints)
    lengths = _checked_lengths(ends.tolist(), contexts.tolist(), tokens)
    if rows and max(which.tolist()) >= count:
        raise WireError(f"a token is to be drawn for a sequence beyond the {count} of the batch")
    rest: _Rest = {}, {}, ()
    if num_rest:
        rest = unpack(data[rest_at:], [("rest", 3, partial(_read_rest, rows, lengths))])
    edits, logprobs, prompt_logprobs = rest
    return Batch(
        step,
        tuple(ids.tolist()),
        token_ids,
        positions,
        ends,
        contexts,
        table.reshape(count, columns),
        Samples(which, drawn_at, np.ndarray(rows, SETTINGS, data, settings_at), edits, logprobs),
        prompt_logprobs,
    )


def _views(data: bytes | bytearray, at: int, dtype: np.dtype[Any], lengths: tuple[int, ...]) -> Iterator[Array]:
    """Arrays that were written one behind the other from here on."""
    for length in lengths:
        yield np.ndarray(length, dtype, data, at)
        at += length * dtype.itemsize


def _checked_lengths(ends: list[int], contexts: list[int], tokens: int) -> list[int]:
    """How many of the batch's tokens each sequence has."""
    lengths = list(map(sub, ends[1:], ends))
    if not lengths or ends[0] != 0 or ends[-1] != tokens or min(lengths) < 1:
        raise WireError(f"{len(lengths)} sequences whose tokens begin at {ends[:4]}..., of {tokens} tokens")
    if not all(map(ge, contexts, lengths)):
        raise WireError("a sequence attends to fewer keys than it has tokens")
    return lengths


def _read_rest(rows: int, lengths: list[int], edits: Any, logprobs: Any, prompt_logprobs: Any) -> _Rest:
    edited = [_read_edit(rows, *record(fields, 11)) for fields in items(edits)]
    reported = [record(fields, 2) for fields in items(logprobs)]
    return (
        distinct(edited),
        distinct([(index_in(index, rows), whole(top)) for index, top in reported]),
        tuple(_read_prompt_row(row, lengths) for row in items(prompt_logprobs)),
    )


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


def _read_prompt_row(fields: Any, lengths: list[int]) -> PromptLogprobRow:
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


_KINDS: tuple[Kind[StepOutput | Beat | Fault | Alive], ...] = (
    ("StepOutput", 6, _read_output),
    ("Beat", 2, lambda finished, waited_s: Beat(whole(finished), real(waited_s))),
    ("Fault", 2, lambda reason, is_victim: Fault(text(reason), truth(is_victim))),
    ("Alive", 0, Alive),
)
"""By kind, which is the place in this table: the message, how many fields it has, and what reads them."""
