"""The towers: the official model's numbers, and the laws of each part.

`golden/unicl_tiny` was made by the official PyTorch code; see its README.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax.encoders import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    bert,
    from_config,
    make_two_tower,
    one_tower,
    resnet,
    swin,
    transformer,
    unit,
    vit,
)
from unicl_jax.encoders.layers import DropPath
from unicl_jax.encoders.weights import from_arrays
from unicl_jax.encoders.weights.layout import split_tree
from unicl_jax.encoders.weights.unicl import UNICL
from unicl_jax.errors import InputError
from unicl_jax.losses import NO_LABEL, unicl_loss

# Float32 rounds at 6e-8 and the order of sums is XLA's own: between two ways to write
# one computation, features of size 1 differ by a few of those.
ROUNDING = dict(rtol=1e-5, atol=1e-6)

# --- The official model's numbers.


def tiny_towers(dtype=jnp.float32, **text_options):
    """The architecture of `golden/unicl_tiny`."""
    image = swin(
        embed_dim=24,
        depths=(2, 2, 2, 1),
        num_heads=(3, 6, 12, 24),
        image_size=64,
        window_size=4,
        dtype=dtype,
    )
    text = transformer(
        vocab_size=512,
        context_length=16,
        width=64,
        num_heads=4,
        num_layers=2,
        dtype=dtype,
        **text_options,
    )
    return image, text


def tiny_model(dtype=jnp.float32):
    return make_two_tower(*tiny_towers(dtype), embed_dim=32)


def parameters(golden, dtype):
    arrays = golden("unicl_tiny/state_dict.npz")
    found = from_arrays(arrays, text={"num_heads": 4})  # 64 wide: not the usual one
    return jax.tree.map(lambda x: x.astype(dtype), found.params)


def inputs(arrays, dtype):
    images = arrays["images"].transpose(0, 2, 3, 1).astype(dtype)
    return images, arrays["input_ids"].astype(np.int32)


STATE = {"image": {}, "text": {}}


def embed(model, params, images, tokens):
    """Both embeddings and the logits, as one compiled function."""

    @jax.jit
    def run(params, images, tokens):
        u, _ = model.encode_image(params, STATE, images)
        v, _ = model.encode_text(params, STATE, tokens)
        return u, v, model.logit_scale(params) * jnp.matmul(u, v.T, precision="highest")

    return run(params, images, tokens)


@pytest.fixture(scope="module")
def official(golden):
    return golden("unicl_tiny/io.npz")


@pytest.fixture(scope="module")
def float32_run(official, golden):
    params = parameters(golden, np.float32)
    return embed(tiny_model(), params, *inputs(official, np.float32))


@pytest.fixture(scope="module")
def float64_run(official, golden):
    """Loss and gradients, and what the same function gives after a step of SGD."""
    with jax.enable_x64(True):
        model, params = tiny_model(jnp.float64), parameters(golden, np.float64)
        images, tokens = inputs(official, np.float64)
        # The golden ids are those that TargetM hands out: captions have fresh ones.
        labels = np.where(official["y"] == 0, NO_LABEL, official["label_ids"])

        @jax.jit
        def run(params):
            def loss(params):
                u, _ = model.encode_image(params, STATE, images)
                v, _ = model.encode_text(params, STATE, tokens)
                scale = model.logit_scale(params)
                logits = scale * u @ v.T
                return unicl_loss(u, v, labels, scale).mean(), (u, v, logits)

            (value, outputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return value, outputs, grads

        value, outputs, grads = run(params)
        grads = jax.tree.map(np.asarray, grads)
        stepped = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        return jax.tree.map(np.asarray, (value, outputs, grads, run(stepped)[0]))


def test_float32_features_and_logits_are_the_official_ones(official, float32_run):
    u, v, logits = float32_run
    # The official code's own float32 is 3e-7 from its float64 on features, 1.1e-6 on
    # logits; the nearest mistake (a wrong text epsilon) moves features by 1.5e-6.
    for got, name in ((u, "image_features"), (v, "text_features")):
        assert np.abs(got - official[name]).max() < 2e-6
        assert np.abs(got - official[f"{name}_f64"]).max() < 1e-6
    assert np.abs(logits - official["logits"]).max() < 5e-6


def test_float64_features_and_logits_are_the_official_ones(official, float64_run):
    u, v, logits = float64_run[1]
    for got, name in ((u, "image_features"), (v, "text_features"), (logits, "logits")):
        # Two float64 programs; an independent one agrees with the golden to 5e-15.
        assert np.abs(got - official[f"{name}_f64"]).max() < 1e-10


def test_the_loss_and_the_loss_after_a_step_are_the_official_ones(
    official, float64_run
):
    assert abs(float64_run[0] - official["loss"]) < 1e-10
    # The step used our gradients, so it sees every one of them.
    assert abs(float64_run[3] - official["loss_after_sgd_step_lr0.05"]) < 1e-10


def test_all_gradient_norms_are_the_official_ones(official, float64_run):
    norms = dict(zip(official["grad_keys"], official["grad_l2"], strict=True))
    grads = split_tree(UNICL, {"params": float64_run[2], "state": {}})
    assert set(norms) == set(grads) and len(norms) == 137
    for name, norm in norms.items():
        # Keys' biases have gradient 0 but for round-off: hence the absolute part.
        np.testing.assert_allclose(
            np.linalg.norm(grads[name]), norm, rtol=1e-8, atol=1e-12, err_msg=name
        )


def test_whole_gradients_are_the_official_ones(official, float64_run):
    kept = {k[5:]: v for k, v in official.items() if k.startswith("grad/")}
    assert len(kept) == 10
    grads = split_tree(UNICL, {"params": float64_run[2], "state": {}})
    for name, want in kept.items():
        # Stored as float32, which rounds at 6e-8 of each number.
        np.testing.assert_allclose(
            grads[name], want, rtol=1e-6, atol=1e-9, err_msg=name
        )


def intermediates(tower, params, x):
    """Name of a part -> its output, as rows of tokens."""

    @jax.jit
    def run(params, x):
        outputs = {}

        def keep(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if len(context.module.path) == 1 and context.method_name == "__call__":
                outputs[context.module.path[0]] = output
            return output

        with nn.intercept_methods(keep):
            tower.apply(params, {}, x)
        return outputs

    parts = run(params, x)
    return {k: v.reshape(len(v), -1, v.shape[-1]) for k, v in parts.items()}


def assert_parts(got, official, names):
    for ours, theirs in names.items():
        want = official[f"inter/{theirs}"]
        assert got[ours].shape == want.shape
        # Both are float32 programs: relative to the part's largest number, a few
        # roundings of 6e-8 a layer.
        error = np.abs(got[ours] - want).max() / np.abs(want).max()
        assert error < 3e-6, (ours, error)


def test_every_stage_of_the_image_tower_is_the_official_one(official, golden):
    params = parameters(golden, np.float32)["image"]
    images, _ = inputs(official, np.float32)
    names = {
        "patch_embed": "patch_embed",
        "norm": "image_norm",
        **{f"layers_{s}_downsample": f"layer{s}_out" for s in range(3)},
        **{
            f"layers_{s}_blocks_{b}": f"layer{s}_block{b}"
            for s, depth in enumerate((2, 2, 2, 1))
            for b in range(depth)
        },
    }
    assert_parts(intermediates(tiny_towers()[0], params, images[:2]), official, names)


def test_every_block_of_the_text_tower_is_the_official_one(official, golden):
    params = parameters(golden, np.float32)["text"]
    _, tokens = inputs(official, np.float32)
    names = {f"resblocks_{i}": f"text_block{i}" for i in range(2)}
    assert_parts(intermediates(tiny_towers()[1], params, tokens[:2]), official, names)


def test_zero_shot_classes_and_logits_are_the_official_ones(
    official, float32_run, golden
):
    model, params = tiny_model(), parameters(golden, np.float32)
    ids = official["zs_input_ids"].astype(np.int32)
    encode = jax.jit(lambda tokens: model.encode_text(params, STATE, tokens)[0])
    texts = encode(ids.reshape(-1, 16)).reshape(5, 4, 32)
    classes = unit(texts.mean(1))
    assert np.abs(classes - official["zs_class_embeddings"]).max() < 2e-6  # float32
    logits = (
        np.exp(np.float32(1.3)) * np.asarray(float32_run[0]) @ np.asarray(classes).T
    )
    assert np.abs(logits - official["zs_logits"]).max() < 5e-6  # a scale of 3.7 more


# --- Text.


@pytest.fixture(scope="module")
def text_tower(golden):
    """A function of (params, tokens) to features, and the parameters."""
    _, tower = tiny_towers()
    params = parameters(golden, np.float32)["text"]
    return lambda params, tokens: tower.apply(params, {}, tokens)[0], params


def test_padding_with_zeros_is_padding_with_end_of_text(text_tower, official):
    apply, params = text_tower
    apply = jax.jit(apply)
    zeros = official["input_ids_zero_pad"].astype(np.int32)
    eot = official["input_ids"].astype(np.int32)
    assert (zeros != eot).any()
    # Nothing is rounded differently: what follows the first EOT is multiplied by 0.
    np.testing.assert_array_equal(apply(params, zeros), apply(params, eot))


def test_slots_after_the_last_end_of_text_change_nothing(text_tower, official):
    apply, params = text_tower
    tokens = official["input_ids"][[1, 2, 3, 5]].astype(np.int32)
    last = (tokens == 511).argmax(1).max()

    def weighted_sum(params, tokens):
        features = apply(params, tokens)
        return (features * jnp.cos(jnp.arange(64.0))).sum(), features

    run = jax.jit(jax.value_and_grad(weighted_sum, has_aux=True))
    (_, features), grads = run(params, tokens)
    (_, cut_features), cut_grads = run(params, tokens[:, : last + 1])
    np.testing.assert_allclose(cut_features, features, **ROUNDING)
    for got, want in zip(
        jax.tree.leaves(cut_grads), jax.tree.leaves(grads), strict=True
    ):
        # Sums over fewer exact zeros come in another order: rounding of the largest.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_a_text_sees_itself_and_nothing_behind_its_end(text_tower, official):
    """The derivative for a position tells whether the features depend on it.

    A leak through the causal mask, or pooling at another position, would give the slots
    behind end-of-text a derivative; a feature that does not depend on the text (pooling
    at position 0) would give the slots before it none.
    """
    apply, params = text_tower

    @jax.jit
    def sensitivity(tokens):
        def total(position):
            features = apply({**params, "positional_embedding": position}, tokens)
            return (features * jnp.cos(jnp.arange(64.0))).sum()

        return jnp.abs(jax.grad(total)(params["positional_embedding"])).max(1)

    for row in (1, 2, 5):
        tokens = official["input_ids"][row : row + 1].astype(np.int32)
        end = (tokens == 511).argmax()
        assert (sensitivity(tokens)[: end + 1] > 1e-4).all()
        assert not np.any(sensitivity(tokens)[end + 1 :])


def test_the_non_causal_mode_is_the_official_one(official, golden):
    _, tower = tiny_towers(causal=False)
    params = parameters(golden, np.float32)

    @jax.jit
    def run(tokens):
        features, _ = tower.apply(params["text"], {}, tokens)
        return unit(
            jnp.matmul(features, params["text_projection"], precision="highest")
        )

    for name, pad in (("input_ids_zero_pad", "zero"), ("input_ids", "eot")):
        got = run(official[name].astype(np.int32))
        # As for the causal mode; only float32 was kept of the official features.
        want = official[f"text_noncausal_features_{pad}_pad"]
        assert np.abs(got - want).max() < 2e-6
    zero_pad = official["text_noncausal_features_zero_pad"]
    assert np.abs(zero_pad - want).max() > 0.01  # padding with EOT is seen


def test_zeros_are_padding_for_the_non_causal_mode_alone(official, golden):
    params = parameters(golden, np.float32)["text"]
    tokens = official["input_ids_zero_pad"][1:3].astype(np.int32)  # ends at 10 and 4
    tokens[:, 2] = 0  # "!", inside a text
    moved = params["positional_embedding"].copy()
    moved[2] += np.cos(np.arange(64))
    for causal in (True, False):
        _, tower = tiny_towers(causal=causal)
        apply = jax.jit(lambda params, x, tower=tower: tower.apply(params, {}, x)[0])
        features = apply(params, tokens)
        np.testing.assert_allclose(apply(params, tokens[:, :11]), features, **ROUNDING)
        # A masked key: what lies at its position is not seen.
        shifted = apply({**params, "positional_embedding": moved}, tokens)
        difference = np.abs(shifted - features).max()
        assert difference > 0.01 if causal else difference < 1e-5  # float32
    # A row of zeros alone has no meaning, but no NaN either.
    assert np.isfinite(apply(params, np.zeros((1, 16), np.int32))).all()


def test_the_activation_and_eps_reach_the_text_tower(official, golden):
    params = parameters(golden, np.float32)["text"]
    tokens = official["input_ids"].astype(np.int32)

    def run(**options):
        _, tower = tiny_towers(**options)
        return jax.jit(tower.apply)(params, {}, tokens)[0]

    # The golden README's sizes of these mistakes, here before the projection.
    assert np.abs(run(activation="gelu") - run()).max() > 1e-3
    assert 1e-6 < np.abs(run(eps=1e-5) - run()).max() < 1e-3


# --- Sizes.


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "image", "total"),
    [("swin_tiny", 27_519_354, 91_340_667), ("swin_base", 86_743_224, 150_695_609)],
)
def test_swin_models_have_the_released_number_of_parameters(name, image, total):
    model = make_two_tower(IMAGE_TOWERS[name](), TEXT_TOWERS["transformer"]())
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert count(params["image"]) == image
    assert count(params["text"]) == 63_165_952
    assert count(params) == total


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet50", 23_508_032), ("resnet101", 42_500_160)]
)
def test_resnets_have_torchvisions_number_of_parameters_without_head(name, expected):
    params, state = jax.eval_shape(IMAGE_TOWERS[name]().init, jax.random.key(0))
    assert count(params) == expected
    # A running mean and variance for every scale and bias.
    assert count(state) == sum(
        x.size for x in jax.tree.leaves(params) if len(x.shape) == 1
    )


# --- Small towers for the laws.

SMALL_SWIN = dict(
    embed_dim=8, depths=(2, 1), num_heads=(2, 4), image_size=16, window_size=2
)
SMALL_VIT = dict(patch_size=4, width=12, num_layers=2, num_heads=2, image_size=16)
SMALL_RESNET = dict(depths=(1, 1), width=4, stem="cifar", image_size=8)
SMALL_TEXT = dict(vocab_size=32, context_length=6, width=16, num_heads=2, num_layers=1)


SMALL_BERT = SMALL_TEXT | dict(hidden=24)


def small_images(size, batch=4):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype("f4")


def small_tokens(batch=4):
    tokens = np.random.default_rng(1).integers(1, 30, (batch, 6), dtype=np.int32)
    tokens[:, -1] = 31
    return tokens


SMALL = {
    "swin": (lambda **options: swin(**SMALL_SWIN, **options), small_images(16)),
    "vit": (lambda **options: vit(**SMALL_VIT, **options), small_images(16)),
    "resnet": (lambda **options: resnet(**SMALL_RESNET, **options), small_images(8)),
    "transformer": (
        lambda **options: transformer(**SMALL_TEXT, **options),
        small_tokens(),
    ),
    "bert": (lambda **options: bert(**SMALL_BERT, **options), small_tokens()),
}


def start(tower, seed=0):
    """Parameters and state as NumPy draws them: compiling `init` takes seconds.

    Larger than those of a new tower, so that features differ and no branch is 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        values = rng.normal(scale=0.3, size=x.shape)
        name = path[-1].key
        if name == "var":
            values = np.abs(values)
        return (values + (name in ("scale", "var"))).astype(x.dtype)

    shapes = jax.eval_shape(tower.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def small(name):
    """A small tower, compiled, with its parameters, inputs and features."""
    make, x = SMALL[name]
    tower = make()
    params, state = start(tower)
    compiled = jax.jit(tower.apply)  # parameters as arguments: constants are folded

    def apply(x):
        return compiled(params, state, x)[0]

    return apply, params, state, x, apply(x)


@pytest.mark.parametrize("name", SMALL)
def test_permuting_the_batch_permutes_the_features(name):
    apply, _, _, x, features = small(name)
    order = np.array([2, 0, 3, 1])
    assert np.abs(features[0] - features[1]).max() > 0.1
    np.testing.assert_allclose(apply(x[order]), features[order], **ROUNDING)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_towers_give_unit_float32_embeddings_near_the_float32_ones(name):
    _, params, state, x, features = small(name)
    tower = SMALL[name][0](dtype=jnp.bfloat16)
    model = make_two_tower(tower, tower, embed_dim=8)
    own, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    projection = np.random.default_rng(3).normal(size=(tower.width, 8)).astype("f4")
    params = {"image": params, "image_projection": projection}
    low, _ = jax.jit(model.encode_image)(params, {"image": state}, x)
    assert low.dtype == jnp.float32
    # The norm is taken in float32, after bfloat16 is left behind.
    np.testing.assert_allclose(jnp.linalg.norm(low, axis=1), 1, atol=1e-6)
    # bfloat16 rounds at 1/256; unit rows are of such a size and a dozen layers add up.
    difference = np.abs(low - unit(features @ projection)).max()
    assert 1e-4 < difference < 0.05


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (
            functools.partial(
                swin,
                **SMALL_SWIN | dict(depths=(2,), num_heads=(2,), drop_path=0.5),
            ),
            small_images(16),
        ),
        (functools.partial(vit, **SMALL_VIT, drop_path=0.5), small_images(16)),
        (functools.partial(transformer, **SMALL_TEXT), small_tokens()),
        (functools.partial(bert, **SMALL_BERT), small_tokens()),
        (functools.partial(resnet, depths=(1, 1), width=4), small_images(32)),
    ],
    ids=["swin", "vit", "transformer", "bert", "resnet"],
)
def test_recomputing_blocks_changes_neither_features_nor_gradients(make, x):
    params, state = start(make())

    def run(remat):
        tower = make(remat=remat)

        def total(params, key):
            out, new = tower.apply(params, state, x, train=True, key=key)
            return (out * jnp.cos(jnp.arange(tower.width))).sum(), (out, new)

        return jax.jit(jax.grad(total, has_aux=True))(params, jax.random.key(5))

    for a, b in zip(*map(jax.tree.leaves, (run(True), run(False))), strict=True):
        # The same sums in another order: float32 rounding of the largest.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("absolute_positions", [False, True])
