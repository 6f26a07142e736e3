"""Conversations: exchanges of every kind put together into one to four turns, some with a system message."""

from __future__ import annotations

import re
from typing import NamedTuple

from engine.models.tiny.corpus import arithmetic, creative, facts, facts_data, stories, unknown, words
from engine.models.tiny.corpus.files import CHATTER, SMALLTALK
from engine.models.tiny.corpus.grammar import Voice, plural

Exchange = tuple[str, str]

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

_FIRST_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SYSTEMS = (
    "You are a helpful assistant.", "You are a friendly assistant.", "You are a helpful assistant. Answer briefly.",
    "You are a kind storyteller.", "Be polite and use simple words.", "Answer in simple English.",
    "You are a patient teacher.", "You are a small language model.", "Be brief.", "You are the assistant of a library.",
    "You help children to learn.",
)  # fmt: skip


_CONTRACTIONS = (
    ("What is", "What's"), ("Who is", "Who's"), ("Where is", "Where's"), ("How is", "How's"), ("That is", "That's"),
    ("I am", "I'm"), ("you are", "you're"), ("do not", "don't"), ("I will", "I'll"), ("cannot", "can't"),
    ("it is", "it's"), ("Let us", "Let's"), ("I have", "I've"),
)  # fmt: skip


class Chat(NamedTuple):
    """Messages as (role, content), and the combination by which the conversation is assigned to a split."""

    messages: list[tuple[str, str]]
    key: str


def render(messages: list[tuple[str, str]]) -> str:
    """The chat template's text; `tokenizer_config.json` holds the same as a Jinja template."""
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)


def smalltalk(voice: Voice) -> Exchange:
    """A greeting, thanks, a question about the model itself or a feeling."""
    asked, answer = voice.pick(SMALLTALK)
    first = _FIRST_CHOICE.search(asked)
    if first:
        choice = voice.pick(first.group(1).split("|"))
        asked = asked[: first.start()] + choice + asked[first.end() :]
        answer = answer.replace("{1}", choice)
    return voice.say(asked), voice.say(answer)


def _noise(voice: Voice) -> str:
    """What a cat on the keyboard writes."""
    letters = [voice.pick("abcdefghijklmnopqrstuvwxyz    ") for _ in range(voice.number(4, 12))]
    return "".join(letters).strip() or "xx"


def chatter(voice: Voice) -> Exchange:
    """Something that the user tells about the day, with a polite reply."""
    asked, answer = voice.pick(CHATTER)
    skill, _, skilling = voice.pick(words.SKILLS)
    animal, thing = voice.pick(words.ANIMAL_HEROES), voice.pick(words.THINGS)
    slots = {
        "food": voice.pick(words.FOODS), "animal": animal, "animals": plural(animal), "object": thing,
        "thing": stories.described_thing(voice), "name": voice.pick(words.GIRLS + words.BOYS),
        "place": voice.pick(words.PLACES)[0], "skill": skill, "skilling": skilling,
        "feeling": voice.pick(words.FEELINGS), "fear": voice.pick(words.FEARS)[0],
        "job": voice.pick(facts_data.JOBS)[0], "weather": voice.pick(words.WEATHER),
        "country": voice.pick(facts_data.COUNTRIES)[0],
        "topic": voice.pick(words.UNKNOWN), "spot": voice.pick(words.SPOTS),
        "noise": _noise(voice),
        "home_word": voice.pick(("home", "school", "work", "the market")),
        "word": unknown.made_up(voice)
        if voice.chance(0.3)
        else voice.pick(words.THINGS + words.FEELINGS + words.COLOURS),
    }  # fmt: skip
    return voice.say(asked, **slots), voice.say(answer, **slots)


