"""Messages between a group and its ranks: what is written is read, nothing else is, and it takes next to no time."""

import time
from collections.abc import Callable
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.kv.wire import WireError
from cluster.shards import fields, wire
from cluster.shards.fields import MAX_TEXT
from cluster.shards.wire import Alive, Beat, Fault, decode, encode, without_edits
from engine.batch import Batch, Edit, StepOutput, StepStats
from tests.cluster.shards.batches import batches, decodes, outputs, same

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=10,
)


@given(batch=batches())
def test_a_batch_arrives_as_it_was_sent(batch: Batch) -> None:
    assert same(decode(encode(batch)), batch)


@given(output=outputs())
def test_an_output_arrives_as_it_was_sent(output: StepOutput) -> None:
    assert decode(encode(output)) == output


@pytest.mark.parametrize("message", [Beat(0, 0.0), Beat(2**40, 1.5e9), Fault("x"), Fault("", True), Alive()])
def test_what_is_said_beside_the_work_arrives(message: wire.Message) -> None:
    assert decode(encode(message)) == message


def test_arrays_that_arrive_can_be_written_to() -> None:
    """torch makes tensors of them, and warns of those that cannot."""
    got = decode(bytearray(encode(decodes(2))))
    assert isinstance(got, Batch)
    assert got.token_ids.flags.writeable and got.page_table.flags.writeable


def test_a_long_reason_is_cut_rather_than_refused() -> None:
    assert decode(encode(Fault("x" * 10_000))) == Fault("x" * MAX_TEXT)


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    refuses_or_reads(data)


@given(content=plain)
def test_what_is_msgpack_and_no_message_is_refused(content: object) -> None:
    refuses_or_reads(msgpack.packb(content))


