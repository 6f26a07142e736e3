"""Sums, comparisons and counting with small numbers, as questions with answers."""

from __future__ import annotations

from collections.abc import Callable

from engine.models.tiny.corpus import words
from engine.models.tiny.corpus.grammar import Voice, listing, plural

Exchange = tuple[str, str]


def _operand(voice: Voice) -> int:
    """Mostly small: sums of small numbers must be known, larger ones are a bonus."""
    roll = voice.rng.random()
    return voice.number(0, 10) if roll < 0.75 else voice.number(0, 20) if roll < 0.92 else voice.number(10, 99)


def _asked(voice: Voice, left: str, word: str, sign: str, right: str) -> str:
    return voice.say(
        "[what is|what's|how much is|calculate|tell me|can you tell me|please compute|do you know||]"
        " {l} {w} {r}[?|?|?|]",
        l=left,
        w=voice.pick((word, word, sign)),
        r=right,
    ).strip()


def addition(voice: Voice) -> Exchange:
    left, right = _operand(voice), _operand(voice)
    if voice.chance(0.1) and max(left, right) <= 10:
        spelled = words.NUMBER_WORDS
        return _asked(voice, spelled[left], "plus", "and", spelled[right]), f"{left} plus {right} is {left + right}."
    return _asked(voice, str(left), "plus", "+", str(right)), f"{left} plus {right} is {left + right}."


def subtraction(voice: Voice) -> Exchange:
    left, right = sorted((_operand(voice), _operand(voice)), reverse=True)
    return _asked(voice, str(left), "minus", "-", str(right)), f"{left} minus {right} is {left - right}."


def multiplication(voice: Voice) -> Exchange:
    left, right = voice.number(0, 10), voice.number(0, 10)
    return _asked(voice, str(left), "times", voice.pick("*x"), str(right)), f"{left} times {right} is {left * right}."


def comparison(voice: Voice) -> Exchange:
    left, right = voice.some(range(voice.pick((10, 20, 100))), 2)
    big, small = max(left, right), min(left, right)
    pairs = (
        (
            f"which [number |]is [bigger|larger|greater], {left} or {right}?",
            f"{big} is [bigger|larger|greater] than {small}.",
        ),
        (f"which [number |]is smaller, {left} or {right}?", f"{small} is smaller than {big}."),
        (
            f"is {left} [bigger|larger|greater|more] than {right}?",
            f"yes, {left} is bigger than {right}." if left > right else f"no, {left} is smaller than {right}.",
        ),
    )
    asked, answer = voice.pick(pairs)
    return voice.say(asked), voice.say(answer)


def counting(voice: Voice) -> Exchange:
    start, step = voice.number(1, 12), voice.number(4, 11)
    up = [str(n) for n in range(start, start + step + 1)]
    last = voice.pick((5, 10, 10, 10, 10, 12, 15, 20, voice.number(3, 20)))
    ten = [str(n) for n in range(1, last + 1)]
    down = [str(n) for n in range(min(last, 12), 0, -1)]
    pairs = (
        (f"count from {start} to {start + step}", ", ".join(up) + "."),
        (f"[count to|can you count to|please count to] {last}", ", ".join(ten) + "."),
        (f"count down from {min(last, 12)}", ", ".join(down) + "."),
        (f"[what|which number] comes after {start + last}?", f"{start + last + 1} comes after {start + last}."),
        (f"[what|which number] comes before {start + last}?", f"{start + last - 1} comes before {start + last}."),
        (
            f"is {start + last} [even or odd|odd or even]?",
            f"{start + last} is {'odd' if (start + last) % 2 else 'even'}.",
        ),
        (f"what is [double|twice|two times] {last}?", f"[double|twice] {last} is {2 * last}."),
        (f"what is half of {2 * last}?", f"half of {2 * last} is {last}."),
    )
    asked, answer = voice.pick(pairs)
    return voice.say(asked), voice.say(answer)


def word_problem(voice: Voice) -> Exchange:
    girl = voice.chance(0.5)
    name, he = voice.pick(words.GIRLS if girl else words.BOYS), "she" if girl else "he"
    things = plural(voice.pick([thing for thing in words.THINGS if " " not in thing]))
    have, more = voice.number(2, 12), voice.number(1, 9)
    if voice.chance(0.5):
        story = (
            f"{name} has {have} {things}. {he} [finds|gets|buys] {more} more. How many {things} does {he} have[ now|]?"
        )
        return voice.say(story), voice.say(
            f"{have} plus {more} is {have + more}, so {name} has {have + more} {things}."
        )
    less = min(more, have - 1)
    story = f"{name} has {have} {things}. {he} [loses|gives away|sells] {less}. How many {things} are left?"
    return voice.say(story), voice.say(
        f"{have} minus {less} is {have - less}, so {name} has {have - less} {things} left."
    )


def ordering(voice: Voice) -> Exchange:
    numbers = voice.some(range(1, 30), voice.number(3, 4))
    shown = listing([str(n) for n in numbers])
    pairs = (
        (f"which is the [largest|biggest] of {shown}?", f"{max(numbers)} is the largest."),
        (f"which is the smallest of {shown}?", f"{min(numbers)} is the smallest."),
        (f"[sort|order] the numbers {shown}", listing([str(n) for n in sorted(numbers)]) + "."),
    )
    asked, answer = voice.pick(pairs)
    return voice.say(asked), voice.say(answer)


# Weighted by repetition: plain sums are what people try first.
KINDS: tuple[Callable[[Voice], Exchange], ...] = (
    addition, addition, addition, addition, addition, addition, subtraction, subtraction, subtraction,
    multiplication, multiplication, comparison, counting, counting, counting, counting, word_problem, ordering,
)  # fmt: skip


def exchange(voice: Voice) -> Exchange:
    """A random question about numbers, with its answer."""
    return voice.pick(KINDS)(voice)
