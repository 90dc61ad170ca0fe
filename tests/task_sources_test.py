"""Data of tasks as it lies on disk: TFDS, CLIP_benchmark's shards, folders, tables."""

import json

import numpy as np
import pytest

from tests.real_files import example, write_tfrecord
from tests.task_files import (
    SIZE,
    WHOLE,
    Image,
    elevater,
    fashion,
    png,
    rows_of,
    write_tfds,
    write_wds,
)
from unicl_jax.data import quickstart
from unicl_jax.errors import InputError
from unicl_jax.evaluation.suites import load_tasks
from unicl_jax.evaluation.tasks import Missing


def emoji_folder(root, names):
    """Class folders of real drawings, called in upper case with "_" for spaces."""
    images, labels, subgroups = quickstart.evaluation_set("twemoji_subgroups")
    for name in names:
        folder = root / name.upper().replace(" ", "_")
        folder.mkdir(parents=True)
        for i in np.flatnonzero(labels == subgroups.index(name))[:4]:
            (folder / f"{i:05d}.png").write_bytes(png(images[i]))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_class_folders_are_joined_by_name_in_any_order(tmp_path, order):
    names = ["animal bug", "face smiling", "sky & weather"]
    emoji_folder(tmp_path / "emoji" / "test", names)
    names = [names[i] for i in order]
    row = {"name": "emoji", "class_names": names, "templates": "short"}
    (task,) = load_tasks([row], "mine", "mine.toml")
    source = task.open("test", str(tmp_path), SIZE, WHOLE)
    rows = rows_of(source)
    assert source.class_names == tuple(names) == task.class_names
    assert len(source) == 12
    images, labels, subgroups = quickstart.evaluation_set("twemoji_subgroups")
    for i in range(12):
        shown = source.where(i).rsplit("/", 2)[1].lower().replace("_", " ")
        assert task.class_names[rows.labels[i]] == shown
        index = int(source.where(i)[-9:-4])
        assert subgroups[labels[index]] == shown
        np.testing.assert_array_equal(rows.images[i], images[index])
    assert task.splits(str(tmp_path)) == ("test",)
    with pytest.raises(Missing, match="no train data at .*emoji/train"):
        task.open("train", str(tmp_path), SIZE)


def test_a_folder_that_is_no_class_is_told(tmp_path):
    emoji_folder(tmp_path / "emoji" / "test", ["animal bug", "face smiling"])
    row = {
        "name": "emoji",
        "class_names": ["animal bug", "face smile"],
        "templates": "short",
    }
    (task,) = load_tasks([row], "mine", "mine.toml")
    with pytest.raises(InputError, match='"FACE SMILING" in .*emoji are not; rename'):
        task.open("test", str(tmp_path), SIZE)


def test_prepared_folders_and_numbered_labels(tmp_path):
    from unicl_jax.prepare import main

    images, classes, names = fashion(6)
    names = [*reversed(names)]
    for i, (image, shown) in enumerate(zip(images, classes, strict=True)):
        folder = tmp_path / "raw" / shown
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(image))
    out = tmp_path / "one" / "test"
    path = f"--path={tmp_path}/raw"
    assert not main(["--format=folder", "--kind=image_label", path, f"--out={out}"])
    row = {"class_names": names, "templates": "short"}
    (task,) = load_tasks([{**row, "name": "one"}], "mine", "mine.toml")
    source = task.open("test", str(tmp_path), SIZE, WHOLE)
    found = [task.class_names[i] for i in rows_of(source).labels]
    assert sorted(found) == sorted(classes)
    # TFRecords have numbers alone, and shards without names, too.
    records = [
        example(image=png(x), label=names.index(c))
        for x, c in zip(images, classes, strict=True)
    ]
    (tmp_path / "two").mkdir()
    write_tfrecord(tmp_path / "two" / "test-0.tfrecord", records)
    place = {"format": "tfrecord", "path": "two"}
    rows = [
        {**row, "name": "two", "where": [{**place, **more}]}
        for more in ({}, {"order": names})
    ]
    first, second = (load_tasks([row], "mine", "mine.toml")[0] for row in rows)
    with pytest.raises(InputError, match="told by name.*set `order`"):
        first.open("test", str(tmp_path), SIZE)
    labels = rows_of(second.open("test", str(tmp_path), SIZE)).labels
    assert [task.class_names[i] for i in labels] == classes
    write_wds(tmp_path / "three", "test", [{"png": png(images[0]), "cls": b"0"}] * 2)
    (task,) = load_tasks([{**row, "name": "three"}], "mine", "mine.toml")
    with pytest.raises(InputError, match="there is no classnames.txt in .*three"):
        task.open("test", str(tmp_path), SIZE)