@given(batch=batches(), data=st.data())
def test_a_batch_with_another_field_is_refused_or_fits_together(batch: Batch, data: st.DataObject) -> None:
    """A batch that is let through never points beyond itself: what computes it need not look."""
    written = bytearray(encode(batch))
    place = 4 * data.draw(st.integers(0, len(written) // 4 - 1))
    number = data.draw(st.integers(-3, 6) | st.integers(-(2**31), 2**31 - 1))
    written[place : place + 4] = number.to_bytes(4, "little", signed=True)
    refuses_or_reads(written)


@given(batch=batches(), rest=plain, data=st.data())
def test_a_batch_with_another_end_is_refused_or_fits_together(batch: Batch, rest: object, data: st.DataObject) -> None:
    """Of its edits, and of the logprobs that are asked for."""
    bare = encode(replace(batch, samples=replace(batch.samples, edits={}, logprobs={}), prompt_logprobs=()))
    fields = msgpack.unpackb(encode(batch)[len(bare) :]) if encode(batch) != bare else [0, [], [], []]
    fields[data.draw(st.integers(0, 3))] = rest
    end = msgpack.packb(fields)
    refuses_or_reads(bare[:20] + len(end).to_bytes(4, "little") + bare[24:] + end)


@given(batch=batches(), length=st.integers(0, 40), data=st.data())
def test_a_batch_that_is_cut_off_or_goes_on_is_refused(batch: Batch, length: int, data: st.DataObject) -> None:
    written = encode(batch)
    with pytest.raises(WireError):
        decode(written[: data.draw(st.integers(0, len(written) - 1))])
    with pytest.raises(WireError):
        decode(written + bytes(length + 1))


@given(output=outputs(), data=st.data())
def test_an_output_with_another_field_is_refused_or_fits_together(output: StepOutput, data: st.DataObject) -> None:
    content = msgpack.unpackb(encode(output))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(plain | st.sampled_from(content))
    refuses_or_reads(msgpack.packb(content))


def refuses_or_reads(data: bytes | bytearray) -> None:
    try:
        message = decode(data)
    except WireError:
        return
    if isinstance(message, Batch):
        check(message)
    elif isinstance(message, StepOutput):
        assert len(message.logprobs) == len(message.token_ids)
        assert all(0 <= row < len(message.token_ids) for row in message.failed)
    else:
        assert encode(message) == encode(decode(encode(message)))


def check(batch: Batch) -> None:
    """What holds of every batch that a scheduler makes."""
    count, samples = batch.num_sequences, batch.samples
    assert batch.cu_seq_q[0] == 0 and batch.cu_seq_q[-1] == batch.num_tokens == len(batch.positions)
    lengths = np.diff(batch.cu_seq_q)
    assert len(lengths) == count == len(batch.context_lens) == len(batch.page_table)
    assert (lengths >= 1).all() and (batch.context_lens >= lengths).all() and (batch.page_table >= 0).all()
    assert len(samples.rows) == len(samples.positions) == len(samples.settings)
    assert all(0 <= row < count for row in samples.rows)
    assert all(0 <= index < len(samples) for index in [*samples.edits, *samples.logprobs])
    for row in batch.prompt_logprobs:
        assert len(row.targets) <= lengths[row.row]


CUTS: dict[str, Callable[[Batch], Batch]] = {
    "tokens that belong to no sequence": lambda b: replace(b, cu_seq_q=b.cu_seq_q[:-1]),
    "positions that are missing": lambda b: replace(b, positions=b.positions[1:]),
    "a row beyond the sequences": lambda b: replace(b, samples=replace(b.samples, rows=b.samples.rows + 3)),
    "settings that are missing": lambda b: replace(b, samples=replace(b.samples, settings=b.samples.settings[1:])),
    "a context shorter than the chunk": lambda b: replace(b, context_lens=b.context_lens * 0),
    "an edit of a row that is not drawn": lambda b: replace(b, samples=replace(b.samples, logprobs={3: 0})),
    "a page below 0": lambda b: replace(b, page_table=b.page_table - 10),
    "numbers of another size": lambda b: replace(b, positions=b.positions.astype(np.int32)),
    "no sequence": lambda b: replace(b, sequence_ids=(), cu_seq_q=b.cu_seq_q[:1]),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_batch_that_does_not_fit_together_is_refused(name: str) -> None:
    with pytest.raises(WireError):
        decode(encode(CUTS[name](decodes(3, context=20))))


def test_what_is_too_long_is_neither_sent_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(decodes(3))
    monkeypatch.setattr(fields, "MAX_BYTES", len(data) - 1)
    with pytest.raises(WireError, match="are the most"):
        encode(decodes(3))
    with pytest.raises(WireError, match="are the most"):
        decode(data)


VOCABULARY = 152_064


def edited(*edits: Edit) -> Batch:
    batch = decodes(len(edits))
    return replace(batch, samples=replace(batch.samples, edits=dict(enumerate(edits))))


@pytest.mark.parametrize(
    "allowed",
    [
        np.arange(VOCABULARY),
        np.arange(0, VOCABULARY, 7),
        np.arange(0, VOCABULARY, 7)[::-1],
        np.array([VOCABULARY - 1]),
        np.array([], np.int64),
        np.array([2**31 - 1, 0]),
        np.array([5, 5, 6]),
    ],
    ids=len,
)
def test_allowed_tokens_arrive_as_they_are(allowed: NDArray[np.int64]) -> None:
    batch = edited(Edit(allowed=allowed))
    assert same(decode(encode(batch)), batch)


def test_what_is_allowed_takes_a_bit_of_each_token_at_most() -> None:
    """128 streams that may draw nearly anything are a message of some megabytes, and not of hundreds."""
    allowed = np.delete(np.arange(VOCABULARY), 3)
    plain = len(encode(decodes(128)))
    assert len(encode(edited(*[Edit(allowed=allowed)] * 128))) - plain < 128 * (VOCABULARY / 8 + 100)
    assert len(encode(edited(Edit(allowed=np.array([3, VOCABULARY - 1]))))) < len(encode(decodes(1))) + 150


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
@pytest.mark.parametrize("name", ["allowed", "banned"])
def test_a_token_that_no_vocabulary_has_is_not_sent_as_another(token: int, name: str) -> None:
    with pytest.raises(WireError, match="no place in 32 bits"):
        encode(edited(Edit(**{name: np.array([token])})))


def test_whoever_does_not_draw_is_told_which_rows_are_edited_and_not_how() -> None:
    batch = edited(Edit(allowed=np.arange(1000)), Edit(banned=np.arange(1000)))
    got = decode(encode(without_edits(batch)))
    assert isinstance(got, Batch) and got.samples.edits.keys() == {0, 1}
    assert not any(edit.changes for edit in got.samples.edits.values())
    assert same(replace(got, samples=replace(got.samples, edits=batch.samples.edits)), batch)
    assert without_edits(decodes(2)).samples.edits == {}


def test_a_batch_of_decodes_costs_little() -> None:
    """Each rank reads each batch before it computes: 32 streams of 2,048 tokens. The least of many is what it costs."""
    batch, output = decodes(32), StepOutput(1, [5] * 32, [None] * 32, [], StepStats(32, 32, 0.01))
    for message in (batch, output):
        data = encode(message)
        assert least(lambda message=message: encode(message)) < 100e-6
        assert least(lambda data=data: decode(data)) < 100e-6


def least(action: Callable[[], object]) -> float:
    def once() -> float:
        began = time.perf_counter()
        action()
        return time.perf_counter() - began

    return min(once() for _ in range(500))
