"""Metrics of scores: fractions in [0, 1], in NumPy and float64.

Scores are anything that grows with belief: cosines, logits, probabilities.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from unicl_jax.errors import InputError


class Interval(NamedTuple):
    """A mean over runs, and how far the true one may be from it."""

    mean: float
    half_width: float | None  # of the interval; None for a single run, which has none
    runs: int


def top_k(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """How often the right class is among the k best.

    mean_i [rank of class y_i in row i < k]; of equal scores the first class is better,
    as for `argmax`.

    Args:
      scores: [n, K] finite.
      labels: [n] integer in [0, K).
      k: at least 1; with K or more of them the answer is 1.

    Returns:
      In [0, 1].

    Raises:
      InputError: where the arguments are not so.
    """
    scores, labels = _classes(scores, labels)
    if k < 1:
        raise InputError(f"top_k: k must be at least 1: got {k}.")
    return float((_ranks(scores, labels) < k).mean())


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """How often the best class is right: `top_k` with k = 1."""
    return top_k(scores, labels, 1)


def per_class(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The accuracy on the records of each class.

    Args:
      scores: [n, K] finite.
      labels: [n] integer in [0, K).

    Returns:
      [K] float64 in [0, 1]; NaN for a class that no record has.

    Raises:
      InputError: where the arguments are not so.
    """
    scores, labels = _classes(scores, labels)
    right = _ranks(scores, labels) < 1
    ways = scores.shape[1]
    found = np.bincount(labels, minlength=ways).astype(np.float64)
    found[found == 0] = np.nan
    return np.bincount(labels, right, minlength=ways) / found


