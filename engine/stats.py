"""What one replica's engine reports about itself: plain numbers, read by monitoring and by the router."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Fields ending in `_total` only ever grow while the engine lives."""

    num_running: int
    """Sequences that hold pages."""
    num_waiting: int
    """Sequences that wait for admission, preempted ones included."""
    num_pages: int
    num_free_pages: int
    """Pages that no sequence holds; what they hold may still be findable."""
    num_outstanding_tokens: int
    """Prompt tokens to compute plus output tokens that may still be drawn, over all unfinished sequences."""
    preemptions_total: int
    prompt_tokens_total: int
    """Prompt tokens of admitted sequences, each counted once however often it is recomputed."""
    generation_tokens_total: int
    steps_total: int
    """Iterations that came back."""
    last_step_tokens: int = 0
    """Tokens of the latest of them, prompt chunks and decodes together."""
    prefix_queries_total: int = 0
    """Prompt tokens of admitted sequences that were looked for in the cache."""
    prefix_hits_total: int = 0
    """Those of them that were there."""

    @property
    def kv_usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return 1.0 - self.num_free_pages / self.num_pages
