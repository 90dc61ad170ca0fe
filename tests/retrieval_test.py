"""Retrieval against brute force in float64 on the whole matrix."""

import jax
import numpy as np
import pytest

from unicl_jax.errors import InputError
from unicl_jax.evaluation import retrieval as module
from unicl_jax.evaluation.retrieval import retrieval


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def made_up(seed=0, images=61, texts=200, dim=24, noise=0.3):
    """Texts near their images, one to several an image, in no order."""
    rng = np.random.default_rng(seed)
    owners = np.arange(images)
    owners = np.concatenate([owners, rng.integers(0, images, texts - images)])
    rng.shuffle(owners)
    u = unit(rng.normal(size=(images, dim)))
    v = unit(u[owners] + noise * rng.normal(size=(texts, dim)))
    return u, v, owners


def by_hand(u, v, owners):
    """Ranks query by query; a wrong candidate that is as good counts as better."""
    scores = u.astype(np.float64) @ v.astype(np.float64).T
    image_ranks, text_ranks = [], []
    for i, row in enumerate(scores):
        best = row[owners == i].max()
        image_ranks.append((row[owners != i] >= best - 1e-12).sum())
    for j, column in enumerate(scores.T):
        wrong = np.delete(column, owners[j])
        text_ranks.append((wrong >= column[owners[j]] - 1e-12).sum())
    return np.array(image_ranks), np.array(text_ranks)


def check(found, image_ranks, text_ranks, at=(1, 5, 10)):
    expected = {}
    for way, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in at:
            expected[f"{way}_r{k}"] = np.mean(ranks < k)
        expected[f"{way}_median_rank"] = np.median(ranks) + 1
    assert found.metrics == expected
    for got, ranks in (
        (found.image_ranks, image_ranks),
        (found.text_ranks, text_ranks),
    ):
        shallow = ranks < max(at)
        np.testing.assert_array_equal(got[shallow], ranks[shallow])
        assert (got <= ranks).all() and ((got < max(at)) == shallow).all()


@pytest.mark.parametrize("seed, noise", [(0, 0.1), (1, 0.3), (2, 1.0), (3, 30.0)])
def test_metrics_and_ranks_are_those_of_the_whole_matrix(make_mesh, seed, noise):
    given = made_up(seed, noise=noise)
    image_ranks, text_ranks = by_hand(*given)
    check(retrieval(*given, mesh=make_mesh(1)), image_ranks, text_ranks)
    # The cases are not all of one kind.
    assert (image_ranks.max() > 10) == (noise >= 1)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(
    "rows, texts", [(1, 7), (5, 200), (7, 13), (64, 64), (32767, 32767)]
)
def test_blocks_and_devices_change_nothing(make_mesh, devices, rows, texts):
    """61 images over 8 devices: the last one holds padding."""
    given = made_up()
    found = retrieval(*given, mesh=make_mesh(devices), rows=rows, texts=texts)
    check(found, *by_hand(*given))


def test_rows_are_divided_over_both_axes_of_a_batch():
    from unicl_jax import sharding

    given = made_up()
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    check(retrieval(*given, mesh=mesh), *by_hand(*given))


def test_any_text_of_an_image_finds_it():
    """Two images, the axes; each has a right text, and one that looks wrong."""
    images = np.eye(2, dtype=np.float32)
    texts = unit(np.array([[1, 0.1], [-1, 0], [0, 1], [0.9, 0.2]]))
    found = retrieval(images, texts, np.array([0, 0, 1, 1]), at=(1, 2))
    assert found.metrics["image_to_text_r1"] == 1.0
    # The texts (-1, 0) and (0.9, 0.2) are nearer to the image that is not theirs.
    assert found.metrics["text_to_image_r1"] == 0.5
    assert found.metrics["text_to_image_r2"] == 1.0
    assert found.metrics["image_to_text_median_rank"] == 1.0
    assert found.metrics["text_to_image_median_rank"] == 1.5
    np.testing.assert_array_equal(found.text_ranks, [0, 1, 0, 1])


