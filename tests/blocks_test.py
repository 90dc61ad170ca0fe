"""A tower's blocks written out, recomputed, or as one loop: the same function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax.encoders import pack, transformer, vit

VIT = dict(patch_size=4, width=16, num_layers=3, num_heads=2, image_size=8)
TEXT = dict(vocab_size=32, context_length=8, width=16, num_heads=2, num_layers=3)


def images(count=4):
    return np.random.default_rng(0).normal(size=(count, 8, 8, 3)).astype("f4")


def tokens():
    tokens = np.random.default_rng(0).integers(1, 31, (4, 8), dtype=np.int32)
    tokens[:, 5:] = 31
    return tokens


TOWERS = {
    "vit": (vit, VIT, images),
    "texts": (transformer, TEXT, tokens),
    "packed": (transformer, TEXT, lambda: pack(tokens(), 16)),
    "not causal": (transformer, TEXT | dict(causal=False), tokens),
}


def parameters(tower):
    """Larger than those of a new tower, so that every block counts."""
    shapes, _ = jax.eval_shape(tower.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype), shapes
    )


def gradients(tower, params, inputs, **options):
    def total(params):
        out, _ = tower.apply(params, {}, inputs, **options)
        return (out * jnp.cos(jnp.arange(tower.width))).sum(), out

    return jax.grad(total, has_aux=True), params


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("which", TOWERS)
def test_a_loop_over_blocks_is_the_blocks_one_by_one(which, remat, x64):
    make, options, inputs = TOWERS[which]
    plain = make(**options, dtype=jnp.float64)
    scanned = make(**options, dtype=jnp.float64, scan=True, remat=remat)
    params = parameters(plain)
    found = []
    for tower in (plain, scanned):
        grad, params = gradients(tower, params, inputs(), train=True)
        found.append(jax.jit(grad)(params))
        program = str(jax.make_jaxpr(grad)(params))
        assert ("scan[" in program) == (tower is scanned)
        assert ("remat" in program) == (tower is scanned and remat)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)  # another program


@pytest.mark.parametrize("make, options", [(vit, VIT), (transformer, TEXT)])
def test_its_parameters_are_a_block_each(make, options):
    plain, _ = make(**options).init(jax.random.key(0))
    scanned, _ = make(**options, scan=True).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, plain, scanned)


def test_in_bfloat16_it_stays_in_bfloat16():
    for train in (False, True):
        plain, scanned = (
            vit(**VIT, dtype=jnp.bfloat16, scan=scan, drop_path=0.0)
            for scan in (False, True)
        )
        params = parameters(plain)
        run = [
            jax.jit(lambda p, x, t=tower, on=train: t.apply(p, {}, x, train=on)[0])
            for tower in (plain, scanned)
        ]
        a, b = (each(params, images()) for each in run)
        assert a.dtype == b.dtype == jnp.float32
        # Two programs that round at 1/256 in other places.
        np.testing.assert_allclose(a, b, atol=0.1 * np.abs(a).max())
    tower = vit(**VIT, dtype=jnp.bfloat16, scan=True, drop_path=0.5)
    key = jax.random.key(0)
    tower.apply(params, {}, images(), train=True, key=key)  # the carry's dtype holds


def test_every_block_of_a_loop_drops_its_own_branches_at_its_own_rate():
    """Rates 0, 1/4 and 1/2 of two branches each: 16 outcomes of one picture."""
    tower = vit(**VIT, drop_path=0.5, scan=True)
    params = parameters(tower)
    same = np.repeat(images(1), 4096, 0)
    run = jax.jit(lambda k: tower.apply(params, {}, same, train=True, key=k)[0])
    rounded = np.round(np.asarray(run(jax.random.key(0))), 3)
    _, counts = np.unique(rounded, axis=0, return_counts=True)
    both = itertools.product(*[(0.75, 0.25)] * 2, *[(0.5, 0.5)] * 2)
    expected = np.sort([np.prod(kept) for kept in both])
    # The standard deviation of a share of 4096 draws is at most 0.0055.
    np.testing.assert_allclose(np.sort(counts) / 4096, expected, atol=0.025)
    still = jax.jit(lambda: tower.apply(params, {}, same[:2])[0])()
    np.testing.assert_array_equal(*still)
