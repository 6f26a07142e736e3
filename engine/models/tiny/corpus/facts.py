"""Questions and answers about simple facts, composed from the tables of `facts_data` and the texts in `data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.models.tiny.corpus import facts_data as data
from engine.models.tiny.corpus import words
from engine.models.tiny.corpus.files import QUESTIONS, TOPICS
from engine.models.tiny.corpus.grammar import Voice, listing, plural

Exchange = tuple[str, str]

# Nouns that take no article, and nouns of which there is one.
_SUBSTANCES = {"grass", "snow", "blood", "milk", "coal", "gold", "chocolate", "sand", "fire", "rain"}
_UNIQUE = {"sky", "sun", "sea", "night", "moon", "ocean"}


def animal(voice: Voice) -> Exchange:
    name, family, home, food, sound, feature, legs, young = voice.pick(data.ANIMALS)
    slots = {
        "a": name, "as": plural(name), "family": family, "home": home, "food": food, "sound": sound,
        "feature": feature, "legs": legs, "young": young, "leg": "leg" if legs == "one" else "legs",
    }  # fmt: skip
    pairs = (
        ("what [sound|noise] does a {a} make?", "a {a} {sound}."),
        ("what does a {a} say?", "a {a} {sound}."),
        ("where do {as} live?", "{as} live {home}."),
        ("where does a {a} live?", "a {a} lives {home}."),
        ("what do {as} eat?", "{as} eat {food}."),
        ("what does a {a} eat?", "a {a} eats {food}."),
        ("how many legs does a {a} have?", "a {a} has {legs} legs."),
        ("what is a [baby|young] {a} called?", "a [baby|young] {a} is called a {young}."),
        ("what is a {a}?", "a {a} is a {family} that lives {home}. [It has {feature}.|]"),
        ("what does a {a} look like?", "a {a} has {feature}."),
    )
    return _ask(voice, pairs, slots)


def animal_text(voice: Voice, name: str | None = None) -> Exchange:
    rows = [row for row in data.ANIMALS if row[0] == name] or data.ANIMALS
    kind, family, home, food, sound, feature, legs, young = voice.pick(rows)
    slots = {"a": kind, "as": plural(kind)}
    lines = [
        f"a {kind} is a {family}.", f"{plural(kind)} live {home}.", f"it has {feature}.", f"it eats {food}.",
        f"a {kind} {sound}.", f"it has {legs} legs.", f"a young {kind} is called a {young}.",
    ]  # fmt: skip
    chosen = [lines[0], *(line for line in lines[1:] if voice.chance(0.7))]
    question = voice.say(
        "[tell me about|describe|what do you know about|tell me something about|can you tell me about]"
        " [a {a}|{as}|the {a}]",
        **slots,
    )
    return question, voice.say(" ".join(chosen))


def food(voice: Voice) -> Exchange:
    name, colour, kind, taste = voice.pick(data.FOODS)
    pairs = (
        ("what colour is [the |a |]{f}?", "[the colour of {f} is|{f} is] {colour}."),
        ("what is {f}?", "{f} is a {kind}. It is {taste}."),
        ("how does {f} taste?", "{f} is {taste}."),
        ("what does a {f} taste like?", "it is {taste}."),
        ("[tell me about|describe] {f}", "{f} is a {kind}. Its colour is {colour}, and it tastes {taste}."),
    )
    return _ask(voice, pairs, {"f": name, "colour": colour, "kind": kind, "taste": taste})


def colour(voice: Voice) -> Exchange:
    thing, shade = voice.pick(data.COLOURS)
    article = "" if thing in _SUBSTANCES else "the " if thing in _UNIQUE else "a "
    question = (
        "[what colour is|what is the colour of|which colour is|what color is|what color has|tell me the colour of]"
        " {a}{t}?"
    )
    return _ask(voice, ((question, "{a}{t} is {shade}."),), {"a": article, "t": thing, "shade": shade})


def opposite(voice: Voice) -> Exchange:
    left, right = voice.pick(data.OPPOSITES)
    if voice.chance(0.5):
        left, right = right, left
    question = "[what is the opposite of|the opposite of|tell me the opposite of|which word is the opposite of] {l}?"
    return _ask(voice, ((question, "the opposite of {l} is {r}."),), {"l": left, "r": right})


def use(voice: Voice) -> Exchange:
    thing, purpose = voice.pick(data.USES)
    pairs = (
        ("what is a {t} [used for|for]?", "a {t} is used for {p}."),
        ("what do you do with a {t}?", "a {t} is used for {p}."),
        ("what [do I need|can I use] for {p}?", "you [need|can use] a {t} for {p}."),
        ("why do people [have|use] a {t}?", "people use a {t} for {p}."),
    )
    if thing == "scissors":
        return _ask(voice, (("what are scissors [used for|for]?", "scissors are used for {p}."),), {"p": purpose})
    return _ask(voice, pairs, {"t": thing, "p": purpose})


def job(voice: Voice) -> Exchange:
    name, task = voice.pick(data.JOBS)
    pairs = (
        ("what does a {j} do?", "a {j} {task}."),
        ("what is a {j}?", "a {j} is someone who {task}."),
        ("who {task}?", "a {j} {task}."),
        ("what is the [job|work] of a {j}?", "a {j} {task}."),
    )
    return _ask(voice, pairs, {"j": name, "task": task})


def country(voice: Voice) -> Exchange:
    name, capital, continent, language = voice.pick(data.COUNTRIES)
    slots = {"c": name, "cap": capital, "cont": continent, "lang": language}
    pairs = (
        ("[what is|what's|tell me|do you know] the capital of {c}?", "the capital of {c} is {cap}."),
        ("[what is|name|which city is] the capital [city |]of {c}?", "the capital of {c} is {cap}."),
        ("where is {c}?", "{c} is in {cont}."),
        ("[which|what] language do people speak in {c}?", "people in {c} speak {lang}."),
        ("[in which country is|where is] {cap}?", "{cap} is in {c}."),
        (
            "[tell me about|what do you know about] {c}",
            "{c} is a country in {cont}. Its capital is {cap}. People there speak {lang}.",
        ),
    )
    return _ask(voice, pairs, slots)


def calendar(voice: Voice) -> Exchange:
    kind, names = voice.pick((("day", data.DAYS), ("month", data.MONTHS), ("season", data.SEASONS)))
    at = voice.number(0, len(names) - 1)
    now, after, before = names[at], names[(at + 1) % len(names)], names[at - 1]
    slots = {
        "k": kind,
        "now": now,
        "after": after,
        "before": before,
        "all": listing(names),
        "n": words.NUMBER_WORDS[len(names)],
    }
    pairs = (
        ("[which|what] {k} comes after {now}?", "{after} comes after {now}."),
        ("[which|what] {k} comes before {now}?", "{before} comes before {now}."),
        (
            "[name|list|tell me|what are] the {k}s[ of the week| of the year|]"
            if kind == "day"
            else "[name|list|what are] the {k}s",
            "the {k}s are {all}.",
        ),
        ("how many {k}s are there?", "there are {n} {k}s[ in a week|]." if kind == "day" else "there are {n} {k}s."),
    )
    return _ask(voice, pairs, slots)


def rhyme(voice: Voice) -> Exchange:
    family = voice.pick(data.RHYMES)
    left, *rest = voice.some(family, 3)
    slots = {"l": left, "r": rest[0], "both": listing(rest)}
    pairs = (
        ("what rhymes with {l}?", "[the word {r} rhymes with {l}.|{both} rhyme with {l}.]"),
        ("[give me|tell me] a [word that rhymes with|rhyme for] {l}", "{r} rhymes with {l}."),
    )
    return _ask(voice, pairs, slots)


def naming(voice: Voice) -> Exchange:
    kind, *examples = voice.pick(data.KINDS)
    count = voice.number(2, 5)
    slots = {
        "k": kind,
        "n": words.NUMBER_WORDS[count] if voice.chance(0.7) else str(count),
        "list": listing(voice.some(examples, count)),
        "one": voice.pick(examples),
    }
    pairs = (
        ("[name|list|tell me|give me|can you name] {n} {k}", "[here are {n} {k}:|{n} {k} are] {list}."),
        ("give me an example of {k}", "{one} is one example of {k}."),
    )
    return _ask(voice, pairs, slots)


def category(voice: Voice) -> Exchange:
    kind, *examples = voice.pick(data.KINDS[1:])
    item = voice.pick(examples)
    right = voice.chance(0.5)
    other = kind if right else voice.pick([row[0] for row in data.KINDS[1:] if row[0] != kind and item not in row])
    name = (
        item if item[0].isupper() else plural(item) if kind not in ("drinks", "metals", "sports", "colours") else item
    )
    verb = "is" if name == item else "are"
    question = f"[does|do] {name} belong to the {other}?".replace("[does|do]", "does" if verb == "is" else "do")
    answer = f"yes, {name} {verb} among the {kind}." if right else f"no, {name} {verb} among the {kind}."
    return voice.say(question), voice.say(answer)


def spelling(voice: Voice) -> Exchange:
    word = voice.pick(
        [entry for entry in words.THINGS + words.ANIMAL_HEROES + words.HERO_QUALITIES if " " not in entry]
    )
    letters = "-".join(word)
    if voice.chance(0.3):
        return voice.say("what is the first letter of {w}?", w=word), voice.say(
            "the first letter of {w} is {l}.", w=word, l=word[0].upper()
        )
    return voice.say("[how do you spell|spell|please spell|how is] {w}?", w=word).replace(
        f"How is {word}", f"How is {word} spelled"
    ), f"It is spelled {letters}."


def topic_text(voice: Voice, topic: str | None = None) -> Exchange:
    topic = topic or voice.pick(list(TOPICS))
    sentences = TOPICS[topic]
    kept = sorted(voice.some(range(1, len(sentences)), voice.number(2, len(sentences) - 1)))
    bare = topic.removeprefix("the ").removeprefix("a ") if voice.chance(0.15) else topic
    verb = "is" if topic.startswith(("the ", "a ")) or not topic.endswith("s") or topic == "happiness" else "are"
    question = voice.say(
        "[tell me about|tell me about|tell me something about|what do you know about|explain|describe|"
        "write about|talk about|can you tell me about|what can you tell me about|I want to know more about|"
        "tell me more about|what {v}|let us talk about] {t}",
        t=bare,
        v=verb,
    )
    return question, " ".join([sentences[0], *(sentences[index] for index in kept)])


def question(voice: Voice) -> Exchange:
    template, answer = voice.pick(QUESTIONS)
    return voice.say(template), voice.say(answer)


def _ask(voice: Voice, pairs: Sequence[Exchange], slots: dict[str, str]) -> Exchange:
    asked, answer = voice.pick(pairs)
    return voice.say(asked, **slots), voice.say(answer, **slots)


# Weighted by repetition: the kinds with more content come up more often.
KINDS: tuple[Callable[[Voice], Exchange], ...] = (
    animal, animal, animal, animal_text, food, colour, colour, opposite, opposite, use, use, job, country, country,
    country, country, calendar, calendar, calendar,
    rhyme, naming, naming, category, spelling, topic_text, topic_text, topic_text, topic_text, question, question,
    question, question,
)  # fmt: skip


def exchange(voice: Voice) -> Exchange:
    """A random question about simple facts, with its answer."""
    return voice.pick(KINDS)(voice)
