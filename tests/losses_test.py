"""The loss: its values, its gradients, and the laws both obey, on one device and eight.

Most laws are seen in float64, where they hold to round-off; float32 and bfloat16 have
their own tests at the end.
"""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unicl_jax.losses import (
    NO_LABEL,
    contrastive_loss,
    positive_mask,
    sharded,
    unicl_loss,
    unicl_loss_and_aux,
)

# Float64 rounds at 1e-16; logits of 100 and sums of a few dozen terms make it 1e-13.
EXACT = dict(rtol=1e-12, atol=1e-12)

LABELS = np.array([3, NO_LABEL, 3, 7, NO_LABEL, 0, 7, 3], np.int32)
# What the golden file holds without a soft target; those are in objective_losses_test.
GOLDEN_CASES = [
    f"{name}{scale}"
    for name in ("mixed", "all_text", "all_label", "one_class", "all_distinct_labels")
    for scale in ("", "_scale100")
] + ["clones"]

rows = jax.jit(unicl_loss_and_aux, static_argnames="direction")


@functools.partial(jax.jit, static_argnames="loss_fn")
def value_and_grads(u, v, labels, scale, loss_fn=unicl_loss, **options):
    """The mean over the rows, and its gradients for images, texts and scale."""

    def mean(u, v, scale):
        return loss_fn(u, v, labels, scale, **options).mean()

    return jax.value_and_grad(mean, (0, 1, 2))(u, v, scale)


def assert_close(got, want, **tolerance):
    """Compares trees of arrays."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or EXACT)), got, want
    )


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embeddings(batch=8, dim=6, seed=0):
    """Random unit rows, [batch, dim] images and texts, float64."""
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(batch, dim))), unit(rng.normal(size=(batch, dim)))


@pytest.fixture(autouse=True)
def explicit_broadcasts():
    """A loss that broadcasts [B] against [B, B] by accident is wrong and runs."""
    with jax.numpy_rank_promotion("raise"):
        yield


# --- Against numbers made by the official formula in PyTorch.


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_values_floors_and_gradients_are_the_golden_ones(case, golden, x64):
    arrays = golden("loss_cases.npz")
    own = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{case}/")}
    if case == "clones":
        u, v, labels = own["u"], own["v"], own["ids"]
    else:
        u, v = arrays["u"], arrays["v"]
        y = arrays[f"{case.removesuffix('_scale100')}/y"]
        labels = np.where(y == 0, NO_LABEL, y)  # raw 0 is a caption there
    scale = np.exp(own["logit_scale"])
    loss, aux = rows(u, v, labels, scale)
    assert_close(aux.per_image, own["i2t_rows"])
    assert_close(aux.per_text, own["t2i_rows"])
    assert_close(loss.mean(), own["loss"])
    assert_close(2 * loss.sum(), own["loss_sum_form"])  # eq. 1 sums, without a half
    assert_close(aux.floor.mean(), own["floor"])
    assert_close(aux.excess.mean(), own["loss"] - own["floor"])
    _, (du, dv, ds) = value_and_grads(u, v, labels, scale)
    assert_close(du, own["grad_u"])
    assert_close(dv, own["grad_v"])
    assert_close(scale * ds, own["grad_logit_scale"])  # the golden is d/d log(scale)


# --- One device or many.

SPANNING = np.array(
    [0, 1, 2, NO_LABEL, 0, 3, 1, 1, NO_LABEL, 2, 0, 4, 5, 0, 1, NO_LABEL]
)
# Each of 8 shards holds [5, NO_LABEL]: ids handed out shard by shard would collide.
ALIKE = np.array([5, NO_LABEL] * 8)


def place(mesh, *arrays):
    """Batch arrays divided over "data", scalars copied."""
    return [
        jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("data") if x.ndim else PartitionSpec())
        )
        for x in arrays
    ]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_sharded_is_single(devices, axis_type, make_mesh, x64):
    u, v = embeddings(16)
    scale = np.array(7.0)
    mesh = make_mesh(devices, axis_type)
    loss_and_aux = sharded(unicl_loss_and_aux, mesh)

    @jax.jit
    def everything(u, v, labels, scale):
        def mean(u, v, scale):
            loss, aux = loss_and_aux(u, v, labels, scale)
            return loss.mean(), (loss, aux)

        return jax.value_and_grad(mean, (0, 1, 2), has_aux=True)(u, v, scale)

    for labels in (SPANNING, ALIKE):
        (mean, parts), grads = everything(*place(mesh, u, v, labels, scale))
        assert_close(parts, rows(u, v, labels, scale))
        assert_close((mean, grads), value_and_grads(u, v, labels, scale))


@pytest.mark.parametrize("under_jit", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
def test_whole_arrays_are_divided_over_the_mesh_that_make_mesh_makes(
    devices, under_jit, x64
):
    """As in the README: nothing was placed, and the mesh's axes are Explicit."""
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    u, v = map(jnp.asarray, embeddings(16))
    loss = sharded(unicl_loss, mesh)
    got = (jax.jit(loss) if under_jit else loss)(u, v, jnp.asarray(SPANNING), 7.0)
    assert_close(got, unicl_loss(u, v, SPANNING, 7.0))


