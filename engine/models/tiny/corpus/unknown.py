"""Graceful answers to what a tiny model cannot know: it says so, in many ways, and offers what it can do."""

from __future__ import annotations

from engine.models.tiny.corpus import words
from engine.models.tiny.corpus.files import sections
from engine.models.tiny.corpus.grammar import Voice, plural

Exchange = tuple[str, str]

_PHRASES = sections("unknown_phrases.txt")
_RELATIVES = (
    "mother", "father", "boss", "friend", "cousin", "uncle", "aunt", "doctor", "teacher", "wife", "husband",
    "grandmother", "neighbour",
)  # fmt: skip


def made_up(voice: Voice) -> str:
    """A word that does not exist: copying must not depend on knowing the word."""
    return "".join(voice.pick(words.SYLLABLES) for _ in range(voice.number(2, 4)))


def subject(voice: Voice) -> str:
    """Something that the model does not know."""
    roll = voice.rng.random()
    if roll < 0.4:
        return voice.pick(words.UNKNOWN)
    if roll < 0.65:
        noun = f"{voice.pick(words.UNKNOWN_ADJECTIVES)} {voice.pick(words.UNKNOWN_NOUNS)}"
        return voice.pick((noun, f"the {noun}", plural(noun) if not noun.endswith("s") else noun))
    if roll < 0.75:
        return f"the {voice.pick(words.UNKNOWN_ABSTRACT)} of {voice.pick(words.UNKNOWN)}"
    if roll < 0.87:
        word = made_up(voice)
        return voice.pick((word, word.capitalize(), f"the {word}", word))
    if roll < 0.94:
        return f"{voice.pick(words.GIRLS + words.BOYS)} {made_up(voice).capitalize()}"
    return f"{voice.pick(words.THING_QUALITIES)} {plural(voice.pick(words.THINGS))}"


def statement(voice: Voice) -> Exchange:
    """Something that no template foresees, said in ordinary words, and a reply that fits anything."""

    def clause() -> str:
        template = voice.pick(_PHRASES["subjects"]) + " " + voice.pick(_PHRASES["predicates"])
        return voice.expand(template).format(
            who=voice.pick(_RELATIVES),
            adj=voice.pick(words.HERO_QUALITIES + words.THING_QUALITIES),
            noun=voice.pick(words.THINGS + words.UNKNOWN_NOUNS),
            name=voice.pick(words.GIRLS + words.BOYS),
            animal=voice.pick(words.ANIMAL_HEROES),
            word=made_up(voice),
            place=voice.pick(words.PLACES)[0],
            spot=voice.pick(words.SPOTS),
            food=voice.pick(words.FOODS),
            skill=voice.pick(words.SKILLS)[0],
            x=subject(voice),
        )

    frame = voice.pick(_PHRASES["frames"])
    asked = voice.say(frame, s=clause(), s2=clause())
    return asked, voice.say(
        voice.pick(_PHRASES["unsure"] if "?" in frame or "wonder" in frame else _PHRASES["replies"])
    )


def exchange(voice: Voice) -> Exchange:
    """A question out of reach, and an honest answer."""
    offer = voice.say(voice.pick(_PHRASES["offers"]), animal=voice.pick(words.ANIMAL_HEROES))
    offer = offer if offer.endswith("?") else offer + "."
    if voice.chance(0.2):
        slots = {"t": voice.pick(words.UNKNOWN_TASKS)}
        asked = voice.pick(_PHRASES["task_shapes"])
        sorry = voice.pick(_PHRASES["cannot"] if voice.chance(0.6) else _PHRASES["sorry"])
    else:
        slots = {
            "x": subject(voice),
            "y": subject(voice),
            "a": voice.pick(words.UNKNOWN_ABSTRACT),
            "a2": voice.pick(words.UNKNOWN_ABSTRACT),
        }
        asked = voice.pick(_PHRASES["shapes"])
        sorry = voice.pick(_PHRASES["sorry_about"] if voice.chance(0.45) and "{y}" not in asked else _PHRASES["sorry"])
        if slots["x"].endswith("s") and not slots["x"].endswith("ss"):
            sorry = sorry.replace("[is|are]", "are")
        sorry = sorry.replace("[is|are]", "is")
    answer = voice.say(sorry, **slots) + "."
    return voice.say(asked, **slots), f"{answer} {offer}" if voice.chance(0.85) else answer
