"""Zero-shot scores and the pixel baseline, against NumPy by hand.

The model is two linear maps, so that NumPy says what everything should be; the real
towers have their own tests.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax.augment import MEAN, STD
from unicl_jax.data import quickstart
from unicl_jax.data.arrays import ArraySource
from unicl_jax.encoders import TwoTower, unit
from unicl_jax.errors import InputError
from unicl_jax.evaluation import (
    ZeroShotTask,
    encoders,
    make_encoders,
    pixel_nearest,
    zero_shot,
)

SIZE, LENGTH, VOCAB, DIM = 4, 24, 128, 16
NAMES = ("cat", "dog", "great white shark", "spoon", "cup", "tea pot", "sloth")
TEMPLATES = ("{}", "a {}.", "a drawing of a {}")


def tokenize(texts):
    """Bytes as tokens."""
    rows = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = list(text.encode())[:LENGTH]
    return rows


def encode_image(params, state, images, *, train=False, key=None):
    flat = images.reshape(images.shape[0], -1)
    product = jnp.matmul(flat, params["image"], precision="highest")
    return unit(product), state


def encode_text(params, state, tokens, *, train=False, key=None):
    # Places weigh differently, so that the order of characters matters.
    places = 1 + jnp.arange(tokens.shape[1], dtype=jnp.float32)
    return unit((params["text"][tokens] * places[:, None]).sum(1)), state


MODEL = TwoTower(None, encode_image, encode_text, None)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(SIZE * SIZE * 3, DIM)).astype(np.float32),
        "text": rng.normal(size=(VOCAB, DIM)).astype(np.float32),
    }


def make_source(records=50, names=NAMES, seed=1):
    rng = np.random.default_rng(seed)
    return ArraySource(
        "shapes",
        rng.integers(0, 256, (records, SIZE, SIZE, 3), dtype=np.uint8),
        labels=rng.integers(0, len(names), records),
        class_names=names,
    )


def make_task(mesh, source=None, templates=TEMPLATES):
    return ZeroShotTask(
        "shapes",
        source or make_source(),
        templates,
        tokenize,
        make_encoders(MODEL, mesh),
    )


# --- The same in NumPy and float64.


def normed(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_classes(params, names=NAMES, templates=TEMPLATES):
    classes = []
    for name in names:
        of_class = []
        for template in templates:
            row = tokenize([template.replace("{}", name)])[0]
            embedding = sum(
                (place + 1) * params["text"][token].astype(np.float64)
                for place, token in enumerate(row)
            )
            of_class.append(normed(embedding))
        classes.append(normed(np.mean(of_class, 0)))
    return np.array(classes)


def numpy_similarity(params, source, classes):
    x = (source.images.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    embeddings = normed(x.reshape(len(x), -1) @ params["image"].astype(np.float64))
    return embeddings @ classes.T


def check(scores, params, source, templates=TEMPLATES):
    """Holds a task's scores against NumPy's."""
    classes = numpy_classes(params, source.class_names, templates)
    similarity = numpy_similarity(params, source, classes)
    k = min(5, len(classes))
    order = np.argsort(-similarity, 1)
    # Gaps of float32's round-off would make the order a matter of luck: there are none.
    ranked = np.take_along_axis(similarity, order, 1)
    assert np.diff(ranked, axis=1).max(initial=-1) < -1e-5
    np.testing.assert_array_equal(scores.predictions, order[:, :k])
    np.testing.assert_array_equal(scores.labels, source.labels)
    hits = order[:, :k] == source.labels[:, None]
    assert scores.metrics["top1"] == hits[:, 0].mean()
    assert scores.metrics["top5"] == hits.any(1).mean()


def test_class_embeddings_are_the_unit_mean_of_unit_prompts(make_mesh):
    params = make_params()
    found = make_task(make_mesh(8)).class_embeddings(params, {})
    assert found.shape == (len(NAMES), DIM) and found.dtype == np.float32
    # Sums of 24 float32 terms: a few roundings of 6e-8 on values below 1.
    np.testing.assert_allclose(found, numpy_classes(params), rtol=0, atol=1e-6)


def test_prompts_are_averaged_after_they_are_made_unit(make_mesh):
    """Otherwise the longest text, whose embedding is the longest, would rule."""
    params = make_params()
    found = make_task(make_mesh(1)).class_embeddings(params, {})
    raw = np.array(
        [
            np.mean(
                [
                    (params["text"][row] * np.arange(1, LENGTH + 1)[:, None]).sum(0)
                    for row in tokenize([t.replace("{}", name) for t in TEMPLATES])
                ],
                0,
            )
            for name in NAMES
        ]
    )
    assert np.abs(found - normed(raw)).max() > 0.01


def test_the_order_of_templates_does_not_matter_but_that_of_classes_does(make_mesh):
    params, mesh = make_params(), make_mesh(1)
    plain = make_task(mesh).class_embeddings(params, {})
    for templates in itertools.permutations(TEMPLATES):
        found = make_task(mesh, templates=templates).class_embeddings(params, {})
        # The mean of three float32 numbers in another order.
        np.testing.assert_allclose(found, plain, rtol=0, atol=3e-7)
    turned = make_task(mesh, make_source(names=NAMES[::-1]))
    np.testing.assert_allclose(
        turned.class_embeddings(params, {}), plain[::-1], rtol=0, atol=3e-7
    )


def test_one_template_gives_the_text_embedding_itself(make_mesh):
    params, mesh = make_params(), make_mesh(1)
    found = make_task(mesh, templates=("{}",)).class_embeddings(params, {})
    expected, _ = encode_text(params, {}, jnp.asarray(tokenize(NAMES)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_scores_and_predictions_are_numpys(make_mesh, devices, seed):
    params, source = make_params(seed), make_source(seed=10 + seed)
    check(make_task(make_mesh(devices), source)(params, {}), params, source)


@pytest.mark.parametrize("records", [1, 7, 8, 16, 17, 41])
def test_every_record_counts_once_whatever_divides_the_batch(
    make_mesh, monkeypatch, records
):
    monkeypatch.setattr(encoders, "BATCH", 16)
    params, source = make_params(), make_source(records)
    scores = make_task(make_mesh(8), source)(params, {})
    assert scores.predictions.shape == (records, 5)
    check(scores, params, source)


def test_prompts_are_encoded_in_batches_too(make_mesh, monkeypatch):
    params = make_params()
    whole = make_task(make_mesh(8)).class_embeddings(params, {})
    monkeypatch.setattr(encoders, "BATCH", 8)  # 21 prompts: three batches
    parts = make_task(make_mesh(8)).class_embeddings(params, {})
    # Another batch shape, another blocking of the same float32 sums.
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_one_and_eight_devices_agree(make_mesh):
    params, source = make_params(), make_source(100)
    one, eight = (make_task(make_mesh(n), source)(params, {}) for n in (1, 8))
    assert (one.metrics["top1"], one.metrics["top5"]) == (
        eight.metrics["top1"],
        eight.metrics["top5"],
    )
    np.testing.assert_array_equal(one.predictions, eight.predictions)
    np.testing.assert_array_equal(one.labels, eight.labels)


@pytest.mark.parametrize("ways", [1, 2, 3, 5])
def test_with_five_classes_or_fewer_top_5_is_all_of_them(make_mesh, ways):
    params, source = make_params(), make_source(names=NAMES[:ways])
    scores = make_task(make_mesh(8), source)(params, {})
    assert scores.predictions.shape == (50, ways)
    assert scores.metrics["top5"] == 1.0
    assert (scores.metrics["top1"] == 1.0) == (ways == 1)
    check(scores, params, source)


def test_a_perfect_model_scores_one_and_a_permuted_one_zero(make_mesh):
    """Images that are the preimages of the class embeddings."""
    mesh, params = make_mesh(8), make_params()
    classes = make_task(mesh).class_embeddings(params, {})
    # 7 pictures of 48 numbers: a linear map sends each exactly to its class.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(NAMES), SIZE, SIZE, 3), dtype=np.uint8)
    pixels = ((images / 255 - np.array(MEAN)) / np.array(STD)).reshape(len(NAMES), -1)
    params["image"] = np.linalg.lstsq(pixels, classes, rcond=None)[0].astype("f4")
    for shift in (0, 1, 3):
        labels = (np.arange(len(NAMES)) + shift) % len(NAMES)
        source = ArraySource("shapes", images, labels=labels, class_names=NAMES)
        scores = make_task(mesh, source)(params, {})
        np.testing.assert_array_equal(scores.predictions[:, 0], np.arange(len(NAMES)))
        assert scores.metrics["top1"] == float(shift == 0)


def test_the_number_of_ways_is_the_number_of_names_seen_or_not(make_mesh):
    labels = np.zeros(9, np.int32)
    images = np.zeros((9, SIZE, SIZE, 3), np.uint8)
    source = ArraySource("shapes", images, labels=labels, class_names=NAMES)
    assert make_task(make_mesh(1), source).ways == len(NAMES)


# --- All scores.


@pytest.mark.parametrize("rows", [1, 7, 50, 4096])
def test_scores_are_cosines_in_blocks_of_any_size(rows):
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(50, 16)) * 9, rng.normal(size=(7, 16))
    found = zero_shot.scores(features.astype("f4"), classes.astype("f4"), rows)
    assert found.dtype == np.float32
    expected = normed(features) @ normed(classes).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "features, classes, said",
    [
        (np.ones((5, 3)), np.ones((2, 4)), r"one width: got \(5, 3\) and \(2, 4\)"),
        (np.ones(3), np.ones((2, 3)), "one width"),
        (np.ones((0, 3)), np.ones((2, 3)), "an image and a class"),
        (np.full((5, 3), np.nan), np.ones((2, 3)), "image features must be finite"),
        (np.ones((5, 3)), np.full((2, 3), np.inf), "class embeddings must be finite"),
    ],
)
def test_scores_of_what_does_not_fit_are_refused(features, classes, said):
    with pytest.raises(InputError, match=said):
        zero_shot.scores(features.astype("f4"), classes.astype("f4"))


# --- The baseline.


def flat(*levels):
    """A 1 x n x 3 picture of grey levels."""
    return np.repeat(np.array(levels, np.uint8)[None, :, None], 3, -1)


def test_the_nearest_pixels_by_hand():
    train = np.stack(
        [
            flat(0, 100, 200),  # class 2: rising
            flat(200, 100, 0),  # class 0: falling
            flat(0, 200, 0),  # class 1: a peak
            flat(200, 0, 200),  # class 3: a valley
        ]
    )
    labels = np.array([2, 0, 1, 3])
    images = np.stack(
        [
            flat(50, 60, 70),  # rising, though dark: brightness and contrast go away
            flat(10, 5, 1),  # falling
            flat(90, 255, 80),  # a peak that falls a little
            flat(0, 100, 199),  # rising, but labelled as falling
        ]
    )
    truth = np.array([2, 0, 1, 0])
    assert pixel_nearest(train, labels, images, truth, top=1) == (0.75, 0.75)
    # The last one's order: rising, then the peak and the valley, falling at the end.
    assert pixel_nearest(train, labels, images, truth, top=3) == (0.75, 0.75)
    assert pixel_nearest(train, labels, images, truth, top=4) == (0.75, 1.0)


def test_top_counts_distinct_classes_not_neighbours():
    train = np.stack([flat(0, 100, 200)] * 6 + [flat(0, 200, 0)])
    labels = np.array([0] * 6 + [1])
    image, truth = flat(0, 100, 200)[None], np.array([1])
    assert pixel_nearest(train, labels, image, truth, top=2) == (0.0, 1.0)


def test_a_flat_picture_divides_by_no_zero():
    train = np.stack([flat(7, 7, 7), flat(0, 100, 200)])
    found = pixel_nearest(train, np.array([0, 1]), train, np.array([0, 1]), top=1)
    # The flat one is as near to either, and the first wins.
    assert found == (1.0, 1.0)


@pytest.mark.parametrize(
    "name, floor", [("fashion_mnist", 0.6), ("twemoji_subgroups", 0.3)]
)
def test_the_quick_starts_baseline_is_that_of_brute_force(name, floor):
    """One image at a time in float64, on every 20th image."""
    held_out = quickstart.evaluation_set(name)
    images, labels = held_out.images[::20], held_out.labels[::20]
    train_images, train_labels = quickstart.training_examples(name)

    def centred(x):
        x = x.astype(np.float64).reshape(len(x), -1)
        return normed(x - x.mean(1, keepdims=True))

    train, first, hits = centred(train_images), [], []
    for query, label in zip(centred(images), labels, strict=True):
        ranked = train_labels[np.argsort(-(train @ query), kind="stable")]
        classes, places = np.unique(ranked, return_index=True)
        best = classes[np.argsort(places)][:5]
        first.append(best[0] == label)
        hits.append(label in best)
    top1, top5 = pixel_nearest(train_images, train_labels, images, labels)
    # Float32 may turn the order of two equally near images: one image in all of them.
    assert abs(top1 - np.mean(first)) <= 1 / len(labels)
    assert abs(top5 - np.mean(hits)) <= 1 / len(labels)
    assert top1 > floor  # it is a baseline worth naming: chance is 0.1 and 0.01


def test_the_baseline_may_not_look_at_the_held_out_drawings():
    for name in quickstart.EVALUATION_SETS:
        held_out = quickstart.evaluation_set(name)
        train_images, train_labels = quickstart.training_examples(name)
        assert len(train_images) == len(train_labels)
        assert train_labels.max() < len(held_out.class_names)
        seen = {image.tobytes() for image in train_images}
        same = np.mean([image.tobytes() in seen for image in held_out.images])
        # Two vendors may draw a plain shape alike to the pixel; a leak would give 1.
        assert same < 0.01