def test_sharded_over_two_mesh_axes_is_single(x64):
    u, v = embeddings(16)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    loss = sharded(unicl_loss, mesh, ("a", "b"))
    got = value_and_grads(u, v, SPANNING, 7.0, loss_fn=loss)
    assert_close(got, value_and_grads(u, v, SPANNING, 7.0))


def test_sharded_with_where_and_weights_is_single(make_mesh, x64):
    u, v = embeddings(16)
    keep = np.arange(16) % 3 != 0
    keep[2:4] = False  # all of the second of eight shards
    weights = np.linspace(0.5, 2, 16)
    options = dict(where=keep, weights=weights)
    loss = sharded(unicl_loss, make_mesh(8))
    got = value_and_grads(u, v, SPANNING, 7.0, loss_fn=loss, **options)
    assert_close(got, value_and_grads(u, v, SPANNING, 7.0, **options))


def parameter_gradients(loss_of):
    """Parameters, data, and the gradients on one device of a loss they share."""
    rng = np.random.default_rng(1)
    x, t = rng.normal(size=(2, 16, 5))
    params = {"image": rng.normal(size=(5, 6)), "text": rng.normal(size=(5, 6))}
    params["theta"] = np.array(0.7)
    want = jax.jit(jax.grad(loss_of))(params, x, t, SPANNING)
    return params, (x, t, SPANNING), want


def tower_loss(params, x, t, labels, **options):
    """A pair of linear towers and the loss: what users differentiate."""
    u, v = x @ params["image"], t @ params["text"]
    u, v = (y / jnp.linalg.norm(y, axis=1, keepdims=True) for y in (u, v))
    scale = jnp.exp(params["theta"])
    return unicl_loss(u, v, labels, scale, **options).mean()


def pmean(x):
    return jax.lax.pmean(x, "data")


def varying_parameters(loss, params, *batch):
    """The gradient of each device's own mean, then the mean of gradients."""
    params = jax.lax.pcast(params, "data", to="varying")
    return pmean(jax.grad(loss)(params, *batch))


def mean_loss_only(loss, params, *batch):
    """Under check_vma, copied parameters have their gradients summed already."""
    return jax.grad(lambda p: pmean(loss(p, *batch)))(params)


def mean_of_gradients(loss, params, *batch):
    return pmean(jax.grad(loss)(params, *batch))


def both_means(loss, params, *batch):
    return pmean(mean_loss_only(loss, params, *batch))


