"""The tables of simple facts, named: each row is a list of cells whose meaning the comment gives."""

from __future__ import annotations

from engine.models.tiny.corpus.files import tables

_TABLES = tables("facts.txt")

# name, class, home, food, sound, feature, number of legs, young
ANIMALS = _TABLES["animals"]
# name, colour, kind, taste
FOODS = _TABLES["foods"]
# thing, colour
COLOURS = _TABLES["colours"]
OPPOSITES = [(left, right) for left, right in _TABLES["opposites"]]
# thing, purpose
USES = _TABLES["uses"]
# job, what one does
JOBS = _TABLES["jobs"]
# name, capital, continent, language
COUNTRIES = _TABLES["countries"]
# words that rhyme with each other
RHYMES = _TABLES["rhymes"]
# kind, then examples of it
KINDS = _TABLES["kinds"]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
SEASONS = ["spring", "summer", "autumn", "winter"]