def test_a_prepared_tfds_dataset_is_found_and_joined_by_name(tmp_path):
    images, classes, names = fashion(8)
    shuffled = ["truck", *elevater("cifar10").class_names[:-1]]
    wanted = dict(zip(names, elevater("cifar10").class_names, strict=True))
    examples = [
        {"id": str(i), "image": image, "label": wanted[shown]}
        for i, (image, shown) in enumerate(zip(images, classes, strict=True))
    ]
    write_tfds(tmp_path / "tensorflow_datasets", "cifar10", "test", examples, shuffled)
    task = elevater("cifar10")
    assert task.splits(str(tmp_path)) == ("test",)
    source = task.open("test", str(tmp_path), SIZE, WHOLE)
    rows = rows_of(source)
    assert [task.class_names[i] for i in rows.labels] == [wanted[c] for c in classes]
    np.testing.assert_array_equal(rows.images, images)
    with pytest.raises(Missing, match="no train data"):
        task.open("train", str(tmp_path), SIZE)
    # Nothing is found where it is not.
    assert not task.splits(str(tmp_path / "elsewhere"))


def test_tfds_alone_is_looked_for_where_it_keeps_its_data(tmp_path, monkeypatch):
    image = np.zeros([28, 28, 1], np.uint8)
    write_tfds(tmp_path, "mnist", "test", [{"image": image, "label": 3}])
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert rows_of(elevater("mnist").open("test", None, SIZE)).labels.tolist() == [3]


@pytest.mark.parametrize("shift", [0, 3])
def test_clip_benchmarks_shards_are_joined_by_their_class_names(tmp_path, shift):
    images, classes, names = fashion()
    task = elevater("cifar10")
    wanted = dict(zip(names, task.class_names, strict=True))
    order = [*task.class_names[shift:], *task.class_names[:shift]]
    members = [
        {"webp": png(x), "cls": str(order.index(wanted[c])).encode()}
        for x, c in zip(images, classes, strict=True)
    ]
    write_wds(tmp_path / "wds_vtab-cifar10", "test", members, order)
    source = task.open("test", str(tmp_path), SIZE, WHOLE)
    rows = rows_of(source)
    assert [task.class_names[i] for i in rows.labels] == [wanted[c] for c in classes]
    np.testing.assert_array_equal(rows.images, images)


ROW = {"name": "plain", "class_names": "imagenet", "templates": "short"}
WDS = {"format": "webdataset", "path": "wds_imagenet1k"}


def test_imagenets_shards_go_by_synset_order_and_its_names_are_checked(tmp_path):
    task = elevater("imagenet")
    clip = ["missile" if n == "projectile" else n for n in task.class_names]
    clip = ["sunglasses" if n == "dark glasses" else n for n in clip]
    images, _, _ = fashion(4)
    labels = (744, 657, 0, 999)
    members = [
        {"webp": png(x), "cls": str(label).encode()}
        for x, label in zip(images, labels, strict=True)
    ]
    folder = tmp_path / "wds_imagenet1k"
    write_wds(folder, "test", members, clip)
    rows = rows_of(task.open("test", str(tmp_path), SIZE))
    assert tuple(rows.labels) == labels
    plain = load_tasks([{**ROW, "where": [WDS]}], "mine", "mine.toml")[0]
    with pytest.raises(InputError, match='are called "missile"; .*`order`'):
        plain.open("test", str(tmp_path), SIZE)
    write_wds(folder, "test", members, [*clip[1:], clip[0]])
    with pytest.raises(InputError, match="must name the classes in the order"):
        task.open("test", str(tmp_path), SIZE)


