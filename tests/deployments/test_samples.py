"""One choice from emissions to text: stop strings, stop tokens, logprobs."""

from deployments.samples import Piece, Sample, TextOptions, joined
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason
from tests.deployments.api.tiny import card, text_model

TEXT = text_model()
EOS = card().eos_token_ids[0]


def play(answer: str, options: TextOptions, *, chunk: int = 1, end: FinishReason = FinishReason.LENGTH) -> list[Piece]:
    """Feeds an answer, `chunk` tokens an emission, until the sample or the answer ends."""
    sample = Sample(0, TEXT, options)
    ids = TEXT.encode(answer)
    pieces = []
    for start in range(0, len(ids), chunk):
        part = tuple(ids[start : start + chunk])
        reason = end if start + chunk >= len(ids) else None
        logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in part)
        pieces.append(sample.feed(Emission("r", 0, part, logprobs, (), reason)))
        if sample.finished:
            break
    return pieces


def test_tokens_and_logprobs_end_with_the_token_that_completes_a_stop_string():
    for chunk in (1, 2, 3, 50):
        whole = joined(play("one two three four", TextOptions(stop=("two",)), chunk=chunk))
        assert whole.text == "one "
        assert (whole.finish_reason, whole.stop_reason) == ("stop", "two")
        assert TEXT.decode(whole.token_ids) == "one two"
        assert len(whole.logprobs) == len(whole.offsets) == len(whole.token_ids)


def test_the_stop_string_is_shown_on_request():
    assert joined(play("one two three", TextOptions(stop=("two",), include_stop=True))).text == "one two"


def test_stop_strings_are_not_looked_for_in_the_first_tokens():
    num_tokens = len(TEXT.encode("one two"))
    whole = joined(play("one two one two", TextOptions(stop=("two",), min_tokens=num_tokens)))
    assert whole.text == "one two one "


def test_what_was_held_back_is_shown_at_the_end():
    whole = joined(play("one tw", TextOptions(stop=("two",))))
    assert (whole.text, whole.finish_reason) == ("one tw", "length")


def test_a_character_that_the_end_cuts_is_shown_as_a_replacement():
    sample = Sample(0, TEXT, TextOptions())
    first = TEXT.encode("😀")[0]
    assert sample.feed(Emission("r", 0, (first,), finish_reason=FinishReason.LENGTH)).text == "\ufffd"


def test_the_stop_token_is_given_but_not_shown():
    sample = Sample(0, TEXT, TextOptions())
    ids = (*TEXT.encode("hello"), EOS)
    logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in ids)
    piece = sample.feed(Emission("r", 0, ids, logprobs, (), FinishReason.STOP, EOS))
    assert (piece.text, piece.token_ids, piece.stop_reason) == ("hello", ids, None)
    assert [entry.token_id for entry in piece.logprobs] == list(ids[:-1])


def test_a_stop_token_that_the_client_named_is_told_and_shown_on_request():
    (token,) = TEXT.encode("!")
    for include, shown in ((False, ""), (True, "!")):
        sample = Sample(0, TEXT, TextOptions(include_stop=include, stop_token_ids=(token,)))
        piece = sample.feed(Emission("r", 0, (token,), (), (), FinishReason.STOP, token))
        assert (piece.text, piece.stop_reason) == (shown, token)


def test_offsets_count_the_characters_before_each_token():
    whole = joined(play("one 😀 two", TextOptions()))
    rebuilt = [TEXT.token_text(entry.token_id) for entry in whole.logprobs]
    for name, offset in zip(rebuilt, whole.offsets, strict=True):
        if not name.startswith("bytes:"):
            assert whole.text[offset:].startswith(name)
