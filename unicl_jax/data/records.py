"""Records on the host: what is asked of a source, what it answers.

A source gives records by index, so that the sampler outside stays a pure function of
(seed, step) and a checkpoint saves the step alone. Letters in shapes: n records, H and
W pixels.
"""

import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from unicl_jax.losses import NO_LABEL

__all__ = ["KINDS", "NO_LABEL", "Request", "Rows", "Source"]

KINDS = ("image_label", "image_text")
# Captions of one record are joined by this: 0xff is in no valid UTF-8 text.
SEPARATOR = b"\xff\x00\xff"


class Request(NamedTuple):
    """Which records are wanted, and the seed of each one's randomness.

    Attributes:
      indices: [n] int64, in [0, len(source)).
      seeds: [n] uint32, one per record: drives crops, flips and the choice of caption.
    """

    indices: np.ndarray
    seeds: np.ndarray


class Skip(NamedTuple):
    """An unreadable record that was met on the way to a row.

    Attributes:
      row: the row that it, or one after it, was to fill.
      index: of the record.
      reason: in a few words, the same for all records with that fault.
    """

    row: int
    index: int
    reason: str


class Rows(NamedTuple):
    """The records of one request, in its order.

    Attributes:
      images: [n, H, W, 3] uint8.
      texts: n entries; the tuple of captions (image-text) or () (image-label).
      labels: [n] int32, class index *within the source*, NO_LABEL for image-text.
      skipped: unreadable records in whose place rows hold another.
    """

    images: np.ndarray
    texts: list
    labels: np.ndarray
    skipped: tuple[Skip, ...] = ()


def hash_of(*parts: bytes | np.ndarray) -> str:
    """A hash of bytes and arrays, to tell whether they are the same another day.

    Args:
      *parts: in an order that counts.

    Returns:
      16 hexadecimal digits.
    """
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part if isinstance(part, bytes) else part.tobytes())
    return found.hexdigest()


class Source(Protocol):
    """Where records come from: random access by index, read as one stream.

    Attributes:
      name: the source's name in the config.
      kind: one of KINDS.
      class_names: names by class index; () for image-text.
      skipped: reason -> how many records indexing left out, and then how often an
        unreadable one was met.
      shard_sizes: how many records each shard has, which lie side by side, in the order
        of the indices; () for a source without shards.
      is_far: whether shards are read in blocks, with a window: see `FileSource`.
    """

    name: str
    kind: str
    class_names: tuple[str, ...]
    skipped: collections.Counter
    shard_sizes: Sequence[int]
    is_far: bool

    def __len__(self) -> int:
        """Returns the number of records, readable or not."""
        ...

    def fingerprint(self) -> str:
        """Returns what changes if the records, their order or labels do."""
        ...

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Reads the records of each request.

        Args:
          requests: taken ahead of the rows, from another thread; may be endless.

        Yields:
          One Rows per Request, in order; n may differ between requests and be 0.
        """
        ...
