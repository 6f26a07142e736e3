"""How many pages a memory budget holds, and how long a sequence may therefore be. Pure arithmetic."""

from dataclasses import dataclass

from engine.config import Auto

SCALE_BYTES = 4
"""A float32 scale for each token and head of an int8 cache."""


def layer_bytes_per_token(kv_heads: int, head_dim: int, item_bytes: int, *, scaled: bool) -> int:
    """Bytes of keys and values that one token keeps in one layer; `scaled` is with a scale for each of its heads."""
    return 2 * kv_heads * (head_dim * item_bytes + (SCALE_BYTES if scaled else 0))


@dataclass(frozen=True, slots=True)
class KVPlan:
    """The resolved size of a page pool."""

    num_pages: int
    max_model_len: int
    bytes_per_page: int

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.bytes_per_page


def plan_kv(
    *,
    budget_bytes: int,
    bytes_per_token: int,
    page_tokens: int,
    max_sequences: int,
    model_max_len: int,
    max_model_len: int | Auto,
) -> KVPlan:
    """Sizes the pool so that one sequence of `max_model_len` tokens always fits: the scheduler relies on it.

    "auto" takes the model's length, or what the budget holds when that is less. No more pages are made than
    `max_sequences` of the full length could use. Raises ValueError, naming the setting to change, if the budget cannot
    hold what was asked for.
    """
    bytes_per_page = bytes_per_token * page_tokens
    affordable = budget_bytes // bytes_per_page
    longest = affordable * page_tokens
    length = min(model_max_len, longest) if max_model_len == "auto" else max_model_len
    if affordable < 1:
        raise ValueError(
            f"kv.memory ({budget_bytes} bytes) is less than one page of {page_tokens} tokens ({bytes_per_page} bytes)"
        )
    if length > model_max_len:
        raise ValueError(f"max_model_len ({length}) is more than the {model_max_len} this model was made for")
    if length > longest:
        needed = _pages(length, page_tokens) * bytes_per_page
        raise ValueError(
            f"max_model_len ({length} tokens) needs {needed} bytes of kv.memory, and there are {budget_bytes}: "
            f"lower max_model_len to {longest} or give kv.memory more"
        )
    useful = max_sequences * _pages(length, page_tokens)
    return KVPlan(min(affordable, useful), length, bytes_per_page)


def _pages(num_tokens: int, page_tokens: int) -> int:
    return -(-num_tokens // page_tokens)
