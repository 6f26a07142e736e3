"""The training text of the tiny model: generated, deterministic by seed, with a held-out split that shares no document.

A document is a plain text (a story, a short description) or a conversation in the chat template's format. Which split a
document belongs to is decided by a hash: of its cast and place where it is a story, of its whole text otherwise. So the
splits are disjoint whatever the seeds, and a held-out story has a combination of hero, friend and place that training
has never seen.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from engine.models.tiny.corpus import facts, stories
from engine.models.tiny.corpus.chats import chat, render
from engine.models.tiny.corpus.grammar import Voice

SPLITS = ("train", "heldout")
_HELDOUT_SHARE = 50


def split_of(key: str) -> str:
    """The split to which a document with this key belongs."""
    return "heldout" if zlib.crc32(key.encode()) % _HELDOUT_SHARE == 0 else "train"


def _plain(voice: Voice) -> tuple[str, str]:
    """A document without roles, and its key."""
    roll = voice.rng.random()
    if roll < 0.25:
        asked, text = facts.topic_text(voice) if voice.chance(0.6) else facts.animal_text(voice)
        return text, text
    told = stories.long_story(voice) if roll < 0.45 else stories.short_story(voice)
    text = told.text
    if voice.chance(0.25):
        text = f"{stories.title(voice, told)}\n\n{text}"
    if voice.chance(0.3):
        asked, answer = voice.pick(told.questions)
        text += f"\n\nQuestion: {asked}\nAnswer: {answer}"
    return text, told.key


def documents(seed: int, split: str = "train", chat_share: float = 0.88) -> Iterator[str]:
    """An endless stream of documents of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {SPLITS}")
    voice = Voice(random.Random(f"{split}/{seed}"))
    while True:
        if voice.chance(chat_share):
            talk = chat(voice)
            text, key = render(talk.messages), talk.key
        else:
            text, key = _plain(voice)
        if split_of(key) == split:
            yield text
