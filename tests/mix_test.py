"""MixUp and CutMix: the law of the draws, exact targets, the same on any mesh."""

import json
import re
import runpy
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from config_test import good, put, refusal
from jax.sharding import NamedSharding, PartitionSpec
from objectives_test import CONCEPTS, LABELS_ONLY, OPTIMIZER, make_batch, model
from scipy import stats

from unicl_jax import config as config_lib
from unicl_jax import objectives, train
from unicl_jax.augment import make_views, normalize
from unicl_jax.errors import InputError
from unicl_jax.losses import (
    NO_LABEL,
    mixed_targets,
    soft_target_floor,
    soft_target_loss,
)
from unicl_jax.mix import cut, make_mix, neighbours
from unicl_jax.objectives import Forward
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import init_state, make_train_step
from unicl_jax.validation import validate

SWINS = dict(mixup=0.8, cutmix=1.0, probability=1.0, cutmix_share=0.5)
MIXES = sorted(k for k, v in objectives.OBJECTIVES.items() if not v.unmixed)
CONFIGS = Path(__file__).parents[1] / "configs"
PARTNER = np.arange(16).reshape(8, 2)[:, ::-1].reshape(-1)


def draws(count, size=8, **section):
    """`count` batches of two 8-pixel images, the first all 1, the second all 0."""
    images = jnp.zeros((2, size, size, 1)).at[0].set(1)
    keys = jax.random.split(jax.random.key(0), count)
    mix = jax.jit(jax.vmap(make_mix(SWINS | section), (0, None)))
    return jax.tree.map(np.asarray, mix(keys, images))


# --- The draws.


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_mixups_share_follows_beta_and_is_in_every_pixel(alpha):
    drawn = draws(2000, mixup=alpha, cutmix=0.0)
    share = drawn.share[:, 0]
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert (drawn.share[:, 1] == share).all()
    assert (drawn.partner == [1, 0]).all()
    own, other = drawn.images[:, 0], drawn.images[:, 1]
    assert (own == share[:, None, None, None]).all()
    np.testing.assert_allclose(other, 1 - own, atol=1e-7)


def boxes_of(lam, height, width):
    """(probability, pixels) of CutMix's box around each centre, by pixel."""
    sides = [int(np.sqrt(1 - lam) * size) for size in (height, width)]
    found = {}
    for centre in np.ndindex(height, width):
        inside = np.ones((height, width), bool)
        for axis, (at, side) in enumerate(zip(centre, sides, strict=True)):
            places = np.arange((height, width)[axis]) - (at - side // 2)
            along = (places >= 0) & (places < side)
            inside &= along[:, None] if axis == 0 else along[None]
        box = inside.tobytes()
        found[box] = found.get(box, 0) + 1 / (height * width)
    return found


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.8, 0.99, 1.0])
def test_cutmixs_box_is_around_a_centre_drawn_from_all_alike(lam):
    height, width, count = 6, 4, 4000
    keys = jax.random.split(jax.random.key(1), count)
    inside, area = jax.vmap(lambda key: cut(key, jnp.float32(lam), height, width))(keys)
    np.testing.assert_array_equal(inside.sum((1, 2)), area)
    want, got = boxes_of(lam, height, width), {}
    for box in np.asarray(inside):
        got[box.tobytes()] = got.get(box.tobytes(), 0) + 1
    assert got.keys() == want.keys()
    if len(want) > 1:
        expected = [count * want[box] for box in want]
        assert stats.chisquare([got[box] for box in want], expected).pvalue > 0.01


def test_cutmixs_share_is_what_the_box_left_and_the_rest_is_the_partners():
    drawn = draws(2000, mixup=0.0, size=16)
    assert set(np.unique(drawn.images)) == {0, 1}
    left = drawn.images[:, 0].mean((1, 2, 3))
    np.testing.assert_allclose(drawn.share[:, 0], left, atol=1e-6)
    np.testing.assert_array_equal(drawn.images[:, 1], 1 - drawn.images[:, 0])
    # Boxes lose what lies over an edge: the share is above Beta(1, 1)'s half.
    expected = np.mean(
        [
            1 - sum(p * sum(box) for box, p in boxes_of(lam, 16, 16).items()) / 256
            for lam in np.linspace(0, 1, 101)
        ]
    )
    assert expected > 0.6
    assert abs(drawn.share.mean() - expected) < 0.02


