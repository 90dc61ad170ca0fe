"""What is mixed up, counted by hand."""

import numpy as np

from unicl_jax.evaluation import confusion

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
FIRST = np.array([0, 1, 1, 1, 0, 0, 2, 2, 0])


def test_classes_are_scored_by_their_own_records():
    accuracy, records = confusion.per_class(FIRST, LABELS, 4)
    np.testing.assert_allclose(accuracy[:3], [1 / 3, 1 / 2, 1 / 2])
    assert accuracy[3] is None
    assert records == [3, 2, 4, 0]


def test_pairs_are_ordered_by_count_then_share():
    ranked = np.stack([FIRST, (FIRST + 1) % 3], 1)
    pairs = confusion.confusions(ranked, LABELS, 4)
    named = [(p["true"], p["predicted"], p["count"], p["share"]) for p in pairs]
    assert named == [(0, 1, 2, 2 / 3), (2, 0, 2, 1 / 2), (1, 0, 1, 1 / 2)]
    assert confusion.confusions(ranked, LABELS, 4, limit=1) == pairs[:1]
    assert confusion.confusions(LABELS, LABELS, 4) == []


def test_examples_show_the_confused_pairs_first():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 1000)
    first = labels.copy()
    first[np.flatnonzero(labels == 3)[:50]] = 4
    chosen = confusion.examples(first, labels, limit=4)
    assert len(set(chosen)) == 4
    pairs = sorted(zip(labels[chosen], first[chosen], strict=True))
    assert pairs == [(3, 3), (3, 4), (3, 4), (4, 4)]
    assert len(confusion.examples(first, labels)) == 64
    assert len(confusion.examples(first[:10], labels[:10])) == 10
