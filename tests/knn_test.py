"""k-NN, against scikit-learn's and NumPy by hand."""

import numpy as np
import pytest

from unicl_jax.data import quickstart
from unicl_jax.errors import InputError
from unicl_jax.evaluation import knn as of


def fashion(records=1500, test=500):
    """Real images as rows of pixels, and their labels."""
    sets = []
    for part, count in (("train", records), ("test", test)):
        found = quickstart.fashion_mnist(part)
        pixels = found.images[:count, ::2, ::2, 0].reshape(count, -1) / 255
        sets += [pixels.astype(np.float32), found.labels[:count]]
    return sets


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_majority_is_scikit_learns(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y, tx, ty = fashion()
    peer = neighbors.KNeighborsClassifier(k, metric="cosine").fit(x, y)
    scores = of.knn(x, y, tx, k=k, vote="majority")
    np.testing.assert_array_equal(scores.argmax(1), peer.predict(tx))
    np.testing.assert_allclose(scores, peer.predict_proba(tx), atol=1e-6)
    assert (scores.argmax(1) == ty).mean() > 0.7


def test_the_weighted_vote_by_hand():
    x, y, tx, _ = fashion(200, 30)

    def unit(a):
        a = a.astype(np.float64)
        return a / np.linalg.norm(a, axis=1, keepdims=True)

    cosine = unit(tx) @ unit(x).T
    rows = np.argsort(-cosine, axis=1, kind="stable")[:, :10]
    expected = np.zeros((30, 10))
    for i, row in enumerate(rows):
        for j in row:
            expected[i, y[j]] += np.exp(cosine[i, j] / 0.05)
    expected /= expected.sum(1, keepdims=True)
    scores = of.knn(x, y, tx, k=10, temperature=0.05)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert not np.array_equal(scores, of.knn(x, y, tx, k=10, vote="majority"))


def test_blocks_find_what_one_block_finds(monkeypatch):
    x, _, tx, _ = fashion(300, 50)
    x[100:200] = x[:100]  # equals: the earlier is nearer, in whatever block
    whole = of.nearest(x, tx, 7)
    assert not ((whole.rows >= 100) & (whole.rows < 200)).all(1).any()
    monkeypatch.setattr(of, "_QUERIES", 16)
    monkeypatch.setattr(of, "_BANK", 64)
    of._nearest.clear_cache()
    blocks = of.nearest(x, tx, 7)
    against = of.nearest(-x[:100], tx, 100)
    of._nearest.clear_cache()
    np.testing.assert_allclose(blocks.similarity, whole.similarity, atol=1e-6)
    # The last block's padding is no neighbour, although 0 is nearer than these.
    assert (np.sort(against.rows, 1) == np.arange(100)).all()
    # Cosines of equal records may differ in the last bit between blocks.
    same = blocks.rows % 100 == whole.rows % 100
    assert same[whole.rows < 200].all()


def test_a_temperature_near_zero_is_the_nearest_alone():
    x, y, tx, _ = fashion(300, 50)
    cold = of.knn(x, y, tx, k=20, temperature=1e-6)
    assert np.isfinite(cold).all()
    one = of.knn(x, y, tx, k=1, vote="majority")
    np.testing.assert_array_equal(cold.argmax(1), one.argmax(1))


def test_zeros_one_record_and_classes_without_any():
    x, y, tx, _ = fashion(10, 4)
    tx[0] = 0
    scores = of.knn(x, y, tx, k=10, classes=12)
    assert scores.shape == (4, 12) and np.isfinite(scores).all()
    assert (scores[:, 10:] == 0).all()
    one = of.knn(x[:1], y[:1], tx, k=1, classes=12)
    assert (one.argmax(1) == y[0]).all()


WRONG = {
    "k of none": (dict(k=0), r"\[1, 100\]"),
    "k of too many": (dict(k=101), r"\[1, 100\]"),
    "vote": (dict(vote="majorty"), "majority"),
    "temperature": (dict(temperature=0.0), "above 0"),
    "nan": (dict(features=np.full((100, 256), np.nan)), "finite"),
    "test nan": (dict(test_features=np.full((5, 256), np.nan)), "finite"),
    "size": (dict(test_features=np.zeros((5, 3))), "size"),
    "range": (dict(classes=3), r"\[0, 3\)"),
    "one class": (dict(labels=np.zeros(100, int)), "2 classes"),
    "none": (dict(features=np.zeros((0, 256)), labels=np.zeros(0, int)), "2 classes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_said(what):
    change, message = WRONG[what]
    x, y, tx, _ = fashion(100, 5)
    given = dict(features=x, labels=y, test_features=tx, k=5)
    with pytest.raises(InputError, match=message):
        of.knn(**{**given, **change})