@pytest.mark.parametrize("implementation", ["dense", "blockwise", "ring"])
@pytest.mark.parametrize(
    ("recipe", "check_vma"),
    [
        (varying_parameters, True),
        (mean_loss_only, True),
        (mean_of_gradients, False),
        (both_means, False),
    ],
)
def test_gradients_taken_inside_a_users_shard_map_are_single(
    recipe, check_vma, implementation, make_mesh, x64
):
    params, batch, want = parameter_gradients(tower_loss)
    p = PartitionSpec
    loss = functools.partial(
        tower_loss, axis_name="data", implementation=implementation
    )
    inside = jax.shard_map(
        functools.partial(recipe, loss),
        mesh=make_mesh(8),
        in_specs=(p(), p("data"), p("data"), p("data")),
        out_specs=p(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(inside)(params, *batch), want)


@pytest.mark.parametrize("implementation", ["dense", "blockwise", "ring"])
def test_gradients_taken_inside_pmap_are_single(implementation, x64):
    params, batch, want = parameter_gradients(tower_loss)
    loss = functools.partial(
        tower_loss, axis_name="data", implementation=implementation
    )
    step = functools.partial(mean_of_gradients, loss)
    step = jax.pmap(step, "data", in_axes=(None, 0, 0, 0))
    got = step(params, *(x.reshape(8, 2, *x.shape[1:]) for x in batch))
    for device in range(8):
        assert_close(jax.tree.map(lambda x, d=device: np.asarray(x)[d], got), want)


def test_the_sharded_loss_gathers_texts_once_and_images_never(make_mesh):
    u, v = (np.float32(x) for x in embeddings(16, 24))
    mesh = make_mesh(8)
    step = value_and_grads.lower(
        *place(mesh, u, v, SPANNING, np.float32(7)), loss_fn=sharded(unicl_loss, mesh)
    )
    ops = [line for line in step.compile().as_text().splitlines() if " = " in line]

    def results(op):
        found = [re.search(rf"= (.*?) {op}(-start)?\(", line) for line in ops]
        return [m.group(1) for m in found if m]

    assert not results("all-to-all")
    # Images have the texts' shape: a second gather of [16, 24] would be theirs.
    assert " ".join(results("all-gather")).count("f32[16,24]") == 1
    # The texts' gradients go back to their owners, two rows each.
    assert " ".join(results("reduce-scatter")).count("f32[2,24]") == 1
    assert not any("[16,24]" in result for result in results("all-reduce"))


# --- Laws of the loss.


def test_permuting_the_batch_permutes_the_losses_and_gradients(x64):
    u, v = embeddings()
    p = np.random.default_rng(2).permutation(8)
    assert_close(
        rows(u[p], v[p], LABELS[p], 5.0),
        jax.tree.map(lambda x: x[p], rows(u, v, LABELS, 5.0)),
    )
    _, (du, dv, ds) = value_and_grads(u, v, LABELS, 5.0)
    _, permuted = value_and_grads(u[p], v[p], LABELS[p], 5.0)
    assert_close(permuted, (du[p], dv[p], ds))


@pytest.mark.parametrize(
    "names",
    [
        {3: 0, 7: 1, 0: 2, NO_LABEL: NO_LABEL},
        {3: 2**31 - 1, 7: -(2**31), 0: -2, NO_LABEL: NO_LABEL},
    ],
    ids=["other", "extreme"],
)
def test_renaming_the_labels_leaves_the_loss_unchanged(names, x64):
    u, v = embeddings()
    renamed = np.array([names[label] for label in LABELS.tolist()], np.int32)
    assert_close(rows(u, v, renamed, 5.0), rows(u, v, LABELS, 5.0))


def test_rotating_the_joint_space_leaves_the_loss_unchanged(x64):
    u, v = embeddings()
    q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))
    assert_close(rows(u @ q, v @ q, LABELS, 5.0), rows(u, v, LABELS, 5.0))


