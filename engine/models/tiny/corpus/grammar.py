"""The template language of the corpus: nested choices, slots, articles, capitals and plurals."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])n? (?=([a-z]+))")
_SENTENCE = re.compile(r"(^\"?|[.!?] |\n\"?|\s\")([a-z])")
# Spelled with a vowel but spoken with a consonant, and the other way round.
_CONSONANT_SOUND = ("uni", "use", "usu", "one", "once", "eu")
_VOWEL_SOUND = ("hour", "honest", "heir", "honour")
_IRREGULAR = {
    "mouse": "mice", "sheep": "sheep", "deer": "deer", "wolf": "wolves", "goose": "geese", "fish": "fish",
    "knife": "knives", "leaf": "leaves", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth",
    "man": "men", "woman": "women", "fisherman": "fishermen", "postman": "postmen", "shelf": "shelves",
    "scarf": "scarves", "elf": "elves", "snowman": "snowmen", "loaf": "loaves", "bread": "bread", "rice": "rice",
    "milk": "milk", "cheese": "cheese", "honey": "honey", "salt": "salt", "water": "water", "butter": "butter",
}  # fmt: skip


def _article(match: re.Match[str]) -> str:
    word = match.group(2)
    vowel = (word[0] in "aeiou" and not word.startswith(_CONSONANT_SOUND)) or word.startswith(_VOWEL_SOUND)
    return match.group(1) + ("n " if vowel else " ")


def polish(text: str) -> str:
    """Right articles ("an owl", "a unicorn") and a capital at the start of each sentence."""
    text = _ARTICLE.sub(_article, text.replace("  ", " "))
    return _SENTENCE.sub(lambda match: match.group(1) + match.group(2).upper(), text)


def plural(noun: str) -> str:
    """The plural of the last word of `noun`."""
    head, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif not last.endswith(("potato", "tomato")):
        last += "s"
    else:
        last += "es"
    return f"{head} {last}" if head else last


def listing(items: Sequence[str], word: str = "and") -> str:
    """`a, b and c`."""
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + f" {word} " + items[-1]


class Voice:
    """A random speaker: one seeded generator and the verbs that turn templates into text."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        return self.rng.sample(items, count)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def number(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def expand(self, template: str) -> str:
        """Resolve `[a|b|c]`, innermost first; slots stay as they are."""
        while "[" in template:
            template = _CHOICE.sub(lambda match: self.pick(match.group(1).split("|")), template)
        return template

    def say(self, template: str, **slots: str) -> str:
        """One random reading of a template with its slots filled, polished."""
        text = self.expand(template)
        return polish(text.format(**slots) if slots else text)
