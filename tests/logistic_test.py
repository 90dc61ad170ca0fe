"""Logistic regression, against scikit-learn's."""

import functools

import numpy as np
import pytest
import real_features
from real_features import several

from unicl_jax.errors import InputError
from unicl_jax.evaluation import lbfgs
from unicl_jax.evaluation.logistic import logistic_probe

FEW = dict(costs=(1e-3, 1e-1, 10.0), coarse=1, max_iterations=200)


def fashion(records=600, test=300):
    return real_features.fashion(records, test, 24)


def scikit_learns(x, y, cost):
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=cost, max_iter=5000, tol=1e-7)
    return model.fit(x.astype(np.float64), y)


@pytest.mark.parametrize("ways", [2, 10])
def test_models_are_scikit_learns(ways):
    x, y, tx, _ = fashion()
    x, tx = 3 * x + 1, 3 * tx + 1  # neither centred nor of variance 1
    y = y % ways
    targets = y[:, None] if ways == 2 else np.eye(10)[y]
    costs = [1e-4, 1e-2, 1.0]
    found = lbfgs.fit(x, targets, costs, binary=ways == 2, tolerance=2e-6)
    logits = np.asarray(found(tx))
    for i, cost in enumerate(costs):
        peer = scikit_learns(x, y, cost)
        expected = peer.decision_function(tx).reshape(len(tx), -1)
        # float32; relative to the largest.
        close = functools.partial(np.testing.assert_allclose, rtol=0)
        close(found.weights[i], peer.coef_, atol=1e-3 * abs(peer.coef_).max())
        close(logits[:, i], expected, atol=2e-3 * abs(expected).max())


def test_together_is_one_penalty_at_a_time():
    x, y, _, _ = fashion()
    targets = np.eye(10)[y]
    costs = [1e-3, 1e-1, 1.0]
    together = lbfgs.fit(x, targets, costs, tolerance=1e-5)
    assert (together.gradient <= 1e-5).all()
    for i in range(3):
        alone = lbfgs.fit(x, targets, costs[i : i + 1], tolerance=1e-5)
        scale = np.abs(alone.weights).max()
        np.testing.assert_allclose(
            together.weights[i], alone.weights[0], atol=2e-3 * scale
        )


def test_probe_is_as_good_as_scikit_learns_best():
    x, y, tx, ty = fashion(2000)
    found = logistic_probe(x, y, tx, ty)
    peer = scikit_learns(x, y, found.cost).score(tx, ty)
    assert found.selected == pytest.approx(peer, abs=0.01)
    assert found.selected == (found.scores.argmax(1) == ty).mean()
    assert found.validation == max(fit.score for fit in found.sweep)
    assert 7 <= len(found.sweep) <= 15 and found.converged
    logits = tx @ found.weights.T + found.bias
    np.testing.assert_allclose(logits, found.scores, atol=1e-3 * abs(logits).max())


def test_nothing_is_chosen_on_the_test_set():
    x, y, tx, ty = fashion()
    found = logistic_probe(x, y, tx, ty, **FEW)
    other = logistic_probe(x, y, tx, np.roll(ty, 7), **FEW)
    assert found.sweep == other.sweep and found.cost == other.cost
    assert found.selected > other.selected


def test_two_classes_several_labels_and_a_validation_set():
    x, y, tx, ty = fashion()
    found = logistic_probe(x, y % 2, tx, ty % 2, metric="roc_auc", **FEW)
    assert 0.8 < found.selected < 1 and found.scores.shape == (300, 2)
    peer = scikit_learns(x, y % 2, found.cost)
    expected = peer.decision_function(tx)
    np.testing.assert_allclose(
        found.scores[:, 1], expected, atol=0.02 * abs(expected).max()
    )
    found = logistic_probe(
        x[:500],
        several(y[:500]),
        tx,
        several(ty),
        validation=(x[500:], several(y[500:])),
        metric="map11",
        **FEW,
    )
    assert found.selected > 2 * several(ty).mean() and found.per_class is None


def test_features_that_say_nothing():
    _, y, _, ty = fashion()
    x, tx = np.ones((600, 3)), np.ones((300, 3))
    found = logistic_probe(x, y, tx, ty, **FEW)
    assert np.isfinite(found.scores).all()
    # All get the class that was most often there.
    assert (found.scores.argmax(1) == np.bincount(y).argmax()).all()


WRONG = {
    "cost": (dict(costs=(0.0, 1.0)), "above 0"),
    "costs": (dict(costs=()), "above 0"),
    "coarse": (dict(coarse=3), "power of 2"),
    "iterations": (dict(max_iterations=0), "iteration"),
    "nan": (dict(features=np.full((600, 24), np.nan)), "finite"),
    "one class": (dict(labels=np.zeros(600, int), test_labels=np.zeros(300, int)), "2"),
    "metric": (dict(metric="top1"), "accuracy"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_said(what):
    change, message = WRONG[what]
    x, y, tx, ty = fashion()
    given = dict(features=x, labels=y, test_features=tx, test_labels=ty)
    with pytest.raises(InputError, match=message):
        logistic_probe(**{**given, **change})