def test_swapping_the_modalities_swaps_the_directions_and_gradients(x64):
    u, v = embeddings()
    loss, aux = rows(u, v, LABELS, 5.0)
    swapped, swapped_aux = rows(v, u, LABELS, 5.0)
    assert_close(swapped, loss)
    assert_close(swapped_aux.per_image, aux.per_text)
    assert_close(swapped_aux.per_text, aux.per_image)
    assert np.abs(aux.per_image - aux.per_text).max() > 0.1  # or nothing was swapped
    _, (du, dv, ds) = value_and_grads(u, v, LABELS, 5.0)
    assert_close(value_and_grads(v, u, LABELS, 5.0)[1], (dv, du, ds))


def test_distinct_labels_give_clip(x64):
    u, v = embeddings()
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    logits, own = 5.0 * u @ v.T, np.arange(8)
    per_image = cross_entropy(logits, own)
    per_text = cross_entropy(logits.T, own)
    loss, aux = rows(u, v, own, 5.0)
    assert_close(aux.per_image, per_image)
    assert_close(aux.per_text, per_text)
    assert_close(loss, (per_image + per_text) / 2)
    assert_close(contrastive_loss(u, v, 5.0), loss)
    assert_close(aux.floor, np.zeros(8))


def test_rows_without_a_label_are_classes_of_their_own(x64):
    u, v = embeddings()
    fresh = np.where(LABELS == NO_LABEL, 100 + np.arange(8), LABELS)
    assert (LABELS == NO_LABEL).sum() > 1
    assert_close(rows(u, v, LABELS, 5.0), rows(u, v, fresh, 5.0))


def test_zero_is_an_ordinary_label(x64):
    u, v = embeddings()
    zeros = np.array([0, 0, 0, 1, 1, 2, NO_LABEL, NO_LABEL])
    ones_up = np.where(zeros == NO_LABEL, NO_LABEL, zeros + 1)
    _, aux = rows(u, v, zeros, 5.0)
    assert aux.num_positives.tolist() == [3, 3, 3, 2, 2, 1, 1, 1]
    assert_close(rows(u, v, zeros, 5.0), rows(u, v, ones_up, 5.0))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_lanes_are_one_label_that_all_of_them_name(dtype, x64):
    u, v = embeddings()
    lanes = [[1, 2], [2, 1], [1, 2], [1, 1], [2, 1], [3, 3], [1, 2], [4, 2]]
    single = np.array([0, 1, 0, 2, 1, 3, 0, 4])
    lanes = np.array(lanes, dtype)
    if dtype == np.int32:  # a whole row of NO_LABEL is none; one lane of it is not
        lanes[5] = lanes[7] = NO_LABEL
        lanes[4, 0] = lanes[1, 0] = NO_LABEL
    assert_close(rows(u, v, lanes, 5.0), rows(u, v, single, 5.0))


def test_the_positive_mask_tells_records_from_labels():
    labels = np.array([4, NO_LABEL, 4, NO_LABEL])
    mask = np.eye(4, dtype=bool)
    mask[0, 2] = mask[2, 0] = True
    np.testing.assert_array_equal(positive_mask(labels, labels), mask)
    # Rows 2 and 3 of the same batch, as their own device sees them.
    ids = np.array([2, 3])
    some = positive_mask(labels[2:], labels, ids, np.arange(4))
    np.testing.assert_array_equal(some, mask[2:])


def test_doubling_the_batch_adds_log_2_and_halves_each_rows_gradient(x64):
    u, v = embeddings()
    labels = np.abs(LABELS)  # a caption's copy would be another record
    twice = [np.concatenate([x, x]) for x in (u, v, labels)]
    loss, (du, dv, ds) = value_and_grads(u, v, labels, 5.0)
    loss2, (du2, dv2, ds2) = value_and_grads(*twice, 5.0)
    assert_close(loss2, loss + np.log(2))
    assert_close((du2[:8], dv2[8:], ds2), (du / 2, dv / 2, ds))


def test_at_scale_zero_every_loss_is_log_batch(x64):
    u, v = embeddings()
    loss, aux = rows(u, v, LABELS, 0.0)
    for x in (loss, aux.per_image, aux.per_text):
        assert_close(x, np.full(8, np.log(8)))


