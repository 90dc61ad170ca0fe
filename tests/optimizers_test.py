"""LAMB, Lion and Adafactor; learning rates by depth, and by part."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from config_test import good, put, refusal
from optimizer_test import CONFIG, DECAYED, FLAT, GRADS, PARAMS, assert_close, two_steps

from unicl_jax import encoders
from unicl_jax.encoders import IMAGE_TOWERS, TEXT_TOWERS
from unicl_jax.errors import InputError
from unicl_jax.learning_rates import depths, factors
from unicl_jax.optimizer import decay_mask, make_optimizer

NEW = ("lamb", "lion", "adafactor")

# --- By hand, in float64.


def test_lamb_has_a_trust_ratio_for_what_is_decayed(x64):
    def by_hand(p, decayed, *grads):
        m = v = 0
        for t, g in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-6)
            step = step + 0.2 * decayed * p
            if decayed:
                step = step * np.sqrt((p**2).sum() / (step**2).sum())
            p = p - 0.5 * step
        return p

    want = jax.tree.map(by_hand, PARAMS, DECAYED, *GRADS)
    assert_close(two_steps(name="lamb"), want)


def test_lion_steps_by_the_sign(x64):
    def by_hand(p, decayed, *grads):
        m = 0
        for g in grads:
            p = p - 0.5 * (np.sign(0.9 * m + 0.1 * g) + 0.2 * decayed * p)
            m = 0.98 * m + 0.02 * g
        return p

    want = jax.tree.map(by_hand, PARAMS, DECAYED, *GRADS)
    assert_close(two_steps(name="lion"), want)


@pytest.mark.parametrize("b2", [0.1, 0.98])
def test_adafactor_of_small_arrays_keeps_all_squares(b2, x64):
    """1 - 2^-0.8 = 0.43 at the second step, if b2 does not cap it."""

    def by_hand(p, decayed, *grads):
        m = v = 0
        for t, g in enumerate(grads, 1):
            rate = min(1 - t**-0.8, b2)
            v = rate * v + (1 - rate) * (g**2 + 1e-30)
            m = 0.9 * m + 0.1 * g / np.sqrt(v)
            p = p - 0.5 * (m + 0.2 * decayed * p)
        return p

    want = jax.tree.map(by_hand, PARAMS, DECAYED, *GRADS)
    assert_close(two_steps(name="adafactor", b2=b2), want)


def test_adafactor_of_large_matrices_keeps_rows_and_columns(x64):
    rng = np.random.default_rng(0)
    params, grad = {"w": np.zeros((32, 48))}, {"w": rng.normal(size=(32, 48))}
    optimizer, _ = make_optimizer(
        {**CONFIG, **FLAT, "name": "adafactor", "b1": 0}, 10**9
    )
    state = optimizer.init(params)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.size > 1)
    assert sizes == [32, 48]
    update, _ = optimizer.update(grad, state, params)
    rows, columns = ((grad["w"] ** 2).mean(axis) for axis in (1, 0))
    v = rows[:, None] * columns[None] / rows.mean()
    assert_close(update["w"], -0.5 * grad["w"] / np.sqrt(v))


@pytest.mark.parametrize("name", NEW)
def test_it_learns(name):
    """Least squares of two linear maps, one behind the other."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    y = x @ rng.normal(size=(8, 4)).astype(np.float32)
    params = {
        "first": {"kernel": 0.3 * rng.normal(size=(8, 16)).astype(np.float32)},
        "second": {"kernel": 0.3 * rng.normal(size=(16, 4)).astype(np.float32)},
    }
    rate = {"learning_rate": 0.03, "final_learning_rate": 0.0, "weight_decay": 1e-4}
    optimizer, _ = make_optimizer({**CONFIG, **rate, "name": name}, 200)

    def loss(p):
        return ((x @ p["first"]["kernel"] @ p["second"]["kernel"] - y) ** 2).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(200):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.02 * values[0]


# --- The layer of every parameter.

SIZES = dict(
    swin=dict(embed_dim=8, depths=(1, 2), num_heads=(2, 2), absolute_positions=True),
    focalnet=dict(
        embed_dim=8, depths=(1, 2), focal_levels=(1, 1), focal_windows=(3, 3)
    ),
    klite_focal=dict(
        embed_dim=8, depths=(1, 2), focal_levels=(1, 1), focal_windows=(3, 3)
    ),
    resnet=dict(depths=(1, 2), width=4),
    vit=dict(width=8, num_layers=11, num_heads=2, patch_size=4),
    transformer=dict(vocab_size=32, width=8, num_layers=3, num_heads=2),
    bert=dict(vocab_size=32, width=8, num_layers=3, num_heads=2, hidden=8),
)
NAMED = {  # of these layers: 0, 1, L, L + 1
    "swin": "absolute_pos_embed layers_0_downsample layers_1_blocks_1 norm",
    "focalnet": "patch_embed layers_0_downsample layers_1_blocks_1 norm",
    "klite_focal": "patch_embed layers_0_blocks_0 layers_1_blocks_1 norm",
    "resnet": "conv1 layer1_0 layer2_1",
    "vit": "positional_embedding resblocks_0 resblocks_10 ln_post",
    "transformer": "token_embedding resblocks_0 resblocks_2 ln_final",
    "bert": "embeddings encoder_layer_0 encoder_layer_2",
}


