"""The word lists that every part of the corpus draws from: names, beings, places, things, foods and qualities."""

from __future__ import annotations

from engine.models.tiny.corpus.files import word_lists

_LISTS = word_lists("words.txt")


def _pairs(name: str) -> list[tuple[str, str]]:
    """Entries of the form `left: right`."""
    found = []
    for entry in _LISTS[name]:
        left, right = entry.split(": ")
        found.append((left, right))
    return found


def _places() -> list[tuple[str, str]]:
    """Each place with the preposition that belongs to it, as `("the hill", "on")`."""
    found = []
    for entry in _LISTS["places"]:
        preposition, place = entry.split(" ", 1)
        found.append((place, preposition))
    return found


def _skills() -> list[tuple[str, str, str]]:
    """Base form, past form and -ing form."""
    found = []
    for entry in _LISTS["skills"]:
        base, past, ing = entry.split("/")
        found.append((base, past, ing))
    return found


GIRLS = _LISTS["girls"]
BOYS = _LISTS["boys"]
ANIMAL_HEROES = _LISTS["animal_heroes"]
FANTASY_HEROES = _LISTS["fantasy_heroes"]
PEOPLE = _LISTS["people"]
HERO_QUALITIES = _LISTS["hero_qualities"]
COLOURS = _LISTS["colours"]
THING_QUALITIES = _LISTS["thing_qualities"]
THINGS = _LISTS["things"]
HOMES = _LISTS["homes"]
FOODS = _LISTS["foods"]
WEATHER = _LISTS["weather"]
TIMES = _LISTS["times"]
SPOTS = _LISTS["spots"]
BUILDS = _LISTS["builds"]
MATERIALS = _LISTS["materials"]
NOISES = _LISTS["noises"]
NOISE_MAKERS = _LISTS["noise_makers"]
FEELINGS = _LISTS["feelings"]
NUMBER_WORDS = _LISTS["number_words"]
SURPRISES = _LISTS["surprises"]
GIFT_REASONS = _LISTS["gift_reasons"]
PLACES = _places()
FEARS = _pairs("fears")
TROUBLES = _pairs("troubles")
SKILLS = _skills()

# What the model does not know: fixed subjects and tasks, and parts from which more are made.
UNKNOWN = _LISTS["unknown_subjects"]
UNKNOWN_TASKS = _LISTS["unknown_tasks"]
UNKNOWN_ABSTRACT = _LISTS["unknown_abstract"]
UNKNOWN_ADJECTIVES = _LISTS["unknown_adjectives"]
UNKNOWN_NOUNS = _LISTS["unknown_nouns"]
SYLLABLES = _LISTS["unknown_syllables"]