def test_a_batch_is_mixed_and_cut_as_often_as_the_config_says():
    drawn = draws(2000, probability=0.3, cutmix_share=0.8)
    whole = (drawn.share == 1).all(1)
    np.testing.assert_array_equal(drawn.images[whole, 0], 1)
    np.testing.assert_array_equal(drawn.images[whole, 1], 0)
    kinds = [len(np.unique(x)) for x in drawn.images[~whole, 0]]
    # A box of no pixels counts as whole, one of all as a MixUp of share 0: the share of
    # lam that makes such boxes, an area of 1 / 64 or less, or exactly 1.
    assert abs(whole.mean() - (0.7 + 0.3 * 0.8 / 64)) < 0.03
    assert abs(np.mean(np.array(kinds) == 2) - 0.8) < 0.06
    assert make_mix(SWINS | dict(probability=0.0)) is None
    assert make_mix(SWINS | dict(mixup=0.0, cutmix=0.0)) is None


@pytest.mark.parametrize(
    "kind, alpha", [("mixup", 1e-3), ("mixup", 1e3), ("cutmix", 1e-3)]
)
def test_the_ends_of_betas_range_are_finite(kind, alpha):
    off = dict(mixup=0.0, cutmix=0.0)
    share = draws(500, **(off | {kind: alpha})).share
    assert ((share >= 0) & (share <= 1)).all()
    if kind == "mixup":
        spread = 0.25 / (2 * alpha + 1)
        assert np.var(share) == pytest.approx(spread, rel=0.2)


def test_a_batch_is_mixed_with_its_neighbours():
    images = np.random.default_rng(0).normal(size=(16, 5, 7, 3)).astype(np.float32)
    np.testing.assert_array_equal(neighbours(images), images[PARTNER])
    mix = jax.jit(make_mix(SWINS))
    for seed in range(6):
        mixed, partner, share = mix(jax.random.key(seed), images)
        np.testing.assert_array_equal(partner, PARTNER)
        assert partner.dtype == np.int32 and share.dtype == np.float32
        mixed, other = np.asarray(mixed), images[PARTNER]
        own = np.all(mixed == images, (0, -1))
        if own.any():  # CutMix
            want = np.where(own[None, :, :, None], images, other)
            assert share[0] == pytest.approx(own.mean())
        else:
            want = share[0] * images + (1 - share[0]) * other
        np.testing.assert_allclose(mixed, want, atol=1e-6)


# --- Targets and losses, by hand.


def test_the_floor_is_the_least_that_the_loss_can_be():
    rng = np.random.default_rng(0)
    targets = rng.uniform(0.01, 1, (6, 6)) * rng.uniform(0.1, 9, (6, 1))
    for direction in ("per_image", "per_text"):
        floor = soft_target_floor(targets, direction=direction)
        at_best = soft_target_loss(jnp.log(targets), targets, direction=direction)
        np.testing.assert_allclose(at_best, floor, rtol=1e-5)
        loss = soft_target_loss(rng.normal(size=(6, 6)), targets, direction=direction)
        assert (loss > floor).all()
    labels = jnp.array([0, NO_LABEL, 0, 2, 0, NO_LABEL])
    floor = soft_target_floor(mixed_targets(labels, jnp.arange(6), 1.0))
    np.testing.assert_allclose(floor, np.log([3, 1, 3, 1, 3, 1]), rtol=1e-6)
    np.testing.assert_array_equal(soft_target_floor(jnp.zeros((2, 2))), 0)


def test_a_partner_that_is_not_there_shows():
    labels = jnp.array([0, 1, NO_LABEL])
    targets = mixed_targets(labels, jnp.array([1, 3, -1]), 0.5)
    np.testing.assert_array_equal(np.isnan(targets).all(1), [False, True, True])


