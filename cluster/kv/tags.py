"""Which pages are probably on this node, in memory that a host writes and its clients read: a table of tags.

A tag is the first 8 bytes of a page's key. It may stand anywhere in the bucket that it belongs to, so that whoever
looks for it reads a few hundred bytes, however many pages there are. A page whose bucket is full is not shown.
"""

import numpy as np
from numpy.typing import NDArray

Tags = NDArray[np.uint64]
"""[buckets, BUCKET], 0 where there is no tag."""

BUCKET = 64
"""Tags of a bucket. At least half of all places stay free: of a million pages, one finds its bucket full."""
TAG_BYTES = 8


def num_buckets(num_pages: int) -> int:
    return -(-2 * num_pages // BUCKET)


def table_bytes(num_pages: int) -> int:
    """The size of a table for so many pages."""
    return num_buckets(num_pages) * BUCKET * TAG_BYTES


def new_table(num_pages: int) -> Tags:
    return np.zeros((num_buckets(num_pages), BUCKET), dtype=np.uint64)


def show(tags: Tags, key: bytes) -> None:
    """A page is here now that was not."""
    bucket = _bucket(tags, key)
    free = np.flatnonzero(bucket == 0)
    if len(free):
        bucket[free[0]] = _tag(key)


def hide(tags: Tags, key: bytes) -> None:
    """A page is here no more; one that was never shown is ignored."""
    bucket = _bucket(tags, key)
    places = np.flatnonzero(bucket == _tag(key))
    if len(places):
        bucket[places[0]] = 0


def is_shown(tags: Tags, key: bytes) -> bool:
    return len(tags) > 0 and bool((_bucket(tags, key) == _tag(key)).any())


def _bucket(tags: Tags, key: bytes) -> Tags:
    # Not by the tag's own bits alone: tags of one bucket would then have fewer that differ.
    return tags[int.from_bytes(key[TAG_BYTES : 2 * TAG_BYTES], "little") % len(tags)]


def _tag(key: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(key[:TAG_BYTES], "little"))
