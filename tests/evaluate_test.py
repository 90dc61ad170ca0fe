"""`python -m unicl_jax.evaluate`: suites on a tiny model, stopped and resumed."""

import csv
import errno
import json

import jax
import numpy as np
import pytest
import tiny_run
from PIL import Image

import unicl_jax
from unicl_jax import evaluate, model, train
from unicl_jax.data.arrays import ArraySource
from unicl_jax.data.records import Rows, Skip
from unicl_jax.errors import InputError
from unicl_jax.evaluation import features, results
from unicl_jax.evaluation.embedder import Embedder

SUITE = """
title = "squares"

[[task]]
name = "squares"
title = "Squares"
metric = "accuracy"
class_names = ["red", "green", "blue"]
templates = "short"
where = [{{ format = "npz", path = "{folder}/squares", val = "" }}]

[[task]]
name = "gone"
title = "Not there"
metric = "mean_per_class"
class_names = ["a", "b"]
templates = ["{{}}"]
how = "draw them, and put them into {{data_dir}}/gone"
where = [{{ format = "folder", path = "gone" }}]

[[task]]
name = "captions"
title = "Captions"
kind = "retrieval"
where = [{{ format = "npz", path = "{folder}/captions", train = "", val = "" }}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, and a suite of its data: (workdir, suite's path, last scores)."""
    folder = tiny_run.write(tmp_path_factory.mktemp("evaluate"))
    workdir = folder / "run"
    scores = train.run(tiny_run.config(folder), workdir)
    with np.load(folder / "labelled.npz") as arrays:
        for split in ("train", "test"):
            path = folder / "squares" / f"{split}.npz"
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **arrays)
    with np.load(folder / "captioned.npz") as arrays:
        (folder / "captions").mkdir()
        np.savez(folder / "captions" / "test.npz", **arrays)
    suite = folder / "squares.toml"
    suite.write_text(SUITE.format(folder=folder))
    return workdir, suite, scores


def call(run, out, *options):
    workdir, suite, _ = run
    return evaluate.main(
        [f"--checkpoint={workdir}", f"--suite={suite}", f"--out={out}", *options]
    )


