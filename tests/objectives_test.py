"""Every objective: it learns, on any mesh alike, and is scored by what it learnt."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax import losses, objectives, program, train
from unicl_jax.augment import PARAMETERS, make_views, normalize
from unicl_jax.config import PARTS
from unicl_jax.data import make_source
from unicl_jax.data.arrays import ArraySource
from unicl_jax.data.captions import caption_lanes
from unicl_jax.data.concepts import make_concept_table
from unicl_jax.data.synonyms import Synonyms
from unicl_jax.encoders import Encoder, heads, make_two_tower
from unicl_jax.errors import InputError
from unicl_jax.evaluation import ZeroShotTask, make_encoders
from unicl_jax.losses import NO_LABEL
from unicl_jax.objectives.positives import row_labels
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import init_state, make_train_step

BATCH, VOCAB, CONCEPTS = 16, 32, 6
BASELINES = sorted((Path(__file__).parents[1] / "configs/baselines").glob("*.py"))
VIEWS = {"supcon": 2, "uniclip": 3}
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
    noise = rng.integers(-60, 61, images.shape)  # no two of a class are alike
    noisy = np.clip(means[label] + noise, 0, 255)
    images = np.where(label[:, None, None, None] == NO_LABEL, images, noisy)
    return {
        "image": np.uint8(images),
        "label": np.int32(label),
        "tokens": np.int32(tokens),
    }


def setup(name, mesh=None, caption_identity="row", **options):
    objective = objectives.make_objective(name, model(), mesh, CONCEPTS)
    optimizer, schedule = make_optimizer(OPTIMIZER | options, 1000)
    still, count = dict(shift=0, color=0.0, flip=False), VIEWS.get(name, 1)
    views = make_views(still, dict(color=0.1, crop=0.7), views=count)
    step = make_train_step(
        model(),
        objective,
        optimizer,
        schedule,
        views,
        caption_identity=caption_identity,
    )
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
    if name == "multitask":
        objective = setup("cross_entropy")[2]
    labelled = batch["label"] != NO_LABEL
    images = normalize(batch["image"])
    if objective.encode_image is None:
        images = model().encode_image(state.params, state.model_state, images)[0]
    else:
        images = objective.encode_image(state.params, state.model_state, images)
    if name == "supcon":  # it has no names: those of a class are nearest to each other
        images, classes = np.asarray(images), np.asarray(images)
        near = images @ classes.T - 2 * np.eye(BATCH)
        best = batch["label"][near.argmax(1)]
        others = (batch["label"][:, None] == batch["label"][None]).sum(1) > 1
        assert (best == batch["label"])[labelled & others].mean() > 0.9
        return
    if objective.concepts is None:
        texts = np.tile(np.arange(CONCEPTS)[:, None], 3)
        classes = model().encode_text(state.params, state.model_state, texts)[0]
    else:
        classes = objective.concepts(state.params)
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


def check(name, *kinds, views=1, evaluations=()):
    sources = {f"source_{i}": {"kind": kind} for i, kind in enumerate(kinds)}
    objectives.check(
        {
            "objective": name,
            "views": views,
            "data": {"sources": sources},
            "evaluations": {name: {} for name in evaluations},
        }
    )


@pytest.mark.parametrize("name", sorted(LABELS_ONLY))
def test_captions_are_refused_where_every_image_needs_a_class(name):
    check(name, "image_label")
    with pytest.raises(InputError, match=f'"{name}" needs a class for every image'):
        check(name, "image_label", "image_text")


def test_an_unknown_objective_lists_the_choices():
    with pytest.raises(InputError, match='objective.*"clap"; did you mean "clip"'):
        check("clap", "image_label")


def test_an_objective_says_how_many_views_it_takes():
    check("supcon", "image_text", views=2)
    check("uniclip", "image_text", views=1)
    with pytest.raises(InputError, match='"supcon" takes at least 2 views.*is 1; set'):
        check("supcon", "image_label")
    with pytest.raises(InputError, match='"unicl" takes 1 views.*views is 2; set it'):
        check("unicl", "image_label", views=2)


def test_supcon_refuses_an_evaluation_and_says_what_to_do():
    with pytest.raises(InputError, match="and shoes are not; set it.*:linear does"):
        check("supcon", "image_label", views=2, evaluations=["shoes"])


@pytest.mark.parametrize("name", ["supcon", "cross_entropy", "linear_text", "uniclip"])
def test_what_an_objective_does_not_use_stays_and_does_not_decay(name):
    step, state, objective = setup(name, weight_decay=0.5)
    assert objective.unused
    batch = make_batch(name in LABELS_ONLY)
    after, metrics = jax.jit(step)(state, batch, jnp.int32(0))
    for part, there in state.params.items():
        moved = [
            np.abs(a - b).max()
            for a, b in zip(
                jax.tree.leaves(after.params[part]), jax.tree.leaves(there), strict=True
            )
        ]
        if part in objective.unused:
            assert not any(moved), part
        else:
            assert max(moved) > 1e-4, part
    if name == "supcon":  # its temperature is the config's
        np.testing.assert_allclose(metrics["logit_scale"], np.exp(2.0), rtol=1e-6)


def test_a_run_takes_over_what_both_objectives_teach():
    assert objectives.taught_by_both("unicl", "clip") == PARTS
    assert objectives.taught_by_both("unicl", "an older one") == PARTS
    assert objectives.taught_by_both("cross_entropy", "supcon") == ("image",)
    assert objectives.taught_by_both("unicl", "supcon") == ("image", "image_projection")
    assert "logit_scale" not in objectives.taught_by_both("supcon", "unicl")


def test_uniclip_is_told_what_was_done_and_learns_its_scales():
    step, state, objective = setup("uniclip")
    assert state.params["objective"]["log_scales"].tolist() == [2.0] * 3
    batch = make_batch(False)
    after, metrics = jax.jit(step)(state, batch, jnp.int32(0))
    for own in ("log_scales", "offsets"):
        moved = after.params["objective"][own] - state.params["objective"][own]
        assert np.abs(moved).min() > 1e-3
    assert metrics["scale/image_text"] == np.float32(np.exp(2.0))
    # The same features, other parameters: another embedding. Zeros are an evaluation's.
    head = heads.augmentation_aware(12, len(PARAMETERS))
    own, features = state.params["objective"]["head"], jnp.ones((2, 12))
    told = jnp.zeros((2, len(PARAMETERS))).at[1, 4].set(1.0)
    u = np.asarray(head.apply(own, features, told))
    assert np.abs(u[0] - u[1]).max() > 1e-3
    images = normalize(batch["image"])
    features, _ = model().image_features(state.params, state.model_state, images)
    untouched = jnp.zeros((BATCH, len(PARAMETERS)))
    want = model().project_image(state.params, head.apply(own, features, untouched))
    got = objective.encode_image(state.params, state.model_state, images)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_uniclip_on_captions_is_mp_nce_of_the_rows():
    """By hand, from embeddings: every record its own, all its views and its text."""
    step, state, objective = setup("uniclip")
    batch = make_batch(False)
    batch["label"] = np.full(BATCH, NO_LABEL, np.int32)
    loss = jax.jit(step)(state, batch, jnp.int32(0))[1]["loss"]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)
    views = make_views(
        dict(shift=0, color=0.0, flip=False), dict(color=0.1, crop=0.7), views=3
    )(keys[0], batch["image"])
    head = heads.augmentation_aware(12, len(PARAMETERS))
    z = []
    for k in range(3):
        features, _ = model().image_features(
            state.params, state.model_state, views.images[:, k]
        )
        own = state.params["objective"]["head"]
        x = head.apply(own, features, views.parameters[:, k])
        z.append(model().project_image(state.params, x))
    text, _ = model().encode_text(state.params, state.model_state, batch["tokens"])
    z = np.concatenate([*z, text]).astype(float)  # view by view, not row by row
    record = np.tile(np.arange(BATCH), 4)
    e = np.exp(np.exp(2.0) * z @ z.T)
    terms = []
    for i, j in np.ndindex(len(z), len(z)):
        if i != j and record[i] == record[j]:
            terms.append(-np.log(e[i, j] / (e[i, j] + e[i][record != record[i]].sum())))
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


def test_row_labels_make_every_caption_a_class_of_its_own():
    labels = jnp.array([3, NO_LABEL, 0, 3, NO_LABEL], jnp.int32)
    lanes = np.asarray(row_labels(labels))
    same = (lanes[:, None] == lanes[None]).all(-1)
    want = np.eye(5, dtype=bool)
    want[0, 3] = want[3, 0] = True
    np.testing.assert_array_equal(same, want)
    assert (lanes >= 0).all()


CAPTIONS_COMPARED = ("unicl", "one_way", "siglip", "supcon", "uniclip")


def with_captions(batch):
    """Numbers for the captions, of which rows 8 and 12, and 9, 10 and 15, are equal."""
    same = {12: 8, 10: 9, 15: 9}
    texts = [f"caption {same.get(row, row)}" for row in range(BATCH)]
    lanes = np.where(
        batch["label"][:, None] == NO_LABEL, caption_lanes(texts), NO_LABEL
    )
    relabelled = batch["label"].copy()
    relabelled[[8, 12]], relabelled[[9, 10, 15]] = 100, 101
    return {**batch, "caption": lanes}, {**batch, "label": relabelled}


@pytest.mark.parametrize(
    "name, devices", [("unicl", 1), *((name, 8) for name in CAPTIONS_COMPARED)]
)
def test_by_text_equal_captions_are_positives_as_if_they_had_a_label(
    name, devices, make_mesh
):
    mesh = make_mesh(devices)
    by_row, state, _ = setup(name, mesh)
    by_text, _, _ = setup(name, mesh, caption_identity="text")
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(state, whole)
    by_row, by_text = (
        jax.jit(step, out_shardings=(whole, whole)) for step in (by_row, by_text)
    )
    put = functools.partial(
        jax.device_put, device=NamedSharding(mesh, PartitionSpec("data"))
    )
    batch, relabelled = map(put, with_captions(make_batch(False)))
    got, told = by_text(state, batch, jnp.int32(0))
    want, metrics = by_row(state, relabelled, jnp.int32(0))
    # Without the captions' numbers, as by row they are of the metrics alone.
    del batch["caption"]
    apart, _ = by_row(state, batch, jnp.int32(0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    moved = [
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(apart), strict=True)
    ]
    assert max(moved) > 1e-3
    # They stay captions: 8 labelled rows of 16; and 5 of 8 captions are said twice.
    assert told["label_share"] == 0.5 and told["duplicate_captions"] == 5 / 8
    assert told["positives_per_row"] == metrics["positives_per_row"]
    assert told["positives_per_row"] == (2 * 4 + 4 * 1 + 2 * 2 + 3 * 3 + 3) / 16


def test_multitask_by_text_compares_captions_and_keeps_classes_to_labels():
    by_text, state, _ = setup("multitask", caption_identity="text")
    by_row, *_ = setup("multitask")
    batch, _ = with_captions(make_batch(False))
    loss = jax.jit(by_text)(state, batch, jnp.int32(0))[1]["loss"]
    apart = jax.jit(by_row)(state, batch, jnp.int32(0))[1]["loss"]
    # The difference is that of the two losses among the captions alone.
    u = model().encode_image(state.params, state.model_state, normalize(batch["image"]))
    v = model().encode_text(state.params, state.model_state, batch["tokens"])
    u, v = (x[0][8:] for x in (u, v))
    scale = model().logit_scale(state.params)
    pairs = losses.unicl_loss(u, v, batch["caption"][8:], scale).mean()
    clip = losses.contrastive_loss(u, v, scale).mean()
    np.testing.assert_allclose(loss - apart, pairs - clip, rtol=1e-4, atol=1e-5)
    assert abs(pairs - clip) > 0.01


def test_clip_knows_no_captions_either():
    batch, _ = with_captions(make_batch(False))
    told = [
        jax.jit(step)(state, batch, jnp.int32(0))[1]
        for step, state, _ in (setup("clip"), setup("clip", caption_identity="text"))
    ]
    assert told[0] == told[1] and told[0]["positives_per_row"] == 1


def test_a_synonym_of_what_was_trained_on_is_that_class(make_mesh):
    objective = setup("cross_entropy")[2]
    table = make_concept_table(
        {"shapes": ("sofa", "lamp")}, Synonyms([("Sofa", "couch"), ("couch", "settee")])
    )
    encoders = make_encoders(model(), make_mesh(1), objective, table.index)
    images = np.zeros((3, 4, 4, 3), np.uint8)
    names = ("Lamp", "settee", "couch")
    source = ArraySource("held_out", images, labels=[0, 1, 2], class_names=names)
    task = ZeroShotTask("held_out", source, ("{}",), None, encoders)
    own = dict(class_weights=np.arange(24.0).reshape(12, 2), class_bias=np.zeros(2))
    got = task.class_embeddings(dict(objective=own), {})
    assert (got[1] == got[2]).all() and (got[0] != got[1]).any()
    np.testing.assert_array_equal(got[0][:12], own["class_weights"][:, 1])


def test_a_class_that_was_not_trained_on_is_named(make_mesh):
    objective = setup("cross_entropy")[2]
    encoders = make_encoders(model(), make_mesh(1), objective, {"bag": 0, "sneaker": 1})
    config = dict(format="quickstart", path="fashion_mnist")
    source = make_source("fashion_mnist", config, 32, train=False)
    with pytest.raises(InputError, match="8 of 10 are not among them.*Leave"):
        ZeroShotTask("fashion", source, ("{}",), None, encoders)


def shrunk(recipe, variant=""):
    """A baseline on its own data, 4 steps of a tower that compiles at once."""
    config = runpy.run_path(str(recipe))["get_config"](variant)
    config.batch_size, config.total_steps = 32, 4
    config.optimizer.warmup_steps = 1
    config.model.image.update(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8)
    config.model.text.update(vocab_size=600, width=16, num_heads=2, num_layers=1)
    for name in list(config.evaluations):
        if name != "fashion_mnist":
            del config.evaluations[name]
    return config


ONE_STAGE = [path for path in BASELINES if path.stem != "supcon"]


@pytest.mark.parametrize("recipe", ONE_STAGE, ids=lambda path: path.stem)
def test_a_baseline_trains_and_is_evaluated(recipe, tmp_path):
    config = shrunk(recipe)
    assert config.objective == recipe.stem
    scores = train.run(config, tmp_path / "run")
    assert 0 <= scores["eval/fashion_mnist_top1"] <= 1


def test_supcon_trains_then_a_classifier_on_its_frozen_tower(tmp_path, capsys):
    recipe = next(path for path in BASELINES if path.stem == "supcon")
    first = shrunk(recipe)
    assert first.objective == "supcon"
    assert train.run(first, tmp_path / "first") == {}
    assert not (tmp_path / "first/predictions.png").exists()
    second = shrunk(recipe, "linear")
    assert second.objective == "cross_entropy"
    with pytest.raises(InputError, match="init_from is not set; pass"):
        train.run(second, tmp_path / "second")
    second.init_from = str(tmp_path / "first")
    scores = train.run(second, tmp_path / "second")
    assert 0 <= scores["eval/fashion_mnist_top1"] <= 1
    said = capsys.readouterr().out
    assert f"image from step 4 of {tmp_path / 'first'}" in said
    assert "task, by classifier" in said
    before, after = (saved_params(tmp_path / name) for name in ("first", "second"))
    jax.tree.map(np.testing.assert_array_equal, after["image"], before["image"])
    assert set(after["objective"]) == {"class_weights", "class_bias"}
    assert np.abs(after["objective"]["class_bias"]).max() > 0


@pytest.mark.parametrize("name", ["supcon", "uniclip"])
def test_views_are_cut_from_larger_pictures_in_files(name, tmp_path, monkeypatch):
    """The paper's recipe on made-up files of its formats, its towers shrunk."""
    recipe = next(path for path in BASELINES if path.stem == name)
    config = runpy.run_path(str(recipe))["get_config"]("paper")
    assert config.data.image_size > config.model.image.image_size
    config.data.made_up_records, config.batch_size, config.total_steps = 16, 8, 2
    config.optimizer.warmup_steps, config.data.image_size = 1, 24
    config.model.image.update(name="swin", image_size=16, patch_size=4, window_size=2)
    config.model.image.update(embed_dim=16, depths=(1,), num_heads=(2,))
    config.model.text.update(vocab_size=600, width=16, num_heads=2, num_layers=1)
    config.model.dtype, config.data.templates = "float32", "short"
    sizes = []

    def make_views(*args, **options):
        made = make_views_of(*args, **options)

        def seen(key, images):
            sizes.append(images.shape)
            return made(key, images)

        return seen

    make_views_of = program.make_views
    monkeypatch.setattr(program, "make_views", make_views)
    scores = train.run(config, tmp_path / "run")
    assert len(scores) == (0 if name == "supcon" else 2)
    assert set(sizes) == {(8, 24, 24, 3)}


def saved_params(workdir):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        state = ocp.args.StandardRestore()
        restored = manager.restore(4, args=ocp.args.Composite(state=state))
    return restored["state"]["params"]


@pytest.mark.parametrize("recipe", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_has_the_papers_data_too(recipe):
    get_config = runpy.run_path(str(recipe))["get_config"]
    config = get_config("paper")
    assert config.model.image.name == "swin_tiny" and config.objective == recipe.stem
    kinds = {source.kind for source in config.data.sources.values()}
    labels_only = recipe.stem in LABELS_ONLY | {"supcon"}
    assert kinds == ({"image_label"} | ({"image_text"} if not labels_only else set()))
    labels = config.batch_size if labels_only else config.batch_size // 2
    epochs = config.total_steps * labels / 1_281_167
    assert abs(epochs - 500) < 0.01  # the paper's, whatever the labels' share is
    with pytest.raises(InputError, match='no variant "papper"; did you mean "paper"'):
        get_config("papper")