@functools.cache
def names_of(which, name):
    tower = encoders.TOWERS[which][name]
    sizes = SIZES.get(name, {})
    if which == "image" and name in SIZES:
        sizes = dict(sizes, image_size=16)
    return jax.eval_shape(tower(**sizes).init, jax.random.key(0))[0]


@pytest.mark.parametrize("name", SIZES)
def test_every_towers_parameters_have_a_layer(name):
    which = "image" if name in IMAGE_TOWERS else "text"
    tower = names_of(which, name)
    layers = depths(tower, which)
    assert set(layers) == set(tower)
    blocks = [x for x in tower if re.search(r"layer.*\d$|blocks_\d+$", x)]
    # Stage and block, or block alone: the order of the numbers is that of the layers.
    number = {x: [int(n) for n in re.findall(r"\d+", x)] for x in blocks}
    in_order = sorted(blocks, key=number.get)
    assert [layers[x] for x in in_order] == list(range(1, len(blocks) + 1))
    got = [layers[x] for x in NAMED[name].split()]
    last = len(blocks)
    assert got == [0, 1, last, last + 1][: len(got)]


def test_no_tower_is_of_a_family_that_was_not_looked_at():
    for towers in (IMAGE_TOWERS, TEXT_TOWERS):
        families = {getattr(tower, "func", tower) for tower in towers.values()}
        assert families == {towers[name] for name in SIZES if name in towers}


def test_an_unknown_parameter_is_named():
    with pytest.raises(
        InputError, match='no rule for "text/adapter"; set opt.*text_la'
    ):
        depths({"resblocks_0": 0, "adapter": 0}, "text")


def test_a_parameters_step_shrinks_with_the_layers_behind_it(x64):
    image = ("patch_embed", "resblocks_0", "resblocks_1", "resblocks_2", "ln_post")
    ones = np.ones((2, 2))
    params = {
        "image": dict.fromkeys(image, {"kernel": ones}),
        "text": {"token_embedding": ones, "resblocks_0": {"kernel": ones}},
        "image_projection": ones,
        "logit_scale": np.ones(()),
    }
    rates = dict(image_layer_decay=0.5, multipliers={"text": 0.1, "image": 4.0})
    steps = []
    for more in ({}, rates):
        optimizer, _ = make_optimizer({**CONFIG, **FLAT, **more}, 10**9)
        state = optimizer.init(params)
        steps.append(jax.jit(optimizer.update)(params, state, params)[0])
    ratio = jax.tree.map(lambda a, b: float((a / b).mean()), steps[1], steps[0])
    got = [ratio["image"][name]["kernel"] for name in image]
    assert got == pytest.approx([4 * 0.5**n for n in (4, 3, 2, 1, 0)])
    assert jax.tree.leaves(ratio["text"]) == pytest.approx([0.1, 0.1])
    assert ratio["image_projection"] == ratio["logit_scale"] == 1


def test_the_state_is_that_of_older_runs_unless_rates_differ():
    params = jax.tree.map(jnp.asarray, PARAMS)
    plain, _ = make_optimizer(CONFIG, 110)
    neutral, _ = make_optimizer(
        {**CONFIG, "image_layer_decay": 1.0, "multipliers": {"text": 1.0}}, 110
    )
    trees = [jax.tree.structure(x.init(params)) for x in (plain, neutral)]
    assert trees[0] == trees[1]
    assert jax.tree.leaves(factors(params, {})) == [1.0] * 3
    assert jax.tree.leaves(decay_mask(params)).count(True) == 1


def test_factors_that_could_not_be_meant_are_refused():
    config = good()
    config.optimizer.image_layer_decay = 0.75
    config.optimizer.multipliers = {"text": 0.1, "objective": 2.0}
    assert "text" in config.optimizer.multipliers
    put(config, "optimizer.text_layer_decay", 1.5)
    assert "optimizer.text_layer_decay must be in (0, 1]" in refusal(config)
    put(config, "optimizer.text_layer_decay", 1.0)
    config.optimizer.multipliers = {"texts": 0.1}
    assert "got texts; choose from image, text," in refusal(config)
    config.optimizer.multipliers = {"text": 0.0}
    assert "multipliers.text must be above 0: got 0.0" in refusal(config)
    config.optimizer.multipliers = {}
    config.frozen, config.init_from = ("image",), "runs/first"
    assert "image_layer_decay must be 1 for a frozen tower" in refusal(config)
    config.optimizer.image_layer_decay = 1.0
    config.optimizer.multipliers = {"image": 0.5}
    assert "parts that learn: image is frozen" in refusal(config)
