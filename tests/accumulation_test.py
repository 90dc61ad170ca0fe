"""Micro-batches with the whole batch's loss; and the loss in other people's code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax.losses import NO_LABEL, in_micro_batches, sharded, unicl_loss

LABELS = np.array([0, 1, 2, -1, 0, 3, 1, 1, -1, 2, 0, 4, 5, 0, 1, -1])


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def batch_and_params(dtype=np.float64):
    rng = np.random.default_rng(0)
    rows = {
        "x": rng.normal(size=(16, 5)).astype(dtype),
        "t": rng.normal(size=(16, 5)).astype(dtype),
        "key": jax.random.split(jax.random.key(1), 16),
    }
    params = {
        "image": rng.normal(size=(5, 6)).astype(dtype),
        "text": rng.normal(size=(5, 6)).astype(dtype),
        "theta": np.asarray(1.3, dtype),
    }
    return params, rows


def encode(params, rows):
    """Two linear towers, dropout on the images, its key with the row."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (5,)))(rows["key"])
    u = unit(jnp.tanh(jnp.where(kept, rows["x"], 0) @ params["image"]))
    return u, unit(rows["t"] @ params["text"])


def loss_of(encode, loss=unicl_loss):
    def mean(params, rows, labels):
        u, v = encode(params, rows)
        return loss(u, v, labels, jnp.exp(params["theta"])).mean()

    return jax.jit(jax.value_and_grad(mean))


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_micro_batches_give_the_whole_batchs_gradients(count, x64):
    params, rows = batch_and_params()
    want = loss_of(encode)(params, rows, LABELS)
    got = loss_of(in_micro_batches(encode, count))(params, rows, LABELS)
    assert abs(want[1]["theta"]) > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want
    )


def test_micro_batches_stay_divided_over_devices(make_mesh, x64):
    params, rows = batch_and_params()
    mesh = make_mesh(4)
    spread = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put((rows, LABELS), spread)
    step = loss_of(in_micro_batches(encode, 2), sharded(unicl_loss, mesh))
    want = loss_of(encode)(params, rows, LABELS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        step(params, *placed),
        want,
    )


def test_micro_batches_hold_fewer_activations():
    def deep(params, rows):
        x = rows["x"]
        for _ in range(8):
            x = jnp.tanh(x @ params["square"])
        return unit(x), unit(rows["t"])

    shape = jax.ShapeDtypeStruct
    params = {"square": shape((64, 64), np.float32), "theta": shape((), np.float32)}
    rows = {k: shape((4096, 64), np.float32) for k in ("x", "t")}
    labels = shape((4096,), np.int32)

    def temporary(encode):
        loss = jax.tree_util.Partial(unicl_loss, implementation="blockwise")
        compiled = loss_of(encode, loss).lower(params, rows, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Eight layers of 4,096 rows against eight of 256.
    assert temporary(in_micro_batches(deep, 16)) < 0.75 * temporary(deep)


def test_a_batch_that_does_not_divide_is_named():
    params, rows = batch_and_params(np.float32)
    with pytest.raises(ValueError, match="divisible by 3 micro-batches: got 16"):
        jax.eval_shape(in_micro_batches(encode, 3), params, rows)
    with pytest.raises(ValueError, match="count must be at least 1: got 0"):
        in_micro_batches(encode, 0)


# --- Guests: the loss alone, in other people's training code.


def separable():
    """16 pairs of 8 classes that two linear maps can align."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(8, 12))
    labels = np.repeat(np.arange(8), 2)
    x, t = (
        np.float32(means[labels] + 0.1 * rng.normal(size=(16, 12))) for _ in range(2)
    )
    return x, np.float32(t), labels


def test_an_nnx_model_trains_with_it():
    x, t, labels = separable()

    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.image, self.text = (nnx.Linear(12, 8, rngs=rngs) for _ in range(2))

        def __call__(self, x, t):
            return unit(self.image(x)), unit(self.text(t))

    model = Pair(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.03), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return unicl_loss(*model(x, t), labels, 10.0).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(150)]
    assert losses[0] > 1.5 and losses[-1] < np.log(2) + 0.05  # two of each class


def test_a_linen_model_trains_with_it():
    x, t, labels = separable()

    class Pair(linen.Module):
        @linen.compact
        def __call__(self, x, t):
            return unit(linen.Dense(8)(x)), unit(linen.Dense(8)(t))

    model, optimizer = Pair(), optax.adam(0.03)
    params = model.init(jax.random.key(0), x, t)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(
            lambda p: unicl_loss(*model.apply(p, x, t), labels, 10.0).mean()
        )(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(150):
        params, state, loss = step(params, state)
    assert loss < np.log(2) + 0.05


def test_a_pmap_function_trains_with_it():
    x, t, labels = (a.reshape(8, 2, *a.shape[1:]) for a in separable())
    params = np.float32(np.random.default_rng(0).normal(size=(2, 12, 8)) / 4)

    def step(params, x, t, labels):
        def loss_fn(params):
            u, v = unit(x @ params[0]), unit(t @ params[1])
            return unicl_loss(u, v, labels, 10.0, axis_name="i").mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        loss, grads = jax.lax.pmean((loss, grads), "i")
        return params - 0.3 * grads, loss

    step = jax.pmap(step, "i", in_axes=(None, 0, 0, 0), out_axes=None)
    for _ in range(150):
        # One step at a time: eight virtual devices on two cores, with many steps on
        # their way, can wait for each other's collectives for ever.
        params, loss = jax.block_until_ready(step(params, x, t, labels))
    assert loss < np.log(2) + 0.1
    assert (labels == NO_LABEL).sum() == 0
