"""The linear probe: ELEVATER's protocol on features that are computed once.

Every choice is made on validation records. ELEVATER's own number, the best epoch on
the test set, comes along under that name.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from unicl_jax.errors import InputError, choose
from unicl_jax.evaluation import elevater, heads
from unicl_jax.evaluation.checks import sets_of
from unicl_jax.evaluation.scores import METRICS, OF_SEVERAL_LABELS, per_class


class Protocol(NamedTuple):
    """How a probe is trained and chosen; the defaults are ELEVATER's."""

    learning_rates: Sequence[float] = elevater.LEARNING_RATES
    weight_decays: Sequence[float] = elevater.WEIGHT_DECAYS
    coarse: int = elevater.COARSE  # every so many weight decays first; 1: all of them
    epochs: int = 10  # of each run of the sweep
    final_epochs: int = 50
    batch_size: int = 64
    momentum: float = 0.9
    logit_scale: float = 1.0
    # ELEVATER ranks the records of a class by softmax also where labels are several.
    softmax_scores: bool = True
    merge: bool = True  # whether the final run has the validation records, too
    # Records of each class that are split for the sweep; None: all. ELEVATER has 10,000
    # for PatchCamelyon. The final run has all records, if `merge`.
    sweep_shots: int | None = None
    seed: int = 0  # of the start and the batches, the same for all settings


