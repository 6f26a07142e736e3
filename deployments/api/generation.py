"""Runs one API request on the backend and turns what comes back into pieces of text, in order of arrival.

Both endpoints and both transports (streamed or not) stand on this. Owns the journals, the metering and the closing of
the backend's generators; knows nothing of JSON.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deployments.api.meter import RequestMeter
from deployments.backend import Backend, GenerationFailed
from deployments.journal import Journal, Usage
from deployments.samples import Piece, Sample, TextOptions, joined
from deployments.text import TextModel
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason, Request


class Generation:
    """The prompts of one API request while they are answered. Choice `prompt * n + sample` answers a prompt."""

    def __init__(
        self, backend: Backend, text: TextModel, requests: Sequence[Request], options: TextOptions, meter: RequestMeter
    ) -> None:
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

    @property
    def num_choices(self) -> int:
        return len(self._samples)

    @property
    def usage(self) -> Usage:
        return sum((journal.usage for journal in self._journals), Usage())

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Raises what the backend raises, or GenerationFailed. Closing it aborts what is unfinished."""
        self._meter.submitted(self.requests)
        failed = True
        try:
            async with aclosing(self._emissions()) as emissions:
                async for prompt, emission in emissions:
                    for ready in self._in_order(prompt, emission):
                        piece = self._feed(prompt, ready)
                        if piece is not None:
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

    async def _emissions(self) -> AsyncGenerator[tuple[int, Emission]]:
        """Emissions of all prompts, with the prompt each belongs to."""
        if len(self.requests) > 1:
            async with aclosing(_merged([self._backend.generate(request) for request in self.requests])) as merged:
                async for item in merged:
                    yield item
            return
        async with aclosing(self._backend.generate(self.requests[0])) as stream:
            async for emission in stream:
                yield 0, emission

    def _in_order(self, prompt: int, emission: Emission) -> list[Emission]:
        """Collects the prompt's logprobs, and keeps the answer back until they are complete."""
        request = self.requests[prompt]
        if request.params.prompt_logprobs is None:
            return [emission]
        collected = self.prompt_logprobs[prompt]
        collected.extend(emission.prompt_logprobs)
        waiting = self._early.setdefault(prompt, [])
        waiting.append(emission)
        if len(collected) < len(request.prompt_token_ids) - 1 and emission.finish_reason is not FinishReason.ERROR:
            return []
        self._early[prompt] = []
        return waiting

    def _feed(self, prompt: int, emission: Emission) -> Piece | None:
        """The piece an emission makes, or None if it adds nothing."""
        if emission.finish_reason in (FinishReason.ERROR, FinishReason.ABORT, FinishReason.MOVED):
            raise GenerationFailed(emission.error or "the generation was aborted by the server")
        index = prompt * self._n + emission.sample_index
        sample = self._samples[index]
        if sample.finished or not (emission.token_ids or emission.finish_reason):
            return None  # Tokens drawn after a stop string, before the backend heard of it; or prompt logprobs alone.
        piece = sample.feed(emission)
        journal = self._journals[prompt]
        journal.cached_tokens += emission.cached_tokens
        journal.give(emission.sample_index, piece.token_ids)
        if piece.token_ids:
            self._meter.tokens(index, len(piece.token_ids))
        if piece.finish_reason is not None:
            journal.finish(emission.sample_index, piece.finish_reason)
            self._unfinished -= 1
            self._meter.finished(index, piece.finish_reason)
        return piece


async def _merged(streams: list[AsyncGenerator[Emission]]) -> AsyncGenerator[tuple[int, Emission]]:
    """Interleaves streams as they come. The first failure ends them all; so does closing this one."""
    arrived: asyncio.Queue[tuple[int, Emission | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Emission]) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(stream):
                async for emission in stream:
                    arrived.put_nowait((index, emission))
        except Exception as error:
            end = error
        arrived.put_nowait((index, end))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
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
