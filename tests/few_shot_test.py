"""Few-shot subsets and the probes on them."""

import numpy as np
import pytest
import real_features

from unicl_jax.errors import InputError
from unicl_jax.evaluation import scores
from unicl_jax.evaluation.elevater import subset
from unicl_jax.evaluation.few_shot import few_shot
from unicl_jax.evaluation.probe import Protocol

QUICK = Protocol(
    learning_rates=(1e-2, 1e-1), weight_decays=(1e-6, 1e-2), coarse=1, epochs=5
)._replace(final_epochs=10)


def fashion(records=1500, test=400):
    return real_features.fashion(records, test, 48)


def test_a_subset_has_so_many_of_each_class():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    labels[:3] = 9  # a class of three
    rows = subset(labels, 20, 0)
    assert np.bincount(labels[rows]).tolist() == [20] * 7 + [0, 0, 3]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, subset(labels, 20, 0))
    assert not np.array_equal(rows, subset(labels, 20, 1))
    assert set(subset(labels, 5, 0)) < set(rows)


def test_a_subset_is_drawn_evenly():
    labels = np.zeros(10, int)
    drawn = np.concatenate([subset(labels, 3, seed) for seed in range(400)])
    # 120 expected of each; the standard deviation is 9.2.
    assert (abs(np.bincount(drawn, minlength=10) - 120) < 40).all()


def test_a_subset_of_several_labels_has_at_least_so_many():
    targets = np.random.default_rng(0).random((300, 6)) < 0.2
    rows = subset(targets, 10, 0)
    assert (targets[rows].sum(0) >= 10).all()
    assert len(rows) < 60  # what a record brings for others counts


def test_more_shots_are_better_and_the_interval_is_theirs():
    x, y, tx, ty = fashion()
    told = []
    few, more = few_shot(
        x, y, tx, ty, shots=(1, 50), protocol=QUICK, done=lambda *a: told.append(a)
    )
    assert told == [(s, seed) for s in (1, 50) for seed in (0, 1, 2)]
    assert few.records == (20,) * 3 and more.records == (500,) * 3
    assert more.selected.mean > few.selected.mean + 0.1
    assert few.selected.mean > 0.2  # of ten classes
    assert more.selected == scores.interval([p.selected for p in more.probes])
    assert more.selected.half_width > 0
    assert more.best_test_epoch.mean >= more.selected.mean
    assert few.classes_short == more.classes_short == 0


def test_one_shot_trains_on_one_record_a_class():
    x, y, tx, ty = fashion()
    (found,) = few_shot(x, y, tx, ty, shots=(1,), seeds=(0,), protocol=QUICK)
    rows = subset(y, 2, 0)
    first = [rows[y[rows] == k][1] for k in range(10)]  # the other validates
    probe = found.probes[0]
    # Running means come from batches that are all ten of them, one an epoch.
    share = 1 - 0.9**QUICK.epochs
    mean = np.asarray(probe.head.mean)
    np.testing.assert_allclose(mean, share * x[first].mean(0), atol=1e-5)
    assert found.selected.half_width is None


def test_few_shot_of_several_labels_and_classes_with_few():
    x, y, tx, ty = fashion()
    both = [
        np.eye(12, dtype=int)[a] + np.eye(12, dtype=int)[10 + a % 2] for a in (y, ty)
    ]
    (found,) = few_shot(
        x,
        both[0],
        tx,
        both[1],
        shots=(200,),
        seeds=(0, 1),
        metric="map11",
        protocol=QUICK,
    )
    assert found.classes_short == int((both[0].sum(0) < 200).sum()) > 0
    assert found.selected.mean > 2 * both[1].mean()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(shots=(0,)), "at least 1 record"),
        (dict(shots=()), "got none"),
        (dict(seeds=()), "got none"),
        (dict(classes=4), r"\[0, 4\)"),
        (dict(features=np.full((1500, 48), np.inf)), "finite"),
    ],
)
def test_wrong_input_is_said(change, message):
    x, y, tx, ty = fashion()
    given = dict(features=x, labels=y, test_features=tx, test_labels=ty)
    with pytest.raises(InputError, match=message):
        few_shot(**{**given, "protocol": QUICK, **change})
