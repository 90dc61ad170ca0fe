"""A batch in micro-batches: the numbers of the whole batch, in less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_test import good, put, refusal
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax import encoders, objectives
from unicl_jax.augment import make_views
from unicl_jax.encoders import Packed, PartKey, make_two_tower, pack
from unicl_jax.encoders.encoder import from_linen
from unicl_jax.encoders.layers import DropPath
from unicl_jax.losses import NO_LABEL
from unicl_jax.mix import make_mix
from unicl_jax.objectives import Forward
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import init_state, make_train_step
from unicl_jax.validation import validate

BATCH, VOCAB, CONCEPTS, SLOTS = 16, 32, 4, 6
VIEWS = {"supcon": 2, "uniclip": 3}
ONE_VIEW = [name for name in objectives.OBJECTIVES if name not in VIEWS]
SGD = dict(
    name="sgd",
    learning_rate=0.1,
    final_learning_rate=0.1,
    warmup_steps=0,
    weight_decay=0.01,
    clip_norm=1.0,
    momentum=0.9,
)


class Tower(nn.Module):
    """A linear map and a branch that drop path drops: compiled in no time."""

    @nn.compact
    def __call__(self, x, train):
        dense = functools.partial(nn.Dense, 12, dtype=jnp.float64)
        x = dense()(x.reshape(len(x), -1).astype(jnp.float64))
        return x + DropPath(0.5)(jnp.tanh(dense()(x)), train)


class Bag(nn.Module):
    """A text tower of the like, of tokens or of packed texts."""

    @nn.compact
    def __call__(self, tokens, train):
        table = self.param("table", nn.initializers.normal(1.0), (VOCAB, 12))
        if not isinstance(tokens, Packed):
            return jnp.tanh(table[tokens]).sum(1)
        x = jnp.tanh(table[tokens.tokens]).cumsum(1)
        x = x.reshape(len(tokens.ends), -1, 12)
        return jnp.take_along_axis(x, tokens.ends[..., None], 1).reshape(-1, 12)


@functools.cache
def model():
    image = from_linen(Tower(), jnp.zeros((1, 4, 4, 3)), 12)
    text = from_linen(Bag(), jnp.zeros((1, SLOTS), jnp.int32), 12)
    return make_two_tower(image, text, embed_dim=8, logit_scale_init=1.5)


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB - 1, (BATCH, SLOTS), dtype=np.int32)
    ends = rng.integers(1, SLOTS, BATCH)
    return {
        "image": rng.integers(0, 256, (BATCH, 4, 4, 3), dtype=np.uint8),
        "label": np.int32(np.arange(BATCH) % CONCEPTS),
        "tokens": np.where(np.arange(SLOTS) >= ends[:, None], VOCAB - 1, tokens),
    }


def views_of(name, flip=False):
    """Made for the whole batch, whatever the parts: little of it will do."""
    augment = dict(shift=0, color=0.0, flip=flip or name in VIEWS)  # uniclip is told
    return make_views(augment, views=VIEWS.get(name, 1))


def in_float64(tree):
    def cast(x):
        return x.astype(np.float64) if jnp.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(cast, tree)


def assert_equal(got, want, tolerance=1e-10):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance, err_msg=str(path)
        ),
        got,
        want,
    )


def losses_and_gradients(names, batch, count, frozen=()):
    """Of several objectives at once, each with parameters of its own."""
    two, keys = model(), jax.random.split(jax.random.key(7), 3)
    made = {
        name: objectives.make_objective(name, two, None, CONCEPTS) for name in names
    }
    params, state = two.init(jax.random.key(0))
    own = {
        name: x.init(jax.random.key(1), params) if x.init else {}
        for name, x in made.items()
    }

    def total(params, own, batch):
        losses = []
        for name, objective in made.items():
            forward = Forward(
                two,
                {**params, "objective": own[name]},
                state,
                batch,
                views_of(name),
                keys,
                frozen,
                micro_batches=count,
            )
            losses.append(objective.loss(forward)[0].mean())
        # No two alike: what is wrong in one cannot be made good in another.
        return sum(loss * (1 + i) for i, loss in enumerate(losses)), losses

    grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(*in_float64((params, own)), batch)


@pytest.mark.parametrize("names", [ONE_VIEW, [*VIEWS]], ids=["one view", "views"])
def test_every_objective_has_the_whole_batchs_loss_and_gradients(names, x64):
    """Drop path is drawn as for the whole batch, too."""
    batch = make_batch()
    if names != ONE_VIEW:
        batch["label"][::3] = NO_LABEL
    want = losses_and_gradients(names, batch, 1)
    got = losses_and_gradients(names, batch, 4)
    assert_equal(got, want)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 1e-6


def packed(batch):
    return {**batch, "tokens": pack(batch["tokens"], 12, groups=8)}


def shared(batch):
    """Half of the texts, each twice."""
    index = np.int32(np.arange(BATCH) // 2)[::-1].copy()
    return {**batch, "tokens": batch["tokens"][:8], "text_index": index}


def step_of(count, mesh=None, mixes=False, frozen=(), objective="unicl"):
    mix = dict(mixup=0.8, cutmix=1.0, probability=1.0, cutmix_share=0.5)
    optimizer, schedule = make_optimizer(SGD, 10**9)
    objective = objectives.make_objective(objective, model(), mesh, CONCEPTS)
    step = make_train_step(
        *(model(), objective, optimizer, schedule, views_of("unicl", flip=True)),
        mix=make_mix(mix) if mixes else None,
        mesh=mesh,
        frozen=frozen,
        micro_batches=count,
    )
    state = jax.jit(lambda: init_state(model(), objective, optimizer, 3, frozen))()
    return jax.jit(step), state


def test_a_run_trains_the_same_parameters(x64):
    """Of shared texts, mixed and flipped images, beside what is frozen."""
    frozen = ("image_projection",)
    batch, states = shared(make_batch()), []
    for count in (1, 4):
        step, state = step_of(count, mixes=True, frozen=frozen)
        start = state = in_float64(state)
        for i in range(2):
            state, metrics = step(state, batch, jnp.int32(i))
        states.append((state, metrics))
    assert_equal(*states)
    moved = jax.tree.map(
        lambda a, b: abs(a - b).max(), states[0][0].params, start.params
    )
    moved = {k: max(jax.tree.leaves(v)) for k, v in moved.items()}
    assert {k for k, v in moved.items() if v == 0} == set(frozen)


def test_nothing_but_sums_travels_between_eight_devices(make_mesh, x64):
    """Rows k, k + 4, ... of a batch that is divided in eight stay where they are.

    With packed texts, of which each device holds a group for each part.
    """
    mesh = make_mesh(8)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    batch = jax.tree.map(lambda x: np.concatenate([x] * 4), packed(make_batch()))
    step, state = step_of(4, mesh)
    state = in_float64(state)
    placed = jax.device_put(state, whole), jax.device_put(batch, rows)
    compiled = step.lower(*placed, jnp.int32(0)).compile()
    text = compiled.as_text()
    assert not re.search(r"all-to-all|collective-permute", text)
    # The loss gathers embeddings and labels: no images [.., 4, 4, 3], nor texts.
    gathered = re.findall(r"= (\S+) all-gather\(", text)
    assert gathered
    assert not [x for x in gathered if "4,4,3]" in x or re.match(r"s32.*,12\]", x)]
    one, _ = step_of(1)
    assert_equal(
        compiled(*placed, jnp.int32(0))[0].params,
        one(state, batch, jnp.int32(0))[0].params,
    )


TOWERS = {
    "swin": dict(embed_dim=8, depths=(2,), num_heads=(2,), window_size=2, patch_size=4),
    "vit": dict(width=8, num_layers=2, num_heads=2, patch_size=4),
    "vit, scan": dict(width=8, num_layers=2, num_heads=2, patch_size=4, scan=True),
    "vit, scan, remat": dict(
        width=8, num_layers=2, num_heads=2, patch_size=4, scan=True, remat=True
    ),
    "focalnet": dict(
        embed_dim=8, depths=(2,), focal_levels=(1,), focal_windows=(3,), remat=True
    ),
    "klite_focal": dict(
        embed_dim=8, depths=(2,), focal_levels=(1,), focal_windows=(3,)
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_towers_part_is_dropped_as_in_the_whole(name):
    tower = encoders.IMAGE_TOWERS[name.split(",")[0]]
    tower = tower(image_size=8, drop_path=0.7, **TOWERS[name])
    params, state = tower.init(jax.random.key(0))
    key = jax.random.key(1)
    images = jax.random.normal(key, (12, 8, 8, 3))

    @jax.jit
    def apply(images, k=None):
        used = key if k is None else PartKey(key, k, 2, 2)
        return tower.apply(params, state, images, train=True, key=used)[0]

    whole = apply(images)
    still = tower.apply(params, state, images)[0]
    assert np.abs(whole - still).max() > 2e-3  # a thousand times the tolerance below
    # Two parts of three pairs each: rows 0, 1, 4, 5, 8, 9 and the others.
    pairs = images.reshape(3, 2, 2, 8, 8, 3)
    for k in range(2):
        rows = pairs[:, k].reshape(6, 8, 8, 3)
        got = apply(rows, jnp.int32(k))
        want = whole.reshape(3, 2, 2, -1)[:, k].reshape(6, -1)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_what_micro_batches_do_not_fit_is_refused():
    config = good()
    config.micro_batches = 2
    validate(config, 8)
    config.micro_batches = 4
    said = refusal(config, 8)
    assert "micro_batches times the devices" in said and "16 for 4 x 8" in said
    assert said.endswith("nearest is 32.")
    for value in (0, 2.0, True):
        wrong = good()
        put(wrong, "micro_batches", value)
        assert "micro_batches must be a whole number" in refusal(wrong, 1)
    config.model.image.name = "resnet50"
    assert 'must be 1 for model.image "resnet50"' in refusal(config, 1)
    config.frozen, config.init_from = ("image",), "runs/first"
    validate(config, 1)
