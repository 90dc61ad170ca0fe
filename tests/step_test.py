"""The compiled step: it learns, is the same on any mesh, and keeps no bad state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax.augment import make_views
from unicl_jax.encoders import (
    Encoder,
    TwoTower,
    make_two_tower,
    resnet,
    swin,
    transformer,
    unit,
)
from unicl_jax.errors import InputError
from unicl_jax.losses import NO_LABEL, unicl_loss
from unicl_jax.objectives import Objective, make_objective
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import _only_if, init_state, make_train_step

BATCH, VOCAB = 16, 32
# SGD, of which one step shows the gradient itself: AdamW turns a gradient of round-off,
# where 0 is meant, into a whole step.
OPTIMIZER = dict(
    name="sgd",
    learning_rate=0.1,
    final_learning_rate=0.1,
    warmup_steps=0,
    weight_decay=1e-4,
    clip_norm=5.0,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    momentum=0.9,
)
AUGMENT = dict(shift=1, color=0.1, flip=True)
STILL = dict(shift=0, color=0.0, flip=False)
AUGMENTS = {"resnet": STILL, "swin": AUGMENT}
STEP = np.int32(0)


def linear_model(noise):
    """Two linear towers: compiled in no time, and with features far from each other.

    The image tower adds noise by its key, as drop path would.
    """

    def init(key):
        image, text = jax.random.normal(key, (2, 192, 16))
        scale = jnp.float32(1.0)
        return {"image": image, "text": text[:VOCAB], "logit_scale": scale}, {}

    def encode_image(params, state, images, *, train=False, key=None):
        u = images.reshape(len(images), -1) @ params["image"]
        if train and noise:
            u += noise * jax.random.normal(key, u.shape)
        return unit(u), state

    def encode_text(params, state, tokens, *, train=False, key=None):
        del train, key
        return unit(params["text"][tokens].sum(1)), state

    return TwoTower(
        init, encode_image, encode_text, lambda p: jnp.exp(p["logit_scale"])
    )


def bag_of_words():
    """A text tower that compiles at once: the sum of its tokens' embeddings."""
    return Encoder(
        lambda key: ({"table": jax.random.normal(key, (VOCAB, 16))}, {}),
        lambda params, state, tokens, **_: (params["table"][tokens].sum(1), state),
        16,
    )


@functools.cache
def model(image):
    """A ResNet for its batch statistics, or transformers with drop path; 8 pixels."""
    if image in ("linear", "noisy"):
        return linear_model(noise=float(image == "noisy"))
    if image == "resnet":
        tower = resnet(depths=(1,), width=4, stem="cifar", image_size=8)
        return make_two_tower(tower, bag_of_words(), embed_dim=16)
    tower = swin(
        embed_dim=16,
        depths=(2,),
        num_heads=(2,),
        image_size=8,
        patch_size=2,
        window_size=2,
        drop_path=0.2,
    )
    text = transformer(
        vocab_size=VOCAB, context_length=5, width=16, num_heads=2, num_layers=1
    )
    return make_two_tower(tower, text, embed_dim=16)


def setup(image="linear", objective="unicl", augment=STILL, mesh=None, **options):
    """The step, not yet compiled, and a function to make its first state."""
    if isinstance(objective, str):
        objective = make_objective(objective, model(image), mesh, num_concepts=4)
    changes = {k: options.pop(k) for k in [*options] if k in OPTIMIZER}
    optimizer, schedule = make_optimizer(OPTIMIZER | changes, 1000)
    step = make_train_step(
        model(image), objective, optimizer, schedule, make_views(augment), **options
    )
    start = functools.partial(init_state, model(image), objective, optimizer)
    return step, lambda: jax.jit(start, static_argnums=0)(0)


@functools.cache
def compiled(image):
    """The step on one device, and its first state on the host; shared by many tests.

    The ResNet sees its pictures as they are, so that they can be learned by heart.
    """
    train_step, init = setup(image, augment=AUGMENTS[image])
    return jax.jit(train_step), arrays(init())


