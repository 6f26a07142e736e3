"""Runs one API request on the backend and turns what comes back into pieces of text.

Both endpoints and both transports (streamed or not) stand on this. Owns the journals, the metering and the closing of
the backend's generators; knows nothing of JSON. With a log the pieces come in an order that depends on the tokens
alone, and a generation that begins with a log that is not empty repeats its pieces and goes on from there.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from deployments.api.meter import RequestMeter
from deployments.backend import Backend, GenerationFailed
from deployments.journal import Journal, Usage
from deployments.samples import Piece, Sample, TextOptions, joined
from deployments.streams.token_log import TokenLog
from deployments.streams.turns import Turns, steps_of
from deployments.text import TextModel
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason, Request

REPLAYED_AT_ONCE = 64
"""Entries of a log between which other streams of the event loop get their turn."""
READ_AHEAD = 64
"""Emissions of several prompts that may wait for the client: as for one prompt, the rest waits at the backend."""


class Generation:
    """The prompts of one API request while they are answered. Choice `prompt * n + sample` answers a prompt."""

    def __init__(
        self,
        backend: Backend,
        text: TextModel,
        requests: Sequence[Request],
        options: TextOptions,
        meter: RequestMeter,
        log: TokenLog | None = None,
    ) -> None:
        """`log`: what has come of it already, and where what comes is added; None if nobody will ask for that."""
        self.requests = tuple(requests)
        self.prompt_logprobs: tuple[list[TokenLogprob], ...] = tuple([] for _ in requests)
        """Per prompt, of its tokens from the second on; complete before the first piece of any of its choices."""
        self._backend = backend
        self._meter = meter
        self._n = requests[0].params.n
        self._journals = tuple(map(Journal, requests))
        self._unfinished = len(requests) * self._n
        self._samples = tuple(Sample(index, text, options) for index in range(self._unfinished))
        self._early: dict[int, list[Emission]] = {}
        """Emissions of a prompt whose own logprobs are not complete yet."""
        self._log = log
        self._turns = None if log is None else Turns(self._unfinished)

    @property
    def num_choices(self) -> int:
        return len(self._samples)

    @property
    def usage(self) -> Usage:
        return sum((journal.usage for journal in self._journals), Usage())

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Raises what the backend raises, or GenerationFailed. Closing it aborts what is unfinished."""
        if self._log:
            self._meter.resumed(self.requests)
        else:
            self._meter.submitted(self.requests)
        failed = True
        try:
            if self._log:
                async for piece in self._replay(self._log):
                    yield piece
            if self._unfinished:
                async with aclosing(self._emissions()) as emissions:
                    async for prompt, emission in emissions:
                        for ready in self._in_order(prompt, emission):
                            for piece in self._pieces_of(prompt, ready):
                                yield piece
                        if not self._unfinished:
                            break
            if self._unfinished:
                raise GenerationFailed("the backend ended the answer before it was finished")
            failed = False
        except (GeneratorExit, asyncio.CancelledError):
            failed = False  # The client left, or needs no more: unfinished choices were aborted.
            raise
        finally:
            self._meter.close(failed=failed)

    async def _replay(self, log: TokenLog) -> AsyncGenerator[Piece]:
        """The pieces of what came before."""
        for count, (choice, entry) in enumerate(log, start=1):
            if entry.prompt_logprobs:
                self.prompt_logprobs[choice // self._n].extend(entry.prompt_logprobs)
                continue
            assert self._turns is not None
            self._turns.put(choice, entry)
            taken = self._turns.take()
            assert taken is not None and taken[0] == choice, "a log is in order"
            piece = self._feed(choice, entry)
            self._meter.replayed(choice, len(piece.token_ids))
            if piece.finish_reason is not None:
                self._meter.ended_elsewhere(choice)
            yield piece
            if count % REPLAYED_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _rest(self) -> Iterator[tuple[int, Request]]:
        """What is still to be generated, by prompt."""
        for prompt, (request, journal) in enumerate(zip(self.requests, self._journals, strict=True)):
            given = tuple(
                journal.token_ids(sample) if journal.reason(sample) is None else None for sample in range(self._n)
            )
            num_scored = len(self.prompt_logprobs[prompt])
            if all(tokens is None for tokens in given):
                continue
            begun = num_scored > 0 or any(tokens is None or tokens for tokens in given)
            yield prompt, replace(request, given=given, num_scored=num_scored) if begun else request

    async def _emissions(self) -> AsyncGenerator[tuple[int, Emission]]:
        """Emissions of all prompts that have not ended, with the prompt each belongs to."""
        rest = list(self._rest())
        if len(rest) > 1:
            streams = [(prompt, self._backend.generate(request)) for prompt, request in rest]
            async with aclosing(_merged(streams)) as merged:
                async for item in merged:
                    yield item
            return
        for prompt, request in rest:
            async with aclosing(self._backend.generate(request)) as stream:
                async for emission in stream:
                    yield prompt, emission

    def _in_order(self, prompt: int, emission: Emission) -> Sequence[Emission]:
        """Collects the prompt's logprobs, and keeps the answer back until they are complete."""
        request = self.requests[prompt]
        if request.params.prompt_logprobs is None:
            return (emission,)
        collected = self.prompt_logprobs[prompt]
        collected.extend(emission.prompt_logprobs)
        waiting = self._early.setdefault(prompt, [])
        waiting.append(emission._replace(prompt_logprobs=()))
        if len(collected) < len(request.prompt_token_ids) - 1 and emission.finish_reason is not FinishReason.ERROR:
            return ()
        if emission.prompt_logprobs and self._log is not None:
            self._log.append(prompt * self._n, Emission("", 0, prompt_logprobs=tuple(collected)))
        self._early[prompt] = []
        return waiting

    def _pieces_of(self, prompt: int, emission: Emission) -> Iterator[Piece]:
        """The pieces that an emission makes, or makes possible; it may have to wait for its turn."""
        if emission.finish_reason in (FinishReason.ERROR, FinishReason.ABORT, FinishReason.MOVED):
            raise GenerationFailed(emission.error or "the generation was aborted by the server")
        choice = prompt * self._n + emission.sample_index
        if not (emission.token_ids or emission.finish_reason):
            return  # Prompt logprobs alone.
        if self._log is None or self._turns is None:
            if not self._samples[choice].finished:
                yield self._count(choice, self._feed(choice, emission))
            return
        for step in steps_of(emission):
            self._turns.put(choice, step)
        while (taken := self._turns.take()) is not None:
            self._log.append(*taken)
            yield self._count(taken[0], self._feed(*taken))

    def _feed(self, choice: int, emission: Emission) -> Piece:
        """The piece an emission makes of an unfinished choice."""
        prompt, sample_index = divmod(choice, self._n)
        piece = self._samples[choice].feed(emission)
        journal = self._journals[prompt]
        journal.cached_tokens += emission.cached_tokens
        journal.give(sample_index, piece.token_ids)
        if piece.finish_reason is not None:
            journal.finish(sample_index, piece.finish_reason)
            self._unfinished -= 1
            if self._turns is not None:
                # Tokens drawn after a stop string, before the backend heard of it, are dropped from here on.
                self._turns.finish(choice)
        return piece

    def _count(self, choice: int, piece: Piece) -> Piece:
        if piece.token_ids:
            self._meter.tokens(choice, len(piece.token_ids))
        if piece.finish_reason is not None:
            self._meter.finished(choice, piece.finish_reason)
        return piece


async def _merged(streams: Sequence[tuple[int, AsyncGenerator[Emission]]]) -> AsyncGenerator[tuple[int, Emission]]:
    """Interleaves numbered streams as they come. The first failure ends them all; so does closing this one."""
    arrived: asyncio.Queue[tuple[int, Emission | BaseException | None]] = asyncio.Queue(READ_AHEAD)

    async def pump(index: int, stream: AsyncGenerator[Emission]) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(stream):
                async for emission in stream:
                    await arrived.put((index, emission))
        except Exception as error:
            end = error
        await arrived.put((index, end))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in streams]
    try:
        running = len(tasks)
        while running:
            index, item = await arrived.get()
            if isinstance(item, Emission):
                yield index, item
            elif item is None:
                running -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(generation: Generation) -> list[Piece]:
    """The complete answer, one piece per choice, in order of index."""
    parts: list[list[Piece]] = [[] for _ in range(generation.num_choices)]
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            parts[piece.index].append(piece)
    return [joined(choice) for choice in parts]
