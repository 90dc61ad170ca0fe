"""Fine-tuning: from a run's tower and prompts, chosen on records it did not see."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import unicl_jax
from unicl_jax import data, losses, objectives, train, validation
from unicl_jax.data.arrays import ArraySource
from unicl_jax.data.parts import part_of
from unicl_jax.data.records import Request
from unicl_jax.errors import InputError
from unicl_jax.evaluation import elevater


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def before(folder):
    """A run with both towers."""
    train.run(tiny_run.config(folder, total_steps=3), folder / "before")
    return folder / "before"


def recipe(folder, **changes):
    config = tiny_run.config(folder, objective="cosine_cross_entropy", total_steps=4)
    del config.data.sources["captioned"]
    config.data.sources.labelled.part = "train"
    config.data.mixture = "proportional"
    config.classes_from_prompts = True
    config.evaluate_every_steps = 2
    held_out = config.evaluations.held_out.to_dict()
    config.evaluations = dict(
        validation={**held_out, "part": "validation"}, test={**held_out, "at_end": True}
    )
    for path, value in changes.items():
        config[path] = value
    return config


@pytest.fixture(scope="module")
def tuned(folder, before):
    """A fine-tuned run, whose first checkpoint is of a step that changed nothing."""
    config = recipe(folder, init_from=str(before), checkpoint_every_steps=1)
    config.checkpoints_kept = 5
    config.optimizer.warmup_steps = 1  # the first step's learning rate is 0
    config.optimizer.image_layer_decay = 0.5
    return folder / "tuned", train.run(config, folder / "tuned")


def test_it_starts_as_the_zero_shot_classifier(tuned, before):
    model = unicl_jax.load(before)
    templates = data.load_templates("short")
    names = ["red", "green", "blue"]
    texts = [[t.format(name) for t in templates] for name in names]
    units = np.stack([np.asarray(model.encode_text(each)).mean(0) for each in texts])
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    saved = tiny_run.saved(tuned[0], 1)
    vectors = saved["['params']['objective']['label_embedding']"]
    np.testing.assert_allclose(vectors, units, atol=1e-6)
    towers = tiny_run.saved(before)
    for path, array in towers.items():
        if "params']['image'" in path or "params']['text'" in path:
            np.testing.assert_array_equal(saved[path], array, err_msg=path)


def test_the_tower_learns_and_the_text_tower_stays(tuned):
    first, last = (tiny_run.saved(tuned[0], step) for step in (1, 4))
    changed = {k for k in first if (first[k] != last[k]).any()}
    assert any(".params['image']" in k or "params']['image'" in k for k in changed)
    assert any("label_embedding" in k for k in changed)
    assert not any("params']['text" in k for k in changed)


def test_the_test_set_is_measured_once_at_the_end(tuned):
    rows = tiny_run.rows(tuned[0])
    at = {
        k: [r["step"] for r in rows if f"eval/{k}_top1" in r]
        for k in ("validation", "test")
    }
    assert at == {"validation": [2, 4], "test": [4]}
    assert {"eval/validation_top1", "eval/test_top1"} <= tuned[1].keys()


def test_its_loss_is_cross_entropy_of_scaled_cosines(folder):
    """By the formula, and what evaluations compare is what it learns."""
    rng = np.random.default_rng(0)
    u, v = (rng.normal(size=(n, 4)).astype("f4") for n in (5, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    labels = jnp.array([0, 2, 1, 1, losses.NO_LABEL])

    class Forward:
        own = {"label_embedding": jnp.asarray(v)}
        mixture = None

        def image(self):
            return jnp.asarray(u)

        def logit_scale(self):
            return jnp.float32(7.0)

    Forward.labels = labels
    objective = objectives.make_objective("cosine_cross_entropy", None)
    rows, metrics = objective.loss(Forward())
    logits = 7.0 * u @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T
    want = jax.nn.logsumexp(logits, axis=1) - logits[range(5), labels]
    np.testing.assert_allclose(rows[:4], want[:4], rtol=1e-5)
    assert rows[4] == 0  # a caption is of no class
    hits = logits.argmax(1) == np.asarray(labels)
    np.testing.assert_allclose(metrics["train_top1"], hits.mean())
    np.testing.assert_allclose(
        objective.concepts({"objective": Forward.own}),
        v / np.linalg.norm(v, axis=1, keepdims=True),
        rtol=1e-6,
    )


def test_prompts_need_a_text_tower_that_learnt(folder, tmp_path):
    supervised = recipe(folder, objective="cross_entropy", classes_from_prompts=False)
    train.run(supervised, tmp_path / "supervised")
    config = recipe(folder, init_from=str(tmp_path / "supervised"))
    with pytest.raises(InputError, match="needs a text tower that learnt.*has none"):
        train.run(config, tmp_path / "x")
    with pytest.raises(InputError, match="needs a text tower that learnt"):
        train.run(recipe(folder), tmp_path / "x")
    config = recipe(folder, objective="cross_entropy")
    with pytest.raises(
        InputError, match='for objectives with a vector.*"cross_entropy"'
    ):
        train.run(config, tmp_path / "x")


# --- Parts of a source.


def source(**more):
    return data.make_source("s", more, 32, train=True)


QUICKSTART = dict(format="quickstart", path="fashion_mnist", kind="image_label")


def test_a_fifth_of_every_class_is_for_validation():
    whole = source(**QUICKSTART)
    parts = [source(**QUICKSTART, part=part) for part in ("train", "validation")]
    assert [len(x) for x in parts] == [3200, 800] and len(whole) == 4000
    counts = [np.bincount(x.labels, minlength=10) for x in (whole, *parts)]
    np.testing.assert_array_equal(counts[2], np.ceil(0.2 * counts[0]))
    np.testing.assert_array_equal(counts[1] + counts[2], counts[0])
    hashes = [{x.tobytes() for x in part.images} for part in parts]
    assert not hashes[0] & hashes[1]
    assert parts[0].fingerprint() != parts[1].fingerprint()
    evaluated = data.make_source("s", {**QUICKSTART, "part": "validation"}, 32, False)
    np.testing.assert_array_equal(evaluated.images, parts[1].images)


def test_the_first_records_of_each_class_are_those_of_elevaters_rule():
    labels = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0, 1])
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(3, -1)
    whole = ArraySource("s", images, labels=labels, class_names=("a", "b"))
    held, rest = (part_of(whole, part) for part in ("validation", "train"))
    # ceil(0.2 * 3) of class 0, ceil(0.2 * 7) of class 1.
    assert held.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert rest.images[:, 0, 0, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    learnt, chosen_on = elevater.split(labels)
    np.testing.assert_array_equal(images[chosen_on], held.images)
    np.testing.assert_array_equal(images[learnt], rest.images)


def test_parts_of_a_folder_are_its_pictures(tmp_path):
    from PIL import Image

    for c, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (32, 32), (100 * c, 10 * i, 0)).save(
                tmp_path / name / f"{i}.png"
            )
    fields = dict(format="folder", path=str(tmp_path), kind="image_label")
    held, rest = (
        data.make_source("s", {**fields, "part": part}, 32, train=False)
        for part in ("validation", "train")
    )
    (rows,) = held.stream([Request(np.arange(2), np.zeros(2, np.uint32))])
    assert len(held) == 2 and len(rest) == 8
    assert rows.labels.tolist() == [0, 1] and rows.images[:, 0, 0, 1].tolist() == [0, 0]
    (rows,) = rest.stream([Request(np.array([0, 7]), np.zeros(2, np.uint32))])
    assert rows.images[:, 0, 0, 1].tolist() == [10, 40]
    assert held.fingerprint() != rest.fingerprint()


def test_parts_that_cannot_be_are_refused():
    whole = source(**QUICKSTART)
    with pytest.raises(InputError, match='part.*"test"'):
        part_of(whole, "test")
    captions = source(
        **dict(format="quickstart", path="emoji_captions", kind="image_text")
    )
    with pytest.raises(InputError, match=r'labels that are known.*split="train\[:80%'):
        part_of(captions, "train")


@pytest.mark.parametrize("variant", ["", "random_head", "own_data", "paper"])
def test_the_recipes_are_sound(variant):
    config = runpy.run_path("configs/finetune.py")["get_config"](variant)
    config.init_from = "runs/quickstart"
    validation.validate(config, 1)
    objectives.check(config)
    assert config.classes_from_prompts == (variant != "random_head")
    assert config.evaluations.test.at_end
    assert not config.evaluations.validation.get("at_end")
    (train_source,) = config.data.sources.values()
    train_source.path = "elsewhere"
    if variant != "random_head" and variant:
        assert config.evaluations.validation.path == "elsewhere"