def make_batch(seed=0):
    """8 labelled rows of 3 classes, each class with one text, and 8 captions."""
    rng = np.random.default_rng(seed)
    label = np.array([0, 1, 2, 0, 1, 2, 0, 1] + [NO_LABEL] * 8, np.int32)
    texts = rng.integers(1, VOCAB - 1, (11, 5), dtype=np.int32)
    texts[:, -1] = VOCAB - 1
    return {
        "image": rng.integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8),
        "label": label,
        "tokens": texts[np.concatenate([label[:8], np.arange(3, 11)])],
    }


def arrays(tree):
    """Host copies: the step may be given the originals to overwrite."""
    return jax.tree.map(np.array, tree)


def assert_close(got, want, **tolerance):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, **tolerance, err_msg=str(path)
        ),
        got,
        want,
    )


# --- Learning.


@pytest.fixture(scope="module")
def learned():
    """200 steps on one batch: every row can be told apart."""
    step, state = compiled("resnet")
    batch, history = make_batch(), []
    for i in range(200):
        state, metrics = step(state, batch, jnp.int32(i))
        history.append(arrays(metrics))
    return state, history


def test_a_batch_seen_again_and_again_is_learned_to_its_floor(learned):
    history = learned[1]
    assert history[0]["excess"] > 0.5
    assert all(m["excess"] > -1e-5 for m in history)  # float32 of log 16
    assert history[-1]["excess"] < 0.01
    # Three, three and two rows of a class, and eight captions.
    floor = (6 * np.log(3) + 2 * np.log(2)) / 16
    assert history[-1]["loss"] - history[-1]["excess"] == pytest.approx(floor, rel=1e-5)


def test_the_metrics_say_what_the_step_did(learned):
    state, history = learned
    first, last = history[0], history[-1]
    assert {m.dtype for m in first.values()} == {np.dtype("float32")}
    assert first["positives_per_row"] == (6 * 3 + 2 * 2 + 8) / 16
    assert first["label_share"] == 0.5
    assert first["learning_rate"] == pytest.approx(0.1)
    assert first["logit_scale"] == pytest.approx(np.e)
    assert last["logit_scale"] > np.e
    assert first["loss"] == pytest.approx(
        (first["per_image"] + first["per_text"]) / 2, rel=1e-6
    )
    assert int(state.step) == 200
    assert all(m[k] > 0 for m in history for k in m if k.endswith("_norm"))


def test_the_state_carries_the_running_statistics_on(learned):
    (state, _), (_, begin) = learned, compiled("resnet")
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), state.model_state, begin.model_state
    )
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_a_transformer_learns_under_augmentation_and_drop_path():
    (step, state), losses = compiled("swin"), []
    for i in range(100):
        state, metrics = step(state, make_batch(), jnp.int32(i))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.2


# --- One device or eight.


@pytest.mark.parametrize("image", ["resnet", "swin"])
def test_eight_devices_train_as_one(image, make_mesh):
    mesh = make_mesh(8)
    place = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    one, begin = compiled(image)
    eight, _ = setup(image, augment=AUGMENTS[image], mesh=mesh)
    steps = [one, jax.jit(eight, out_shardings=(whole, whole))]
    states = [begin, jax.device_put(begin, whole)]
    for i in range(3):
        batch = make_batch(i)
        both = [
            steps[0](states[0], batch, jnp.int32(i)),
            steps[1](states[1], jax.device_put(batch, place), jnp.int32(i)),
        ]
        states = [state for state, _ in both]
        # Float32 sums in another order: 4e-7 was seen after three steps.
        assert_close(*(arrays(metrics) for _, metrics in both), rtol=1e-5, atol=1e-6)
        assert_close(*map(arrays, states), rtol=1e-5, atol=2e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), arrays(states[0]), begin)
    # What differs by 2e-6 at most has moved by far more.
    assert np.median(jax.tree.leaves(moved.params)) > 1e-3
    assert {x.sharding for x in jax.tree.leaves(states[1])} == {whole}


# --- What does not learn.


@pytest.mark.parametrize("image, parts", [("resnet", ("image",)), ("swin", ("text",))])
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(image, parts):
    train_step, _ = setup(image, augment=AUGMENTS[image], frozen=parts)
    optimizer, _ = make_optimizer(OPTIMIZER, 1000)
    objective = make_objective("unicl", model(image))
    start = functools.partial(init_state, model(image), objective, optimizer, 0)
    state = arrays(jax.jit(functools.partial(start, parts))())
    whole = jax.eval_shape(start)
    assert len(jax.tree.leaves(state.opt_state)) < len(jax.tree.leaves(whole.opt_state))
    after, _ = jax.jit(train_step)(state, make_batch(), STEP)
    for part in parts:
        assert_same_bits(after.params[part], state.params[part])
        assert_same_bits(after.model_state[part], state.model_state[part])
    for part in set(state.params) - set(parts):
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(),
            *(arrays(s.params[part]) for s in (after, state)),
        )
        assert max(jax.tree.leaves(moved)) > 1e-4