def test_orthonormal_pairs_have_the_closed_form(x64):
    u = np.eye(8)
    loss, _ = rows(u, u, np.arange(8), 3.0)
    assert_close(loss, np.full(8, np.log1p(7 * np.exp(-3.0))))


def test_collapsed_classes_have_the_closed_form_and_reach_the_floor(x64):
    labels = np.repeat(np.arange(4), 2)
    u = np.eye(6)[labels]  # 4 classes of 2 rows, each on one point
    loss, _ = rows(u, u, labels, 3.0)
    assert_close(loss, np.full(8, np.log(2) + np.log1p(3 * np.exp(-3.0))))
    loss, aux = rows(u, u, labels, 100.0)
    assert_close(loss, aux.floor)  # what is left is exp(-100)
    assert_close(aux.floor, np.full(8, np.log(2)))


def test_orthonormal_pairs_of_one_label_have_the_closed_form(x64):
    u = np.eye(8)
    loss, _ = rows(u, u, np.zeros(8, int), 3.0)
    assert_close(loss, np.full(8, np.log(np.exp(3.0) + 7) - 3.0 / 8))


def test_one_text_a_class_makes_per_image_cross_entropy_over_classes(x64):
    u, class_texts = embeddings()[0], embeddings(4, seed=5)[0]
    labels = np.array([0, 1, 1, 2, 2, 2, 3, 3])
    counts = np.bincount(labels)
    _, aux = rows(u, class_texts[labels], labels, 5.0)
    logits = 5.0 * u @ class_texts.T + np.log(counts)[None]
    want = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert_close(aux.per_image, want + np.log(counts[labels]))


def test_with_one_text_a_class_clip_and_unicl_are_one_loss(x64):
    """Labels add something where the texts of a class differ, and only there."""
    u, class_texts = embeddings()[0], embeddings(4, seed=5)[0]
    labels = np.array([0, 1, 1, 2, 2, 2, 3, 3])

    def mean(labels_given):
        def of(u, texts, scale):
            return unicl_loss(u, texts[labels], labels_given, scale).mean()

        return jax.value_and_grad(of, (0, 1, 2))(u, class_texts, 5.0)

    unlabelled = np.full(8, NO_LABEL)
    assert_close(mean(labels), mean(unlabelled))
    # Row by row they differ, and so they do with other texts.
    rows_of = [rows(u, class_texts[labels], y, 5.0)[0] for y in (labels, unlabelled)]
    assert np.abs(rows_of[0] - rows_of[1]).max() > 1e-2
    other = embeddings(seed=6)[1]
    means = [rows(u, other, y, 5.0)[0].mean() for y in (labels, unlabelled)]
    assert abs(means[0] - means[1]) > 1e-2


@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_neither_direction_goes_below_the_floor(scale, x64):
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(-1, 4, 8)
        loss, aux = rows(*embeddings(seed=seed), labels, scale)
        slack = 1e-12  # of log and exp, in float64
        assert (aux.per_image >= aux.floor - slack).all()
        assert (aux.per_text >= aux.floor - slack).all()
        assert_close(aux.excess, loss - aux.floor)


def test_euler_identity(x64):
    """Logits are linear in images, texts and scale, so three products agree."""
    u, v = embeddings()
    _, (du, dv, ds) = value_and_grads(u, v, LABELS, 5.0)
    assert abs(ds) > 1e-3  # or the identity says little
    assert_close([(u * du).sum(), (v * dv).sum()], [5.0 * ds] * 2)


# The next laws are of the logits: with the identity for texts, images are logits.


def of_logits(logits, direction="both"):
    batch = len(logits)

    def mean(logits):
        texts = jnp.eye(batch)
        return unicl_loss(logits, texts, LABELS, 1.0, direction=direction).mean()

    return jax.value_and_grad(mean)(jnp.asarray(logits))


