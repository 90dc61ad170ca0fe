"""A labelled source's validation records, and the rest of it to learn from.

Which records these are is a matter of their labels alone: settings can be chosen on the
one part while a test set stays unseen.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from unicl_jax.data.arrays import ArraySource
from unicl_jax.data.records import Request, Rows, Source, hash_of
from unicl_jax.errors import InputError, choose

SHARE = 0.2  # of each class, for validation
PARTS = ("train", "validation")


def part_of(source: Source, part: str) -> Source:
    """Takes a part of a source.

    The first ceil(0.2 n_c) records of each class c are for validation.

    Args:
      source: image-label, of arrays, class folders or a table: its labels are known
        before any record is read.
      part: "train" or "validation".

    Returns:
      The source of those records, in their order.

    Raises:
      InputError: if there is no such part, labels lie inside records, or a part is
        empty.

    Source: ELEVATER's toolkit, whose rule `evaluation.elevater.split` has:
      the share, and that records are not drawn.
    """
    choose(dict.fromkeys(PARTS), part, f'source "{source.name}": part')
    labels = getattr(source, "labels", None)
    if labels is None:
        labels = getattr(getattr(source, "index", None), "labels", None)
    if source.kind != "image_label" or labels is None or len(labels) != len(source):
        raise InputError(
            f'source "{source.name}": part is for labels that are known before records '
            "are read: quickstart, npz, folder and csv; of tfds name a part as "
            'split="train[:80%]", of shards divide the files.'
        )
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[: math.ceil(SHARE * len(rows))]] = True
    rows = np.flatnonzero(held if part == "validation" else ~held)
    if not len(rows):
        raise InputError(
            f'source "{source.name}": each part must have records: {part} has none of '
            f"{len(labels)}; give each class two or more."
        )
    if isinstance(source, ArraySource):
        return ArraySource(
            source.name,
            source.images[rows],
            labels=source.labels[rows],
            class_names=source.class_names,
        )
    return _Part(source, rows)


class _Part:
    """Some records of a source; what else it says is that of the whole."""

    shard_sizes, is_far = (), False

    def __init__(self, source, rows):
        self._source, self._rows = source, rows

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._rows)

    def fingerprint(self) -> str:
        return hash_of(self._source.fingerprint().encode(), self._rows)

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        return self._source.stream(
            Request(self._rows[indices], seeds) for indices, seeds in requests
        )
