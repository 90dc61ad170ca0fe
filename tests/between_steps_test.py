"""Evaluations of a config that are not zero-shot, or are a suite's tasks."""

import numpy as np
import pytest
import tiny_run

import unicl_jax
from unicl_jax import objectives, train
from unicl_jax.errors import InputError
from unicl_jax.evaluation import retrieval
from unicl_jax.evaluation.knn import knn
from unicl_jax.evaluation.probe import linear_probe
from unicl_jax.validation import validate

TASK = """
title = "squares"

[[task]]
name = "squares"
title = "Squares"
metric = "mean_per_class"
class_names = ["red", "green", "blue"]
templates = "short"
where = [{{ format = "npz", path = "{folder}/squares", train = "", val = "" }}]
"""


def labelled(folder, **more):
    return dict(format="npz", path=str(folder / "labelled.npz"), **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an evaluation of every protocol: its data, workdir and scores."""
    folder = tiny_run.write(tmp_path_factory.mktemp("between"))
    with np.load(folder / "labelled.npz") as arrays:
        (folder / "squares").mkdir()
        few = {**arrays, "images": arrays["images"][:7], "labels": arrays["labels"][:7]}
        np.savez(folder / "squares" / "test.npz", **few)
    (folder / "squares.toml").write_text(TASK.format(folder=folder))
    config = tiny_run.config(folder)
    other = labelled(folder, templates="short", kind="image_label")
    with np.load(folder / "captioned.npz") as arrays:
        images, labels = arrays["images"], np.arange(24)[::-1] % 3
        names = ["red", "green", "blue"]
        np.savez(folder / "new.npz", images=images, labels=labels, class_names=names)
    new = {**labelled(folder), "path": str(folder / "new.npz")}
    config.evaluations.near = {**new, "protocol": "knn", "train": labelled(folder)}
    config.evaluations.probe = {
        **new,
        "protocol": "linear_probe",
        "train": labelled(folder),
    }
    config.evaluations.found = dict(
        format="npz", path=str(folder / "captioned.npz"), protocol="retrieval"
    )
    config.evaluations.of_suite = dict(task=f"{folder}/squares.toml/squares")
    config.evaluations.zero = other
    validate(config, 1)
    workdir = folder / "run"
    scores = train.run(config, workdir)
    return folder, workdir, scores


@pytest.fixture(scope="module")
def embedded(run):
    """Unit features of the two files by the trained model, and labels of the first."""
    model = unicl_jax.load(run[1])
    with np.load(run[0] / "labelled.npz") as known, np.load(run[0] / "new.npz") as new:
        u = np.asarray(model.encode_image(known["images"]))
        v = np.asarray(model.encode_image(new["images"]))
        return model, u, known["labels"], v, new["labels"]


def test_knn_and_probe_score_as_on_the_saved_model(run, embedded):
    _, known, known_labels, new, labels = embedded
    found = knn(known, known_labels, new, k=20, classes=3).argmax(1)
    assert run[2]["eval/near_top1"] == pytest.approx((found == labels).mean())
    found = linear_probe(known, known_labels, new, labels, classes=3)
    assert run[2]["eval/probe_top1"] == pytest.approx(found.selected, abs=1 / 24)


def test_retrieval_scores_as_on_the_saved_model(run, embedded):
    model, *_ = embedded
    with np.load(run[0] / "captioned.npz") as arrays:
        images = np.asarray(model.encode_image(arrays["images"]))
        texts = np.asarray(model.encode_text(arrays["texts"].tolist()))
    found = retrieval.retrieval(images, texts, np.arange(24)).metrics
    for metric in ("image_to_text_r1", "text_to_image_r10"):
        assert run[2][f"eval/found_{metric}"] == pytest.approx(found[metric])
    assert not any("median" in key for key in run[2])


def test_a_suites_task_has_the_suites_metric(run):
    for row in tiny_run.rows(run[1]):
        if "eval/of_suite_top1" in row:
            # Of 7 records 3, 2, 2 are of each class.
            share = row["eval/of_suite_mean_per_class"]
            assert any(
                np.isclose(share, (a / 3 + b / 2 + c / 2) / 3)
                and np.isclose(row["eval/of_suite_top1"], (a + b + c) / 7)
                for a in range(4)
                for b in range(3)
                for c in range(3)
            )
            break
    else:
        raise AssertionError("never evaluated")


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(protocol="kn"), 'did you mean "knn"'),
        (dict(protocol="knn"), "must say train"),
        (dict(task="squares"), '"suite/task"'),
        (dict(task="ofline/x"), 'did you mean "offline"'),
        (dict(task="offline/fashion"), 'did you mean "fashion_mnist"'),
        (dict(task="offline/twemoji_captions"), "retrieval cannot be judged"),
        (dict(task="elevater20/dtd", data_dir="/nowhere"), "tfds build dtd"),
        (dict(task="offline/fashion_mnist", fields=dict(image="x")), 'has no "fields"'),
    ],
)
def test_wrong_fields_are_answered(run, tmp_path, fields, said):
    config = tiny_run.config(run[0])
    given = fields if "task" in fields else labelled(run[0], **fields)
    config.evaluations.held_out = given
    with pytest.raises(InputError, match=said):
        train.run(config, tmp_path / "run")


def test_several_labels_are_hit_by_any_of_them_and_not_probed_by_accuracy(
    run, tmp_path
):
    path, labels = tmp_path / "real", np.eye(3, dtype=np.uint8)[np.arange(9) % 3]
    path.mkdir()
    labels[0], labels[1] = 0, 1
    images = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3)).astype(np.uint8)
    names = np.array(["red", "green", "blue"])
    for split in ("train", "test"):
        np.savez(path / f"{split}.npz", images=images, labels=labels, class_names=names)
    suite = tmp_path / "own.toml"
    suite.write_text(
        '[[task]]\nname = "real"\nkind = "multi_label"\ntemplates = ["{}"]\n'
        'class_names = ["red", "green", "blue"]\n'
    )
    config = tiny_run.config(run[0])
    config.evaluations = dict(
        real=dict(task=f"{suite}/real", data_dir=str(tmp_path), protocol="linear_probe")
    )
    with pytest.raises(InputError, match="needs a metric of them"):
        train.run(config, tmp_path / "run")
    config.evaluations.real.protocol = "zero_shot"
    config.total_steps = 3
    scores = train.run(config, tmp_path / "again")
    assert scores["eval/real_accuracy"] * 8 == pytest.approx(
        round(scores["eval/real_accuracy"] * 8)
    )
    assert scores["eval/real_accuracy"] >= 1 / 8  # the record of all classes


def test_what_learns_no_names_can_be_probed(run):
    config = tiny_run.config(run[0])
    config.objective, config.views = "supcon", 2
    del config.data.sources["captioned"]
    with pytest.raises(InputError, match="held_out are not"):
        objectives.check(config)
    config.evaluations.held_out.protocol = "knn"
    objectives.check(config)
    config.objective, config.views = "linear_text", 1
    config.evaluations.held_out.protocol = "retrieval"
    with pytest.raises(InputError, match="teaches no text tower"):
        objectives.check(config)
