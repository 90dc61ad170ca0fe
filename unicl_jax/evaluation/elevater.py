"""ELEVATER's rules of a probe: how it draws, splits, and searches.

Source: ELEVATER (Li et al., 2022, arXiv 2204.08790) and its toolkit's code, which is
what counts where the two differ.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from unicl_jax.errors import InputError

# Of SGD, and the grid of weight decays.
LEARNING_RATES = tuple(np.logspace(-6, -1, 6).tolist())
WEIGHT_DECAYS = tuple(np.logspace(-6, 6, 97).tolist())
COARSE = 16  # every so many weight decays are tried first


def split(
    labels: np.ndarray, share: float = 0.2, shots: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Takes validation records from a training set, the same share of every class.

    The first ceil(share n_c) records of each class c, not drawn. Of records with
    several labels: class after class, the first records that have it, until every class
    has ceil(share n_c), counting what those taken for other classes have.

    Args:
      labels: [n] integer, or [n, K] of 0 and 1.
      share: in (0, 1).
      shots: of each class so many records, drawn by `subset`, are split; None: all.
      seed: of the draw.

    Returns:
      The training and the validation records, ascending rows; both have some.

    Raises:
      InputError: if no record is left to train on.
    """
    labels = np.asarray(labels)
    rows = np.arange(len(labels)) if shots is None else subset(labels, shots, seed)
    labels = labels[rows]
    taken = np.zeros(len(labels), bool)
    if labels.ndim == 1:
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            taken[own[: math.ceil(share * len(own))]] = True
    else:
        wanted = np.ceil(share * labels.sum(0, dtype=np.int64))
        for label in range(labels.shape[1]):
            for row in np.flatnonzero(labels[:, label]):
                if wanted[label] <= 0:
                    break
                if not taken[row]:
                    taken[row] = True
                    wanted -= labels[row]
    train, held = np.flatnonzero(~taken), np.flatnonzero(taken)
    if not len(train) or not len(held):
        raise InputError(
            "a probe's training set must give both training and validation records: "
            f"got {len(train)} and {len(held)} of {len(labels)} records. Use at least "
            "2 records of each class, or a validation set of its own."
        )
    return rows[train], rows[held]


def subset(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draws records of each class, without replacement.

    Of records with several labels: class after class, those that the class needs
    beyond what the classes before it brought.

    Args:
      labels: [n] integer, or [n, K] of 0 and 1.
      shots: how many of each class, at least 1; all of a class that has fewer.
      seed: of the draw. With the same seed, more shots have all records of fewer, where
        a record has one label.

    Returns:
      Ascending rows.

    Raises:
      InputError: if shots is less than 1.
    """
    if shots < 1:
        raise InputError(f"shots must be at least 1 record a class: got {shots}.")
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:
        shuffled = labels[order]
        # A record's place among those of its class, in the order drawn.
        by_class = np.argsort(shuffled, kind="stable")
        _, first, count = np.unique(
            shuffled[by_class], return_index=True, return_counts=True
        )
        place = np.arange(len(labels)) - np.repeat(first, count)
        return np.sort(order[by_class[place < shots]])
    taken = np.zeros(len(labels), bool)
    have = np.zeros(labels.shape[1], np.int64)
    for label in range(labels.shape[1]):
        for row in order[labels[order, label] > 0]:
            if have[label] >= shots:
                break
            if not taken[row]:
                taken[row] = True
                have += labels[row].astype(np.int64)
    return np.flatnonzero(taken)


def search(
    evaluate: Callable[[Sequence[tuple[int, int]]], Sequence[float]],
    rates: int,
    decays: int,
    coarse: int = COARSE,
) -> tuple[int, int]:
    """Looks for the best setting: weight decays at a distance first, then in between.

    For each learning rate: every `coarse`-th weight decay; then those `coarse` / 2,
    `coarse` / 4, .., 1 to the left and right of the best so far. All learning rates go
    on together.
    Of equal scores the earlier wins, the lower learning rate first.

    Args:
      evaluate: scores of settings, pairs of a learning rate's and a weight decay's
        place; -1 where a setting is no choice.
      rates: how many learning rates.
      decays: how many weight decays, in order.
      coarse: a power of 2; 1 tries them all.

    Returns:
      The best setting; scores of -1 alone give (0, 0).
    """
    best = [(0, -1.0)] * rates  # of each learning rate

    def look(settings):
        for (rate, decay), score in zip(settings, evaluate(settings), strict=True):
            if score > best[rate][1]:
                best[rate] = decay, score

    look([(rate, decay) for rate in range(rates) for decay in range(0, decays, coarse)])
    span = coarse // 2
    while span:
        look(
            [
                (rate, decay)
                for rate in range(rates)
                for decay in (best[rate][0] - span, best[rate][0] + span)
                if 0 <= decay < decays
            ]
        )
        span //= 2
    rate = max(range(rates), key=lambda rate: best[rate][1])
    return rate, best[rate][0]
