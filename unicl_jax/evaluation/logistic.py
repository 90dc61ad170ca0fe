"""CLIP's linear probe: logistic regression by L-BFGS, its penalty chosen by search."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from unicl_jax.errors import InputError, choose
from unicl_jax.evaluation import elevater, lbfgs
from unicl_jax.evaluation.checks import sets_of
from unicl_jax.evaluation.scores import METRICS, OF_SEVERAL_LABELS, per_class

COSTS = tuple(np.logspace(-6, 6, 97).tolist())  # C: 8 a decade
_BYTES = 2**29  # of the logits of settings that are fitted together


class Fit(NamedTuple):
    """One C of the sweep."""

    cost: float
    score: float  # on the validation records
    iterations: int


class LogisticProbe(NamedTuple):
    """What a logistic probe found; scores are of the task's metric, in [0, 1]."""

    metric: str
    cost: float  # C, chosen on validation records
    validation: float  # of the chosen C
    selected: float  # on the test set, trained on training and validation records
    converged: bool  # whether the final fit reached its tolerance
    sweep: tuple[Fit, ...]  # by C
    per_class: np.ndarray | None  # [K] accuracy; None for several labels
    scores: np.ndarray  # [n, K] float32 logits of the test set
    weights: np.ndarray  # [K, D] float32, of the final fit
    bias: np.ndarray  # [K] float32


def logistic_probe(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    classes: int | None = None,
    metric: str = "accuracy",
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    costs: Sequence[float] = COSTS,
    coarse: int = elevater.COARSE,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
) -> LogisticProbe:
    """Fits logistic regressions with many C, picks one, and scores it on the test set.

    C sum_i loss(W x_i + b, y_i) + |W|^2 / 2. First every `coarse`-th C, then those in
    between beside the best, each round together; then all training and validation
    records with the best C.

    Args:
      features: [n, D] finite, of the training set.
      labels: [n] integer in [0, K), or [n, K] of 0 and 1: then a model a class.
      test_features: [m, D] finite.
      test_labels: as `labels`, of m records.
      classes: K, if the labels do not tell.
      metric: a key of `scores.METRICS`; "map11" or "map" for several labels.
      validation: features and labels of a set of its own; else a fifth of every class
        of the training set, as `elevater.split` takes it.
      costs: C, ascending, above 0.
      coarse: every so many C first, a power of 2; 1: all of them.
      max_iterations: of each fit.
      tolerance: as of `lbfgs.fit`; scikit-learn's default.

    Returns:
      Scores, the choice, and all that led to it.

    Raises:
      InputError: where the arguments are not so.

    Source: CLIP (Radford et al., 2021), appendix A.3: scikit-learn's L-BFGS, at most
    1,000 iterations, C in 96 steps from 1e-6 to 1e6 by a binary search.
    """
    choose(METRICS, metric, "a probe's metric")
    costs = np.asarray(costs, np.float64)
    if not costs.size or not np.isfinite(costs).all() or costs.min() <= 0:
        raise InputError(
            f"costs of a logistic probe must be finite and above 0: got {costs}."
        )
    if coarse < 1 or coarse & (coarse - 1):
        raise InputError(f"coarse of a probe must be a power of 2: got {coarse}.")
    if max_iterations < 1 or not tolerance >= 0:
        raise InputError(
            "a logistic probe needs at least 1 iteration and a tolerance of 0 or more: "
            f"got {max_iterations} and {tolerance}."
        )
    several = metric in OF_SEVERAL_LABELS
    sets = sets_of(
        (features, labels), (test_features, test_labels), validation, classes, several
    )
    # Two classes are one question, as for scikit-learn: the penalty counts it once.
    binary = several or sets.ways == 2

    def fit(data, settings):
        x, y = data
        if not several:
            y = y[:, None] if binary else np.eye(sets.ways, dtype=np.float32)[y]
        return lbfgs.fit(
            x,
            y,
            settings,
            binary=binary,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )

    def scored(model, on):
        """The logits [n, K] of each setting, one after the other."""
        logits = np.asarray(model(jnp.asarray(on[0]))).swapaxes(0, 1)
        if binary and not several:
            logits = np.concatenate([np.zeros_like(logits), logits], -1)
        return logits

    width = 1 if binary and not several else sets.ways
    group = max(1, _BYTES // (4 * width * len(sets.fit[0])))
    sweep = {}

    def evaluate(places):
        new = [c for _, c in places if c not in sweep]
        for first in range(0, len(new), group):
            part = new[first : first + group]
            model = fit(sets.fit, costs[part])
            logits = scored(model, sets.held)
            for i, c in enumerate(part):
                score = METRICS[metric](logits[i], sets.held[1])
                sweep[c] = Fit(float(costs[c]), score, int(model.iterations[i]))
        return [sweep[c].score for _, c in places]

    _, best = elevater.search(evaluate, 1, len(costs), coarse)
    final = fit(sets.whole, costs[[best]])
    logits = scored(final, sets.test)[0]
    weights, bias = np.asarray(final.weights)[0], np.asarray(final.bias)[0]
    if binary and not several:
        weights = np.concatenate([np.zeros_like(weights), weights])
        bias = np.concatenate([np.zeros_like(bias), bias])
    return LogisticProbe(
        metric=metric,
        cost=float(costs[best]),
        validation=sweep[best].score,
        selected=METRICS[metric](logits, sets.test[1]),
        converged=bool(final.gradient[0] <= tolerance),
        sweep=tuple(sweep[c] for c in sorted(sweep)),
        per_class=None if several else per_class(logits, sets.test[1]),
        scores=logits,
        weights=weights,
        bias=bias,
    )