def test_absolute_positions_tell_one_window_from_another(absolute_positions):
    """In a block without shift nothing else does, and the mean has no order."""
    options = SMALL_SWIN | dict(depths=(1,), num_heads=(2,))
    tower = swin(**options, absolute_positions=absolute_positions)
    params, state = start(tower)
    x = small_images(16)
    apply = jax.jit(tower.apply)
    features, _ = apply(params, state, x)
    swapped, _ = apply(params, state, np.roll(x, 8, 2))  # left half and right half
    difference = np.abs(swapped - features).max()
    assert difference > 0.1 if absolute_positions else difference < 1e-5  # float32


# --- Drop path.


def drop(rate, x, key, train=True):
    return DropPath(rate).apply({}, x, train, rngs={"drop_path": key})


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    x = jnp.ones((4096, 3))
    dropped = np.asarray(drop(0.25, x, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert (dropped.min(1) == dropped.max(1)).all()
    # The mean of 4,096 draws of 4/3 with probability 3/4 has a spread of 0.009.
    assert abs(dropped.mean() - 1) < 0.04
    np.testing.assert_array_equal(drop(0.25, x, jax.random.key(0), train=False), x)


def program(tower, x, **options):
    """What a tower computes, as text; equal programs give equal bits."""
    params, state = jax.eval_shape(tower.init, jax.random.key(0))
    apply = functools.partial(tower.apply, **options)
    return str(jax.make_jaxpr(apply)(params, state, x))


@pytest.mark.parametrize(
    "make",
    [functools.partial(swin, **SMALL_SWIN), functools.partial(vit, **SMALL_VIT)],
    ids=["swin", "vit"],
)
def test_drop_path_is_for_training_at_a_rate_above_zero(make):
    x, key = small_images(16), jax.random.key(0)
    plain, dropping = make(), make(drop_path=0.5)
    evaluating = program(plain, x)
    assert program(plain, x, train=True, key=key) == evaluating
    assert program(dropping, x) == evaluating
    assert program(dropping, x, train=True, key=key) != evaluating


def test_the_first_block_is_never_dropped():
    """Rates rise from exactly 0, so a tower of one block has none."""
    options = SMALL_SWIN | dict(depths=(1,), num_heads=(2,), drop_path=0.9)
    tower, x = swin(**options), small_images(16)
    training = program(tower, x, train=True, key=jax.random.key(0))
    assert training == program(tower, x)


def test_drop_path_draws_by_key_for_each_sample():
    tower = swin(**SMALL_SWIN | dict(depths=(2,), num_heads=(2,), drop_path=0.5))
    params, _ = start(tower)
    x = np.repeat(small_images(16, 1), 16, 0)  # one picture: rows differ by draws alone
    apply = jax.jit(lambda p, key: tower.apply(p, {}, x, train=True, key=key)[0])
    first, again, other = (apply(params, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    # Two branches, dropped or not: at most four kinds of rows, more than one of them.
    assert 1 < len(np.unique(np.round(first, 3), axis=0)) <= 4


# --- Batch norm.


def test_only_training_moves_the_running_statistics():
    tower = resnet(**SMALL_RESNET)
    params, state = start(tower)
    x = small_images(8)
    _, evaluated = tower.apply(params, state, x)
    jax.tree.map(np.testing.assert_array_equal, evaluated, state)
    _, trained = jax.jit(functools.partial(tower.apply, train=True))(params, state, x)
    first = jax.lax.conv_general_dilated(
        x,
        params["conv1"]["kernel"],
        (1, 1),  # the CIFAR stem keeps the resolution
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    got, old = trained["batch_stats"]["bn1"], state["batch_stats"]["bn1"]
    want = 0.9 * old["mean"] + 0.1 * first.mean((0, 1, 2))  # PyTorch's momentum 0.1
    np.testing.assert_allclose(got["mean"], want, **ROUNDING)
    want = 0.9 * old["var"] + 0.1 * first.var((0, 1, 2))
    np.testing.assert_allclose(got["var"], want, **ROUNDING)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, trained, state)
    assert all(jax.tree.leaves(moved))


def test_batch_norm_takes_its_statistics_over_all_devices(make_mesh):
    tower = resnet(**SMALL_RESNET)
    params, state = start(tower)
    x = small_images(8, batch=8) * np.arange(1, 9)[:, None, None, None].astype("f4")
    apply = jax.jit(functools.partial(tower.apply, train=True))
    rows = NamedSharding(make_mesh(8), PartitionSpec("data"))
    got, want = apply(params, state, jax.device_put(x, rows)), apply(params, state, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want
    )


def test_the_stems_start_at_full_and_at_quarter_resolution():
    # One stage: its blocks' 4 x 4 channels are at the stem's resolution.
    for stem, size in (("cifar", 32), ("imagenet", 8)):
        tower = resnet(depths=(1,), width=4, stem=stem, image_size=32)
        params, state = jax.eval_shape(tower.init, jax.random.key(0))
        text = str(
            jax.make_jaxpr(tower.apply)(params, state, jnp.zeros((1, 32, 32, 3)))
        )
        assert f"f32[1,{size},{size},16]" in text
        assert params["conv1"]["kernel"].shape[:2] == ((3, 3) if size == 32 else (7, 7))


# --- The joint space.


def test_unit_rows_have_norm_1_and_zero_stays_zero_without_gradient():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("f4") * 100
    x[1] = 0
    rows, pullback = jax.vjp(unit, x)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(rows[0], x[0] / np.linalg.norm(x[0]), atol=1e-6)
    (dx,) = pullback(jnp.ones((3, 5)))
    assert not np.any(dx[1])
    # Along x itself nothing changes.
    np.testing.assert_allclose((dx * x).sum(1), 0, atol=1e-5)
    assert unit(jnp.ones((1, 4), jnp.bfloat16)).dtype == jnp.float32


def test_logit_scale_is_the_exponential_and_stops_at_its_cap():
    towers = transformer(**SMALL_TEXT), transformer(**SMALL_TEXT)
    free = make_two_tower(*towers, embed_dim=8, logit_scale_init=1.0)
    capped = make_two_tower(*towers, embed_dim=8, logit_scale_max=np.log(100))
    params, _ = jax.jit(free.init)(jax.random.key(0))
    assert float(free.logit_scale(params)) == pytest.approx(np.e)  # the paper's start
    high = {"logit_scale": jnp.float32(6)}
    assert float(free.logit_scale(high)) == pytest.approx(np.exp(6), rel=1e-6)
    assert float(capped.logit_scale(high)) == pytest.approx(100, rel=1e-6)
    assert not jax.grad(capped.logit_scale)(high)["logit_scale"]


# --- Wrong options.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depths=(2, 1, 1)), "depths and num_heads"),
        (dict(image_size=18), "image_size must be divisible by patch_size.*18"),
        (dict(num_heads=(3, 4)), r"num_heads\[0\].*8 channels.*3"),
        (dict(window_size=3), "window_size must divide stage 0's resolution 4.*3"),
        (dict(image_size=12, window_size=3), "stage 0's resolution must be even.*3"),
    ],
)
def test_swin_sizes_that_do_not_fit_are_told(change, message):
    with pytest.raises(InputError, match=message):
        swin(**{**SMALL_SWIN, **change})


def test_heads_that_do_not_divide_the_width_are_told():
    with pytest.raises(InputError, match="num_heads must divide.*16.*3"):
        transformer(**{**SMALL_TEXT, "num_heads": 3})


def test_an_unknown_activation_is_told():
    with pytest.raises(InputError, match="activation.*quick_glu.*gelu, quick_gelu"):
        transformer(**SMALL_TEXT, activation="quick_glu")


def test_an_unknown_stem_is_told():
    with pytest.raises(InputError, match="stem.*cifar, imagenet"):
        resnet(depths=(1,), stem="cifer")


CONFIG = dict(
    image=dict(name="swin", **SMALL_SWIN),
    text=dict(name="transformer", **SMALL_TEXT),
    embed_dim=8,
    logit_scale_init=1.0,
    logit_scale_max=None,
    dtype="float32",
)


def test_from_config_builds_the_model_it_describes():
    model = from_config(CONFIG)
    by_hand = make_two_tower(swin(**SMALL_SWIN), transformer(**SMALL_TEXT), embed_dim=8)
    key = jax.random.key(0)
    assert jax.eval_shape(model.init, key) == jax.eval_shape(by_hand.init, key)
    low = from_config({**CONFIG, "dtype": "bfloat16"})
    jaxpr = str(
        jax.make_jaxpr(low.encode_image)(
            *jax.eval_shape(low.init, key), small_images(16)
        )
    )
    assert "bf16[" in jaxpr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict(image={"name": "swin_tinny"}),
            ["model.image.name", '"swin_tiny"', "resnet50"],
        ),
        (dict(text={"name": "t5"}), ["model.text.name", '"t5"', "bert, transformer"]),
        (
            dict(text=dict(name="transformer", widht=8)),
            ["model.text", '"widht"', 'did you mean "width"'],
        ),
        (
            dict(image=dict(name="swin", embed_dim=8)),
            ["model.image", "depths, num_heads"],
        ),
        (dict(dtype="float16"), ["model.dtype", '"float16"', "bfloat16, float32"]),
    ],
)
def test_config_errors_name_the_field_and_the_choices(change, words):
    with pytest.raises(InputError) as error:
        from_config({**CONFIG, **change})
    for word in words:
        assert re.search(re.escape(word), str(error.value))


@pytest.mark.parametrize(
    "option, value",
    [
        ("image_size", 0),
        ("image_size", "64"),
        ("image_size", 64.0),
        ("image_size", (64, 64)),
        ("window_size", -4),
        ("num_heads", (3, 0)),
        ("num_heads", 3),
        ("depths", True),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_told(option, value):
    config = dict(name="swin", embed_dim=12, depths=(1, 1), num_heads=(2, 4))
    one_tower("image", {**config, "image_size": 56})
    one_tower("image", {**config, "image_size": np.int64(56), "depths": [1, 1]})
    with pytest.raises(InputError, match=f"model.image.{option} must be a .*: got"):
        one_tower("image", {**config, "image_size": 56, option: value})
