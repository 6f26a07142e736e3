"""What a group and its ranks say to each other, written as bounded binary messages (`cluster.shards.fields`).

Knows no sockets. What comes from the other side is checked here for its form: lengths fit each other, indices point
into what they index. What only the receiver knows (its pages, its vocabulary) is the receiver's to check.
"""

from dataclasses import dataclass, replace
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
    return [
        batch.step,
        np.array(batch.sequence_ids, I64).tobytes(),
        bytes_of(batch.token_ids, I64),
        bytes_of(batch.positions, I64),
        bytes_of(batch.cu_seq_q, I32),
        bytes_of(batch.context_lens, I32),
        batch.page_table.shape[1],
        bytes_of(batch.page_table, I32),
        bytes_of(samples.rows, I64),
        bytes_of(samples.positions, I64),
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
    sequence_ids: Any,
    token_ids: Any,
    positions: Any,
    cu_seq_q: Any,
    context_lens: Any,
    width: Any,
    page_table: Any,
    rows: Any,
    sample_positions: Any,
    settings: Any,
    edits: Any,
    logprobs: Any,
    prompt_logprobs: Any,
) -> Batch:
    ids = array(sequence_ids, I64)
    count = len(ids)
    tokens, ends = array(token_ids, I64), array(cu_seq_q, I32, count + 1)
    lengths = ends[1:].astype(np.int64) - ends[:-1]
    if not count or ends[0] != 0 or ends[-1] != len(tokens) or lengths.min() < 1:
        raise WireError(f"{count} sequences whose tokens begin at {ends[:4].tolist()}..., of {len(tokens)} tokens")
    contexts = array(context_lens, I32, count)
    if (contexts < lengths).any():
        raise WireError("a sequence attends to fewer keys than it has tokens")
    columns = whole(width, 2**31 - 1)
    table = array(page_table, I32, count * columns).reshape(count, columns)
    if table.size and table.min() < 0:
        raise WireError("a page below 0")
    return Batch(
        step=whole(step),
        sequence_ids=tuple(ids.tolist()),
        token_ids=tokens,
        positions=array(positions, I64, len(tokens)),
        cu_seq_q=ends,
        context_lens=contexts,
        page_table=table,
        samples=_read_samples(count, rows, sample_positions, settings, edits, logprobs),
        prompt_logprobs=tuple(_read_prompt_row(row, lengths) for row in items(prompt_logprobs)),
    )


def _read_samples(num_sequences: int, rows: Any, positions: Any, settings: Any, edits: Any, logprobs: Any) -> Samples:
    which = array(rows, I64)
    count = len(which)
    if count and not (which.min() >= 0 and which.max() < num_sequences):
        raise WireError(f"a token is to be drawn for a sequence beyond the {num_sequences} of the batch")
    edited = [_read_edit(count, *record(fields, 11)) for fields in items(edits)]
    reported = [record(fields, 2) for fields in items(logprobs)]
    return Samples(
        rows=which,
        positions=array(positions, I64, count),
        settings=array(settings, SETTINGS, count),
        edits=distinct(edited),
        logprobs=distinct([(index_in(index, count), whole(top)) for index, top in reported]),
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
    ("Batch", 14, _read_batch),
    ("StepOutput", 6, _read_output),
    ("Beat", 2, lambda finished, waited_s: Beat(whole(finished), real(waited_s))),
    ("Fault", 2, lambda reason, is_victim: Fault(text(reason), truth(is_victim))),
    ("Alive", 0, Alive),
)
"""By kind, which is the place in this table: the message, how many fields it has, and what reads them."""
