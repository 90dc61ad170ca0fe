"""Metrics, against scikit-learn's and by hand."""

import numpy as np
import pytest

from unicl_jax.errors import InputError
from unicl_jax.evaluation import scores as of


def random_scores(n=200, ways=7, seed=0, ties=True):
    """Scores with many ties, labels, and targets of several labels a record."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, ways)).astype(np.float32)
    if ties:
        scores = np.round(2 * scores) / 2
    return scores, rng.integers(0, ways, n), rng.random((n, ways)) < 0.3


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_is_scikit_learns(k):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = random_scores(ties=False)
    expected = metrics.top_k_accuracy_score(labels, scores, k=k)
    assert of.top_k(scores, labels, k) == pytest.approx(expected, abs=0)


def test_top_k_takes_the_first_of_equal_scores_and_all_of_few_classes():
    scores, labels, _ = random_scores()
    assert of.accuracy(scores, labels) == (scores.argmax(1) == labels).mean()
    assert of.top_k(scores, labels, 7) == of.top_k(scores, labels, 50) == 1
    assert of.accuracy(np.zeros((4, 3)), [0, 1, 2, 0]) == 0.5
    assert of.accuracy(np.zeros((1, 1)), [0]) == 1


def test_mean_per_class_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels, _ = random_scores()
    labels[labels == 3] = 4  # a class without records does not count
    expected = metrics.recall_score(
        labels, scores.argmax(1), average="macro", labels=[0, 1, 2, 4, 5, 6]
    )
    assert of.mean_per_class(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(of.per_class(scores, labels)[3])


def test_roc_auc_is_scikit_learns_with_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, _, targets = random_scores()
    for column, target in zip(scores.T, targets.T, strict=True):
        expected = metrics.roc_auc_score(target, column)
        assert of.roc_auc(column, target) == pytest.approx(expected, abs=1e-12)
        both = np.stack([-column / 2, column / 2], 1)
        assert of.roc_auc(both, target) == pytest.approx(expected, abs=1e-12)


def test_roc_auc_by_hand():
    assert of.roc_auc([0.1, 0.2, 0.3], [0, 0, 1]) == 1
    assert of.roc_auc([0.3, 0.2, 0.1], [0, 0, 1]) == 0
    assert of.roc_auc([0.5, 0.5, 0.5], [0, 0, 1]) == 0.5
    assert of.roc_auc([0.1, 0.2, 0.2], [0, 0, 1]) == 0.75


def test_average_precision_is_scikit_learns_with_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, _, targets = random_scores()
    expected = metrics.average_precision_score(targets, scores, average=None)
    np.testing.assert_allclose(
        of.average_precision(scores, targets), expected, rtol=0, atol=1e-12
    )
    assert of.METRICS["map"](scores, targets) == pytest.approx(expected.mean())


def test_map11_is_the_interpolated_curve_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, _, targets = random_scores()
    expected = []
    for column, target in zip(scores.T, targets.T, strict=True):
        precision, recall, _ = metrics.precision_recall_curve(target, column)
        # Its last point, precision 1 at recall 0, is not the challenge's.
        precision, recall = precision[:-1], recall[:-1]
        expected.append(
            np.mean([precision[recall >= t - 1e-9].max() for t in np.arange(11) / 10])
        )
    np.testing.assert_allclose(
        of.average_precision_11(scores, targets), expected, rtol=0, atol=1e-12
    )


def test_map11_by_hand():
    # Hits at ranks 1 and 3 of 4: precision 1 up to recall 1/2, then 2/3.
    score = np.array([[4.0], [3], [2], [1]])
    target = np.array([[1], [0], [1], [0]])
    assert of.map11(score, target) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    # Ten hits in a row after a miss: every recall 0.1, 0.2, .. is reached, exactly.
    target = np.r_[0, np.ones(10, int)][:, None]
    score = -np.arange(11.0)[:, None]
    assert of.map11(score, target) == pytest.approx(10 / 11)


def test_map11_at_recalls_that_floating_point_misses():
    # Of ten records that have the class, the first three come before 90 that do not:
    # recall 0.3 is reached with precision 1, although 3 * 0.1 > 0.3.
    target = np.r_[np.ones(3, int), np.zeros(90, int), np.ones(7, int)][:, None]
    score = -np.arange(100.0)[:, None]
    assert of.map11(score, target) == pytest.approx((4 * 1 + 7 * 0.1) / 11)


def test_classes_that_no_record_has_do_not_count():
    scores, _, targets = random_scores()
    without = targets.copy()
    without[:, 2] = False
    kept = [0, 1, 3, 4, 5, 6]
    for name in of.OF_SEVERAL_LABELS:
        metric = of.METRICS[name]
        assert metric(scores, without) == metric(scores[:, kept], targets[:, kept])
        with pytest.raises(InputError, match="got none"):
            metric(scores, np.zeros_like(targets))


@pytest.mark.parametrize("name", sorted(of.METRICS))
@pytest.mark.parametrize("what", ["nan", "shape", "range", "empty"])
def test_wrong_input_is_said(name, what):
    scores, labels, targets = random_scores(ways=2)
    given = targets.astype(int) if name in of.OF_SEVERAL_LABELS else labels
    if what == "nan":
        scores[3, 1] = np.nan
    elif what == "shape":
        given = given[:-1]
    elif what == "range":
        given = given + 1
    else:
        scores, given = scores[:0], given[:0]
    with pytest.raises(InputError):
        of.METRICS[name](scores, given)


def test_more_wrong_input_is_said():
    scores, labels, _ = random_scores()
    with pytest.raises(InputError, match="k must be at least 1"):
        of.top_k(scores, labels, 0)
    with pytest.raises(InputError, match="integers"):
        of.accuracy(scores, labels.astype(float))
    with pytest.raises(InputError, match="two classes"):
        of.roc_auc(scores, labels)
    with pytest.raises(InputError, match="both classes"):
        of.roc_auc(scores[:, 0], np.ones(len(labels), int))
    with pytest.raises(InputError, match="at least one value"):
        of.interval([])
    with pytest.raises(InputError, match="finite"):
        of.interval([0.5, np.nan])
    with pytest.raises(InputError, match="confidence"):
        of.interval([0.5, 0.6], confidence=95)
    with pytest.raises(InputError, match="at least one record"):
        of.wilson(0.5, 0)
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        of.wilson(95.0, 10)


def test_intervals():
    # t of 2 degrees of freedom at 0.975 is 4.302653: a table's.
    mean, half, runs = of.interval([0.1, 0.2, 0.3])
    assert (mean, runs) == (pytest.approx(0.2), 3)
    assert half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert of.interval([0.4]) == (0.4, None, 1)
    # Newcombe 1998, table I, 81 of 263 and 0 of 20.
    assert of.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert of.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert of.wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