class Curve(NamedTuple):
    """What one setting of the sweep did on the validation records."""

    learning_rate: float
    weight_decay: float
    scores: tuple[float, ...]  # after each epoch; empty where surely divergent
    diverged: bool  # NaN or infinite at some epoch: it scores 0 and cannot be chosen

    @property
    def steady(self) -> float:
        """The mean over the later half of the epochs; -1 if it cannot be chosen.

        The best epoch, by which ELEVATER chooses, favours settings on the edge of
        divergence, whose scores jump up and down: one epoch of many is good by chance.
        """
        if self.diverged:
            return -1.0
        return float(np.mean(self.scores[len(self.scores) // 2 :]))


class Elevater(NamedTuple):
    """What ELEVATER's own rules make of a sweep."""

    learning_rate: float  # of the best epoch of any setting on validation records
    weight_decay: float
    validation: float  # there
    validation_epoch: int  # which epoch that is, from 1
    test_curve: tuple[float, ...]  # of the final run, after each epoch; 0 if not finite
    last_epoch: float  # on the test set, after the final run
    best_test_epoch: float  # test-set selection: ELEVATER's number, too good
    finite: bool  # whether the final run stayed so


class Probe(NamedTuple):
    """What a probe found; scores are of the task's metric, in [0, 1]."""

    metric: str
    learning_rate: float  # chosen on validation records: the steadiest best
    weight_decay: float
    validation: float  # of that setting: `Curve.steady`
    selected: float  # on the test set, trained on all records with that setting
    elevater: Elevater
    sweep: tuple[Curve, ...]  # by learning rate, then weight decay
    diverged: int  # of the sweep
    per_class: np.ndarray | None  # [K] accuracy; None for several labels
    scores: np.ndarray  # [n, K] float32 logits of the test set, of `selected`
    head: heads.Heads  # of `selected`


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    classes: int | None = None,
    metric: str = "accuracy",
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    start: np.ndarray | None = None,
    protocol: Protocol = Protocol(),  # noqa: B008 - a tuple
) -> Probe:
    """Trains linear heads with many settings, picks one, and scores it on the test set.

    A head is a batch norm without scale and offset and a linear map. The sweep runs on
    the training records without validation records. The setting that is best over the
    later epochs is then trained on all records for as many epochs, which is the score;
    and ELEVATER's choice for ELEVATER's 50, of which the best on the test set is its
    number.

    Args:
      features: [n, D] finite, of the training set, as the model gives them: ELEVATER
        does not normalise them.
      labels: [n] integer in [0, K), or [n, K] of 0 and 1 for several labels a record.
      test_features: [m, D] finite.
      test_labels: as `labels`, of m records.
      classes: K, if the labels do not tell.
      metric: a key of `scores.METRICS`; "map11" or "map" for several labels.
      validation: features and labels of a set of its own; else a fifth of every class
        of the training set, as `elevater.split` takes it.
      start: [K, D] weights that heads start from, as text embeddings of the class
        names, with no bias; else random ones, PyTorch's way.
      protocol: see there.

    Returns:
      Scores, the choice, and all that led to it.

    Raises:
      InputError: where the arguments are not so; if every setting diverged.

    Source: ELEVATER (Li et al., 2022) and its toolkit's code. Other than there, the
    score is of a steady setting (see `Curve.steady`), and never chosen on the test set;
    the official validation set may be used; settings that diverge are counted, and
    those that surely will, by their weight decay alone, are not trained.
    """
    _check_protocol(protocol, metric)
    several = metric in OF_SEVERAL_LABELS
    fit, held, whole, test, ways = sets_of(
        (features, labels),
        (test_features, test_labels),
        validation,
        classes,
        several,
        protocol.merge,
        functools.partial(
            elevater.split, shots=protocol.sweep_shots, seed=protocol.seed
        ),
    )
    start = _start(start, ways, fit[0].shape[1], protocol.seed)
    best, curves = sweep(fit, held, start, metric, protocol)
    chosen = max(curves, key=lambda curve: curve.steady)  # the first of equals

    def run(on, curve, epochs):
        setting = [(curve.learning_rate, curve.weight_decay)]
        trained, scores = _fit(on, test, start, setting, epochs, metric, protocol)
        return trained, tuple(map(float, scores[:, 0]))

    trained, scored = run(whole, chosen, protocol.epochs)
    if not trained.finite.all():  # with more records, and so more steps
        trained, scored = run(fit, chosen, protocol.epochs)
    final, test_curve = run(whole, best, protocol.final_epochs)
    head = trained.heads
    logits = np.asarray(head(jnp.asarray(test[0]), protocol.logit_scale))[:, 0]
    return Probe(
        metric=metric,
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        validation=chosen.steady,
        selected=scored[-1],
        elevater=Elevater(
            learning_rate=best.learning_rate,
            weight_decay=best.weight_decay,
            validation=max(best.scores),
            validation_epoch=int(np.argmax(best.scores)) + 1,
            test_curve=test_curve,
            last_epoch=test_curve[-1],
            best_test_epoch=max(test_curve),
            finite=bool(final.finite.all()),
        ),
        sweep=curves,
        diverged=sum(curve.diverged for curve in curves),
        per_class=None if several else per_class(logits, test[1]),
        scores=logits,
        head=head,
    )


def sweep(
    fit: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
    start: tuple[np.ndarray, np.ndarray],
    metric: str = "accuracy",
    protocol: Protocol = Protocol(),  # noqa: B008 - a tuple
) -> tuple[Curve, tuple[Curve, ...]]:
    """Trains heads with the settings that the search asks for, each round together.

    Args:
      fit: features [n, D] float32 and labels, [n] int32 or [n, K] float32, to train on.
      held: likewise, to score on.
      start: weights [K, D] and bias [K] that all heads start from.
      metric: a key of `scores.METRICS`.
      protocol: see there.

    Returns:
      The best setting, and all that were tried, by learning rate, then weight decay.

    Raises:
      InputError: if every setting diverged.
    """
    found = {}  # by the places of learning rate and weight decay
    steps = heads.batches(len(fit[0]), 1, protocol.batch_size, 0).shape[1]

    def evaluate(places):
        live = []
        for place in places:
            rate, decay = place
            setting = protocol.learning_rates[rate], protocol.weight_decays[decay]
            if heads.overflows(*setting, protocol.momentum, steps * protocol.epochs):
                found[place] = Curve(*setting, (), True)
            elif place not in found:
                live.append((place, setting))
        if live:
            trained, curves = _fit(
                fit,
                held,
                start,
                [setting for _, setting in live],
                protocol.epochs,
                metric,
                protocol,
            )
            finite = trained.finite.all(0)
            for i, (place, setting) in enumerate(live):
                curve = tuple(map(float, curves[:, i]))
                found[place] = Curve(*setting, curve, not bool(finite[i]))
        return [
            -1.0 if found[place].diverged else max(found[place].scores)
            for place in places
        ]

    best = elevater.search(
        evaluate,
        len(protocol.learning_rates),
        len(protocol.weight_decays),
        protocol.coarse,
    )
    if found[best].diverged:
        raise InputError(
            f"a setting of the probe must stay finite: all {len(found)} diverged. Use "
            "lower learning rates, or look at the scale of the features."
        )
    return found[best], tuple(found[place] for place in sorted(found))


def _fit(data, on, start, settings, epochs, metric, protocol):
    """Heads of some settings, and their scores after each epoch [epochs, settings]."""
    trained = heads.train(
        *map(jnp.asarray, data),
        *map(jnp.asarray, on),
        start,
        *np.array(settings, np.float64).T,
        heads.batches(len(data[0]), epochs, protocol.batch_size, protocol.seed + 1),
        momentum=protocol.momentum,
        scale=protocol.logit_scale,
        want_logits=metric in OF_SEVERAL_LABELS or metric == "roc_auc",
        # Rounds of the search differ in length: one size is one program.
        group=None if len(settings) == 1 else 2 * len(protocol.learning_rates),
    )
    return trained, _curves(trained, on[1], metric, protocol.softmax_scores)


def _check_protocol(protocol, metric):
    choose(METRICS, metric, "a probe's metric")
    if not (len(protocol.learning_rates) and len(protocol.weight_decays)):
        raise InputError("a probe needs a learning rate and a weight decay: got none.")
    values = np.array([*protocol.learning_rates, *protocol.weight_decays])
    if not np.isfinite(values).all() or values.min() < 0:
        raise InputError(
            "learning rates and weight decays must be finite and not negative: got "
            f"{protocol.learning_rates} and {protocol.weight_decays}."
        )
    for name in ("epochs", "final_epochs"):
        if getattr(protocol, name) < 1:
            raise InputError(
                f"{name} of a probe must be at least 1: got {getattr(protocol, name)}."
            )
    if protocol.batch_size < 2:
        raise InputError(
            "batch_size of a probe must be at least 2, for one record has no variance: "
            f"got {protocol.batch_size}."
        )
    if protocol.coarse < 1 or protocol.coarse & (protocol.coarse - 1):
        raise InputError(
            f"coarse of a probe must be a power of 2: got {protocol.coarse}."
        )


def _start(start, ways, dim, seed):
    """The weights and the bias that all heads start from."""
    if start is None:
        return heads.random_start(ways, dim, seed)
    start = np.asarray(start, np.float32)
    if start.shape != (ways, dim) or not np.isfinite(start).all():
        raise InputError(
            f"start must be [K, D] = [{ways}, {dim}], finite: got "
            f"{list(start.shape)}. Embed the {ways} class names with the model that "
            "gave the features."
        )
    return start, np.zeros(ways, np.float32)


def _curves(trained, labels, metric, softmax):
    """The metric after each epoch [epochs, settings]; 0 where not finite."""
    if trained.logits is None:
        records = np.bincount(labels, minlength=trained.hits.shape[-1])
        hits = trained.hits.astype(np.float64)
        if metric == "accuracy":
            scores = hits.sum(-1) / records.sum()
        else:
            there = records > 0
            scores = (hits[..., there] / records[there]).mean(-1)
        return np.where(trained.finite, scores, 0.0)
    scores = np.zeros(trained.finite.shape)
    for epoch, setting in zip(*np.nonzero(trained.finite), strict=True):
        logits = trained.logits[epoch, setting].astype(np.float64)
        if softmax:  # its logarithm, which ranks as well and never rounds to 0
            peak = logits.max(1, keepdims=True)
            logits = logits - peak
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        scores[epoch, setting] = METRICS[metric](logits, labels)
    return scores