def test_labels_of_a_table_and_of_an_npz_are_joined_by_name(tmp_path):
    images, _, _ = fashion(4)
    folder = tmp_path / "hateful_memes"
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(png(image))
    (folder / "test.csv").write_text(
        "image,label\n0.png,hateful\n1.png,not_hateful\n2.png,1\n3.png,0\n"
    )
    task = elevater("hateful_memes")
    rows = rows_of(task.open("test", str(tmp_path), SIZE))
    assert rows.labels.tolist() == [1, 0, 1, 0]
    with open(folder / "val.csv", "w") as file:
        file.write("image,label\n0.png,hateful\n1.png,spiteful\n")
    with pytest.raises(InputError, match='"spiteful" in .*val.csv is not'):
        task.open("val", str(tmp_path), SIZE)
    np.savez(
        folder / "train.npz",
        images=images,
        labels=np.array([0, 1, 1, 0]),
        class_names=np.array(["hateful", "not hateful"]),
    )
    rows = rows_of(task.open("train", str(tmp_path), 16))
    assert rows.labels.tolist() == [1, 0, 0, 1] and rows.images.shape[1] == 16
    (tmp_path / "voc2007").mkdir()
    np.savez(
        tmp_path / "voc2007" / "test.npz",
        images=images,
        labels=np.eye(4, 3, dtype=np.int64),
        class_names=np.array(["dog", "cat", "bus"]),
    )
    task = elevater("voc2007")
    rows = rows_of(task.open("test", str(tmp_path), SIZE))
    assert rows.labels.shape == (4, 20) and rows.labels.sum() == 3
    keys = [task.class_keys[i] for i in rows.labels[:3].argmax(1)]
    assert keys == ["dog", "cat", "bus"]


def test_splits_are_told_by_dataset_info_not_by_the_folder(tmp_path):
    folder = tmp_path / "dtd" / "3.0.1"
    folder.mkdir(parents=True)
    info = {"splits": [{"name": "train"}, {"name": "validation"}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert elevater("dtd").splits(str(tmp_path)) == ("train", "val")
    newer = tmp_path / "dtd" / "10.0.0"
    newer.mkdir()
    info = {"splits": [{"name": "test"}]}
    (newer / "dataset_info.json").write_text(json.dumps(info))
    assert elevater("dtd").find("test", str(tmp_path)).path == str(newer)
    assert elevater("dtd").find("train", str(tmp_path)).path == str(folder)
    (newer / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="must say the splits of a prepared TFDS"):
        elevater("dtd").find("train", str(tmp_path))


@pytest.mark.parametrize("pct, zoom", [(224 / 256, 256 / 224), (1, 1)])
def test_how_much_of_the_margin_is_cropped(tmp_path, pct, zoom):
    image = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (60, 1)) * 2)
    image = image.convert("RGB")
    folder = tmp_path / "mnist" / "test" / "3"
    folder.mkdir(parents=True)
    image.save(folder / "0.png")
    cut = {"name": "center", "crop_pct": pct}
    source = elevater("mnist").open("test", str(tmp_path), 30, cut)
    short = int(30 * zoom)
    wide = image.resize((short * 90 // 60, short), Image.Resampling.BICUBIC)
    left, top = round((wide.width - 30) / 2), round((short - 30) / 2)
    crop = wide.crop((left, top, left + 30, top + 30))
    np.testing.assert_array_equal(rows_of(source).images[0], np.asarray(crop))
