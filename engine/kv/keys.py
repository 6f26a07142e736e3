"""What a page of keys and values contains, as a name: the chain hash of every token up to its end.

Keys and values of a token depend on all tokens before it, so a page is known by its own tokens and the key of the page
before it. Pure; knows neither pages nor where they are.
"""

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 32
"""Of BLAKE2b: whoever can choose prompts must not be able to find two with one key."""
_TOKEN = "I"


def root_key(*parts: str) -> bytes:
    """The key before the first page: all besides the tokens that pages under it have in common."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def page_keys(root: bytes, token_ids: Sequence[int], page_tokens: int, count: int, known: list[bytes]) -> list[bytes]:
    """The keys of the first `count` pages of these tokens; `known`, the first of them, grows by those that it lacks."""
    for page in range(len(known), count):
        tokens = token_ids[page * page_tokens : (page + 1) * page_tokens]
        known.append(_page_key(known[-1] if page else root, tokens))
    return known[:count]


def _page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    tokens = array(_TOKEN, token_ids)
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=KEY_BYTES).digest()