def test_true_matches_below_the_best_do_not_push_each_other_down():
    """Five texts of one image stand above all others: rank 0, not 4."""
    images = np.eye(2, dtype=np.float32)
    texts = unit(np.array([[1, x] for x in (0.1, 0.2, 0.3, 0.4, 0.5)] + [[0.0, 1]]))
    found = retrieval(images, texts, np.array([0, 0, 0, 0, 0, 1]), at=(1,))
    np.testing.assert_array_equal(found.image_ranks, [0, 0])


def test_a_tie_counts_against_the_model_whatever_the_order():
    """Equal captions of two images, as COCO has them: neither image is found."""
    images = unit(np.array([[1, 0.1, 0], [1, 0, 0.1], [0, 1, 1]]))
    same, other = unit(np.array([[1, 0.0, 0], [0, 1, 0.9]]))
    for texts, owners in (
        ([same, same, other], [0, 1, 2]),
        ([other, same, same], [2, 1, 0]),
    ):
        found = retrieval(images, np.stack(texts), np.array(owners), at=(1, 2))
        np.testing.assert_array_equal(found.image_ranks, [1, 1, 0])
        assert found.metrics["image_to_text_r1"] == 1 / 3
        assert found.metrics["image_to_text_r2"] == 1.0


@pytest.mark.parametrize("rows, texts", [(61, 200), (7, 13), (3, 200)])
def test_features_that_are_all_the_same_find_nothing(make_mesh, rows, texts):
    """The best true match and all wrong ones tie, in every tile's arithmetic."""
    rng = np.random.default_rng(0)
    one = unit(rng.normal(size=(1, 512)))
    owners = made_up()[2]
    u, v = np.repeat(one, 61, 0), np.repeat(one, 200, 0)
    found = retrieval(u, v, owners, mesh=make_mesh(8), rows=rows, texts=texts)
    assert [found.metrics[f"image_to_text_r{k}"] for k in (1, 5, 10)] == [0, 0, 0]
    np.testing.assert_array_equal(found.image_ranks, 200 - np.bincount(owners))
    np.testing.assert_array_equal(found.text_ranks, 60)


def near_ties(dim=512, images=40, rivals=8):
    """Texts whose scores differ by less than float32's rounding, but do differ."""
    rng = np.random.default_rng(0)
    u = unit(rng.normal(size=(images, dim)))
    v = np.repeat(unit(u + rng.normal(size=u.shape) * 0.1), rivals, 0)
    # One unit in the last place, here and there.
    steps = rng.integers(-1, 2, v.shape)
    v = np.where(steps < 0, np.nextafter(v, np.float32(-9)), v)
    v = np.where(steps > 0, np.nextafter(v, np.float32(9)), v)
    return u, v, rng.permutation(np.repeat(np.arange(images), rivals))


def test_near_ties_are_told_apart_as_float64_does(make_mesh):
    u, v, owners = near_ties()
    image_ranks, text_ranks = by_hand(u, v, owners)
    scores = u @ v.T
    float32 = np.array(
        [
            (row[owners != i] >= row[owners == i].max()).sum()
            for i, row in enumerate(scores)
        ]
    )
    assert (float32 != image_ranks).any()  # there is something to tell apart
    for rows, texts in ((40, 320), (7, 31)):
        found = retrieval(u, v, owners, mesh=make_mesh(8), rows=rows, texts=texts)
        check(found, image_ranks, text_ranks)


def test_only_queries_that_matter_are_counted_again(make_mesh, monkeypatch):
    counted = []
    original = module._recounted

    def recounted(queries, *rest):
        counted.append(len(queries))
        return original(queries, *rest)

    monkeypatch.setattr(module, "_recounted", recounted)
    given = made_up(images=300, texts=3000, dim=512, noise=30.0)
    check(retrieval(*given, mesh=make_mesh(1)), *by_hand(*given))
    # Of 300 and 3,000 queries that find nothing: those found first, and the median's.
    assert 0 < sum(counted) < 600


