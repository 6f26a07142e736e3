"""Stories: a random cast put through a plot. A story knows the questions that its text answers."""

from __future__ import annotations

from typing import NamedTuple

from engine.models.tiny.corpus import words
from engine.models.tiny.corpus.files import PLOTS, sections
from engine.models.tiny.corpus.grammar import Voice

_PHRASES = sections("story_phrases.txt")
_ENDINGS, _LIKES, _OPENINGS = _PHRASES["endings"], _PHRASES["likes"], _PHRASES["openings"]

_HE = ("he", "him", "his")
_SHE = ("she", "her", "her")
_FEMALE = {"girl", "queen", "princess", "mermaid", "fairy", "hen", "cow"}
_MALE = {"boy", "king", "prince", "fisherman", "postman", "wizard"}


class Being(NamedTuple):
    """Someone in a story."""

    name: str
    kind: str
    quality: str
    pronouns: tuple[str, str, str]


class Story(NamedTuple):
    """A finished story, what it is about, and `key`: the combination by which it is assigned to a split."""

    text: str
    hero: Being
    slots: dict[str, str]
    questions: list[tuple[str, str]]
    key: str


def being(voice: Voice, kind: str | None = None, avoid: str = "", name: str | None = None) -> Being:
    """A random character; `kind` and `name` may be asked for."""
    while True:
        if kind is None:
            roll = voice.rng.random()
            pool = words.ANIMAL_HEROES if roll < 0.6 else words.PEOPLE if roll < 0.85 else words.FANTASY_HEROES
            chosen = voice.pick(pool)
        else:
            chosen = kind
        female = chosen in _FEMALE or (chosen not in _MALE and voice.chance(0.5))
        called = name or voice.pick(words.GIRLS if female else words.BOYS)
        if name is not None and chosen not in _FEMALE | _MALE:
            female = name in words.GIRLS
        if called != avoid:
            return Being(called, chosen, voice.pick(words.HERO_QUALITIES), _SHE if female else _HE)


def described_thing(voice: Voice) -> str:
    """A thing with a colour or another quality."""
    return voice.pick(words.COLOURS if voice.chance(0.45) else words.THING_QUALITIES) + " " + voice.pick(words.THINGS)


def _cast(voice: Voice, hero: Being, friend: Being, thing: str, place: tuple[str, str]) -> dict[str, str]:
    """Every slot that a plot may use, so that plots stay pure data."""
    spots = voice.some(words.SPOTS, 3)
    fear, deed = voice.pick(words.FEARS)
    skill, skilled, skilling = voice.pick(words.SKILLS)
    trouble, solution = voice.pick(words.TROUBLES)
    he, him, his = hero.pronouns
    return {
        "name": hero.name, "kind": hero.kind, "adj": hero.quality, "he": he, "him": him, "his": his,
        "He": he.capitalize(), "His": his.capitalize(),
        "friend": friend.name, "fkind": friend.kind, "fadj": friend.quality,
        "place": place[0], "inplace": f"{place[1]} {place[0]}", "place2": voice.pick(words.PLACES)[0],
        "thing": thing, "home": voice.pick(words.HOMES), "food": voice.pick(words.FOODS),
        "weather": voice.pick(words.WEATHER), "weather2": voice.pick(words.WEATHER), "time": voice.pick(words.TIMES),
        "spot": spots[0], "spot2": spots[1], "spot3": spots[2], "fear": fear, "deed": deed,
        "skill": skill, "skilled": skilled, "skilling": skilling, "trouble": trouble, "solution": solution,
        "build": voice.pick(words.BUILDS), "material": voice.pick(words.MATERIALS), "noise": voice.pick(words.NOISES),
        "maker": voice.pick(words.NOISE_MAKERS), "feeling": voice.pick(words.FEELINGS),
        "n": words.NUMBER_WORDS[voice.number(2, 12)], "surprise": voice.pick(words.SURPRISES),
        "reason": voice.pick(words.GIFT_REASONS), "colour": voice.pick(words.COLOURS),
        "moral": voice.pick(_PHRASES["morals"]),
    }  # fmt: skip