def test_gradients_of_logits_sum_to_zero_along_each_softmax(x64):
    logits = np.random.default_rng(4).normal(size=(8, 8), scale=3)
    per_image, per_text = (of_logits(logits, f"per_{x}")[1] for x in ("image", "text"))
    assert_close(per_image.sum(1), np.zeros(8))
    assert_close(per_text.sum(0), np.zeros(8))
    assert np.abs(per_image.sum(0)).max() > 1e-2  # the other sums are not zero
    assert_close(of_logits(logits)[1], (per_image + per_text) / 2)


def test_a_constant_for_a_row_leaves_per_image_and_moves_per_text(x64):
    rng = np.random.default_rng(5)
    logits, constants = rng.normal(size=(8, 8), scale=3), rng.normal(size=(8, 1))
    for direction, shift in (("per_image", constants), ("per_text", constants.T)):
        moved, plain = (
            of_logits(logits + shift, direction),
            of_logits(logits, direction),
        )
        assert_close(moved, plain)
    assert abs(of_logits(logits + constants, "per_text")[0] - plain[0]) > 1e-2


def test_the_loss_is_convex_in_the_logits(x64):
    rng = np.random.default_rng(6)
    for _ in range(10):
        a, b = rng.normal(size=(2, 8, 8), scale=4)
        (at_a, slope), (at_b, _), (middle, _) = map(of_logits, (a, b, (a + b) / 2))
        assert middle < (at_a + at_b) / 2
        assert at_b > at_a + (slope * (b - a)).sum()  # above its tangent


def test_gradients_are_finite_differences(x64):
    u, v = embeddings()
    _, gradients = value_and_grads(u, v, LABELS, 5.0)
    rng = np.random.default_rng(7)
    directions = rng.normal(size=u.shape), rng.normal(size=v.shape), rng.normal()
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def at(step):
        moved = [x + step * d for x, d in zip((u, v, 5.0), directions, strict=True)]
        return rows(moved[0], moved[1], LABELS, moved[2])[0].mean()

    # Central differences of 1e-5: the cube of it, and round-off of 1e-16 over it.
    assert_close((at(1e-5) - at(-1e-5)) / 2e-5, slope, rtol=1e-7)


def test_equal_features_tell_nothing_apart(x64):
    u, _ = embeddings(1)
    u = np.repeat(u, 8, 0)
    loss, _ = rows(u, u, LABELS, 100.0)
    assert_close(loss, np.full(8, np.log(8)))


def test_exchanging_texts_within_a_class_leaves_the_mean_unchanged(x64):
    u, v = embeddings()
    exchanged = np.arange(8)
    exchanged[[0, 2, 7]] = [2, 7, 0]  # three rows of label 3
    assert (LABELS[exchanged] == LABELS).all()
    loss, aux = rows(u, v, LABELS, 5.0)
    other, other_aux = rows(u, v[exchanged], LABELS, 5.0)
    assert_close(other.mean(), loss.mean())
    assert_close(other_aux.per_image, aux.per_image)
    assert_close(other_aux.per_text, aux.per_text[exchanged])


def test_what_reaches_an_embedding_before_it_is_made_unit_turns_it(x64):
    """The gradient through normalising is at a right angle: lengths don't learn."""
    rng = np.random.default_rng(8)
    x, y = 3 * rng.normal(size=(2, 8, 6))

    def mean(x, y):
        u, v = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        return unicl_loss(u, v, LABELS, 5.0).mean()

    for z, dz in zip((x, y), jax.grad(mean, (0, 1))(x, y), strict=True):
        assert_close((z * dz).sum(1), np.zeros(8))
        assert np.abs(dz).max() > 1e-3


# --- Leaving out and weighing.