def test_a_suite_is_scored_as_training_scores_it_and_says_what_is_missing(
    run, tmp_path, capsys
):
    assert call(run, tmp_path, "--data_dir=/nowhere") == 1  # a task is missing
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "put them into /nowhere/gone" in printed.replace("\n", " ")
    found = json.loads((tmp_path / "results.json").read_text())
    squares = found["tasks"]["squares"]["protocols"]
    scores = run[2]
    assert squares["zero_shot"]["score"] == scores["eval/held_out_top1"]
    assert f"{100 * squares['zero_shot']['score']:.1f}" in printed
    assert found["tasks"]["gone"]["missing"]["how"].endswith("/nowhere/gone.")
    assert not found["tasks"]["gone"]["protocols"]
    recall = found["tasks"]["captions"]["protocols"]["retrieval"]
    assert 0 <= recall["metrics"]["image_to_text_r1"] <= 1
    assert found["model"]["step"] == 6
    with open(tmp_path / "results.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "top1"]
    assert {row["protocol"] for row in rows} >= {"zero_shot", "linear_probe"}
    assert all(row["records"] == "24" for row in rows)


def test_every_protocol_leaves_what_a_report_reads(run, tmp_path):
    call(run, tmp_path, "--task=squares,captions")
    folder = tmp_path / "tasks" / "squares"
    for protocol in ("zero_shot", "linear_probe"):
        told = json.loads((folder / f"{protocol}.json").read_text())
        assert len(told["per_class"]) == len(told["class_names"]) == 3
        assert sum(told["per_class_records"]) == 24
        wrong = sum(pair["count"] for pair in told["confusions"])
        assert wrong == round(24 * (1 - told["metrics"]["top1"]))
        with np.load(folder / f"{protocol}.npz") as arrays:
            hits = arrays["predictions"][:, 0] == arrays["labels"]
            assert hits.mean() == told["metrics"]["top1"]
    assert told["best_test_epoch"]["score"] >= told["selected"]
    shown = json.loads((tmp_path / "tasks/captions/retrieval.json").read_text())
    with np.load(tmp_path / "tasks/captions/thumbnails.npz") as pictures:
        there = set(pictures["index"].tolist())
        assert len(pictures["images"]) == len(there)
    for example in shown["examples"]["text_to_image"]:
        assert there >= {image["image"] for image in example["images"]}


def test_what_is_done_is_not_done_again_and_changed_data_is(run, tmp_path, monkeypatch):
    options = ("--task=squares", "--protocol=zero_shot")
    assert call(run, tmp_path, *options) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    embedded = []
    embed = Embedder.images

    def counted(self, pixels):
        embedded.append(len(pixels))
        return embed(self, pixels)

    monkeypatch.setattr(Embedder, "images", counted)
    assert call(run, tmp_path, *options) == 0
    assert not embedded
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["tasks"] == first["tasks"]
    # What one task was scored on may change; so do its features.
    path = run[1].parent / "squares" / "test.npz"
    whole = path.read_bytes()
    with np.load(path) as arrays:
        changed = {**arrays, "labels": np.roll(arrays["labels"], 1)}
    np.savez(path, **changed)
    try:
        assert call(run, tmp_path, *options) == 0
        assert embedded == [24]
        third = json.loads((tmp_path / "results.json").read_text())
        assert third["tasks"]["squares"] != first["tasks"]["squares"]
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("change", ["picture", "squash"])
def test_a_mended_picture_and_another_crop_are_seen(run, tmp_path, monkeypatch, change):
    model = unicl_jax.load(run[0])
    model.crop_pct = 1.0
    monkeypatch.setattr(evaluate, "_load", lambda options: model)
    suite = tmp_path / "own.toml"
    row = '[[task]]\nname = "own"\nclass_names = ["red", "blue"]\ntemplates = ["{}"]\n'
    suite.write_text(row)
    for name in ("red", "blue"):
        path = tmp_path / "data/own/test" / name / "a.png"
        path.parent.mkdir(parents=True)
        picture = np.zeros((20, 40, 3), np.uint8)
        picture[:, :20] = 255
        Image.fromarray(picture).save(path)
    options = [f"--suite={suite}", f"--data_dir={tmp_path / 'data'}"]
    options = [f"--checkpoint={run[0]}", *options, "--protocol=zero_shot"]

    def embedded():
        assert evaluate.main([*options, f"--out={tmp_path / 'out'}"]) == 0
        kept = features.read(tmp_path / "out/tasks/own/features_test.npz")
        return kept.image[kept.label == 0]

    first = embedded()
    np.testing.assert_array_equal(embedded(), first)
    if change == "picture":
        Image.new("RGB", (20, 40), "red").save(tmp_path / "data/own/test/red/a.png")
    else:
        suite.write_text(row + "squash = true\n")
    assert np.abs(embedded() - first).max() > 1e-3


def test_an_extraction_that_is_killed_goes_on_with_the_parts_it_has(
    run, tmp_path, monkeypatch
):
    embedder = Embedder(unicl_jax.load(run[0]), batch_size=4)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (50, 16, 16, 3), dtype=np.uint8)
    source = ArraySource("x", images, labels=np.arange(50) % 3, class_names="abc")
    whole = features.extract(embedder, source, tmp_path / "whole.npz")
    monkeypatch.setattr(features, "PART", 16)
    monkeypatch.setattr(features, "ROWS", 8)

    class Killed(BaseException):
        pass

    def kill(done, of):
        if done >= 40:
            raise Killed

    path, told = tmp_path / "features.npz", []
    with pytest.raises(Killed):
        features.extract(embedder, source, path, kill)
    assert not path.exists()
    found = features.extract(embedder, source, path, lambda *x: told.append(x))
    assert told == [(32, 50), (40, 50), (48, 50), (50, 50)]
    np.testing.assert_array_equal(found.index, np.arange(50))
    np.testing.assert_array_equal(found.label, np.arange(50) % 3)
    np.testing.assert_allclose(found.image, whole.image, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.npz", "whole.npz"]


def test_a_damaged_part_is_embedded_again(run, tmp_path, monkeypatch):
    embedder = Embedder(unicl_jax.load(run[0]), batch_size=4)
    images = np.zeros((24, 16, 16, 3), np.uint8)
    source = ArraySource("x", images, labels=np.arange(24) % 3, class_names="abc")
    monkeypatch.setattr(features, "PART", 8)
    monkeypatch.setattr(features, "ROWS", 8)

    class Killed(BaseException):
        pass

    def kill(done, of):
        if done == of:
            raise Killed

    path, told = tmp_path / "features.npz", []
    with pytest.raises(Killed):
        features.extract(embedder, source, path, kill)
    (tmp_path / "features.parts" / "00001.npz").write_bytes(b"PK\x03\x04 cut off")
    found = features.extract(embedder, source, path, lambda *x: told.append(x))
    assert told == [(8, 24), (16, 24), (24, 24)]
    np.testing.assert_array_equal(found.index, np.arange(24))


def test_records_that_cannot_be_read_are_no_rows(run, tmp_path):
    class Holey(ArraySource):
        def stream(self, requests):
            for request, rows in zip(*self._two(requests), strict=True):
                bad = tuple(Skip(i, i, "damaged") for i in (3, 4) if i in request[0])
                yield Rows(*rows[:3], bad)

        def _two(self, requests):
            requests = list(requests)
            return requests, super().stream(requests)

    images = np.zeros((9, 16, 16, 3), np.uint8)
    source = Holey("x", images, labels=np.arange(9) % 3, class_names="abc")
    embedder = Embedder(unicl_jax.load(run[0]))
    found = features.extract(embedder, source, tmp_path / "features.npz")
    assert found.index.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert found.label.tolist() == [0, 1, 2, 2, 0, 1, 2]


def test_devices_change_nothing(run):
    model = unicl_jax.load(run[0])
    embedder = Embedder(model, batch_size=16)
    assert embedder.mesh.size == jax.local_device_count() > 1
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (21, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        embedder.images(images), model.encode_image(images, normalize=False), atol=1e-6
    )
    texts = ["red", "a green square, number 7", "red", "blue"]
    np.testing.assert_allclose(
        embedder.texts(texts), model.encode_text(texts), atol=1e-6
    )


def test_another_model_is_refused_before_it_overwrites(run, tmp_path):
    call(run, tmp_path, "--task=squares", "--protocol=zero_shot")
    before = (tmp_path / "results.json").read_bytes()
    found = json.loads(before)
    found["model"]["digest"] = "other"
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert call(run, tmp_path, "--task=squares") == evaluate.BAD_INPUT
    (tmp_path / "results.json").write_bytes(before)
    assert call(run, tmp_path, "--task=squares", "--protocol=zero_shot") == 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["--task=sqares"], 'did you mean "squares"'),
        (["--protocol=zeroshot"], 'did you mean "zero_shot"'),
        (["--suite=ofline"], 'did you mean "offline"'),
        (["--checkpoint=/nowhere"], "is no file or folder"),
        (["picture.png"], "--names"),
        (["--names=/nowhere.txt", "picture.png"], "/nowhere.txt"),
        (["--task=squares", "--out={file}/x"], "name another folder with --out"),
    ],
)
def test_wrong_input_is_answered(run, tmp_path, capsys, options, said):
    options = [option.replace("{file}", str(run[1])) for option in options]
    assert call(run, tmp_path, *options) == evaluate.BAD_INPUT
    assert said in capsys.readouterr().err


