"""Decides, iteration by iteration, which tokens run next, and keeps the page accounting in step. Imports no torch.

Iteration-level scheduling (Orca, OSDI'22) with chunked prefill: the decodes of all running sequences come first, then
prompt chunks in order of (priority, arrival) until the token budget is spent. Admission stops at the first sequence
that does not fit, it never skips, so nobody is overtaken within a priority.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Callable
from itertools import islice
from operator import attrgetter

from engine.batch import Batch, StepOutput, TokenLogprob
from engine.batching import Layout, build_batch
from engine.config import SchedulerConfig
from engine.emissions import drawn, emission, newly_scored
from engine.kv.pages import PagePool
from engine.kv.tier import Tier
from engine.lanes import Lanes
from engine.offload import Offload
from engine.pace import Pace
from engine.parts import Parts, Prompts
from engine.policy import ADMISSION_POLICIES, AdmissionPolicy, Demand, Supply, choose_victim
from engine.prefixes import Prefixes
from engine.returning import Returning
from engine.sequence import Emission, FinishReason, Order, Sequence, Status
from engine.stats import Counters, EngineStats

_by_order: Callable[[Sequence], Order] = attrgetter("order")


class Scheduler:
    """`plan()` gives the next batch, `commit()` takes its output; between the two, sequences may be added and aborted.

    Invariants: `waiting` and `running` are sorted by order and disjoint. A running sequence has pages for every token
    it has, except the one page a decode may need next, and is in a lane for as long as it has them; a waiting sequence
    has none. Samples after the first of a request are held back until the first has computed the prompt's full pages,
    or loaded them, and then find those.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        page_tokens: int,
        *,
        admits: AdmissionPolicy | None = None,
        tier: Tier | None = None,
        depth: int = 1,
    ) -> None:
        """`depth`: batches that are to be in flight at once, each with its part of the sequences."""
        self._config = config
        self._parts = Parts(depth)
        self._admits = admits or ADMISSION_POLICIES[config.admission]
        self._page_tokens = page_tokens
        self.pool = pool
        self.offload = Offload(pool, page_tokens, tier)
        self._prefixes = Prefixes(pool.index, self.offload, page_tokens)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._siblings: dict[str, list[Sequence]] = {}
        patience_s = math.inf if config.max_stall_s is None else config.max_stall_s
        self._returning = Returning(self.offload.is_loading, patience_s)
        self._pace = Pace(config.max_stall_s)
        self._sequences: dict[str, list[Sequence]] = {}
        self._lanes = Lanes(page_tokens)
        self._in_flight: deque[Layout] = deque()
        self._step = 0
        self._outstanding = 0
        self._reserved = 0
        self._counters = Counters()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting) + sum(map(len, self._siblings.values())),
            num_pages=self.pool.num_pages,
            num_free_pages=self.pool.num_free,
            num_outstanding_tokens=self._outstanding,
            **vars(self._counters),
            **self.offload.totals(),
        )

    # -- what comes in -----------------------------------------------------------------------------------------------

    def add(self, sequences: list[Sequence]) -> None:
        """Queues the samples of one request, in order of sample index. The pool must be able to hold each one alone."""
        first, *rest = sequences
        assert self._pages_at_most(first) <= self.pool.num_pages, "can never be scheduled"
        self._sequences[first.request.request_id] = sequences
        self._outstanding += sum(s.num_outstanding for s in sequences)
        insort(self.waiting, first, key=_by_order)
        if first.request.given:
            self._returning.add(sequences)
        if rest:
            self._siblings[first.request.request_id] = rest

    def abort(self, request_id: str) -> None:
        """Ends all samples of a request and frees their pages now, or when the batch they are in comes back.

        A request that is unknown or already finished is not an error: aborts race with the last token.
        """
        for sequence in self._sequences.get(request_id, ()):
            if sequence.status is not Status.FINISHED:
                self._finish(sequence)
        self._sequences.pop(request_id, None)
        self._siblings.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self._in_flight or self.offload.busy)

    # -- one iteration -----------------------------------------------------------------------------------------------

    def plan(self) -> Batch | None:
        """The next iteration, or None when nothing can run before a batch in flight, or a page on its way, arrives."""
        self.settle()
        self._let_ahead()
        near = self._returning.near(self.running)
        decodes = self._decodes(near if self._returning.come_first(near) else self.running)
        # Before anybody is let in: what was preempted just now would be gone, and was to be copied.
        self.offload.send()
        prompts = self._prompts(len(decodes))
        self._prefill_running(near, prompts)
        self._admit(prompts)
        chunks = prompts.chunks
        if near and not decodes and not chunks and not self._in_flight and not self.offload.busy:
            decodes = self._decodes(self.running)  # none of those that all wait for has the pages to run
        if not decodes and not chunks:
            stuck = self.waiting and not self._in_flight and not self.offload.busy
            assert not stuck, "sequences wait, and nothing will ever let them in"
            return None
        self._step += 1
        layout = build_batch(self._step, self._lanes, decodes, chunks)
        for sequence in decodes:
            sequence.num_computed += 1
            sequence.in_flight = True
        for sequence, count in chunks:
            sequence.num_computed += count
            sequence.in_flight = True
        self._outstanding -= layout.batch.num_tokens
        self._in_flight.append(layout)
        return layout.batch

    def commit(self, output: StepOutput) -> list[Emission]:
        """Books what the oldest planned batch brought back; finished sequences free their pages here."""
        layout = self._in_flight.popleft()
        batch = layout.batch
        assert batch.step == output.step, f"step {output.step} came back, {batch.step} was expected"
        counters = self._counters
        counters.steps_total += 1
        counters.last_step_tokens = batch.num_tokens
        self.offload.observe(batch.positions, output.stats.seconds)
        self._pace.observe(batch.num_tokens, output.stats.seconds)
        self._lanes.append(layout.drawing_lanes, output.token_ids)
        scored = newly_scored(layout, output)
        plain = not output.failed and not scored
        emissions: list[Emission] = []
        for index, (sequence, token_id, logprob) in enumerate(
            zip(layout.drawing, output.token_ids, output.logprobs, strict=True)
        ):
            sequence.in_flight = False
            if sequence.status is Status.FINISHED:  # aborted while it was in flight
                self._release(sequence)
                continue
            if sequence.num_computed - sequence.num_indexed >= self._page_tokens and index not in output.failed:
                self._prefixes.index(sequence)
            if self._siblings:
                self._fork_siblings(sequence)
            self._returning.discard(sequence)
            tokens, goes_on = sequence.tokens, token_id not in sequence.stop_token_ids
            plain_here = logprob is None and plain and not sequence.num_cached
            if goes_on and len(tokens) + 1 < sequence.max_len and plain_here:
                tokens.append(token_id)
                counters.generation_tokens_total += 1
                emissions.append(Emission(sequence.request.request_id, sequence.order.sample_index, (token_id,)))
            else:
                emissions.append(self._book(sequence, output, index, scored.get(sequence.sequence_id, ())))
        for sequence in layout.partial:
            sequence.in_flight = False
            if sequence.status is Status.FINISHED:
                self._release(sequence)
                continue
            self._prefixes.index(sequence)
            if fresh := scored.get(sequence.sequence_id):
                emissions.append(emission(sequence, prompt_logprobs=fresh))
        return emissions

    def _decodes(self, running: list[Sequence]) -> list[Sequence]:
        """Every one of these running sequences with one token to run, in order, with a page for it."""
        decodes: list[Sequence] = []
        page_tokens = self._page_tokens
        most = self._parts.decodes(self.running)
        # A copy: preemption removes sequences from `running`, always from behind the one at hand.
        for sequence in list(running):
            if len(decodes) == most:
                break
            length = len(sequence.tokens)
            if sequence.in_flight or length - sequence.num_computed != 1 or sequence.status is not Status.RUNNING:
                continue
            if len(sequence.pages) * page_tokens >= length or self._grow(sequence):
                decodes.append(sequence)
        return decodes

    def _prompts(self, num_decodes: int) -> Prompts:
        """Room for prompts beside so many decodes."""
        most = self._config.max_batch_tokens
        waited_for = num_decodes or self._returning
        budget = min(most - num_decodes, self._pace.tokens(most)) if waited_for else most
        places = islice(self.waiting, self._config.max_sequences - len(self.running))
        least = self._pace.least_tokens() if num_decodes and not self._returning else None
        return self._parts.prompts(self.running, places, budget, least, num_decodes)

    def _prefill_running(self, near: list[Sequence], prompts: Prompts) -> None:
        """Adds running sequences, in order.

        Nobody else has a place while streams that go on from elsewhere are about to: a chunk would cost each of them
        its time.
        """
        for sequence in near or self.running:
            if prompts.left <= 0:
                break
            if not sequence.in_flight and sequence.num_remaining > 1:
                prompts.add(sequence)
        if near:
            prompts.close()

    def _let_ahead(self) -> None:
        """Lets in whoever comes before a sequence that runs, though prompts take all tokens.

        The other samples of a request have next to nothing to compute, and the pages of streams that go on from
        elsewhere can come meanwhile.
        """
        while self.waiting and self._is_ahead(self.waiting[0]) and self._let_in(self.waiting[0]):
            pass

    def _is_ahead(self, sequence: Sequence) -> bool:
        return sequence in self._returning or (bool(self.running) and sequence.order < self.running[-1].order)

    def _admit(self, prompts: Prompts) -> None:
        while self.waiting and prompts.left > 0 and self._let_in(sequence := self.waiting[0]):
            if not sequence.in_flight:
                prompts.add(sequence)

    def _let_in(self, sequence: Sequence) -> bool:
        """Starts the next sequence that waits, and the loading of what the tier has of it; False if it does not fit."""
        if len(self.running) >= self._config.max_sequences:
            return False
        found = self._prefixes.find(sequence)
        need = self._pages_for(len(sequence.tokens)) - len(found)
        # Pages that are found and idle are free ones too, and are not any more once they are shared.
        now = need + self.pool.count_idle(found)
        if now > self.pool.num_free or not self._admits(Demand(now, self._pages_at_most(sequence)), self._supply()):
            return False
        self.pool.share(found)
        sequence.pages = found + self.pool.allocate(need)
        self._start(sequence, len(found) * self._page_tokens)
        # It waits for what the tier has of it as if it were in flight.
        sequence.in_flight = self._prefixes.load(sequence, len(found))
        return True

    def settle(self, timeout_s: float = 0.0) -> None:
        """Takes back what the tier has finished with; waits up to `timeout_s` for the first."""
        for sequence, num_pages in self.offload.settle(timeout_s):
            sequence.in_flight = False
            if sequence.status is Status.FINISHED:  # aborted meanwhile
                self._release(sequence)
                continue
            tokens = num_pages * self._page_tokens
            sequence.num_computed += tokens
            self._outstanding -= tokens
            self._prefixes.index(sequence, loaded=True)
            self._fork_siblings(sequence)
            if self._counts_prompt(sequence):
                self._counters.prefix_hits_total += tokens
                sequence.num_cached += tokens

    def _start(self, sequence: Sequence, num_found: int) -> None:
        """From waiting to running, with pages, the first `num_found` tokens of which are computed."""
        self.waiting.remove(sequence)
        sequence.num_computed = sequence.num_indexed = num_found
        self._outstanding -= num_found
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_by_order)
        self._lanes.enter(sequence)
        self._reserved += self._pages_at_most(sequence)
        if self._counts_prompt(sequence):
            self._counters.prompt_tokens_total += sequence.num_prompt
            self._counters.prefix_queries_total += sequence.num_prompt
            self._counters.prefix_hits_total += num_found
            sequence.num_cached = num_found

    @staticmethod
    def _counts_prompt(sequence: Sequence) -> bool:
        """Whether this is the one time that its prompt's tokens are counted."""
        return sequence.num_preemptions == 0 and sequence.sample_index == 0 and not sequence.request.given

    def _leave(self, sequence: Sequence) -> None:
        """Out of running."""
        self.running.remove(sequence)
        self._reserved -= self._pages_at_most(sequence)

    def _book(self, sequence: Sequence, output: StepOutput, index: int, scored: tuple[TokenLogprob, ...]) -> Emission:
        """Appends the token that sample row `index` drew, and ends the sequence if that was its last."""
        if index in output.failed:
            self._finish(sequence)
            return emission(sequence, finish_reason=FinishReason.ERROR, error=output.failed[index])
        token_id, logprob = output.token_ids[index], output.logprobs[index]
        sequence.tokens.append(token_id)
        self._counters.generation_tokens_total += 1
        cached, sequence.num_cached = sequence.num_cached, 0
        reason = sequence.finish_reason_after(token_id)
        if reason is not None:
            self._finish(sequence)
        return drawn(sequence, token_id, logprob, scored=scored, finish_reason=reason, cached_tokens=cached)

    # -- pages -------------------------------------------------------------------------------------------------------

    def _grow(self, sequence: Sequence) -> bool:
        """Makes sure of the page that the next token is written to; False if the sequence cannot run now."""
        if len(sequence.pages) * self._page_tokens >= len(sequence.tokens):
            return True
        if not self._make_room(sequence):
            # Pages that come back by themselves are waited for; otherwise earlier sequences need these.
            if not self.offload.gives_back(sequence) and not self._in_flight:
                self._preempt(sequence)
            return False
        sequence.pages.extend(self.pool.allocate(1))
        self._lanes.add_page(sequence)
        return True

    def _make_room(self, beneficiary: Sequence) -> bool:
        """Takes the pages of sequences that come later until one is free; False if there is nobody to take from."""
        while self.pool.num_free == 0:
            victim = choose_victim(self.running, beneficiary)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Drops a running sequence's pages; its tokens stay. Those whose pages were taken meanwhile come from the tier,
        or are prefilled again, when it is next in order."""
        self.offload.preempted(sequence.pages)
        self._release(sequence)
        self._outstanding += sequence.num_computed
        sequence.num_computed = sequence.num_indexed = 0
        self._counters.preemptions_total += 1
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self._leave(sequence)
        insort(self.waiting, sequence, key=_by_order)

    def _fork_siblings(self, first: Sequence) -> None:
        """Lets the other samples of a request in once they find the prompt's full pages.

        A partly filled page is computed again by each rather than copied on write.
        """
        num_pages = first.num_prompt // self._page_tokens
        if first.num_computed < num_pages * self._page_tokens:
            return
        for sequence in self._siblings.pop(first.request.request_id, ()):
            sequence.keys = self._prefixes.keys(first, num_pages)
            insort(self.waiting, sequence, key=_by_order)

    def _finish(self, sequence: Sequence) -> None:
        self._returning.discard(sequence)
        self._outstanding -= sequence.num_outstanding
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence in self.waiting:  # a sibling that was not let in yet is in neither
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        if not sequence.in_flight:
            self._release(sequence)
        elif self.offload.is_loading(sequence):
            self.offload.give_up(sequence)
        samples = self._sequences.get(sequence.request.request_id, ())
        if all(s.status is Status.FINISHED for s in samples):
            self._sequences.pop(sequence.request.request_id, None)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        if sequence.lane >= 0:
            self._lanes.leave(sequence)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def _pages_at_most(self, sequence: Sequence) -> int:
        return self._pages_for(sequence.num_prompt + sequence.max_tokens)

    def _supply(self) -> Supply:
        return Supply(self.pool.num_pages, self.pool.num_free, len(self.running), self._reserved)
