"""What a sequence has in common with others: the pages that hold its first tokens already, here or in the tier.

Knows keys and where to look for them; not who may run, nor who holds a page. Imports no torch.
"""

from engine.batching import wants_prompt_logprobs
from engine.kv.keys import page_keys
from engine.kv.prefix import PrefixIndex
from engine.offload import Offload
from engine.sequence import Sequence


class Prefixes:
    """Finds pages for sequences, and lets others find theirs."""

    def __init__(self, index: PrefixIndex, offload: Offload, page_tokens: int) -> None:
        self._index = index
        self._offload = offload
        self._page_tokens = page_tokens

    def keys(self, sequence: Sequence, num_pages: int) -> list[bytes]:
        """Of its first pages."""
        return page_keys(sequence.root, sequence.tokens, self._page_tokens, num_pages, sequence.keys)

    def find(self, sequence: Sequence) -> list[int]:
        """Pages of the device that hold its first tokens."""
        return self._index.match(self._findable(sequence))

    def load(self, sequence: Sequence, num_found: int) -> bool:
        """Begins to fetch what the tier has of a sequence after `num_found` pages; False if it has none."""
        return self._offload.load(sequence, num_found, self._findable(sequence))

    def index(self, sequence: Sequence, *, loaded: bool = False) -> None:
        """Lets others find what the sequence has computed, here and in the tier; or what it has loaded, here alone."""
        first, num_pages = sequence.num_indexed // self._page_tokens, sequence.num_computed // self._page_tokens
        keys = self.keys(sequence, num_pages)
        self._offer_again(keys, first)
        for page in range(first, num_pages):
            if self._index.insert(keys[page], sequence.pages[page]) and not loaded:
                self._offer(keys, page, sequence.pages[page])
        sequence.num_indexed = num_pages * self._page_tokens

    def _offer_again(self, keys: list[bytes], count: int) -> None:
        """Offers those of the first pages that the tier's host has not been offered, as it came later: without them
        nobody would find there what comes after. A page was offered after those before it, so the last ones tell."""
        known = count
        while known and not self._is_offered(keys[known - 1]):
            known -= 1
        for place in range(known, count):
            if (page := self._index.page_of(keys[place])) is not None:
                self._offer(keys, place, page)

    def _is_offered(self, key: bytes) -> bool:
        page = self._index.page_of(key)
        return not self._offload.has_host() or (page is not None and self._offload.is_offered(page))

    def _offer(self, keys: list[bytes], place: int, page: int) -> None:
        self._offload.note(keys[place], keys[place - 1] if place else b"", page)

    def _findable(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages that it need not compute: one token at least is left, as its logits are needed."""
        if wants_prompt_logprobs(sequence):  # and here those of all that were not reported yet
            return self.keys(sequence, sequence.num_scored // self._page_tokens)
        return self.keys(sequence, (len(sequence.tokens) - 1) // self._page_tokens)
