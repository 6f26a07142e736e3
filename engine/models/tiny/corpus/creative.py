"""Things that the model writes on request: stories with questions about them, poems, jokes and riddles."""

from __future__ import annotations

from engine.models.tiny.corpus import stories, words
from engine.models.tiny.corpus.facts_data import RHYMES
from engine.models.tiny.corpus.files import COUPLETS, JOKES, RIDDLES, TOPICS
from engine.models.tiny.corpus.grammar import Voice, polish

Exchange = tuple[str, str]

_TELL = (
    "[tell me|tell us|please tell me|can you tell me|could you tell me|write|write me|I want|I would like|give me|"
    "I want to hear|do you know|make up|tell|can you write|share] a "
)
_AGAIN = (
    "[tell me another story|another one, please|one more story|another story|tell me another one|again, please|"
    "one more]"
)
_ELABORATE = ("long ", "long ", "long ", "long ", "longer ", "very long ", "big ", "detailed ")
_PLAIN = ("", "", "", "short ", "little ", "new ", "nice ", "funny ", "sweet ", "bedtime ", "beautiful ")


def story(voice: Voice, long: bool | None = None) -> tuple[Exchange, stories.Story]:
    """A request for a story and the story, which keeps what the request asked for."""
    if long is None:
        long = voice.chance(0.4)
    ask = _TELL + (voice.pick(_ELABORATE) if long else voice.pick(_PLAIN)) + "[story|tale|story]"
    kind = name = thing = friend_kind = place = None
    roll = voice.rng.random()
    if roll < 0.3:
        kind = voice.pick(words.ANIMAL_HEROES + words.PEOPLE + words.FANTASY_HEROES)
        ask += f" about a {kind}"
    elif roll < 0.4:
        kind = voice.pick(words.ANIMAL_HEROES + words.FANTASY_HEROES)
        name = voice.pick(words.GIRLS + words.BOYS)
        ask += f" about a {kind} [named|called] {name}"
    elif roll < 0.48:
        name = voice.pick(words.GIRLS + words.BOYS)
        ask += f" about {name}"
    elif roll < 0.58:
        thing = stories.described_thing(voice)
        ask += f" about a {thing}"
    elif roll < 0.64:
        thing = "book about " + voice.pick(words.UNKNOWN if voice.chance(0.7) else list(TOPICS))
        ask += f" about {thing.removeprefix('book about ')}"
    elif roll < 0.7 and not long:
        kind, friend_kind = voice.some(words.ANIMAL_HEROES + words.FANTASY_HEROES, 2)
        ask += f" about a {kind} and a {friend_kind}"
    elif roll < 0.76 and not long:
        place = voice.pick(words.PLACES)
        ask += f" [that happens|] {place[1]} {place[0]}" if voice.chance(0.3) else f" about {place[0]}"
    if long:
        told = stories.long_story(voice, kind=kind, thing=thing, name=name)
    else:
        told = stories.short_story(voice, kind=kind, thing=thing, name=name, friend_kind=friend_kind, place=place)
    return (voice.say(ask), told.text), told


def another_story(voice: Voice) -> Exchange:
    """A follow-up that wants one more story."""
    return voice.say(_AGAIN), stories.short_story(voice).text


def poem(voice: Voice) -> Exchange:
    """Rhymed couplets, sometimes about a subject that the user names."""
    slots = {"weather": voice.pick(words.WEATHER), "colour": voice.pick(words.COLOURS)}
    # The request decides the length, so that the end of a poem is never a matter of chance.
    size = voice.pick(("", "", "nice ", "short ", "little "))
    couplets = [
        voice.say(couplet, **slots) for couplet in voice.some(COUPLETS, 2 if size in ("short ", "little ") else 3)
    ]
    ask = f"[write|write me|please write|tell me|give me|can you write|I would like|make] a {size}poem"
    if voice.chance(0.6):
        subject = voice.pick(
            list(TOPICS) + words.UNKNOWN + [f"a {entry}" for entry in words.ANIMAL_HEROES + words.THINGS]
        )
        ask += f" about {subject}"
        first = voice.say(
            "[I think of {s} every day, / at work, at home and when I play.|"
            "I wrote a line, I wrote it true, / of {s} and me and you.|"
            "O {s}, how well I know, / you make the quiet hours glow.|"
            "Of {s} I want to sing, / for it is such a lovely thing.|"
            "I looked at {s} for long, / and in my heart began a song.]",
            s=subject,
        )
        couplets = [first, *couplets[:-1]]
    return voice.say(ask), polish("\n".join(couplets).replace(" / ", "\n"))


def joke(voice: Voice) -> Exchange:
    """A question joke."""
    asked, answer = voice.pick(JOKES)
    ask = (
        "[tell me a joke|do you know a joke|tell a joke|make me laugh|a joke, please|can you tell me a joke|"
        "say something funny|another joke]"
    )
    return voice.say(ask), voice.say("[here is one: |sure! |]") + voice.say(asked) + " " + answer


def riddle(voice: Voice) -> list[Exchange]:
    """A riddle in two turns: asked, then solved or given up."""
    asked, answer = voice.pick(RIDDLES)
    ask = voice.say("[tell me a riddle|ask me a riddle|give me a riddle|do you know a riddle|a riddle, please]")
    turns = [(ask, voice.say(asked))]
    if voice.chance(0.7):
        if voice.chance(0.5):
            guess = voice.say(f"[{answer}|is it {answer}?|it is {answer}|I think it is {answer}]")
            turns.append((guess, voice.say(f"[yes, that is right! |well done! |correct! ]It is {answer}.")))
        else:
            give_up = voice.say("[I do not know|what is it?|tell me the answer|I give up|what is the answer?]")
            turns.append((give_up, voice.say(f"the answer is {answer}.")))
    return turns


def rhyming_line(voice: Voice) -> Exchange:
    """A single couplet made from a rhyme family, for requests to rhyme."""
    left, right = voice.some(voice.pick(RHYMES), 2)
    return (
        voice.say(f"[make|write|give me] a rhyme with {left} and {right}"),
        voice.say(
            f"here is the word {left}, and there is the word {right}, / "
            "I wrote them both down [in the morning light|on a quiet night]."
        ),
    )