def mean_per_class(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean of `per_class` over the classes that have records.

    Args:
      scores: [n, K] finite.
      labels: [n] integer in [0, K).

    Returns:
      In [0, 1].

    Raises:
      InputError: where the arguments are not so.
    """
    return float(np.nanmean(per_class(scores, labels)))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve of two classes.

    P(s_i > s_j) + P(s_i = s_j) / 2 over all pairs of a record i of class 1 and a
    record j of class 0.

    Args:
      scores: [n] of class 1; or [n, 2] of both, of which the difference is taken.
      labels: [n], 0 or 1, both there.

    Returns:
      In [0, 1]; 0.5 is chance.

    Raises:
      InputError: where the arguments are not so.
    """
    scores = _finite(scores, "scores")
    if scores.ndim == 2:
        if scores.shape[1] != 2:
            raise InputError(
                f"roc_auc: scores must be [n], or [n, 2] of two classes: got "
                f"{list(scores.shape)}. Use mean_per_class for more classes."
            )
        scores = scores[:, 1] - scores[:, 0]
    _, labels = _classes(np.stack([-scores, scores], 1), labels)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise InputError(
            f"roc_auc: both classes must have records: got {negatives} of class 0 "
            f"and {positives} of class 1. Use another split or metric."
        )
    # The mean rank of a positive, ties sharing theirs: Mann and Whitney's U.
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    above = rank[labels == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The area under each class's precision-recall curve, not interpolated.

    AP_k = sum_t (R_t - R_(t-1)) P_t over the distinct scores t, highest first.

    Args:
      scores: [n, K] finite.
      targets: [n, K], 1 where a record has the class, else 0.

    Returns:
      [K] float64 in [0, 1]; NaN for a class that no record has.

    Raises:
      InputError: where the arguments are not so.
    """
    return _of_curves(scores, targets, _area)


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """The mean of `average_precision` over the classes that some record has."""
    return _mean_of_classes(average_precision(scores, targets))


def average_precision_11(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Each class's average precision at eleven recalls, interpolated.

    AP_k = 1/11 sum_(r = 0, 0.1, .., 1) max_(t: R_t >= r) P_t

    Args:
      scores: [n, K] finite.
      targets: [n, K], 1 where a record has the class, else 0.

    Returns:
      [K] float64 in [0, 1]; NaN for a class that no record has.

    Raises:
      InputError: where the arguments are not so.

    Source: Everingham et al., The PASCAL VOC Challenge, 2010, section 4.2.1. Records
    of equal scores come in together. ELEVATER's toolkit also counts a point of
    precision 1 at recall 0, so its first of the eleven is always 1: at most 1/11 more.
    """
    return _of_curves(scores, targets, _eleven)


def map11(scores: np.ndarray, targets: np.ndarray) -> float:
    """VOC2007's mAP: the mean of `average_precision_11` over classes that occur."""
    return _mean_of_classes(average_precision_11(scores, targets))


# By the name that a task's row has.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "mean_per_class": mean_per_class,
    "roc_auc": roc_auc,
    "map11": map11,
    "map": mean_average_precision,
}
OF_SEVERAL_LABELS = ("map11", "map")  # the metrics that take targets [n, K]


def wilson(score: float, records: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of an accuracy that was measured on so many records.

    (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Args:
      score: an accuracy in [0, 1].
      records: how many, at least 1.
      confidence: that the true accuracy is inside, in (0, 1).

    Returns:
      The two ends, in [0, 1].

    Raises:
      InputError: where the arguments are not so.

    Source: Wilson, Probable inference, the law of succession, and statistical
    inference, 1927.
    """
    from scipy import special

    if not 0 <= score <= 1 or records < 1:
        raise InputError(
            "wilson: an accuracy in [0, 1] of at least one record is needed: got "
            f"{score} of {records}."
        )
    z2 = float(special.ndtri((1 + _within(confidence)) / 2)) ** 2
    middle = score + z2 / (2 * records)
    half = (score * (1 - score) / records * z2 + (z2 / (2 * records)) ** 2) ** 0.5
    scale = 1 + z2 / records
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean over runs with different seeds, and its interval by Student's t.

    mean -+ t_(n-1) s / sqrt(n), s the standard deviation with n - 1.

    Args:
      values: one a run, finite.
      confidence: that the true mean is inside, in (0, 1).

    Returns:
      The mean and the half width; None for a single run, which tells nothing of it.

    Raises:
      InputError: if there is no value, or one that is not finite.
    """
    from scipy import special

    values = _finite(values, "values")
    if values.ndim != 1 or not len(values):
        raise InputError(
            f"interval: at least one value is needed, in a list: got shape "
            f"{list(values.shape)}."
        )
    quantile, runs = (1 + _within(confidence)) / 2, len(values)
    if runs == 1:
        return Interval(float(values[0]), None, 1)
    half = special.stdtrit(runs - 1, quantile) * values.std(ddof=1) / runs**0.5
    return Interval(float(values.mean()), float(half), runs)


def _within(confidence):
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be in (0, 1): got {confidence}.")
    return confidence


def _finite(values, what):
    values = np.asarray(values, np.float64)
    if wrong := int(np.count_nonzero(~np.isfinite(values))):
        raise InputError(
            f"{what} must be finite: got {wrong} of {values.size} that are NaN or "
            "infinite. Look at what made them."
        )
    return values


def _classes(scores, labels):
    """Scores [n, K] and labels [n] that fit each other."""
    scores, labels = _finite(scores, "scores"), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not scores.size:
        raise InputError(
            "scores must be [n, K] and labels [n], n and K at least 1: got "
            f"{list(scores.shape)} and {list(labels.shape)}."
        )
    if labels.dtype.kind not in "iub":
        raise InputError(f"labels must be integers: got {labels.dtype}.")
    labels = labels.astype(np.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise InputError(
            f"labels must be in [0, {scores.shape[1]}), one a column of the scores: "
            f"got {low} to {high}."
        )
    return scores, labels


def _ranks(scores, labels):
    """How many classes are before the right one, equal scores in their order."""
    right = np.take_along_axis(scores, labels[:, None], 1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > right) | ((scores == right) & before)).sum(1)


def _of_curves(scores, targets, measure):
    """`measure(precision, recall)` of each class's curve; NaN where there is none."""
    scores, targets = _finite(scores, "scores"), np.asarray(targets)
    if scores.ndim != 2 or targets.shape != scores.shape or not scores.size:
        raise InputError(
            "scores and targets must be [n, K], n and K at least 1: got "
            f"{list(scores.shape)} and {list(targets.shape)}."
        )
    if not np.isin(targets, (0, 1)).all():
        raise InputError(
            f"targets must be 0 or 1: got {np.unique(targets)[:5].tolist()} among them."
        )
    return np.array(
        [
            measure(*_curve(column, target)) if target.any() else np.nan
            for column, target in zip(scores.T, targets.T, strict=True)
        ]
    )


def _curve(scores, targets):
    """Precision and recall after each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(targets[order], dtype=np.float64)
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return hits[last] / (last + 1), hits[last] / hits[-1]


def _area(precision, recall):
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def _eleven(precision, recall):
    # The best precision from here on; recall never falls, and ends at 1.
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # Quotients, as recalls are: 3 / 10 is 6 / 20 in floating point, but not 3 * 0.1.
    places = np.searchsorted(recall, np.arange(11) / 10)
    return float(best[places].mean())


def _mean_of_classes(values):
    if np.isnan(values).all():
        raise InputError(
            "the mean over classes needs a class that some record has: got none. "
            "Look at the labels of this split."
        )
    return float(np.nanmean(values))
