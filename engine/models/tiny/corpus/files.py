"""Readers for the text files in `data`: word lists, phrases, tables, exchanges, topics and plots."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_DATA = Path(__file__).parent / "data"


class Plot(NamedTuple):
    """Beats in order, each a list of alternatives, and the questions that a reader of the story can answer."""

    beats: list[list[str]]
    questions: list[tuple[str, str]]


def _lines(name: str) -> list[str]:
    return [line for line in (_DATA / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def sections(name: str) -> dict[str, list[str]]:
    """The lines under each `# heading`."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in _lines(name):
        if line.startswith("# "):
            current = found.setdefault(line[2:], [])
        else:
            current.append(line)
    return found


def word_lists(name: str) -> dict[str, list[str]]:
    """The entries under each heading; entries are separated by commas and may hold several words."""
    return {
        heading: [entry.strip() for entry in " ".join(lines).split(",")] for heading, lines in sections(name).items()
    }


def tables(name: str) -> dict[str, list[list[str]]]:
    """The rows under each heading; cells are separated by `|`."""
    return {
        heading: [[cell.strip() for cell in line.split("|")] for line in lines]
        for heading, lines in sections(name).items()
    }


def _pair(line: str) -> tuple[str, str]:
    question, answer = line.split("=>")
    return question.strip(), answer.strip()


def _topics() -> dict[str, list[str]]:
    """Lines of the form `topic: Sentence. Sentence.`"""
    topics = {}
    for line in _lines("topics.txt"):
        topic, text = line.split(":", 1)
        topics[topic] = [sentence + "." for sentence in text.strip().rstrip(".").split(". ")]
    return topics


def _plots() -> list[Plot]:
    """`- ` opens a beat, an indented line is one more alternative for it, `? ` is a question with its answer."""
    plots = []
    for lines in sections("plots.txt").values():
        plot = Plot([], [])
        for line in lines:
            if line.startswith("- "):
                plot.beats.append([line[2:]])
            elif line.startswith("? "):
                plot.questions.append(_pair(line[2:]))
            else:
                plot.beats[-1].append(line.strip())
        plots.append(plot)
    return plots


SMALLTALK = [_pair(line) for line in _lines("smalltalk.txt")]
CHATTER = [_pair(line) for line in _lines("chatter.txt")]
QUESTIONS = [_pair(line) for line in _lines("questions.txt")]
JOKES = [_pair(line) for line in _lines("jokes.txt")]
RIDDLES = [_pair(line) for line in _lines("riddles.txt")]
COUPLETS = _lines("couplets.txt")
TOPICS = _topics()
PLOTS = _plots()
