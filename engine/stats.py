"""What one replica's engine reports about itself: plain numbers, read by monitoring and by the router."""

from dataclasses import dataclass


@dataclass
class Counters:
    """What a scheduler counts; see the fields of `EngineStats`, which have the same names."""

    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    last_step_tokens: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0


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
    """Those of them that were there, or came from the tier."""
    tier_pages_saved_total: int = 0
    """Pages copied to the KV host."""
    tier_pages_refused_total: int = 0
    """Pages that were to be copied and were not: no bandwidth, no memory or no host."""
    tier_pages_loaded_total: int = 0
    """Pages that came back from it."""
    tier_pages_corrupt_total: int = 0
    """Pages that came back with a wrong checksum, and were computed again."""
    tier_failures_total: int = 0
    """Times that the KV host was lost."""
    tier_load_seconds_total: float = 0.0
    tier_load_predicted_seconds_total: float = 0.0
    """What those loads were expected to take."""
    tier_saved_seconds_total: float = 0.0
    """By which computing the same tokens was expected to take longer."""
    tier_regretted_seconds_total: float = 0.0
    """By which it was expected to take less than the load took."""

    @property
    def kv_usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return 1.0 - self.num_free_pages / self.num_pages
