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
        for page in range(first, num_pages):
            if self._index.insert(keys[page], sequence.pages[page]) and not loaded:
                self._offload.note(keys[page], keys[page - 1] if page else b"", sequence.pages[page])
        sequence.num_indexed = num_pages * self._page_tokens

    def _findable(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages that it need not compute: one token at least is left, as its logits are needed."""
        if wants_prompt_logprobs(sequence):  # and here those of all that were not reported yet
            return self.keys(sequence, sequence.num_scored // self._page_tokens)
        return self.keys(sequence, (len(sequence.tokens) - 1) // self._page_tokens)