@pytest.fixture
def half_and_half(monkeypatch):
    """Beta's draws near a half: compiling its own takes seconds, and is tested above.

    About half of each image is its own, whatever the key.
    """

    def beta(key, a, b):
        return jax.random.uniform(key, minval=0.4, maxval=0.6)

    monkeypatch.setattr(jax.random, "beta", beta)


def parts(name, mesh=None, caption_identity="row", **section):
    objective = objectives.make_objective(name, model(), mesh, CONCEPTS)
    optimizer, schedule = make_optimizer(OPTIMIZER, 1000)
    views = make_views(dict(shift=1, color=0.1, flip=True))
    step = make_train_step(
        *(model(), objective, optimizer, schedule, views),
        caption_identity=caption_identity,
        mix=make_mix(SWINS | section),
    )
    state = jax.jit(lambda: init_state(model(), objective, optimizer, 0))()
    return step, state, objective


def see(state, batch, step=0, **section):
    """What the objective sees at a step, from the same keys: a Forward."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 3)
    views = make_views(dict(shift=1, color=0.1, flip=True))
    mix = make_mix(SWINS | section)
    return Forward(
        model(), state.params, state.model_state, batch, views, keys, mix=mix
    )


def by_hand(logits, targets):
    """Loss and entropy of rows, in float64 and loops."""
    losses, entropies = [], []
    for row, weights in zip(logits, targets, strict=True):
        q = weights / weights.sum()
        log_softmax = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        losses.append(-sum(q * log_softmax))
        entropies.append(-sum(p * np.log(p) for p in q if p > 0))
    return np.mean(losses), np.mean(entropies)


CUT, UP = dict(mixup=0.0), dict(cutmix=0.0)


@pytest.mark.usefixtures("half_and_half")
@pytest.mark.parametrize("section", [CUT, UP], ids=["cutmix", "mixup"])
@pytest.mark.parametrize(
    "name, identity",
    [(n, "row") for n in ("unicl", "clip", "one_way", "linear_text")]
    + [("unicl", "text")],
)
def test_the_metrics_are_those_of_the_mixed_targets(name, identity, section):
    step, state, _ = parts(name, caption_identity=identity, **section)
    batch = make_batch(name in LABELS_ONLY)
    batch["caption"] = np.stack([np.arange(16) // 3, np.full(16, 7)], 1)  # three alike
    metrics = jax.jit(step)(state, batch, jnp.int32(0))[1]
    forward = see(state, batch, **section)
    share = np.asarray(forward.mixture.share, np.float64)
    assert metrics["own_share"] == pytest.approx(share.mean())
    assert 0.2 < share.mean() < 0.95  # else it says little
    labels = batch["label"] if name != "clip" else np.full(16, NO_LABEL)
    positive = np.zeros((16, 16))
    for i, j in np.ndindex(16, 16):
        positive[i, j] = i == j or (labels[i] == labels[j] != NO_LABEL)
        if identity == "text" and labels[i] == labels[j] == NO_LABEL:
            positive[i, j] = i // 3 == j // 3
    targets = share[:, None] * positive + (1 - share)[:, None] * positive[PARTNER]
    u = np.asarray(forward.image(), np.float64)
    v = np.asarray(forward.text(), np.float64)
    if name == "linear_text":
        v = np.asarray(state.params["objective"]["label_embedding"])[labels]
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
    logits = np.exp(2.0) * u @ v.T
    per_image, image_floor = by_hand(logits, targets)
    per_text, text_floor = by_hand(logits.T, targets.T)
    loss, floor = (per_image + per_text) / 2, (image_floor + text_floor) / 2
    if name == "one_way":
        loss, floor = per_image, image_floor
    close = dict(rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(metrics["loss"], loss, **close)
    np.testing.assert_allclose(metrics["excess"], loss - floor, **close)
    if name == "linear_text":
        assert "per_text" not in metrics
        return
    np.testing.assert_allclose(metrics["per_image"], per_image, **close)
    np.testing.assert_allclose(metrics["per_text"], per_text, **close)
    positives = targets.sum(1).mean()
    np.testing.assert_allclose(metrics["positives_per_row"], positives, **close)


@pytest.mark.usefixtures("half_and_half")
@pytest.mark.parametrize("step", [1, 3, 5])
def test_cross_entropy_is_of_both_classes_by_their_shares(step):
    _, state, objective = parts("cross_entropy")
    batch = make_batch(True)
    forward = see(state, batch, step)
    rows, metrics = objective.loss(forward)
    features = np.asarray(forward.image_features(), np.float64)
    own = jax.tree.map(np.asarray, state.params["objective"])
    logits = features @ own["class_weights"] + own["class_bias"]
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    share, label = np.asarray(forward.mixture.share), batch["label"]
    other = label[PARTNER]
    for i in range(16):
        want = share[i] * log_softmax[i, label[i]]
        want += (1 - share[i]) * log_softmax[i, other[i]]
        np.testing.assert_allclose(rows[i], -want, rtol=1e-4)
    heavier = label if share[0] >= 0.5 else other
    hits = np.mean(logits.argmax(1) == heavier)
    assert metrics["train_top1"] == pytest.approx(hits)


@pytest.mark.usefixtures("half_and_half")
def test_a_batch_that_is_left_whole_has_the_plain_loss():
    batch = make_batch(False)
    never = np.nextafter(np.float32(0), np.float32(1))  # on, but hardly ever
    step, state, _ = parts("unicl", probability=float(never))
    mixed = jax.jit(step)(state, batch, jnp.int32(0))[1]
    objective = objectives.make_objective("unicl", model())
    optimizer, schedule = make_optimizer(OPTIMIZER, 1000)
    views = make_views(dict(shift=1, color=0.1, flip=True))
    plain = make_train_step(model(), objective, optimizer, schedule, views)
    plain = jax.jit(plain)(state, batch, jnp.int32(0))[1]
    assert mixed.pop("own_share") == 1
    assert mixed.keys() == plain.keys()  # and without mixing there is no other metric
    for key, value in plain.items():
        np.testing.assert_allclose(mixed[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_whole_images_are_named_by_what_was_learnt_from_mixed_ones():
    step, state, _ = parts("unicl")
    step, batch, excess = jax.jit(step), make_batch(False), []
    for i in range(200):
        state, metrics = step(state, batch, jnp.int32(i))
        excess.append(float(metrics["excess"]))
    assert min(excess) > -1e-5
    assert np.mean(excess[-40:]) < 0.7 * np.mean(excess[:10])
    u, _ = model().encode_image(
        state.params, state.model_state, normalize(batch["image"])
    )
    texts = np.tile(np.arange(CONCEPTS)[:, None], 3)
    v, _ = model().encode_text(state.params, state.model_state, texts)
    is_label = batch["label"] != NO_LABEL
    hits = np.asarray(u @ v.T).argmax(1) == batch["label"]
    assert hits[is_label].mean() > 0.8


# --- On several devices.


@pytest.mark.usefixtures("half_and_half")
@pytest.mark.parametrize("name", MIXES)
def test_eight_devices_have_the_loss_and_gradient_of_one(name, make_mesh):
    mesh, values = make_mesh(8), {}
    batch, place = make_batch(name in LABELS_ONLY), NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    for devices in (1, 8):
        _, state, objective = parts(name, mesh if devices == 8 else None)

        def loss(params, batch, state=state, objective=objective):
            forward = see(state._replace(params=params), batch)
            losses, metrics = objective.loss(forward)
            return losses.mean(), (losses, metrics, forward.mixture)

        placed = state.params, batch
        if devices == 8:
            placed = jax.device_put(placed[0], place), jax.device_put(batch, rows)
        value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
        values[devices] = jax.tree.map(np.asarray, value_and_grad(*placed))
    # Float32 sums in another order.
    one, eight = values[1], values[8]
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            *(a, b), rtol=2e-5, atol=2e-6, err_msg=str(path)
        ),
        eight,
        one,
    )
    grads = [np.abs(x).max() for x in jax.tree.leaves(one[1]["image"])]
    assert min(grads) > 1e-3  # so the tolerance above says something


@pytest.mark.usefixtures("half_and_half")
@pytest.mark.parametrize("name", MIXES)
def test_rows_of_logits_and_images_stay_where_they_are(name, make_mesh):
    """On each of 8 devices 10 of 80 rows: nothing of [80, 80], no images on the way."""
    mesh, batch = make_mesh(8), 80
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step, state, _ = parts(name, mesh)
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, 4, 4, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((batch,), np.int32),
        "tokens": jax.ShapeDtypeStruct((batch, 3), np.int32),
    }
    step = jax.jit(step, in_shardings=(whole, rows, None), out_shardings=(whole, whole))
    text = step.lower(state, shapes, jnp.int32(0)).compile().as_text()
    assert "[80,80]" not in text
    assert ("[10,80]" in text) == (not name.endswith("cross_entropy"))
    assert not re.search("all-to-all|collective-permute", text)
    gathered = [
        int(np.prod([int(n) for n in dims.split(",")]))
        for shape in re.findall(r"= (.*) all-gather", text)
        for dims in re.findall(r"\[([\d,]+)\]", shape)
    ]
    assert 0 < max(gathered) <= batch * 8  # the texts' embeddings; an image has 48


# --- What is refused.


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_an_objective_takes_mixed_images_or_says_why_not(name):
    config = {
        "objective": name,
        "views": 2 if name == "supcon" else 1,
        "mix": SWINS,
        "data": {"sources": {"pictures": {"kind": "image_label"}}},
        "evaluations": {},
    }
    assert {"unicl", "clip", "one_way", "cross_entropy"} <= set(MIXES)
    if name in MIXES:
        objectives.check(config)
        return
    match = rf'"{name}" .*: images must not be mixed, and mix.mixup is 0.8.*both to 0'
    with pytest.raises(InputError, match=match):
        objectives.check(config)
    objectives.check(config | {"mix": SWINS | dict(mixup=0.0, cutmix=0.0)})


@pytest.mark.parametrize(
    "field, value, must",
    [
        ("mixup", -0.1, "0, for off, or in [0.001, 1000]"),
        ("mixup", 1e-4, "0, for off, or in [0.001, 1000]"),
        ("cutmix", 1e4, "0, for off, or in [0.001, 1000]"),
        ("cutmix", "1", "0, for off, or in [0.001, 1000]"),
        ("mixup", None, "0, for off, or in [0.001, 1000]"),
        ("probability", 1.1, "in [0, 1]"),
        ("probability", -0.1, "in [0, 1]"),
        ("cutmix_share", 2, "in [0, 1]"),
        ("mixup", float("nan"), "finite"),
        ("cutmix", float("inf"), "finite"),
        ("probability", float("nan"), "finite"),
    ],
)
def test_a_number_out_of_range_is_refused(field, value, must):
    config = good()
    put(config, f"mix.{field}", value)
    message = refusal(config)
    assert message.startswith(f"mix.{field} must be {must}")
    assert f"got {value}" in message


def test_mixing_needs_one_view_and_even_rows_on_each_device():
    config = good()
    config.mix.update(mixup=1, cutmix=1.0, probability=0.5)
    validate(config, 8)  # two rows each
    assert "views must be 1 where images are mixed: got 2" in refusal(
        views_2 := good_with(config, views=2)
    )
    views_2.mix.probability = 0.0
    validate(views_2, 8)
    message = refusal(good_with(config, batch_size=24), 8)
    assert "twice the number of devices" in message
    assert "got 24 for 8 devices; nearest are 16 and 32." in message
    assert "nearest is 16." in refusal(good_with(config, batch_size=8), 8)
    config = good()
    config.mix.update(mixups=1.0)
    assert 'no config field "mix.mixups"; did you mean "mixup"' in refusal(config)


def good_with(config, **changes):
    config = config.copy_and_resolve_references()
    config.update(changes)
    return config


# --- Runs and recipes.


@pytest.fixture
def make_config(tmp_path):
    """Sixteen-pixel squares, labelled and captioned; nothing to evaluate."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 6
    images = rng.integers(0, 256, (6, 16, 16, 3))[labels]
    images = np.uint8(np.clip(images + rng.integers(-30, 30, images.shape), 0, 255))
    names = ["red", "green", "blue", "white", "yellow", "grey"]
    files = {"labelled": dict(labels=labels, class_names=names)}
    files["captioned"] = dict(texts=[f"{names[k]} {i}" for i, k in enumerate(labels)])
    for name, fields in files.items():
        np.savez(tmp_path / f"{name}.npz", images=images, **fields)

    def make(objective="unicl"):
        c = config_lib.default()
        c.objective = objective
        c.batch_size, c.total_steps = 16, 4
        c.model.image.update(name="swin", image_size=16, patch_size=4, window_size=2)
        c.model.image.update(embed_dim=16, depths=(1,), num_heads=(2,), drop_path=0.2)
        c.model.text.update(name="transformer", vocab_size=600, context_length=12)
        c.model.text.update(width=16, num_heads=2, num_layers=1)
        c.model.embed_dim = 16
        for name, kind in (("labelled", "image_label"), ("captioned", "image_text")):
            if kind == "image_label" or objective not in LABELS_ONLY:
                path = str(tmp_path / f"{name}.npz")
                c.data.sources[name] = dict(format="npz", path=path, kind=kind)
        c.data.mixture, c.data.templates = "proportional", "short"
        c.augment.shift, c.augment.flip = 1, True
        c.mix.update(mixup=0.8, cutmix=1.0)
        c.optimizer.warmup_steps = 1
        c.checkpoint_every_steps, c.log_every_steps = 2, 1
        return c

    return make


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    times = ("step_seconds", "data_wait", "images_per_second")
    kept = [{k: v for k, v in json.loads(x).items() if k not in times} for x in lines]
    return [row for row in kept if "loss" in row]