def test_a_disk_that_is_full_is_said(run, tmp_path, monkeypatch, capsys):
    def full(*arguments, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert call(run, tmp_path, "--task=squares", "--protocol=zero_shot") > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot be written (No space left on device)" in said


def test_what_looks_like_markup_is_printed(run, tmp_path, capsys):
    assert call(run, tmp_path / "a[x] [/y]", "--task=gone,captions") == 1
    assert "a[x] [/y]" in capsys.readouterr().out.replace("\n", "")
    assert call(run, tmp_path / "b", "--task=gone", "--data_dir=/[x]/[/y]") == 1
    assert "/[x]/[/y]/gone" in capsys.readouterr().out.replace("\n", "")
    names, picture = tmp_path / "names.txt", tmp_path / "a[red].png"
    names.write_text("[red]\n[/green]\n")
    Image.new("RGB", (40, 30), "red").save(picture)
    options = [f"--checkpoint={run[0]}", f"--names={names}", str(picture)]
    assert evaluate.main(options) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a[red].png", "[red]", "[/green]"))


def test_a_protocol_that_cannot_be_done_says_why(run, tmp_path):
    call(run, tmp_path, "--task=captions", "--protocol=linear_probe,retrieval")
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]["captions"]
    assert found["skipped"] == {"linear_probe": "not for tasks of retrieval"}
    assert [*found["protocols"]] == ["retrieval"]


