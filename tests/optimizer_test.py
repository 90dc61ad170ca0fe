"""Schedules, what is decayed, and one step of each optimizer by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unicl_jax.encoders import make_two_tower, resnet, swin, transformer
from unicl_jax.errors import InputError
from unicl_jax.optimizer import (
    MUON_RMS,
    decay_mask,
    make_optimizer,
    make_schedule,
)

CONFIG = dict(
    name="adamw",
    learning_rate=0.5,
    final_learning_rate=0.1,
    warmup_steps=10,
    weight_decay=0.2,
    clip_norm=0.0,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    momentum=0.8,
)

# --- The mask.


def masks(image):
    """Parameter name -> (decayed, number of axes), of a model with that image tower."""
    text = transformer(
        vocab_size=32, context_length=6, width=16, num_heads=2, num_layers=1
    )
    model = make_two_tower(image, text, embed_dim=8)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    joined = jax.tree.map(lambda m, x: (m, x.ndim), decay_mask(params), params)
    leaves = jax.tree_util.tree_leaves_with_path(
        joined, is_leaf=lambda x: isinstance(x, tuple)
    )
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


SWIN = masks(
    swin(
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 4),
        image_size=16,
        window_size=2,
        absolute_positions=True,
    )
)
RESNET = masks(resnet(depths=(1,), width=4, stem="cifar", image_size=8))


@pytest.mark.parametrize("mask", [SWIN, RESNET], ids=["swin", "resnet"])
def test_vectors_and_scalars_are_not_decayed(mask):
    few = {name: decayed for name, (decayed, ndim) in mask.items() if ndim < 2}
    assert len(few) > 10 and not any(few.values())
    assert any(name.endswith("/scale") for name in few)
    assert any(name.endswith("/bias") for name in few)
    assert "logit_scale" in few


def test_position_tables_are_not_decayed():
    tables = [n for n in SWIN if n.endswith("relative_position_bias_table")]
    assert len(tables) == 3
    places = "text/positional_embedding", "image/absolute_pos_embed"
    for name in (*tables, *places):
        decayed, ndim = SWIN[name]
        assert ndim > 1 and not decayed


@pytest.mark.parametrize("mask", [SWIN, RESNET], ids=["swin", "resnet"])
def test_all_else_is_decayed(mask):
    decayed = {name for name, (is_decayed, _) in mask.items() if is_decayed}
    assert {
        "image_projection",
        "text_projection",
        "text/token_embedding/embedding",
        "text/resblocks_0/attn_in_proj/kernel",
    } <= decayed
    kernels = {name for name in mask if name.endswith("/kernel")}
    assert len(kernels) > 6 and kernels <= decayed
    assert len(decayed) == len(kernels) + 3


# --- The schedule.


def test_the_schedule_warms_up_and_falls_by_half_a_cosine():
    schedule = make_schedule(CONFIG, 110)
    # lr(t) = end + (peak - end) (1 + cos(pi (t - warmup) / (total - warmup))) / 2
    want = {
        0: 0,
        5: 0.25,
        10: 0.5,
        35: 0.1 + 0.4 * (1 + np.cos(np.pi / 4)) / 2,
        60: 0.3,
        110: 0.1,
        500: 0.1,
    }
    for step, rate in want.items():
        # optax computes it in float32, which rounds at 6e-8.
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


def test_without_warm_up_the_schedule_starts_at_its_peak():
    schedule = make_schedule({**CONFIG, "warmup_steps": 0}, 100)
    assert float(schedule(0)) == pytest.approx(0.5)
    assert float(schedule(50)) == pytest.approx(0.3, abs=1e-6)


# --- One step and the next, by hand, in float64.

PARAMS = {
    "dense": {"kernel": np.array([[1.0, -2.0]]), "bias": np.array([0.5])},
    "logit_scale": np.array(1.0),
}
GRADS = [
    {"dense": {"kernel": np.array([[0.3, -0.1]]), "bias": np.array([2.0])},
     "logit_scale": np.array(-4.0)},
    {"dense": {"kernel": np.array([[-0.2, 0.4]]), "bias": np.array([1.0])},
     "logit_scale": np.array(0.0)},
]  # fmt: skip
DECAYED = {"dense": {"kernel": 1.0, "bias": 0.0}, "logit_scale": 0.0}
# Warm-up is over at once, and 10^9 steps later the cosine has not moved.
FLAT = dict(warmup_steps=0, learning_rate=0.5, final_learning_rate=0.5)


def two_steps(**change):
    optimizer, _ = make_optimizer({**CONFIG, **FLAT, **change}, 10**9)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for grads in GRADS:
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(got, want):
    # The learning rate is a float32 number in both: 0.5, exactly.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), got, want
    )


def clipped(grads, norm):
    length = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * min(1, norm / length), grads)


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_adamw_is_the_textbooks_with_decoupled_decay(clip_norm, x64):
    def by_hand(p, decayed, *grads):
        m = v = 0
        for t, g in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
            direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-6)
            p = p - 0.5 * (direction + 0.2 * decayed * p)
        return p

    grads = [clipped(g, clip_norm) if clip_norm else g for g in GRADS]
    want = jax.tree.map(by_hand, PARAMS, DECAYED, *grads)
    assert_close(two_steps(clip_norm=clip_norm), want)


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_sgd_has_nesterov_momentum_and_decay_in_the_gradient(clip_norm, x64):
    def by_hand(p, decayed, *grads):
        m = 0
        for g in grads:
            g = g + 0.2 * decayed * p
            m = 0.8 * m + g
            p = p - 0.5 * (g + 0.8 * m)
        return p

    grads = [clipped(g, clip_norm) if clip_norm else g for g in GRADS]
    want = jax.tree.map(by_hand, PARAMS, DECAYED, *grads)
    assert_close(two_steps(name="sgd", clip_norm=clip_norm), want)


def test_a_gradient_within_the_norm_is_not_clipped(x64):
    assert_close(two_steps(name="sgd", clip_norm=100.0), two_steps(name="sgd"))


def test_the_learning_rate_follows_the_schedule_it_reports(x64):
    optimizer, schedule = make_optimizer({**CONFIG, "name": "sgd", "momentum": 0}, 110)
    params = {"w": jnp.ones(1)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(15):
        updates, state = update({"w": jnp.ones(1)}, state, params)
        np.testing.assert_allclose(updates["w"][0], -schedule(step), rtol=1e-6)


def test_an_unknown_optimizer_lists_the_choices():
    with pytest.raises(InputError, match='optimizer.name.*"adam".*adamw.*sgd'):
        make_optimizer({**CONFIG, "name": "adam"}, 110)


# --- Muon.


def muon_step(**change):
    """One step on a tower's linear map, a vector, and the maps that face the data."""
    rng = np.random.default_rng(0)
    params = {
        "image": {
            "patch_embed": {"proj": {"kernel": rng.normal(size=(12, 8))}},
            "mlp": {"kernel": rng.normal(size=(8, 24)), "bias": rng.normal(size=24)},
        },
        "image_projection": rng.normal(size=(8, 4)),
    }
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    optimizer, _ = make_optimizer({**CONFIG, **FLAT, **change}, 10**9)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return updates


def test_muon_orthogonalises_linear_maps_to_a_step_of_adams_size(x64):
    update = muon_step(name="muon", weight_decay=0.0)["image"]["mlp"]["kernel"]
    sizes = np.linalg.svd(update, compute_uv=False)
    # Five Newton-Schulz steps bring singular values to 0.7..1.2 of one another's size.
    assert sizes.max() < 2 * sizes.min()
    rms = np.sqrt((update**2).mean())
    assert rms == pytest.approx(0.5 * MUON_RMS, rel=0.2)


def test_muon_leaves_all_else_to_adamw(x64):
    muon, adamw = muon_step(name="muon"), muon_step()
    muon["image"]["mlp"].pop("kernel"), adamw["image"]["mlp"].pop("kernel")
    assert_close(muon, adamw)
