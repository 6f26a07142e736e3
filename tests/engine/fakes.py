"""Stand-ins for the device: a KV cache of plain tokens that notices when a sequence would read what is not its own."""

from collections import deque
from collections.abc import Sequence as SequenceOf

from engine.batch import Batch, StepOutput, StepStats, TokenLogprob
from engine.engine import Engine
from engine.sequence import Emission

VOCAB = 97


def next_token(context: SequenceOf[int], seed: int = 0, sample_index: int = 0) -> int:
    """The fake model: a token that depends on every token before it, on the seed and on the sample."""
    state = 17 + 31 * seed + 1009 * sample_index
    for token in context:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCAB


class LedgerRunner:
    """Writes tokens instead of keys and values, and reads the whole context back through the page table."""

    def __init__(self, num_pages: int, page_tokens: int, poison: int | None = None, token_seconds: float = 0.0) -> None:
        """`token_seconds`: what a token is said to take."""
        self._token_seconds = token_seconds
        self._page_tokens = page_tokens
        self._slots: list[list[int | None]] = [[None] * page_tokens for _ in range(num_pages)]
        self._poison = poison
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> StepOutput:
        self.batches.append(batch)
        contexts = [self._write_and_read(batch, row) for row in range(batch.num_sequences)]
        tokens, logprobs, failed = [], [], {}
        samples = batch.samples
        for index, row in enumerate(samples.rows.tolist()):
            context, setting = contexts[row], samples.settings[index]
            assert samples.positions[index] == len(context)
            token = next_token(context, int(setting["seed"]), int(setting["sample_index"]))
            if self._poison in context:
                failed[index] = "poisoned"
            tokens.append(token)
            logprobs.append(TokenLogprob(token, -1.0, 1) if index in samples.logprobs else None)
        scored = [tuple(TokenLogprob(t, -2.0, 1) for t in row.targets) for row in batch.prompt_logprobs]
        stats = StepStats(batch.num_tokens, batch.num_sequences, batch.num_tokens * self._token_seconds)
        return StepOutput(batch.step, tokens, logprobs, scored, stats, failed)

    def page(self, page: int) -> list[int | None]:
        """What a page holds: a copy."""
        return list(self._slots[page])

    def fill(self, page: int, tokens: list[int | None]) -> None:
        self._slots[page] = list(tokens)

    def _write_and_read(self, batch: Batch, row: int) -> list[int]:
        begin, end = batch.cu_seq_q[row : row + 2]
        length = int(batch.context_lens[row])
        assert batch.positions[begin:end].tolist() == list(range(length - (end - begin), length))
        table = batch.page_table[row]
        for position, token in zip(batch.positions[begin:end], batch.token_ids[begin:end], strict=True):
            page, offset = divmod(int(position), self._page_tokens)
            self._slots[table[page]][offset] = int(token)
        context = [self._slots[table[p // self._page_tokens]][p % self._page_tokens] for p in range(length)]
        assert None not in context, "a slot was read that was never written"
        return context  # type: ignore[return-value]


class PipelinedExecutor:
    """A LedgerRunner behind `depth` batches in flight: results come back late, in order."""

    def __init__(self, runner: LedgerRunner, depth: int) -> None:
        self.depth = depth
        self.failure = None
        self._runner = runner
        self._outputs: deque[StepOutput] = deque()
        self._running: list[set[int]] = []

    def submit(self, batch: Batch) -> None:
        ids = set(batch.sequence_ids)
        assert not any(ids & other for other in self._running), "a sequence is in two batches in flight"
        self._running.append(ids)
        self._outputs.append(self._runner.run(batch))
        assert len(self._outputs) <= self.depth

    def collect(self) -> StepOutput:
        self._running.pop(0)
        return self._outputs.popleft()

    def close(self) -> None:
        self._outputs.clear()


class Streams:
    """Gathers emissions into one list of tokens per (request, sample)."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.prompt_logprobs: dict[tuple[str, int], list[TokenLogprob]] = {}
        self.finished: dict[tuple[str, int], Emission] = {}
        self.cached: dict[tuple[str, int], int] = {}

    def take(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            key = (emission.request_id, emission.sample_index)
            assert key not in self.finished, f"{key} went on after it had finished"
            self.tokens.setdefault(key, []).extend(emission.token_ids)
            self.prompt_logprobs.setdefault(key, []).extend(emission.prompt_logprobs)
            if emission.cached_tokens:
                assert key not in self.cached, "the cached tokens were reported twice"
                self.cached[key] = emission.cached_tokens
            if emission.finish_reason is not None:
                self.finished[key] = emission


def run_to_end(engine: Engine, streams: Streams | None = None, max_steps: int = 100_000) -> Streams:
    streams = streams or Streams()
    steps = 0
    while engine.has_work():
        streams.take(engine.step())
        steps += 1
        assert steps < max_steps, "the engine does not come to an end"
    return streams
