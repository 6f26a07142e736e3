"""The scheduler's choices as functions of numbers: who is admitted, who is preempted, how long a prompt chunk is.

Nothing here holds state or knows pages, tensors or requests beyond the values passed in.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.config import Admission
from engine.sequence import Sequence

LEAST_CHUNK = 128
"""Tokens of a prompt below which arithmetic on a CPU is no longer at its best: each costs more in shorter chunks."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Pages one waiting sequence asks for."""

    now: int
    """Free pages that its present tokens take: new ones, and idle ones that hold some of them already."""
    at_most: int
    """All pages it can ever hold: prompt and max_tokens."""


@dataclass(frozen=True, slots=True)
class Supply:
    """Pages there are."""

    total: int
    free: int
    num_running: int
    reserved: int
    """Sum of `Demand.at_most` over the running sequences."""


AdmissionPolicy = Callable[[Demand, Supply], bool]


def admit_optimistic(demand: Demand, supply: Supply) -> bool:
    """Admits while the present tokens fit, with a page to grow for every running sequence.

    Outputs are mostly shorter than max_tokens, so holding pages for them would leave the pool half empty; when the bet
    is lost, a sequence is preempted. The spare pages keep that from happening within the next few iterations.
    """
    if supply.num_running == 0:
        return demand.now <= supply.free
    return demand.now + supply.num_running <= supply.free


def admit_reserved(demand: Demand, supply: Supply) -> bool:
    """Orca's reservation (OSDI'22, algorithm 1): max_tokens pages are set aside at admission, nothing is preempted."""
    return supply.reserved + demand.at_most <= supply.total


ADMISSION_POLICIES: dict[Admission, AdmissionPolicy] = {"optimistic": admit_optimistic, "reserve": admit_reserved}


def choose_victim(holders: Iterable[Sequence], beneficiary: Sequence) -> Sequence | None:
    """Who gives its pages to `beneficiary`: the last in order, if it comes after the beneficiary.

    The rule that only later sequences yield is what makes every request finish: the first in order can always take
    pages from all others, and when it is done the next one is first.
    """
    return last_after((s for s in holders if s.pages and not s.in_flight), beneficiary)


def last_after(sequences: Iterable[Sequence], beneficiary: Sequence) -> Sequence | None:
    """The last of them in order, if it comes after the beneficiary."""
    later = (s for s in sequences if s.order > beneficiary.order)
    return max(later, key=lambda s: s.order, default=None)


def chunk_tokens(num_remaining: int, budget: int) -> int:
    """Tokens of a prompt to run in this iteration: as many as the token budget still has."""
    return min(num_remaining, budget)


def batch_share(num_decoding: int, depth: int) -> int:
    """Sequences that decode in one of `depth` batches in flight: an equal part of all, so that each stage of a pipeline
    has as much to do as the next."""
    return -(-num_decoding // depth)


def prompt_share(prompts: Iterable[int], depth: int, budget: int) -> int:
    """Tokens of prompts in one of `depth` batches in flight, of sequences that have so many left to run.

    An equal part for each batch, as a long chunk in one would keep all others waiting at every stage. No more parts
    than sequences: one is in one batch at a time, and to cut a lone one finer would gain nothing.
    """
    total = count = 0
    for tokens in prompts:
        total += tokens
        count += 1
        if total >= budget * depth and count >= depth:
            break
    parts = max(1, min(depth, count))
    return min(budget, max(LEAST_CHUNK, -(-total // parts)))


def spread_share(prompts: Iterable[int], batches: int, least: int, budget: int) -> int:
    """Tokens of prompts in a batch of decodes, of sequences that have so many left to run and could run now: what is
    left of all of them, spread over so many batches, but `least` at least.

    A stage of a pipeline waits for the difference between two batches that follow each other. Spread, prompts that come
    now and then make batches that change little by little, in place of a long one here and there.
    """
    return min(budget, max(least, -(-sum(prompts) // batches)))


def unfelt_tokens(most: int, token_seconds: float, max_stall_s: float) -> int:
    """Tokens of prompts in an iteration that streams wait for: `most`, halved until they take no longer than allowed.

    Halves, so that noise in what a token costs does not make every iteration a different one; none below LEAST_CHUNK.
    """
    tokens = most
    while tokens // 2 >= LEAST_CHUNK and tokens * token_seconds > max_stall_s:
        tokens //= 2
    return tokens