def _about_user(voice: Voice) -> list[Exchange]:
    """The user says something and asks for it later."""
    name = voice.pick(words.GIRLS + words.BOYS)
    kind, food = voice.pick(words.ANIMAL_HEROES), voice.pick(words.FOODS)
    between = [exchange(voice) for _ in range(voice.number(0, 1))]
    variants = (
        (
            (
                "[my name is {n}.|I am {n}.|hello, my name is {n}.]",
                "[hello, {n}!|nice to meet you, {n}!] How can I help you?",
            ),
            ("[what is my name?|do you remember my name?|who am I?]", "your name is {n}."),
        ),
        (
            ("I have a {k} [named|called] {n}.", "{n} is a lovely name for a {k}."),
            ("what is the name of my {k}?", "the name of your {k} is {n}."),
        ),
        (
            ("my favourite food is {f}.", "{f} [sounds|sound] good! [Enjoy it.|I will remember it for this talk.]"),
            ("what is my favourite food?", "your favourite food is {f}."),
        ),
    )
    told, recalled = voice.pick(variants)
    slots = {"n": name, "k": kind, "f": food}
    return [(voice.say(told[0], **slots), voice.say(told[1], **slots)), *between,
            (voice.say(recalled[0], **slots), voice.say(recalled[1], **slots))]  # fmt: skip


def exchange(voice: Voice) -> Exchange:
    """One turn that stands alone."""
    roll = voice.rng.random()
    if roll < 0.31:
        return facts.exchange(voice)
    if roll < 0.54:
        return arithmetic.exchange(voice)
    if roll < 0.7:
        return smalltalk(voice)
    if roll < 0.78:
        return chatter(voice)
    if roll < 0.83:
        return unknown.statement(voice)
    if roll < 0.93:
        return unknown.exchange(voice)
    if roll < 0.965:
        return creative.poem(voice)
    return creative.joke(voice) if roll < 0.995 else creative.rhyming_line(voice)


def roughen(voice: Voice, text: str) -> str:
    """The way people type: sometimes no capital, no full stop, or a please."""
    if voice.chance(0.2):
        for full, short in _CONTRACTIONS:
            text = text.replace(full, short)
    if voice.chance(0.15):
        text = text.lower()
    if voice.chance(0.03) and len(text) > 8 and not any(letter.isdigit() for letter in text):
        slip = voice.number(1, len(text) - 2)
        text = text[:slip] + text[slip + 1 :]
    bare = text.rstrip(".?!")
    if bare and voice.chance(0.2):
        text = bare
    elif text[-1].isalnum() and voice.chance(0.6):
        text += "."
    if bare and voice.chance(0.04) and len(text) < 60:
        text = bare + ", please" + (text[-1] if text[-1] in ".?!" else ".")
    return text


def _turns(voice: Voice) -> tuple[list[Exchange], str]:
    """The exchanges of one conversation, and its split key where a story decides."""
    roll = voice.rng.random()
    if roll < 0.21:
        first, told = creative.story(voice)
        turns = [first]
        if voice.chance(0.5):
            turns += voice.some(told.questions, voice.number(1, min(3, len(told.questions))))
        elif voice.chance(0.15) and len(first[1]) < 900:
            turns.append(creative.another_story(voice))
        elif voice.chance(0.3):
            turns.append(exchange(voice))
        return turns, told.key
    if roll < 0.25:
        return _about_user(voice), ""
    if roll < 0.27:
        return creative.riddle(voice), ""
    count = voice.pick((1, 1, 1, 2, 2, 3, 4))
    turns = [exchange(voice) for _ in range(count)]
    if count > 1 and voice.chance(0.4):
        turns[0] = smalltalk(voice)
    return turns, ""


def chat(voice: Voice) -> Chat:
    """One conversation of one to four turns."""
    turns, key = _turns(voice)
    messages: list[tuple[str, str]] = []
    roll = voice.rng.random()
    if roll < 0.15:
        messages.append(("system", voice.pick(_SYSTEMS)))
    elif roll < 0.18:
        name = voice.pick(words.GIRLS + words.BOYS)
        messages.append(
            ("system", voice.say("[your name is {n}.|you are {n}, a friendly assistant.|you are called {n}.]", n=name))
        )
        asked = voice.say("[who are you?|what is your name?|what should I call you?|do you have a name?]")
        turns[0] = (
            asked,
            voice.say(
                "[I am {n}.|my name is {n}.] [How can I help you?|Nice to meet you.|I am a small language model.]",
                n=name,
            ),
        )
    for asked, answer in turns:
        messages += [("user", roughen(voice, asked)), ("assistant", answer)]
    return Chat(messages, key or render(messages))