def saved_state(workdir):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        restored = manager.restore(
            4, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
    return restored["state"]


@pytest.mark.parametrize("objective", ["unicl", "cross_entropy"])
def test_a_run_mixes_every_step_and_goes_on_to_the_same_bits(
    objective, make_config, tmp_path, monkeypatch
):
    config = make_config(objective)
    train.run(config, tmp_path / "whole")
    rows = logged(tmp_path / "whole")
    shares = [row["own_share"] for row in rows]
    assert len(set(shares)) == 4 and all(0 <= share <= 1 for share in shares)
    if objective == "unicl":
        assert all(row["excess"] > -1e-5 for row in rows)
        plain = make_config(objective)
        plain.mix.update(mixup=0.0, cutmix=0.0)
        train.run(plain, tmp_path / "plain")
        assert "own_share" not in logged(tmp_path / "plain")[0]
        assert logged(tmp_path / "plain")[0]["loss"] != rows[0]["loss"]
    with monkeypatch.context() as patch:
        patch.setattr(
            train.StopRequest,
            "requested",
            lambda self, step: signal.SIGTERM if step == 2 else 0,
        )
        with pytest.raises(train.Stopped, match="stopped at step 2"):
            train.run(config, tmp_path / "stopped")
    train.run(config, tmp_path / "stopped")
    assert logged(tmp_path / "stopped") == rows
    jax.tree.map(
        np.testing.assert_array_equal,
        *(saved_state(tmp_path / name) for name in ("stopped", "whole")),
    )


def test_table_2_has_its_column_with_mixup_and_cutmix():
    recipe = runpy.run_path(str(CONFIGS / "swin_tiny.py"))["get_config"]
    classes = runpy.run_path(str(CONFIGS / "baselines/cross_entropy.py"))["get_config"]
    for config, plain in (
        (recipe("labels_mixup"), recipe("labels")),
        (classes("paper_mixup"), classes("paper")),
    ):
        validate(config, 8)
        objectives.check(config)
        mix = plain.mix.to_dict()
        assert not plain.mix.mixup and not plain.mix.cutmix
        assert config.mix.to_dict() == mix | dict(mixup=0.8, cutmix=1.0)
        assert (mix["probability"], mix["cutmix_share"]) == (1.0, 0.5)
        plain.mix = config.mix
        assert config.to_dict() == plain.to_dict()
        assert list(config.data.sources) == ["imagenet"]
        assert round(config.total_steps * config.batch_size / 1_281_167) == 500
    assert recipe("labels").total_steps == recipe().total_steps // 2
