"""The two forms of a depthwise convolution, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax.encoders import depthwise
from unicl_jax.encoders.depthwise import depthwise_convolution


def arrays(side, dtype, shape=(2, 6, 5, 3)):
    rng = np.random.default_rng(side)
    x, cotangent = rng.normal(size=(2, *shape)).astype(dtype)
    return x, rng.normal(size=(side, side, 1, shape[-1])).astype(dtype), cotangent


def both(convolution, x, kernel, cotangent):
    out, pull = jax.vjp(convolution, x, kernel)
    return out, pull(cotangent)


@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_both_forms_are_one_convolution(side, x64):
    """The kernel of side 7 reaches over these images' edges on all sides."""
    given = arrays(side, np.float64)
    ours = jax.jit(lambda *a: both(depthwise_convolution, *a))(*given)
    shifted = (
        depthwise._shifted(*given[:2]),
        depthwise._shifted_gradients(*given),
    )
    grouped = jax.jit(lambda *a: both(depthwise._grouped, *a))(*given)
    for found in (ours, shifted):
        for a, b in zip(*map(jax.tree.leaves, (found, grouped)), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_on_other_devices_it_is_the_grouped_convolution():
    """Lowered for each: no accelerator is needed to look at the program."""
    given = arrays(3, np.float32)[:2]
    for platform, is_grouped in (("cpu", False), ("cuda", True), ("tpu", True)):
        program = jax.jit(depthwise_convolution).trace(*given)
        text = program.lower(lowering_platforms=(platform,)).as_text()
        assert ("feature_group_count = 3" in text) == is_grouped


def test_in_bfloat16_sums_are_taken_in_float32():
    x, kernel, cotangent = arrays(7, np.float32)
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x, kernel, cotangent)]
    want = both(depthwise_convolution, *(np.asarray(a, np.float32) for a in low))
    got = both(depthwise_convolution, *low)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == jnp.bfloat16
        # One rounding at the end: half of 2^-8 of the number.
        np.testing.assert_allclose(np.float32(a), b, rtol=2**-8, atol=1e-6)
