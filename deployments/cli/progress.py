"""How far a long run is: a bar on a terminal, a line now and then elsewhere. Knows no engine."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

LINE_SECONDS = 10.0


class _Rate(ProgressColumn):
    """Tokens per second since the start."""

    def __init__(self, num_tokens: Callable[[], int]) -> None:
        super().__init__()
        self._num_tokens = num_tokens

    def render(self, task: Task) -> Text:
        return Text(f"{self._num_tokens() / max(task.elapsed or 0.0, 1e-9):.1f} tokens/s")


class Progress:
    """Counts finished prompts on stderr, and shows tokens per second beside them."""

    def __init__(self, total: int, num_tokens: Callable[[], int]) -> None:
        self._total = total
        self._num_tokens = num_tokens
        self._done = 0
        self._begin = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), _Rate(num_tokens), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("prompts", total=total)

    def advance(self) -> None:
        """One more prompt is done."""
        self._done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            tokens = self._num_tokens()
            rate = tokens / (now - self._begin)
            print(
                f"{self._done}/{self._total} prompts, {tokens} tokens, {rate:.1f} tokens/s", file=sys.stderr, flush=True
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
