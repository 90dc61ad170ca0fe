"""Dense, blockwise, ring: one loss three ways, on one device, two and eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unicl_jax.losses import NO_LABEL, sharded, unicl_loss, unicl_loss_and_aux

# Float64 rounds at 1e-16; logits of 100 and sums of a few dozen terms make it 1e-13.
EXACT = dict(rtol=1e-12, atol=1e-12)
OTHERS = ["blockwise", "ring"]
ALL = ["dense", *OTHERS]
# Classes that span eight shards of two; and a pattern that is the same on each.
SPANNING = np.array([0, 1, 2, -1, 0, 3, 1, 1, -1, 2, 0, 4, 5, 0, 1, -1])
LABELS = {
    "spanning": SPANNING,
    "alike": np.array([5, NO_LABEL] * 8),
    "captions": np.full(16, NO_LABEL),
    "one class": np.zeros(16, int),
    "distinct": np.arange(16),
    "lanes": np.stack([SPANNING, SPANNING[::-1]], axis=1),
}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embeddings(batch=16, dim=6, seed=0):
    """Random unit rows, [batch, dim] images and texts, float64."""
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(batch, dim))), unit(rng.normal(size=(batch, dim)))


def everything(u, v, labels, scale, loss_and_aux=unicl_loss_and_aux, **options):
    """Loss, aux, and gradients of a mean in which every row weighs differently."""
    row_weights = np.linspace(0.5, 1.5, len(u))
    row_weights = row_weights.astype(np.promote_types(u.dtype, np.float32))

    @jax.jit
    def run(u, v, labels, scale):
        def mean(u, v, scale):
            loss, aux = loss_and_aux(u, v, labels, scale, **options)
            return (loss * row_weights).mean(), (loss, aux)

        return jax.grad(mean, (0, 1, 2), has_aux=True)(u, v, scale)

    return run(u, v, labels, scale)


def assert_close(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or EXACT)), got, want
    )


@pytest.fixture(autouse=True)
def explicit_broadcasts():
    """A loss that broadcasts [B] against [B, B] by accident is wrong and runs."""
    with jax.numpy_rank_promotion("raise"):
        yield


# --- The same numbers.


@pytest.mark.parametrize(
    "labels, block_size",
    [
        (labels, size)
        for labels in LABELS
        for size in (1, 5, 16, 100, None)
        if labels != "lanes" or size in (5, None)  # a program of their own
    ],
)
def test_blockwise_is_dense(labels, block_size, x64):
    u, v = embeddings()
    own = dict(implementation="blockwise", block_size=block_size)
    got = everything(u, v, LABELS[labels], 7.0, **own)
    assert_close(got, everything(u, v, LABELS[labels], 7.0, implementation="dense"))


@pytest.mark.parametrize("batch", [1, 2, 257])
@pytest.mark.parametrize("implementation", OTHERS)
def test_any_batch_size(implementation, batch, x64):
    u, v = embeddings(batch, 8)
    labels = np.random.default_rng(0).integers(-1, 20, batch)
    got = everything(u, v, labels, 9.0, implementation=implementation, block_size=64)
    assert_close(got, everything(u, v, labels, 9.0, implementation="dense"))


def test_a_ring_of_one_is_blockwise(x64):
    u, v = embeddings()
    got = everything(u, v, SPANNING, 7.0, implementation="ring", block_size=4)
    assert_close(got, everything(u, v, SPANNING, 7.0, implementation="dense"))


@pytest.mark.parametrize(
    "implementation, devices, axis_type",
    [("dense", 8, AxisType.Auto)]  # the others of the dense one: in losses_test
    + [(name, n, AxisType.Auto) for name in OTHERS for n in (1, 2, 8)]
    + [(name, 8, AxisType.Explicit) for name in OTHERS],
)
def test_sharded_is_single(implementation, devices, axis_type, make_mesh, x64):
    u, v = embeddings()
    mesh = make_mesh(devices, axis_type)
    block_size = None if implementation == "dense" else 3  # divides no shard
    loss = functools.partial(
        sharded(unicl_loss_and_aux, mesh),
        implementation=implementation,
        block_size=block_size,
    )

    def place(x):
        spec = PartitionSpec("data") if np.ndim(x) else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    for name in ("spanning", "alike", "lanes"):
        labels = LABELS[name]
        placed = map(place, (u, v, labels, np.array(7.0)))
        got = everything(*placed, loss_and_aux=loss)
        assert_close(got, everything(u, v, labels, 7.0, implementation="dense"))


@pytest.mark.parametrize("implementation", OTHERS)
def test_sharded_over_two_mesh_axes_is_single(implementation, x64):
    u, v = embeddings()
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    loss = functools.partial(
        sharded(unicl_loss_and_aux, mesh, ("a", "b")), implementation=implementation
    )
    got = everything(u, v, SPANNING, 7.0, loss_and_aux=loss)
    assert_close(got, everything(u, v, SPANNING, 7.0, implementation="dense"))


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("implementation", ALL)
def test_where_and_weights(implementation, is_sharded, make_mesh, x64):
    u, v = embeddings()
    keep = np.arange(16) % 3 != 0
    keep[2:4] = False  # all of the second of eight shards
    u[0], v[3] = np.nan, np.inf  # in rows left out: no one's business
    options = dict(where=keep, weights=np.linspace(0.5, 2, 16))
    loss = sharded(unicl_loss_and_aux, make_mesh(8)) if is_sharded else None
    got = everything(
        u,
        v,
        SPANNING,
        7.0,
        loss_and_aux=loss or unicl_loss_and_aux,
        implementation=implementation,
        **options,
    )
    dropped = [x[keep] for x in (u, v, SPANNING)]
    want, aux = unicl_loss_and_aux(*dropped, 7.0, weights=options["weights"][keep])
    (du, dv, _), (loss, got_aux) = got
    assert_close(loss[keep], want)
    assert_close([x[keep] for x in got_aux], list(aux))
    for x in (loss, du, dv, *got_aux):
        assert not np.any(x[~keep])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("implementation", OTHERS)
def test_all_left_out_is_zero(implementation, is_sharded, make_mesh, x64):
    loss = sharded(unicl_loss_and_aux, make_mesh(8)) if is_sharded else None
    got = everything(
        *embeddings(),
        SPANNING,
        5.0,
        loss_and_aux=loss or unicl_loss_and_aux,
        where=np.zeros(16, bool),
        implementation=implementation,
    )
    for x in jax.tree.leaves(got):
        assert not np.any(x)  # NaN is not 0 either


@pytest.mark.parametrize("direction", ["per_image", "per_text"])
def test_one_direction_alone(direction, x64):
    u, v = embeddings()
    got, want = (
        everything(u, v, SPANNING, 7.0, direction=direction, implementation=name)
        for name in ("blockwise", "dense")
    )
    assert_close(got, want)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("scale", [1.0, 5.0, 50.0])
def test_second_derivatives_in_float32(scale, implementation):
    """1/x^2 of the sums of exponentials is below the least float32."""
    u, v = embeddings(4, 3)

    def second(dtype):
        def total(scale, u, v):
            loss = unicl_loss(u, v, SPANNING[:4], scale, implementation=implementation)
            return loss.sum()

        twice = jax.jit(jax.grad(jax.grad(total)))
        return twice(np.asarray(scale, dtype), u.astype(dtype), v.astype(dtype))

    with jax.enable_x64(True):
        want = float(second(np.float64))
    # What is left of a difference of terms of order 1, rounded at 6e-8 each.
    np.testing.assert_allclose(second(np.float32), want, rtol=1e-4, atol=2e-6)


def test_second_derivatives_of_the_dense_loss(x64):
    u, v = embeddings(4, 3)

    @jax.jit
    def gradient(u):
        return jax.grad(lambda u: unicl_loss(u, v, SPANNING[:4], 3.0).mean())(u)

    direction, step = embeddings(4, 3, seed=1)[0], 1e-6
    got = jax.jit(lambda *x: jax.jvp(gradient, *x))((u,), (direction,))[1]
    want = (gradient(u + step * direction) - gradient(u - step * direction)) / 2e-6
    # Central differences: rounding of 1e-16 over the step, and its square.
    assert_close(got, want, rtol=1e-7, atol=1e-9)


# --- Logits that one shift cannot hold.


def same(x):
    return np.tile(x[:1], (16, 1))


HARD = {
    "anti-aligned": lambda u, v: (u, -u, 100.0),
    "one row, anti-aligned": lambda u, v: (u[:1], -u[:1], 100.0),
    "long": lambda u, v: (30 * u, 30 * v, 10.0),
    "one long row": lambda u, v: (
        u * np.where(np.arange(16) == 3, 99, 1)[:, None],
        v,
        50.0,
    ),
    "all cosines -1": lambda u, v: (same(u), -same(u), 100.0),
    "identical": lambda u, v: (same(u), same(u), 100.0),
    "scale 0": lambda u, v: (u, v, 0.0),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("implementation", ALL)
def test_float32_with_logits_far_apart(implementation, is_sharded, case, make_mesh):
    u, v, scale = HARD[case](*embeddings())
    labels = SPANNING[: len(u)]
    u, v = np.float32(u), np.float32(v)
    with jax.enable_x64(True):  # of the very numbers that float32 holds
        want = everything(*np.float64((u, v)), labels, scale, implementation="dense")
    loss = unicl_loss_and_aux
    if is_sharded and len(u) > 1:
        loss = sharded(loss, make_mesh(8))
    got = everything(
        u,
        v,
        labels,
        np.float32(scale),
        loss_and_aux=loss,
        implementation=implementation,
    )
    # Float32 rounds a logit of size L at 6e-8 L, hence a softmax by as much, and the
    # gradient of an embedding by `scale` times that.
    largest = np.abs(scale * np.float64(u) @ np.float64(v).T).max()
    size = max(scale, 1) * max(np.linalg.norm(v, axis=1).max(), 1)
    size *= max(np.linalg.norm(u, axis=1).max(), 1)
    assert_close(got, want, rtol=2e-5, atol=2e-6 + 4e-7 * largest * size)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("implementation", OTHERS)
def test_a_bad_embedding_shows_in_the_loss(implementation, is_sharded, bad, make_mesh):
    loss = sharded(unicl_loss_and_aux, make_mesh(8)) if is_sharded else None
    u, v = (np.float32(x) for x in embeddings())
    v[3, 2] = bad
    _, (losses, _) = everything(
        u,
        v,
        SPANNING,
        np.float32(5),
        loss_and_aux=loss or unicl_loss_and_aux,
        implementation=implementation,
    )
    assert not np.isfinite(losses.mean())


def converged(batch=512, dim=64, group=8):
    """Pairs that match, among look-alikes: logits 7 to 9 apart at scale 100."""
    rng = np.random.default_rng(0)
    centre = np.repeat(unit(rng.normal(size=(batch // group, dim))), group, axis=0)
    own = unit(rng.normal(size=(batch, dim)))
    own = unit(own - (own * centre).sum(1, keepdims=True) * centre)
    u = unit(np.sqrt(0.92) * centre + np.sqrt(0.08) * own)
    v = unit(u + 0.003 * rng.normal(size=u.shape))
    return jnp.bfloat16(u), jnp.bfloat16(v)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    ("make", "scale", "bound"),
    # What remains of a matched pair's gradient is what is rounded to bfloat16 (1/256);
    # subtracting the positives after that rounding would give errors of order 1 here.
    [(converged, 100.0, 2e-2), (lambda: embeddings(512, 64), 2.7, 5e-3)],
    ids=["converged", "random"],
)
def test_bfloat16_gradients(implementation, make, scale, bound):
    u, v = (jnp.bfloat16(x) for x in make())
    labels = np.full(len(u), NO_LABEL)
    with jax.enable_x64(True):
        wide = [np.float64(np.asarray(x, np.float32)) for x in (u, v)]
        want, (loss, _) = everything(*wide, labels, scale, implementation="dense")
    want, loss = jax.tree.map(np.asarray, (want, loss))
    if make is converged:
        assert loss.mean() < 0.05
    got, _ = everything(u, v, labels, np.float32(scale), implementation=implementation)
    for a, b in zip(got[:2], want[:2], strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        # The result itself is rounded to bfloat16, too.
        assert error < bound + 2**-8
    assert_close(np.float64(got[2]), want[2], rtol=bound)


# --- Memory and traffic.


def lowered(batch, implementation, dim=8, mesh=None, dtype=np.float32):
    """The compiled value and gradient of a batch, not run."""
    loss = sharded(unicl_loss, mesh) if mesh else unicl_loss
    options = {} if implementation == "dense" else dict(block_size=64)

    def mean(u, v, labels, scale):
        return loss(
            u, v, labels, scale, implementation=implementation, **options
        ).mean()

    def shape(*size, dtype=dtype):
        spec = PartitionSpec("data") if size else PartitionSpec()
        sharding = NamedSharding(mesh, spec) if mesh else None
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    arguments = (
        shape(batch, dim),
        shape(batch, dim),
        shape(batch, dtype=np.int32),
        shape(),
    )
    return jax.jit(jax.value_and_grad(mean, (0, 1, 3))).lower(*arguments).compile()


@pytest.mark.parametrize("implementation", OTHERS)
def test_memory_grows_with_the_batch_and_not_its_square(implementation):
    sizes = [
        lowered(batch, implementation).memory_analysis().temp_size_in_bytes
        for batch in (2048, 4096, 8192)
    ]
    # A constant and what grows by the batch: each doubling at most doubles.
    assert sizes[1] < 2.1 * sizes[0] and sizes[2] < 2.1 * sizes[1]
    dense = lowered(4096, "dense").memory_analysis().temp_size_in_bytes
    assert sizes[1] < dense / 20


def test_no_block_of_logits_as_wide_as_the_batch_is_in_the_program(make_mesh):
    text = lowered(2048, "blockwise", mesh=make_mesh(8)).as_text()
    wide = r"f32\[(256,2048|2048,256|2048,2048)\]"
    assert not re.search(wide, text)
    assert re.search(wide, lowered(2048, "dense", mesh=make_mesh(8)).as_text())


def test_the_ring_gathers_no_features(make_mesh):
    text = lowered(512, "ring", dim=24, mesh=make_mesh(8)).as_text()
    assert "collective-permute" in text
    assert not re.search(r"all-gather|all-to-all|\[512,24\]", text)


def test_blockwise_gathers_texts_and_never_images(make_mesh):
    text = lowered(512, "blockwise", dim=24, mesh=make_mesh(8)).as_text()
    assert "all-to-all" not in text
    gathers = [line for line in text.splitlines() if "all-gather(" in line]
    # Once forward, and once in each branch that may come after it: far apart
    # logits, the gradient by one shift, by two. The images have the same shape.
    assert sum("f32[512,24]" in line for line in gathers) == 4


# --- Wrong input.


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(implementation="blockwise", block_size=0), "block_size must be"),
        (dict(implementation="ring", block_size=2.5), "block_size must be"),
        (dict(implementation="dense", block_size=4), "block_size must be None"),
        (dict(implementation="flash"), "implementation must be one of"),
    ],
)
def test_wrong_choices_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        unicl_loss(*embeddings(), SPANNING, 1.0, **options)


def test_auto_is_dense_for_small_batches_and_blockwise_for_large(monkeypatch):
    from unicl_jax.losses import unicl

    def blocks(batch):
        shapes = [jax.ShapeDtypeStruct((batch, 4), np.float32)] * 2
        labels = jax.ShapeDtypeStruct((batch,), np.int32)
        jaxpr = jax.make_jaxpr(unicl_loss)(*shapes, labels, 1.0)
        return "scan" in str(jaxpr)

    monkeypatch.setattr(unicl, "DENSE_UNTIL", 64 * 64)
    assert not blocks(64)
    assert blocks(65)


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_an_empty_batch_is_refused(size):
    with pytest.raises(ValueError, match="must hold a row and a column"):
        unicl_loss(np.ones(size), np.ones(size), np.zeros(size[0], int), 1.0)