def test_between_is_called_and_may_end_it(make_mesh):
    class Stop(Exception):
        pass

    calls = []
    retrieval(*made_up(), mesh=make_mesh(1), texts=50, between=lambda: calls.append(1))
    assert len(calls) >= 4

    def stop():
        raise Stop

    with pytest.raises(Stop):
        retrieval(*made_up(), mesh=make_mesh(1), between=stop)


def test_half_precision_and_device_arrays_are_taken():
    u, v, owners = made_up()
    half = u.astype(np.float16), v.astype(np.float16)
    expected = by_hand(*(x.astype(np.float32) for x in half), owners)
    check(retrieval(*half, owners.astype(np.uint8)), *expected)
    check(retrieval(*map(jax.numpy.asarray, half), owners), *expected)


def test_counts_may_be_more_than_16_bits(make_mesh):
    """Those of a tile share an integer; those of all tiles don't."""
    u, v, owners = made_up(images=3, texts=70_000, dim=16)
    for best in (-2.0, 2.0):  # below all, above all
        few = (u, np.full(3, best)), (v, np.full(70_000, best), owners)
        many = (v, np.full(70_000, best)), (u, np.full(3, best), np.arange(3))
        for given, wrong_texts, wrong_images in (
            (few, 70_000 - np.bincount(owners), 2),
            (many, np.where(np.arange(70_000) < 3, 2, 3), 69_999),
        ):
            counts = module._count(*given, make_mesh(2), 32_767, 32_767, lambda: None)
            for got, wrong in zip(counts, (wrong_texts, wrong_images), strict=True):
                wrong = np.broadcast_to(wrong, len(got)) * (best < 0)
                np.testing.assert_array_equal(got, np.stack([wrong, wrong], 1))


GOOD = made_up()


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(u=GOOD[0][:0]), "image_features must be floats.*at least one"),
        (dict(v=GOOD[1][:0], owners=GOOD[2][:0]), "text_features must be floats"),
        (dict(u=GOOD[0][0]), r"image_features must be floats \[rows, D\]"),
        (dict(u=GOOD[0].astype(int)), "image_features must be floats.*int64"),
        (dict(u=GOOD[0] * 2), "image_features must be unit rows: got one of norm 2"),
        (dict(v=GOOD[1] * 0), "text_features must be unit rows: got one of norm 0"),
        (dict(v=unit(GOOD[1][:, :5])), "one width: got 24 and 5"),
        (dict(v=np.where(np.arange(200)[:, None] == 7, np.nan, GOOD[1])), "row 7"),
        (dict(u=np.where(np.arange(61)[:, None] == 3, np.inf, GOOD[0])), "row 3"),
        (dict(owners=GOOD[2][:-1]), "200 integers, one a text"),
        (dict(owners=GOOD[2] * 1.0), "200 integers, one a text: got float64"),
        (dict(owners=GOOD[2] - 1), r"in \[0, 61\), the images: got -1 for text"),
        (dict(owners=GOOD[2] + 1), r"in \[0, 61\), the images: got 61 for text"),
        (
            dict(owners=np.where(GOOD[2] == 9, 8, GOOD[2])),
            "every image must have a text: got none for 1 of 61, as image 9",
        ),
        (dict(at=(0,)), "each k must be a whole number"),
        (dict(rows=0), "rows must be"),
        (dict(texts=2**15), "texts must be.*32768"),
    ],
)
def test_wrong_input_is_named(change, said):
    given = dict(zip(("u", "v", "owners"), GOOD, strict=True)) | change
    arrays = [given.pop(key) for key in ("u", "v", "owners")]
    with pytest.raises(InputError, match=said):
        retrieval(*arrays, **given)