def test_a_frozen_tower_runs_as_in_evaluation():
    """The other tower's gradient is that of features without drop path or noise."""
    losses = {}
    for frozen in ((), ("image",)):
        step, init = setup("noisy", frozen=frozen, seed=5)
        state = arrays(init())
        if frozen:
            optimizer, _ = make_optimizer(OPTIMIZER, 1000)
            objective = make_objective("unicl", model("noisy"))
            start = functools.partial(init_state, model("noisy"), objective, optimizer)
            state = arrays(jax.jit(functools.partial(start, 0, frozen))())
        losses[frozen] = jax.jit(step)(state, make_batch(), STEP)[1]["loss"]
    step, init = setup("linear", seed=5)
    still = jax.jit(step)(arrays(init()), make_batch(), STEP)[1]["loss"]
    np.testing.assert_allclose(losses[("image",)], still, rtol=1e-6)
    assert abs(losses[()] - still) > 1e-3


# --- What must not happen.


@pytest.fixture(scope="module")
def guarded():
    """The compiled step and a state two steps in, on the host."""
    step, state = compiled("resnet")
    for i in range(2):
        state, _ = step(state, make_batch(), jnp.int32(i))
    return step, arrays(state)


def assert_same_bits(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
        ),
        jax.tree.map(np.atleast_1d, arrays(got)),
        jax.tree.map(np.atleast_1d, arrays(want)),
    )


@pytest.mark.parametrize("drawn_for", [0, 1, 3])
def test_a_batch_drawn_for_another_step_changes_nothing(drawn_for, guarded):
    step, state = guarded
    after, metrics = step(state, make_batch(), jnp.int32(drawn_for))
    assert_same_bits(after, state)
    assert np.isfinite(metrics["loss"])
    after, _ = step(state, make_batch(), jnp.int32(2))
    assert int(after.step) == 3


def with_scale(state, value):
    return state._replace(params={**state.params, "logit_scale": np.float32(value)})


def with_nan(state, *path):
    """The state with one NaN in the array at that path."""
    params = jax.tree.map(np.array, state.params)
    node = params
    for key in path:
        node = node[key]
    node.flat[0] = np.nan
    return state._replace(params=params)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: with_nan(s, "image_projection"),
        lambda s: with_nan(s, "text_projection"),
        lambda s: with_scale(s, np.nan),
        lambda s: with_scale(s, 1000.0),
    ],
    ids=["image", "text", "scale", "infinite scale"],
)
def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported(spoil, guarded):
    step, state = guarded
    bad = spoil(state)
    after, metrics = step(bad, make_batch(), jnp.int32(2))
    assert_same_bits(after, bad)
    assert not np.isfinite(metrics["loss"])


def test_a_nan_that_the_loss_does_not_show_changes_nothing_and_is_reported(guarded):
    """XLA's ReLU on CPU makes 0 of NaN, so that the loss is finite, but no gradient."""
    step, state = guarded
    bad = with_nan(state, "image", "conv1", "kernel")
    after, metrics = step(bad, make_batch(), jnp.int32(2))
    assert_same_bits(after, bad)
    assert not np.isfinite(metrics["loss"] + metrics["grad_norm"])


@pytest.mark.parametrize(
    ("addend", "bad"),
    [
        (lambda u: jnp.sqrt(0 * u[:, 0]), "grad_norm"),  # 0, with an infinite slope
        (lambda u: jnp.full(len(u), jnp.inf), "loss"),  # infinite, without a slope
    ],
    ids=["gradient", "loss"],
)
def test_loss_and_gradient_must_both_be_finite(addend, bad):
    def broken(forward):
        u, v = forward.image(), forward.text()
        loss = unicl_loss(u, v, forward.labels, forward.logit_scale())
        return loss + addend(u), {}

    train_step, init = setup(objective=Objective(broken))
    state = arrays(init())
    after, metrics = jax.jit(train_step)(state, make_batch(), STEP)
    assert_same_bits(after, state)
    finite = {name for name in ("loss", "grad_norm") if np.isfinite(metrics[name])}
    assert finite == {"loss", "grad_norm"} - {bad}


