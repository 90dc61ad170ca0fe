"""The linear probe: ELEVATER's protocol on features that are computed once.

Every choice is made on validation records. ELEVATER's own number, the best epoch on
the test set, comes along under that name.
"""

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
    seed: int = 0  # of the start and the batches, the same for all settings


class Curve(NamedTuple):
    """What one setting of the sweep did on the validation records."""

    learning_rate: float
    weight_decay: float
    scores: tuple[float, ...]  # after each epoch; empty where surely divergent
    diverged: bool  # NaN or infinite at some epoch: it scores 0 and cannot be chosen


class Probe(NamedTuple):
    """What a probe found; scores are of the task's metric, in [0, 1]."""

    metric: str
    learning_rate: float  # chosen on validation records, as all but best_test_epoch
    weight_decay: float
    validation: float  # of the chosen setting, at its best epoch
    validation_epoch: int  # which epoch that is, from 1
    selected: float  # on the test set, after the final run's last epoch
    best_validation_epoch: float  # on the test set, trained as it was when chosen
    best_test_epoch: float  # test-set selection: ELEVATER's number, too good
    test_curve: tuple[float, ...]  # of the final run, after each epoch
    test_finite: bool  # whether the final run stayed finite; if not, it scores 0
    sweep: tuple[Curve, ...]  # by learning rate, then weight decay
    diverged: int  # of the sweep
    per_class: np.ndarray | None  # [K] accuracy; None for several labels, or not finite
    scores: np.ndarray  # [n, K] float32 logits of the test set, last epoch
    head: heads.Heads  # of the final run


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
    the training records without validation records, the final run on all of them.

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
    official validation set may be used; settings that diverge are counted, and those
    that surely will, by their weight decay alone, are not trained.
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
    )
    start = _start(start, ways, fit[0].shape[1], protocol.seed)

    def fit_heads(data, on, settings, epochs, logits=several or metric == "roc_auc"):
        order = heads.batches(
            len(data[0]), epochs, protocol.batch_size, protocol.seed + 1
        )
        return heads.train(
            *map(jnp.asarray, data),
            *map(jnp.asarray, on),
            start,
            *np.array(settings, np.float64).T,
            order,
            momentum=protocol.momentum,
            scale=protocol.logit_scale,
            want_logits=logits,
            # Rounds of the search differ in length: one size is one program.
            group=None if len(settings) == 1 else 2 * len(protocol.learning_rates),
        )

    def curves(trained, on):
        return _curves(trained, on[1], metric, protocol.softmax_scores)

    sweep = {}  # by the places of learning rate and weight decay
    steps = _steps(len(fit[0]), protocol)

    def evaluate(places):
        new = [place for place in places if place not in sweep]
        settings = {
            place: (
                protocol.learning_rates[place[0]],
                protocol.weight_decays[place[1]],
            )
            for place in new
        }
        doomed = {
            place
            for place, setting in settings.items()
            if heads.overflows(*setting, protocol.momentum, steps)
        }
        for place in doomed:
            sweep[place] = Curve(*settings[place], (), True)
        live = [place for place in new if place not in doomed]
        if live:
            trained = fit_heads(
                fit, held, [settings[place] for place in live], protocol.epochs
            )
            for i, (place, curve) in enumerate(
                zip(live, curves(trained, held).T, strict=True)
            ):
                finite = bool(trained.finite[:, i].all())
                sweep[place] = Curve(
                    *settings[place], tuple(map(float, curve)), not finite
                )
        return [
            -1.0 if sweep[place].diverged else max(sweep[place].scores)
            for place in places
        ]

    best = elevater.search(
        evaluate,
        len(protocol.learning_rates),
        len(protocol.weight_decays),
        protocol.coarse,
    )
    chosen = sweep[best]
    diverged = sum(curve.diverged for curve in sweep.values())
    if chosen.diverged:
        raise InputError(
            f"a setting of the probe must stay finite: all {diverged} diverged. Use "
            "lower learning rates, or look at the scale of the features."
        )
    setting = [(chosen.learning_rate, chosen.weight_decay)]
    epoch = int(np.argmax(chosen.scores))
    as_chosen = curves(fit_heads(fit, test, setting, protocol.epochs), test)[epoch, 0]
    final = fit_heads(whole, test, setting, protocol.final_epochs)
    curve = curves(final, test)[:, 0]
    logits = np.asarray(final.heads(jnp.asarray(test[0]), protocol.logit_scale))[:, 0]
    finite = bool(final.finite.all())
    return Probe(
        metric=metric,
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        validation=chosen.scores[epoch],
        validation_epoch=epoch + 1,
        selected=float(curve[-1]),
        best_validation_epoch=float(as_chosen),
        best_test_epoch=float(curve.max()),
        test_curve=tuple(map(float, curve)),
        test_finite=finite,
        sweep=tuple(sweep[place] for place in sorted(sweep)),
        diverged=diverged,
        per_class=per_class(logits, test[1])
        if not several and np.isfinite(logits).all()
        else None,
        scores=logits,
        head=final.heads,
    )


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
        rng, bound = np.random.default_rng(seed), dim**-0.5
        return (
            rng.uniform(-bound, bound, (ways, dim)).astype(np.float32),
            rng.uniform(-bound, bound, ways).astype(np.float32),
        )
    start = np.asarray(start, np.float32)
    if start.shape != (ways, dim) or not np.isfinite(start).all():
        raise InputError(
            f"start must be [K, D] = [{ways}, {dim}], finite: got "
            f"{list(start.shape)}. Embed the {ways} class names with the model that "
            "gave the features."
        )
    return start, np.zeros(ways, np.float32)


def _steps(records, protocol):
    return heads.batches(records, 1, protocol.batch_size, 0).shape[1] * protocol.epochs


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