def test_leaving_rows_out_is_dropping_them(x64):
    u, v = embeddings()
    keep = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
    u[2] = v[4] = 0  # padding
    loss, aux = rows(u, v, LABELS, 5.0, where=keep)
    dropped_loss, dropped_aux = rows(u[keep], v[keep], LABELS[keep], 5.0)
    for got, want in zip((loss, *aux), (dropped_loss, *dropped_aux), strict=True):
        assert_close(got[keep], want)
        assert not np.any(got[~keep])
    mean, (du, dv, ds) = value_and_grads(u, v, LABELS, 5.0, where=keep)
    want_mean, want = value_and_grads(u[keep], v[keep], LABELS[keep], 5.0)
    share = keep.mean()  # the mean above is over all eight
    assert_close(mean / share, want_mean)
    assert_close((du[keep] / share, dv[keep] / share, ds / share), want)
    assert not np.any(du[~keep]) and not np.any(dv[~keep])


@pytest.mark.parametrize("weights", [None, np.ones(16)], ids=["plain", "weighted"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_with_all_rows_left_out_loss_and_gradients_are_zero(
    is_sharded, weights, make_mesh, x64
):
    loss_fn = sharded(unicl_loss, make_mesh(8)) if is_sharded else unicl_loss
    options = dict(where=np.zeros(16, bool), weights=weights)
    result = value_and_grads(*embeddings(16), SPANNING, 5.0, loss_fn=loss_fn, **options)
    for x in jax.tree.leaves(result):
        assert not np.any(x)  # NaN is not 0 either


def test_equal_weights_are_no_weights(x64):
    u, v = embeddings()
    keep = np.arange(8) != 3
    for where in (None, keep):
        want = value_and_grads(u, v, LABELS, 5.0, where=where)
        got = value_and_grads(u, v, LABELS, 5.0, where=where, weights=np.full(8, 0.3))
        assert_close(got, want)


def test_the_mean_of_weighted_rows_is_their_weighted_mean(x64):
    u, v = embeddings()
    weights = np.array([1, 2, 1, 0, 3, 1, 1, 1.0])
    plain, aux = rows(u, v, LABELS, 5.0)
    loss, weighted_aux = rows(u, v, LABELS, 5.0, weights=weights)
    assert_close(loss.mean(), np.average(plain, weights=weights))
    assert_close(loss, plain * weights / weights.mean())
    assert_close(weighted_aux, aux)
    keep = np.arange(8) != 4
    loss, _ = rows(u, v, LABELS, 5.0, weights=weights, where=keep)
    kept, _ = rows(u[keep], v[keep], LABELS[keep], 5.0)
    want = np.average(kept, weights=weights[keep])
    assert_close(loss.sum() / keep.sum(), want)


def test_a_direction_is_that_half_alone(x64):
    u, v = embeddings()
    both, aux = rows(u, v, LABELS, 5.0)
    per_image, image_aux = rows(u, v, LABELS, 5.0, direction="per_image")
    per_text, _ = rows(u, v, LABELS, 5.0, direction="per_text")
    assert_close(per_image, aux.per_image)
    assert_close(per_text, aux.per_text)
    assert_close(both, (per_image + per_text) / 2)
    assert_close(image_aux.per_text, aux.per_text)  # told whatever is minimised
    assert_close(image_aux.excess, per_image - aux.floor)
    logits = 5.0 * u @ v.T
    assert_close(aux.image_log_normalizer, np.log(np.exp(logits).sum(1)))
    assert_close(aux.text_log_normalizer, np.log(np.exp(logits).sum(0)))


# --- Precision.


def test_float32_at_scale_100_stays_finite_and_right():
    """Pairs that point away from each other: where log(softmax) is log(0)."""
    u, _ = embeddings()
    v = -u
    with jax.enable_x64(True):
        want = value_and_grads(u, v, LABELS, 100.0)
    u, v = np.float32(u), np.float32(v)
    got = value_and_grads(u, v, LABELS, np.float32(100))
    assert got[0].dtype == jnp.float32 and got[0] > 50
    # Float32 rounds a logit of 100 at 4e-6, and so the probabilities; s = 100 times
    # that is the error of an embedding's gradient, divided by the batch.
    assert_close(got, want, rtol=2e-5, atol=1e-4)


def test_bfloat16_embeddings_are_multiplied_exactly_and_summed_in_float32():
    u, v = (jnp.bfloat16(x) for x in embeddings())
    loss, (du, dv, _) = value_and_grads(u, v, LABELS, jnp.float32(20))
    assert (loss.dtype, du.dtype, dv.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    wide = [jnp.float32(x) for x in (u, v)]
    want, (wide_du, wide_dv, _) = value_and_grads(*wide, LABELS, jnp.float32(20))
    # A product of two bfloat16 numbers is exact in float32, which rounds at 6e-8.
    assert_close(loss, want, rtol=1e-6)
    # A gradient goes out in its input's dtype, which rounds at 1/256.
    assert_close(
        (jnp.float32(du), jnp.float32(dv)), (wide_du, wide_dv), rtol=2**-7, atol=1e-3
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["image", "text"])
def test_a_bad_embedding_shows_in_the_loss(which, is_sharded, bad, make_mesh):
    loss_fn = sharded(unicl_loss, make_mesh(8)) if is_sharded else unicl_loss
    pair = [np.float32(x) for x in embeddings(16)]
    pair[which][3, 2] = bad
    loss, _ = value_and_grads(*pair, SPANNING, np.float32(5), loss_fn=loss_fn)
    assert not np.isfinite(loss)


# --- Wrong input, all found at trace time: nothing here has values.

F32 = jnp.float32


def shape(*size, dtype=F32):
    return jax.ShapeDtypeStruct(size, dtype)


GOOD = dict(
    image_embeddings=shape(8, 4),
    text_embeddings=shape(8, 4),
    labels=shape(8, dtype=jnp.int32),
    logit_scale=shape(),
)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("image_embeddings", shape(7, 4), ValueError),
        ("image_embeddings", shape(8, 4, 1), ValueError),
        ("image_embeddings", shape(8, 4, dtype=jnp.int32), TypeError),
        ("text_embeddings", shape(8, 5), ValueError),
        ("text_embeddings", shape(8), ValueError),
        ("text_embeddings", shape(8, 4, dtype=jnp.uint8), TypeError),
        ("labels", shape(8), TypeError),
        ("labels", shape(8, dtype=jnp.bool_), TypeError),
        ("labels", shape(4, dtype=jnp.int32), ValueError),
        ("labels", shape(8, 2, 2, dtype=jnp.int32), ValueError),
        ("labels", shape(8, 0, dtype=jnp.int32), ValueError),
        ("labels", [3, 7, 3, -1, 0, 0, 0, 0], TypeError),
        ("labels", shape(dtype=jnp.int32), ValueError),
        ("logit_scale", shape(1), ValueError),
        ("where", shape(7, dtype=jnp.bool_), ValueError),
        ("where", shape(8), TypeError),
        ("weights", shape(8, 1), ValueError),
    ],
)
def test_bad_arrays_are_named_at_trace_time(name, value, error):
    with pytest.raises(error, match=f"{name}.* must .*got"):
        jax.eval_shape(unicl_loss, **{**GOOD, name: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("direction", "i2t"), ("implementation", "fast"), ("block_size", 128)],
)
def test_bad_choices_are_named_at_trace_time(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*got .*{value}"):
        jax.eval_shape(functools.partial(unicl_loss, **{option: value}), **GOOD)


def test_an_axis_that_the_mesh_lacks_is_named(make_mesh):
    with pytest.raises(ValueError, match="batch_axes.*batch.*data"):
        sharded(unicl_loss, make_mesh(8), ("batch",))


# --- The room.


@pytest.mark.parametrize("module", ["unicl_jax", "unicl_jax.losses"])
def test_importing_the_loss_loads_jax_and_no_other_library(module):
    heavy = "flax optax orbax tensorflow ml_collections einops PIL matplotlib".split()
    code = (
        f"import sys, {module}; "
        f"print([m for m in {heavy} if m in sys.modules], 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] True"