def short_story(
    voice: Voice,
    kind: str | None = None,
    thing: str | None = None,
    place: tuple[str, str] | None = None,
    name: str | None = None,
    friend_kind: str | None = None,
) -> Story:
    """One plot from beginning to end, about 60 to 150 tokens."""
    hero = being(voice, kind, name=name)
    friend = being(voice, friend_kind, avoid=hero.name)
    where = place or voice.pick(words.PLACES)
    slots = _cast(voice, hero, friend, thing or described_thing(voice), where)
    # A wish for a thing or a place must show up in the text, so only plots that mention it can be taken.
    plots = [p for p in PLOTS if not thing or "{thing}" in " ".join(b[0] for b in p.beats if len(b) == 1)]
    if place:
        plots = [p for p in plots if any(all("{inplace}" in t or "{place}" in t for t in b) for b in p.beats)]
    plot = voice.pick(plots)
    lines = [voice.say(voice.pick(_OPENINGS), **slots)]
    if voice.chance(0.4):
        lines.append(voice.say(voice.pick([like for like in _LIKES if "{friend}" not in like]), **slots))
    lines += [voice.say(voice.pick(beat), **slots) for beat in plot.beats]
    endings = voice.some(_ENDINGS, voice.number(1, 2))
    if all("{moral}" in ending for ending in endings):
        endings = endings[:1]
    lines += [voice.say(ending, **slots) for ending in endings]
    questions = [(voice.say(q, **slots), voice.say(a, **slots)) for q, a in plot.questions]
    questions.append(
        (
            voice.say("[who is the story about?|who is the hero of the story?|what is the story about?]", **slots),
            voice.say("[the story is about {name}, a {adj} {kind}.|it is about a {adj} {kind} named {name}.]", **slots),
        )
    )
    return Story(" ".join(lines), hero, slots, questions, f"{hero.name}|{friend.name}|{where[0]}")


def long_story(voice: Voice, kind: str | None = None, thing: str | None = None, name: str | None = None) -> Story:
    """A journey with several meetings, about 200 to 400 tokens."""
    hero = being(voice, kind, name=name)
    friend = being(voice, avoid=hero.name)
    where = voice.pick(words.PLACES)
    slots = _cast(voice, hero, friend, thing or described_thing(voice), where)
    slots["moral_line"] = voice.say(
        "[{name} had learned that {moral}.|'{moral},' {he} said with a smile.]".replace("'", '"'), **slots
    )
    lines = [
        voice.say(voice.pick(_OPENINGS), **slots),
        voice.say(voice.pick(_LIKES), **slots),
        voice.say(voice.pick(_PHRASES["leaving"]), **slots),
    ]
    stops = [place for place in voice.some(words.PLACES, 6) if place != where]
    met: list[Being] = []
    for meeting in voice.some(_PHRASES["meetings"], voice.number(2, 4)):
        other = being(voice, avoid=hero.name)
        met.append(other)
        scene = _cast(voice, hero, other, slots["thing"], where)
        lines.append(voice.say(meeting, **{**scene, "who": other.name, "stop": stops.pop()[0]}))
    lines += [voice.say(voice.pick(_PHRASES["arrivals"]), **slots), voice.say(voice.pick(_PHRASES["returns"]), **slots)]
    first = met[0]
    questions = [
        (voice.say("where did {name} go?", **slots), voice.say("{name} went to {place}.", **slots)),
        (voice.say("what did {name} find?", **slots), voice.say("{name} found the {thing}.", **slots)),
        (voice.say("who did {name} meet first?", **slots), f"{slots['name']} met {first.name} the {first.kind} first."),
    ]
    return Story(" ".join(lines), hero, slots, questions, f"{hero.name}|{friend.name}|{where[0]}")


def title(voice: Voice, story: Story) -> str:
    """A heading for a story that stands alone."""
    text = voice.say(
        "[{name} and the {thing}|the {adj} {kind}|{name} the {kind}|{name} and {friend}|the story of {name}]",
        **story.slots,
    )
    return text[0].upper() + text[1:]
