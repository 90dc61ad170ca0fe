"""The objectives beside UniCL's: against their formulas written out, pair by pair."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unicl_jax import losses
from unicl_jax.losses import NO_LABEL, sharded


def compiled(loss):
    """One program, where JAX would compile each operation of it by itself."""

    @functools.wraps(loss)
    def run(*arrays, **options):
        return jax.jit(functools.partial(loss, **options))(*arrays)

    return run


contrastive_loss = compiled(losses.contrastive_loss)
cross_entropy_loss = compiled(losses.cross_entropy_loss)
mixed_targets = compiled(losses.mixed_targets)
mp_nce_loss = compiled(losses.mp_nce_loss)
multitask_loss = compiled(losses.multitask_loss)
pair_logits = compiled(losses.pair_logits)
siglip_loss = compiled(losses.siglip_loss)
soft_target_loss = compiled(losses.soft_target_loss)
supcon_loss = compiled(losses.supcon_loss)
unicl_loss = compiled(losses.unicl_loss)

# Float64 rounds at 1e-16; logits of 100 and sums of a few dozen terms make it 1e-13.
EXACT = dict(rtol=1e-12, atol=1e-12)
SPANNING = np.array([0, 1, 2, -1, 0, 3, 1, 1, -1, 2, 0, 4, 5, 0, 1, -1])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_unit(*shape, seed=0):
    return unit(np.random.default_rng(seed).normal(size=shape))


def assert_close(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or EXACT)), got, want
    )


def is_positive(labels, i, j):
    return i == j or (labels[i] == labels[j] and labels[i] != NO_LABEL)


@pytest.fixture(autouse=True)
def strict(x64):
    """Float64, and no broadcast of [n] against [n, n] by accident."""
    with jax.numpy_rank_promotion("raise"):
        yield


def value_and_grads(loss, *arrays):
    """The mean, and gradients for all float arguments."""
    floats = tuple(i for i, x in enumerate(arrays) if np.asarray(x).dtype.kind == "f")
    return jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays).mean(), floats))(
        *arrays
    )


# --- Soft targets.


@pytest.mark.parametrize("case", ["mixup", "mixup_hard_text", "mixed", "one_class"])
def test_soft_targets_give_the_golden_values_and_gradients(case, golden):
    arrays = golden("loss_cases.npz")
    own = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{case}/")}
    targets, theta = own["target"], own["logit_scale"]

    def loss(u, v, theta, direction="both"):
        logits = pair_logits(u, v, jnp.exp(theta))
        return soft_target_loss(logits, targets, direction=direction)

    u, v = arrays["u"], arrays["v"]
    assert_close(loss(u, v, theta, "per_image"), own["i2t_rows"])
    assert_close(loss(u, v, theta, "per_text"), own["t2i_rows"])
    value, (du, dv, dtheta) = value_and_grads(loss, u, v, theta)
    assert_close(value, own["loss"])
    assert_close(du, own["grad_u"])
    assert_close(dv, own["grad_v"])
    assert_close(dtheta, own["grad_logit_scale"])


def test_soft_targets_left_out_are_dropped():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(6, 6)), rng.uniform(size=(6, 6))
    keep = np.array([1, 0, 1, 1, 0, 1], bool)
    logits[1], logits[:, 4] = np.nan, np.inf
    got = soft_target_loss(logits, targets, where=keep)
    inner = np.ix_(keep, keep)
    assert_close(got[keep], soft_target_loss(logits[inner], targets[inner]))
    assert not np.any(got[~keep])
    grad = jax.grad(lambda x: soft_target_loss(x, targets, where=keep).sum())(logits)
    assert np.isfinite(grad).all() and not np.any(grad[1]) and not np.any(grad[:, 4])


def test_a_row_without_a_target_has_no_loss():
    logits = np.random.default_rng(0).normal(size=(4, 4))
    targets = np.eye(4)
    targets[2, 2] = 0
    per_image = soft_target_loss(logits, targets, direction="per_image")
    per_text = soft_target_loss(logits, targets, direction="per_text")
    assert per_image[2] == per_text[2] == 0
    assert (np.delete(per_image, 2) > 0).all()


def test_mixed_targets_against_unmixed_texts():
    labels = np.array([7, NO_LABEL, 7, 2])
    partner, share = np.array([1, 0, 3, 3]), np.array([0.75, 0.5, 0.25, 0.1])
    got = mixed_targets(labels, partner, share)
    want = [
        [0.75, 0.25, 0.75, 0],  # class 7, a quarter of caption 1
        [0.5, 0.5, 0.5, 0],  # caption 1, half of class 7
        [0.25, 0, 0.25, 0.75],
        [0, 0, 0, 1],  # mixed with itself
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    u, v = random_unit(4, 3), random_unit(4, 3, seed=1)
    logits = pair_logits(u, v, 5.0)
    unmixed = mixed_targets(labels, partner, 1.0)
    assert_close(soft_target_loss(logits, unmixed), unicl_loss(u, v, labels, 5.0))


# --- SigLIP.


@pytest.mark.parametrize("labels", [None, SPANNING], ids=["pairs", "labels"])
def test_siglip_is_its_formula(labels):
    u, v = random_unit(16, 6), random_unit(16, 6, seed=1)
    scale, bias = 10.0, -3.0
    want = np.zeros(16)
    for i, j in itertools.product(range(16), repeat=2):
        positive = i == j if labels is None else is_positive(labels, i, j)
        z = 1 if positive else -1
        want[i] += math.log1p(math.exp(-z * (scale * u[i] @ v[j] + bias)))
    assert_close(siglip_loss(u, v, scale, bias, labels=labels), want)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_siglip_every_way_is_dense_on_one_device(implementation, devices, make_mesh):
    u, v = random_unit(16, 6), random_unit(16, 6, seed=1)
    keep = np.arange(16) % 5 != 0
    options = dict(labels=SPANNING, where=keep)
    loss = siglip_loss
    if devices > 1:
        loss = compiled(sharded(losses.siglip_loss, make_mesh(devices)))

    def this(*arrays):
        return loss(*arrays, implementation=implementation, block_size=3, **options)

    def dense(*arrays):
        return siglip_loss(*arrays, **options)

    arrays = u, v, np.float64(10), np.float64(-3)
    assert_close(this(*arrays), dense(*arrays))
    assert_close(value_and_grads(this, *arrays), value_and_grads(dense, *arrays))


def test_siglip_left_out_is_dropped_and_far_apart_logits_are_finite():
    u, v = random_unit(8, 6), random_unit(8, 6, seed=1)
    keep = np.arange(8) != 3
    u[3] = np.nan
    got = siglip_loss(u, v, 10.0, -3.0, where=keep)
    assert_close(got[keep], siglip_loss(u[keep], v[keep], 10.0, -3.0))
    assert got[3] == 0
    far = siglip_loss(np.float32(v), -np.float32(v), 1000.0, -10.0)
    assert np.isfinite(far).all() and (far > 900).all()


def test_siglip_blockwise_holds_no_matrix():
    def temporary(implementation):
        def mean(u, v):
            return siglip_loss(
                u, v, 10.0, -3.0, implementation=implementation, block_size=64
            ).mean()

        shape = jax.ShapeDtypeStruct((2048, 8), np.float32)
        step = jax.jit(jax.grad(mean, (0, 1))).lower(shape, shape).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert temporary("blockwise") < temporary("dense") / 10


# --- SupCon.


def supcon_by_hand(z, labels, temperature, anchors):
    batch, views, _ = z.shape
    everything = [(i, a) for i in range(batch) for a in range(views)]
    found = np.zeros(batch)
    for i in range(batch):
        chosen = range(views) if anchors == "all" else [0]
        for a in chosen:
            others = [c for c in everything if c != (i, a)]
            logits = {c: z[i, a] @ z[c] / temperature for c in others}
            normalizer = math.log(sum(map(math.exp, logits.values())))
            positives = [c for c in others if is_positive(labels, i, c[0])]
            terms = [normalizer - logits[p] for p in positives]
            found[i] += np.mean(terms) / len(chosen) if terms else 0
    return found


@pytest.mark.parametrize("anchors", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon_is_its_formula(views, anchors):
    z, labels = random_unit(8, views, 5), SPANNING[:8]
    got = supcon_loss(z, labels, 0.2, anchors=anchors)
    assert_close(got, supcon_by_hand(z, labels, 0.2, anchors))


def test_supcon_without_labels_is_simclr():
    """The other view against all else: NT-Xent."""
    z = random_unit(8, 2, 5)
    flat = z.transpose(1, 0, 2).reshape(
        16, 5
    )  # as optax has it: views one after another
    labels = np.tile(np.arange(8), 2)
    want = optax.losses.ntxent(jnp.asarray(flat), labels, temperature=0.2)
    assert_close(supcon_loss(z, np.full(8, NO_LABEL), 0.2).mean(), want)


def test_supcons_base_temperature_scales_it():
    z = random_unit(8, 2, 5)
    plain = supcon_loss(z, SPANNING[:8], 0.2)
    scaled = supcon_loss(z, SPANNING[:8], 0.2, base_temperature=0.07)
    assert_close(scaled, plain * 0.2 / 0.07)


def test_supcon_and_unicl_of_the_same_images():
    """UniCL of images with themselves counts each with itself; SupCon does not."""
    u = random_unit(8, 5)
    labels = np.array([0, 1, 1, 2, 2, 2, 0, 1])
    scale = 4.0
    supcon = supcon_loss(u[:, None], labels, 1 / scale)
    others = np.log(
        np.exp(scale * u @ u.T).sum(1) - np.exp(scale)
    )  # log of the sum over the others
    n = np.bincount(labels)[labels]
    want = np.logaddexp(others, scale) - (scale + (n - 1) * (others - supcon)) / n
    assert_close(unicl_loss(u, u, labels, scale), want)


@pytest.mark.parametrize("anchors", ["all", "one"])
def test_supcon_sharded_is_single(anchors, make_mesh):
    z = random_unit(16, 2, 5)
    keep = np.arange(16) % 5 != 0
    options = dict(anchors=anchors, where=keep)
    loss = sharded(losses.supcon_loss, make_mesh(8))
    arrays = z, SPANNING, np.float64(0.3)
    got = value_and_grads(lambda *x: loss(*x, **options), *arrays)
    want = value_and_grads(lambda *x: supcon_loss(*x, **options), *arrays)
    assert_close(got, want)
    dropped = supcon_loss(z[keep], SPANNING[keep], 0.3, anchors=anchors)
    assert_close(supcon_loss(*arrays, **options)[keep], dropped)


def test_a_lone_anchor_has_no_loss_and_no_nan():
    z = random_unit(3, 1, 5)
    value, grads = value_and_grads(lambda z: supcon_loss(z, np.arange(3)), z)
    assert value == 0 and not np.any(grads)


# --- Cross-entropy, alone and beside CLIP.


def test_cross_entropy_is_optax_on_labelled_rows_and_0_elsewhere():
    logits = np.random.default_rng(0).normal(size=(16, 6))
    labelled = SPANNING != NO_LABEL
    want = optax.softmax_cross_entropy_with_integer_labels(
        logits[labelled], SPANNING[labelled]
    )
    got = cross_entropy_loss(logits, SPANNING)
    assert_close(got[labelled], want)
    assert not np.any(got[~labelled])
    smooth = optax.smooth_labels(jax.nn.one_hot(SPANNING[labelled], 6), 0.1)
    want = optax.softmax_cross_entropy(logits[labelled], smooth)
    assert_close(
        cross_entropy_loss(logits, SPANNING, label_smoothing=0.1)[labelled], want
    )


def test_what_is_masked_by_minus_infinity_has_no_share():
    logits = np.array([[1.0, -np.inf, 2.0], [0.5, 1.0, -np.inf]])
    kept = np.array([[1.0, 2.0], [0.5, 1.0]])
    got = cross_entropy_loss(logits, np.array([0, 1]))
    want = optax.softmax_cross_entropy_with_integer_labels(kept, np.array([0, 1]))
    assert_close(got, want)
    square = np.where(np.eye(3) + np.eye(3)[::-1] > 0, 1.0, -np.inf)
    got = soft_target_loss(square, np.eye(3))
    assert_close(got, np.log([2.0, 1.0, 2.0]))
    assert np.isfinite(
        jax.grad(lambda x: soft_target_loss(x, np.eye(3)).sum())(square)
    ).all()


def test_a_label_that_is_no_class_shows():
    logits = np.zeros((3, 6))
    got = cross_entropy_loss(logits, np.array([5, 6, -2]))
    assert np.isnan(got).tolist() == [False, True, True]


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("kind", ["both", "labels", "captions"])
def test_multitask_is_the_sum_of_the_two_means(kind, is_sharded, make_mesh):
    u, v = random_unit(16, 6), random_unit(16, 6, seed=1)
    logits = np.random.default_rng(2).normal(size=(16, 6))
    labels = {"both": SPANNING, "labels": abs(SPANNING), "captions": 0 * SPANNING - 1}
    labels = labels[kind]
    loss = multitask_loss
    if is_sharded:
        loss = compiled(sharded(losses.multitask_loss, make_mesh(8)))
    weights = dict(class_weight=2.0, pair_weight=0.5)
    captions, want = labels == NO_LABEL, 0.0
    if (~captions).any():
        want += 2 * np.mean(cross_entropy_loss(logits[~captions], labels[~captions]))
    if captions.any():
        want += 0.5 * np.mean(contrastive_loss(u[captions], v[captions], 7.0))
    assert_close(loss(u, v, logits, labels, 7.0, **weights).mean(), want)
    arrays = u, v, logits, labels, np.float64(7)
    _, grads = value_and_grads(lambda *x: loss(*x, **weights), *arrays)
    assert all(np.isfinite(x).all() for x in grads)


# --- MP-NCE.


def mp_nce_by_hand(z, labels, domains, scales, offsets, weights):
    n, found, pairs = len(z), [], []
    for i in range(n):
        pair = [domains[i] + domains[j] for j in range(n)]
        e = [
            math.exp(scales[p] * (z[i] @ z[j] - offsets[p])) for j, p in enumerate(pair)
        ]
        negatives = sum(e[j] for j in range(n) if not is_positive(labels, i, j))
        terms = [
            -weights[pair[p]] * math.log(e[p] / (e[p] + negatives))
            for p in range(n)
            if p != i and is_positive(labels, i, p)
        ]
        found.append(np.mean(terms) if terms else 0.0)
        pairs += terms
    return np.array(found), np.mean(pairs)


def universal(seed=0):
    """Six records with two image views and a text each: 18 embeddings."""
    z = random_unit(18, 5, seed=seed)
    labels, domains = np.tile(np.arange(6), 3), np.repeat([0, 0, 1], 6)
    labels[labels == 4] = 1  # one class of two records
    labels[17] = NO_LABEL  # and a text that belongs to none
    return z, labels, domains


SCALES, OFFSETS = np.array([9.0, 5.0, 7.0]), np.array([0.1, -0.2, 0.05])
PAIR_WEIGHTS = np.array([1.0, 2.0, 0.5])


def test_mp_nce_is_its_formula():
    arrays = (*universal(), SCALES, OFFSETS)
    per_anchor, mean_of_pairs = mp_nce_by_hand(*arrays, PAIR_WEIGHTS)
    assert_close(mp_nce_loss(*arrays, pair_weights=PAIR_WEIGHTS), per_anchor)
    by_pair = mp_nce_loss(*arrays, pair_weights=PAIR_WEIGHTS, average="pair")
    assert_close(by_pair.mean(), mean_of_pairs)


def test_mp_nce_of_one_domain_and_equal_groups_is_ntxent():
    z, labels = random_unit(12, 5), np.repeat(np.arange(4), 3)
    domains, scales = np.zeros(12, int), np.full(3, 5.0)
    want = optax.losses.ntxent(jnp.asarray(z), labels, temperature=0.2)
    got = mp_nce_loss(z, labels, domains, scales, np.full(3, 0.7))
    assert_close(got.mean(), want)


def test_mp_nces_common_offset_cancels_and_its_scales_and_offsets_learn():
    z, labels, domains = universal()
    shifted = mp_nce_loss(z, labels, domains, np.full(3, 5.0), OFFSETS + 1)
    assert_close(shifted, mp_nce_loss(z, labels, domains, np.full(3, 5.0), OFFSETS))

    def mean(scales, offsets):
        return mp_nce_loss(z, labels, domains, scales, offsets).mean()

    got = jax.grad(mean, (0, 1))(SCALES, OFFSETS)
    step = 1e-6
    for which, grad in enumerate(got):
        for k in range(3):
            moved = [SCALES.copy(), OFFSETS.copy()]
            moved[which][k] += step
            up = float(mean(*moved))  # now, as the arrays change
            moved[which][k] -= 2 * step
            # Central differences: rounding of 1e-16 over the step, and its square.
            assert_close(
                grad[k], (up - mean(*moved)) / (2 * step), rtol=1e-6, atol=1e-9
            )


def test_mp_nce_sharded_is_single(make_mesh):
    z, labels, domains = (x[:16] for x in universal())
    keep = np.arange(16) != 5
    loss = sharded(losses.mp_nce_loss, make_mesh(8))
    for average in ("anchor", "pair"):
        options = dict(where=keep, average=average, pair_weights=PAIR_WEIGHTS)
        arrays = z, labels, domains, SCALES, OFFSETS
        got = value_and_grads(lambda *x, o=options: loss(*x, **o), *arrays)
        want = value_and_grads(lambda *x, o=options: mp_nce_loss(*x, **o), *arrays)
        assert_close(got, want)


def test_mp_nce_without_negatives_or_positives_is_zero():
    z, domains = random_unit(4, 5), np.zeros(4, int)
    for labels in (np.zeros(4, int), np.full(4, NO_LABEL)):
        value, grads = value_and_grads(
            lambda z, labels=labels: mp_nce_loss(z, labels, domains, SCALES, OFFSETS), z
        )
        assert value == 0 and not np.any(grads)


# --- Wrong input.

GOOD = jax.ShapeDtypeStruct((8, 4), jnp.float32)
INTEGERS = jax.ShapeDtypeStruct((8,), jnp.int32)
THREE = jax.ShapeDtypeStruct((3,), jnp.float32)
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def shape(*size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


@pytest.mark.parametrize(
    ("loss", "arrays", "error"),
    [
        (soft_target_loss, (shape(8, 7), shape(8, 7)), "logits must be"),
        (soft_target_loss, (shape(8, 8), shape(8)), "targets must be"),
        (siglip_loss, (GOOD, GOOD, SCALAR, shape(1)), "logit_bias must be a scalar"),
        (siglip_loss, (GOOD, shape(8, 5), SCALAR, SCALAR), "must both be"),
        (supcon_loss, (GOOD, INTEGERS), "embeddings must be .*views"),
        (supcon_loss, (shape(8, 2, 4), shape(4, dtype=jnp.int32)), "labels must be"),
        (cross_entropy_loss, (shape(8), INTEGERS), "logits must be"),
        (cross_entropy_loss, (GOOD, GOOD), "labels must be integers"),
        (cross_entropy_loss, (GOOD, shape(8, 2, dtype=jnp.int32)), "labels must be"),
        (mp_nce_loss, (GOOD, INTEGERS, GOOD, THREE, THREE), "domains must be"),
        (mp_nce_loss, (GOOD, INTEGERS, INTEGERS, shape(2), THREE), "scales must be"),
        (mp_nce_loss, (shape(8), INTEGERS, INTEGERS, THREE, THREE), "embeddings must"),
    ],
)
def test_what_does_not_fit_is_named_at_trace_time(loss, arrays, error):
    with pytest.raises((TypeError, ValueError), match=f"{error}.*got"):
        jax.eval_shape(loss, *arrays)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (lambda **o: soft_target_loss(np.eye(3), np.eye(3), **o), {"direction": "up"}),
        (
            lambda **o: supcon_loss(np.ones((3, 2, 4)), SPANNING[:3], **o),
            {"anchors": "x"},
        ),
        (
            lambda **o: siglip_loss(np.ones((3, 4)), np.ones((3, 4)), 1.0, 0.0, **o),
            {"implementation": "ring"},
        ),
    ],
)
def test_wrong_choices_are_named(loss, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be one of .*got"):
        loss(**options)