def test_pictures_are_named_out_of_a_text_file(run, tmp_path, capsys):
    names, picture = tmp_path / "names.txt", tmp_path / "red.png"
    names.write_text("red\ngreen\nblue\n")
    Image.new("RGB", (40, 30), "red").save(picture)
    options = [f"--checkpoint={run[0]}", f"--names={names}", str(picture)]
    assert evaluate.main(options) == 0
    printed = capsys.readouterr().out
    assert "red.png" in printed
    shares = [
        float(x.strip(",│ ")) for x in printed.split() if x.strip(",")[-1:].isdigit()
    ]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_a_suite_is_listed_without_a_model(run, capsys):
    assert evaluate.main([f"--suite={run[1]}", "--list"]) == 0
    assert "train, test" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([f"--suite={run[1]}"])
    assert "--checkpoint is required" in capsys.readouterr().err


def test_a_name_is_told_from_trained_weights(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model.is_random("swin_tiny") and not model.is_random("swin_tny")
    assert not model.is_random(run[0])
    (tmp_path / "swin_tiny").mkdir()
    assert not model.is_random("swin_tiny")


def test_results_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "results.json").write_text("{")
    for text in ("{", "3", '{"model": []}', '{"tasks": null}', '{"tasks": {"a": 3}}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match="delete it"):
            results.read_results(tmp_path)


def test_two_evaluations_are_not_at_work_in_one_folder(run, tmp_path, capsys):
    with results.held(tmp_path):
        assert call(run, tmp_path, "--task=squares") == evaluate.BAD_INPUT
    assert "another" in capsys.readouterr().err
    assert call(run, tmp_path, "--task=squares", "--protocol=zero_shot") == 0


def test_results_of_a_task_that_was_changed_are_not_shown_beside_new_ones(
    run, tmp_path
):
    suite, text = tmp_path / "squares.toml", run[1].read_text()
    options = [f"--checkpoint={run[0]}", f"--suite={suite}", "--task=squares"]
    options.append(f"--out={tmp_path / 'out'}")

    def shown(*more):
        assert evaluate.main([*options, *more]) == 0
        found = json.loads((tmp_path / "out/results.json").read_text())
        return {*found["tasks"]["squares"]["protocols"]}

    suite.write_text(text)
    shown("--protocol=zero_shot")
    assert shown("--protocol=knn", "--neighbors=3") == {"zero_shot", "knn"}
    assert shown("--protocol=zero_shot") == {"zero_shot", "knn"}
    suite.write_text(text.replace('"short"', '["{}"]'))
    assert shown("--protocol=knn") == {"knn"}


@pytest.mark.parametrize("how", ["damaged", "other"])
def test_thumbnails_that_are_damaged_or_of_other_data_are_drawn_anew(
    run, tmp_path, how
):
    assert call(run, tmp_path, "--task=captions") == 0
    path = tmp_path / "tasks/captions/thumbnails.npz"
    with np.load(path) as arrays:
        before = dict(arrays)
    path.write_bytes(path.read_bytes()[:99])
    if how == "other":
        np.savez(path, **before | dict(images=255 - before["images"], key="another"))
    (tmp_path / "tasks/captions/retrieval.json").unlink()
    assert call(run, tmp_path, "--task=captions") == 0
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["images"], before["images"])


def test_a_task_that_no_protocol_fits_has_no_score(run, tmp_path, capsys):
    assert call(run, tmp_path, "--task=captions", "--protocol=knn") == 1
    assert "captions has no score: knn: not for tasks" in capsys.readouterr().out


def test_a_probe_of_several_labels_has_one_map(run, tmp_path):
    suite, path = tmp_path / "s.toml", tmp_path / "several"
    suite.write_text(
        '[[task]]\nname = "several"\nkind = "multi_label"\nmetric = "map11"\n'
        'templates = ["{}"]\nclass_names = ["red", "green", "blue"]\n'
    )
    path.mkdir()
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        labels = (draw.random((24, 3)) < 0.5).astype(np.uint8)
        labels[np.arange(24), np.arange(24) % 3] = 1
        images = draw.integers(0, 150, (24, 16, 16, 3))
        images = (images + 60 * labels[:, None, None]).astype(np.uint8)
        names = np.array(["red", "green", "blue"])
        np.savez(path / f"{split}.npz", images=images, labels=labels, class_names=names)
    options = [f"--checkpoint={run[0]}", f"--suite={suite}", f"--data_dir={tmp_path}"]
    out = tmp_path / "out"
    assert evaluate.main([*options, f"--out={out}", "--protocol=linear_probe"]) == 0
    found = json.loads((out / "results.json").read_text())["tasks"]["several"]
    probe = found["protocols"]["linear_probe"]
    assert probe["score"] == pytest.approx(probe["metrics"]["map11"], abs=1e-9)
