"""Every objective: it learns, on any mesh alike, and is scored by what it learnt."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax import objectives, train
from unicl_jax.augment import make_augment, normalize
from unicl_jax.data import make_source
from unicl_jax.encoders import Encoder, make_two_tower
from unicl_jax.errors import InputError
from unicl_jax.evaluation import ZeroShotTask, make_encoders
from unicl_jax.losses import NO_LABEL
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import init_state, make_train_step

BATCH, VOCAB, CONCEPTS = 16, 32, 6
BASELINES = sorted((Path(__file__).parents[1] / "configs/baselines").glob("*.py"))
LABELS_ONLY = {k for k, v in objectives.OBJECTIVES.items() if v.labels_only}
OPTIMIZER = dict(
    name="adamw",
    learning_rate=0.03,
    final_learning_rate=0.03,
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=0.0,
    b1=0.9,
    b2=0.98,
    eps=1e-6,
)


@functools.cache
def model():
    """Linear towers on 4-pixel images and bags of 3 tokens."""

    def image(params, state, images, **_):
        return images.reshape(len(images), -1) @ params["kernel"], state

    def text(params, state, tokens, **_):
        return params["table"][tokens].sum(1), state

    def draw(name, *shape):
        return lambda key: ({name: 0.1 * jax.random.normal(key, shape)}, {})

    return make_two_tower(
        Encoder(draw("kernel", 48, 12), image, 12),
        Encoder(draw("table", VOCAB, 10), text, 10),
        embed_dim=8,
        logit_scale_init=2.0,
    )


def make_batch(labels_only):
    rng = np.random.default_rng(0)
    label = np.arange(BATCH) % CONCEPTS
    if not labels_only:
        label[BATCH // 2 :] = NO_LABEL
    tokens = rng.integers(0, VOCAB, (BATCH, 3))
    tokens[label != NO_LABEL] = label[label != NO_LABEL, None]  # one text a class
    means = rng.integers(0, 256, (CONCEPTS, 4, 4, 3))
    images = rng.integers(0, 256, (BATCH, 4, 4, 3))
    images = np.where(label[:, None, None, None] == NO_LABEL, images, means[label])
    return {
        "image": np.uint8(images),
        "label": np.int32(label),
        "tokens": np.int32(tokens),
    }


def setup(name, mesh=None):
    objective = objectives.make_objective(name, model(), mesh, CONCEPTS)
    optimizer, schedule = make_optimizer(OPTIMIZER, 1000)
    still = make_augment(dict(shift=0, color=0.0, flip=False))
    step = make_train_step(model(), objective, optimizer, schedule, still)
    state = jax.jit(lambda: init_state(model(), objective, optimizer, 0))()
    return step, state, objective


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_it_learns_a_batch_and_its_labels_can_be_read_off(name, make_mesh):
    step, state, objective = setup(name)
    batch, step = make_batch(name in LABELS_ONLY), jax.jit(step)
    losses = []
    for i in range(150):
        state, metrics = step(state, batch, jnp.int32(i))
        losses.append(float(metrics["loss"]))
        assert np.isfinite(list(metrics.values())).all()
    assert losses[-1] < 0.7 * losses[0]
    # Two tasks are two spaces: the classifier knows the classes, the texts don't.
    labelled = batch["label"] != NO_LABEL
    classifier = objective.classifier
    if name == "multitask":
        classifier = setup("cross_entropy")[2].classifier
    if classifier is None:
        images = model().encode_image(
            state.params, state.model_state, normalize(batch["image"])
        )[0]
        texts = np.tile(np.arange(CONCEPTS)[:, None], 3)
        classes = model().encode_text(state.params, state.model_state, texts)[0]
    else:
        images = classifier.image(
            state.params, state.model_state, normalize(batch["image"])
        )
        classes = classifier.concepts(state.params)
    best = np.asarray((images @ classes.T).argmax(1))
    assert (best == batch["label"])[labelled].mean() > 0.9


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_eight_devices_train_as_one(name, make_mesh):
    mesh = make_mesh(8)
    place = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    one, state, _ = setup(name)
    eight, other, _ = setup(name, mesh)
    other = jax.device_put(other, whole)
    batch = make_batch(name in LABELS_ONLY)
    one, eight = jax.jit(one), jax.jit(eight, out_shardings=(whole, whole))
    for i in range(3):
        state, metrics = one(state, batch, jnp.int32(i))
        other, same = eight(other, jax.device_put(batch, place), jnp.int32(i))
        # Float32 sums in another order; AdamW divides by a gradient's own size.
        for key, value in metrics.items():
            np.testing.assert_allclose(same[key], value, rtol=2e-4, atol=1e-5)


def test_siglips_bias_and_the_classifiers_weights_learn():
    for name, own in (("siglip", "logit_bias"), ("cross_entropy", "class_weights")):
        step, state, _ = setup(name)
        before = np.array(state.params["objective"][own])
        batch = make_batch(name in LABELS_ONLY)
        state, _ = jax.jit(step)(state, batch, jnp.int32(0))
        assert np.abs(state.params["objective"][own] - before).max() > 1e-3


def test_one_way_and_unicl_differ_and_share_their_directions():
    batch = make_batch(False)
    metrics = {}
    for name in ("unicl", "one_way"):
        step, state, _ = setup(name)
        metrics[name] = jax.jit(step)(state, batch, jnp.int32(0))[1]
    both, one = metrics["unicl"], metrics["one_way"]
    np.testing.assert_allclose(one["loss"], both["per_image"], rtol=1e-6)
    mean = (both["per_image"] + both["per_text"]) / 2
    np.testing.assert_allclose(both["loss"], mean, rtol=1e-6)
    assert abs(one["loss"] - both["loss"]) > 1e-3


@pytest.mark.parametrize("name", sorted(LABELS_ONLY))
def test_captions_are_refused_where_every_image_needs_a_class(name):
    objectives.check(name, ["image_label"])
    with pytest.raises(InputError, match=f'"{name}" needs a class for every image'):
        objectives.check(name, ["image_label", "image_text"])


def test_an_unknown_objective_lists_the_choices():
    with pytest.raises(InputError, match='objective.*"clap"; did you mean "clip"'):
        objectives.check("clap", ["image_label"])


def test_a_class_that_was_not_trained_on_is_named(make_mesh):
    objective = setup("cross_entropy")[2]
    encoders = make_encoders(
        model(), make_mesh(1), objective.classifier, ["Bag", "sneaker"]
    )
    config = dict(format="quickstart", path="fashion_mnist")
    source = make_source("fashion_mnist", config, 32, train=False)
    with pytest.raises(InputError, match="8 of 10 are not among them.*Leave"):
        ZeroShotTask("fashion", source, ("{}",), None, encoders)


@pytest.mark.parametrize("recipe", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_trains_and_is_evaluated(recipe, tmp_path):
    config = runpy.run_path(str(recipe))["get_config"]()
    assert config.objective == recipe.stem
    config.batch_size, config.total_steps = 32, 4
    config.optimizer.warmup_steps = 1
    config.model.image.update(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8)
    config.model.text.update(vocab_size=600, width=16, num_heads=2)
    for name in list(config.evaluations):
        if name != "fashion_mnist":
            del config.evaluations[name]
    scores = train.run(config, tmp_path / "run")
    assert 0 <= scores["eval/fashion_mnist_top1"] <= 1


@pytest.mark.parametrize("recipe", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_has_the_papers_data_too(recipe):
    get_config = runpy.run_path(str(recipe))["get_config"]
    config = get_config("paper")
    assert config.model.image.name == "swin_tiny" and config.objective == recipe.stem
    kinds = {source.kind for source in config.data.sources.values()}
    assert kinds == (
        {"image_label"} if recipe.stem in LABELS_ONLY else {"image_label", "image_text"}
    )
    with pytest.raises(InputError, match='no variant "papper"; did you mean "paper"'):
        get_config("papper")
