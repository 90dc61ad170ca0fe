"""Blocks that are recomputed: the same numbers, less kept, more computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax import encoders
from unicl_jax.encoders import IMAGE_TOWERS, TEXT_TOWERS
from unicl_jax.errors import InputError

VIT = dict(width=8, num_layers=2, num_heads=2, patch_size=4)
FOCAL = dict(embed_dim=8, depths=(2,), focal_levels=(1,), focal_windows=(3,))
TEXT = dict(vocab_size=32, context_length=6, width=8, num_layers=2, num_heads=2)
TOWERS = {
    "swin": dict(embed_dim=8, depths=(2,), num_heads=(2,), window_size=2, patch_size=4),
    "vit": VIT,
    "vit, scan": VIT | dict(scan=True),
    "focalnet": FOCAL,
    "klite_focal": FOCAL,
    "resnet": dict(depths=(2,), width=4, stem="cifar"),
    "transformer": TEXT,
    "bert": TEXT | dict(hidden=16),
}


def gradient(name, remat, dtype=jnp.float32):
    """Of the mean square of features, by the parameters; and where to take it."""
    kind = name.split(",")[0]
    tower = {**IMAGE_TOWERS, **TEXT_TOWERS}[kind]
    size = dict(image_size=8) if kind in IMAGE_TOWERS else {}
    tower = tower(**size, **TOWERS[name], remat=remat, dtype=dtype)
    params, state = jax.eval_shape(tower.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 8, 8, 3)) if size else rng.integers(1, 31, (4, 6))

    def loss(params, state):
        key = jax.random.key(1)
        out, _ = tower.apply(params, state, x, train=True, key=key)
        return (out * jnp.arange(out.size).reshape(out.shape)).mean()

    def draw(x):
        return rng.normal(size=x.shape).astype(dtype) * 0.3

    return jax.grad(loss), jax.tree.map(draw, params), jax.tree.map(draw, state)


@pytest.mark.parametrize("name", TOWERS)
def test_a_policy_keeps_linear_maps_and_computes_the_rest_again(name):
    """Products of matrices in the backward pass, counted before any compiler."""
    counts = {}
    for remat in (False, "dots", True):
        grad, *at = gradient(name, remat)
        text = str(jax.make_jaxpr(grad)(*at))
        counts[remat] = len(re.findall(r"= dot_general\[", text))
    assert counts[False] < counts[True]
    attends = name not in ("focalnet", "klite_focal", "resnet")
    # Attention's products have batch dimensions: some are computed again.
    assert (counts[False] < counts["dots"]) == attends
    assert counts["dots"] < counts[True]


@pytest.mark.parametrize("name", ["vit", "vit, scan"])
def test_recomputed_gradients_are_the_same(name, x64):
    found = []
    for remat in (False, "dots", True):
        grad, *at = gradient(name, remat, jnp.float64)
        found.append(jax.jit(grad)(*at))
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            other,
            found[0],
        )
    assert min(float(abs(x).max()) for x in jax.tree.leaves(found[0])) > 1e-6


@pytest.mark.parametrize("remat", ["all", "True", 1, None])
def test_an_unknown_policy_is_refused(remat):
    config = dict(name="vit", image_size=8, **VIT, remat=remat)
    with pytest.raises(
        InputError, match='model.image.remat must be True, False or "dots"'
    ):
        encoders.one_tower("image", config)
    encoders.one_tower("image", config | dict(remat="dots"))
