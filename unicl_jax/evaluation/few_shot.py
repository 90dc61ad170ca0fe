"""Probes on a few records of each class, over seeds, with an interval."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from unicl_jax.errors import InputError
from unicl_jax.evaluation import elevater
from unicl_jax.evaluation.checks import checked, num_classes
from unicl_jax.evaluation.probe import Probe, Protocol, linear_probe
from unicl_jax.evaluation.scores import OF_SEVERAL_LABELS, Interval, interval

SHOTS = (5, 20, 50)
SEEDS = (0, 1, 2)


class FewShot(NamedTuple):
    """Probes on so many records of each class, one a seed."""

    shots: int
    records: tuple[int, ...]  # of each seed's subset
    classes_short: int  # classes with fewer records than that: all of theirs are used
    selected: Interval  # of the probes' `selected`, over the seeds
    best_test_epoch: Interval  # test-set selection, as the probes'
    probes: tuple[Probe, ...]


def few_shot(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    classes: int | None = None,
    metric: str = "accuracy",
    start: np.ndarray | None = None,
    protocol: Protocol = Protocol(),  # noqa: B008 - a tuple
    done: Callable[[int, int], None] = lambda shots, seed: None,
) -> tuple[FewShot, ...]:
    """Probes on small subsets of the training set, drawn anew for each seed.

    A fifth of a subset, at least one record a class, validates. With one shot that
    would leave nothing to train on: two records a class are drawn, one of them
    validates, and the final run does not have it.

    Args:
      features: [n, D] finite, of the training set.
      labels: [n] integer in [0, K), or [n, K] of 0 and 1.
      test_features: [m, D] finite.
      test_labels: as `labels`, of m records.
      shots: records of each class.
      seeds: of the draws, the start and the batches.
      classes: K, if the labels do not tell.
      metric: a key of `scores.METRICS`.
      start: as of `linear_probe`.
      protocol: of the probes; its seed is not used.
      done: called after each probe.

    Returns:
      One for each number of shots, with 95 % intervals of the mean over seeds.

    Raises:
      InputError: where the arguments are not so.

    Source: ELEVATER (Li et al., 2022): 5, 20 and 50 shots, seeds 0, 1 and 2; its
    toolkit's code for one shot.
    """
    if not len(shots) or not len(seeds):
        raise InputError("few_shot needs a number of shots and a seed: got none.")
    several = metric in OF_SEVERAL_LABELS
    ways = num_classes(classes, labels, test_labels, several)
    features, labels = checked(features, labels, ways, several, "training")
    found = []
    for count in shots:
        one = count == 1
        probes, records = [], []
        for seed in seeds:
            rows = elevater.subset(labels, 2 if one else count, seed)
            merge = protocol.merge and not one
            probes.append(
                linear_probe(
                    features[rows],
                    labels[rows].astype(np.int32),
                    test_features,
                    test_labels,
                    classes=ways,
                    metric=metric,
                    start=start,
                    protocol=protocol._replace(seed=seed, merge=merge),
                )
            )
            records.append(len(rows))
            done(count, seed)
        sizes = labels.sum(0) if several else np.bincount(labels, minlength=ways)
        found.append(
            FewShot(
                shots=count,
                records=tuple(records),
                classes_short=int((sizes < count).sum()),
                selected=interval([probe.selected for probe in probes]),
                best_test_epoch=interval(
                    [probe.elevater.best_test_epoch for probe in probes]
                ),
                probes=tuple(probes),
            )
        )
    return tuple(found)
