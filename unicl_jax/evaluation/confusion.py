"""What a classifier mixes up: per class, per pair of classes, and in pictures."""

from typing import Any

import numpy as np

OF_A_PAIR = 3  # pictures of each confused pair, so that many pairs get some


def per_class(
    predictions: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[list[float | None], list[int]]:
    """The fraction of each class's records that get its name.

    Args:
      predictions: [n] or [n, k] integer, best first.
      labels: [n] integer.
      classes: how many there are.

    Returns:
      Accuracies, None for a class without records; and records, each [classes].
    """
    first = _first(predictions)
    records = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[first == labels], minlength=classes)
    accuracy = [
        float(r / n) if n else None for r, n in zip(right, records, strict=True)
    ]
    return accuracy, records.tolist()


def confusions(
    predictions: np.ndarray, labels: np.ndarray, classes: int, limit: int = 50
) -> list[dict[str, Any]]:
    """The pairs of classes that are most often mixed up.

    Args:
      predictions: [n] or [n, k] integer, best first.
      labels: [n] integer.
      classes: how many there are.
      limit: of pairs.

    Returns:
      `true`, `predicted`, `count` and `share`, of the true class's records; the largest
      counts first, of equal ones the largest shares.
    """
    first = _first(predictions)
    wrong = first != labels
    codes = labels[wrong].astype(np.int64) * classes + first[wrong]
    pairs, counts = np.unique(codes, return_counts=True)
    true, predicted = np.divmod(pairs, classes)
    shares = counts / np.bincount(labels, minlength=classes)[true]
    order = np.lexsort((pairs, -shares, -counts))[:limit]
    return [
        dict(
            true=int(true[i]),
            predicted=int(predicted[i]),
            count=int(counts[i]),
            share=float(shares[i]),
        )
        for i in order
    ]


def examples(
    predictions: np.ndarray, labels: np.ndarray, limit: int = 64, seed: int = 0
) -> np.ndarray:
    """Which records show best what is mixed up.

    Args:
      predictions: [n] or [n, k] integer, best first.
      labels: [n] integer.
      limit: of records.
      seed: of the choice within a pair, and of the rest.

    Returns:
      [min(n, limit)] positions in order: of the most confused pairs wrong ones, and a
      right one of each of the two classes; what is left is drawn from all.
    """
    first = _first(predictions)
    order = np.random.default_rng(seed).permutation(len(labels))
    first_of, label_of = first[order], labels[order]
    classes = int(max(first.max(initial=0), labels.max(initial=0))) + 1
    kept: dict[int, None] = {}
    for pair in confusions(predictions, labels, classes):
        a, b = pair["true"], pair["predicted"]
        found = order[(label_of == a) & (first_of == b)][: OF_A_PAIR - 1].tolist()
        for right in (a, b):
            found += order[(label_of == right) & (first_of == right)][:1].tolist()
        kept |= dict.fromkeys(found)
        if len(kept) >= limit:
            break
    kept |= dict.fromkeys(order.tolist())
    return np.sort(np.fromiter(kept, np.int64)[:limit])


def _first(predictions):
    return predictions if predictions.ndim == 1 else predictions[:, 0]