def test_a_donated_state_is_given_up_and_the_result_is_the_same():
    train_step, init = setup(name="adamw", learning_rate=0.01)
    host, batch = arrays(init()), make_batch()
    want = arrays(jax.jit(train_step)(host, batch, STEP))
    state = init()
    got = jax.jit(train_step, donate_argnums=0)(state, batch, STEP)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    # The buffers are used again, the arithmetic is the same; fusion may differ.
    assert_close(arrays(got), want, rtol=1e-5, atol=1e-6)


# --- Draws, objectives, shared texts.


@pytest.mark.parametrize(
    ("image", "augment"),
    [("linear", AUGMENT), ("noisy", STILL)],
    ids=["pixels", "tower"],
)
def test_what_is_drawn_depends_on_seed_and_step(image, augment):
    def losses(seed):
        train_step, init = setup(image, augment=augment, seed=seed)
        step, state = jax.jit(train_step), init()
        steps = (0, 1, 0)
        return [
            float(step(state, make_batch(), jnp.int32(i))[1]["loss"]) for i in steps
        ]

    first, later, again = losses(0)
    assert first == again
    assert len({first, later, losses(1)[0]}) == 3


def test_clip_is_unicl_on_captions_alone():
    clip, init = setup(objective="clip")
    unicl, _ = setup()
    state, batch = arrays(init()), make_batch()
    # One text a class would make both objectives alike: image by image the same terms.
    batch["tokens"] = np.random.default_rng(1).integers(0, VOCAB, (BATCH, 5), np.int32)
    captions = {**batch, "label": np.full(BATCH, NO_LABEL, np.int32)}
    got, metrics = arrays(jax.jit(clip)(state, batch, STEP))
    want, caption_metrics = arrays(jax.jit(unicl)(state, captions, STEP))
    # The same arithmetic on the same labels; XLA may fuse it otherwise.
    assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert metrics.pop("label_share") == 0.5  # of the data, whatever is minimised
    assert caption_metrics.pop("label_share") == 0
    assert_close(metrics, caption_metrics, rtol=1e-5)
    labelled = jax.jit(unicl)(state, batch, STEP)[1]
    assert abs(labelled["loss"] - metrics["loss"]) > 0.01


def test_an_unknown_objective_lists_the_choices():
    with pytest.raises(InputError, match='objective.*"clap"; did you mean "clip"'):
        setup(objective="clap")


def test_encoding_equal_texts_once_is_encoding_them_all():
    train_step, init = setup(learning_rate=0.5, clip_norm=0.0)
    step, state, batch = jax.jit(train_step), arrays(init()), make_batch()
    unique, text_index = np.unique(batch["tokens"], axis=0, return_inverse=True)
    assert len(unique) == 11
    unused = np.repeat(unique[:1], 2, 0)  # slots that no row points to
    shared = {
        **batch,
        "tokens": np.concatenate([unique, unused]),
        "text_index": text_index.reshape(-1).astype(np.int32),
    }
    got, metrics = arrays(step(state, shared, STEP))
    want, row_metrics = arrays(step(state, batch, STEP))
    # SGD: equal parameters are equal gradients. Sums of them come in another order.
    assert_close(metrics, row_metrics, rtol=1e-5)
    assert_close(got, want, rtol=1e-5, atol=1e-6)
    moved = np.abs(got.params["text"] - state.params["text"]).max()
    assert moved > 1e-2  # so the tolerance above says something


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_a_refused_update_is_a_branch_on_cpus_and_a_selection_elsewhere(platform):
    def update(x):
        return x + 1, jnp.float32(2)

    def step(good, x):
        return _only_if(good, update, x)

    traced = jax.jit(step).trace(True, jnp.zeros(3))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.select" in text) == (platform != "cpu")
    for good, want in ((True, (1.0, 2.0)), (False, (0.0, 0.0))):
        x, norm = step(jnp.bool_(good), jnp.zeros(3))
        assert (float(x[0]), float(norm)) == want
