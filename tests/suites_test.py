"""Suites and their rows: all of them read, counts as published, names joined by key."""

import collections
import random
from importlib import resources

import numpy as np
import pytest
from ml_collections import ConfigDict

from unicl_jax.data.labels import load_class_names
from unicl_jax.data.prompts import TEMPLATES
from unicl_jax.data.records import Request
from unicl_jax.data.synonyms import name_key
from unicl_jax.errors import InputError
from unicl_jax.evaluation.places import SPLITS
from unicl_jax.evaluation.suites import SUITES, load_suite, load_tasks
from unicl_jax.evaluation.tasks import METRICS, Missing

# Classes, templates, metric, and records of train, val, test: ELEVATER's registry.
ELEVATER = {
    "imagenet": (1000, 80, "accuracy", 0, 0, 50000),
    "caltech101": (102, 34, "mean_per_class", 3060, 0, 6084),
    "cifar10": (10, 18, "accuracy", 50000, 0, 10000),
    "cifar100": (100, 18, "accuracy", 50000, 0, 10000),
    "country211": (211, 5, "accuracy", 31650, 10550, 21100),
    "dtd": (47, 8, "accuracy", 1880, 1880, 1880),
    "eurosat": (10, 3, "accuracy", 5000, 5000, 5000),
    "fer2013": (7, 6, "accuracy", 28709, 3589, 3589),
    "fgvc_aircraft": (100, 2, "mean_per_class", 3334, 3333, 3333),
    "food101": (101, 1, "accuracy", 75750, 0, 25250),
    "gtsrb": (43, 3, "accuracy", 26640, 12569, 12630),
    "hateful_memes": (2, 1, "roc_auc", 8500, 0, 500),
    "kitti_distance": (4, 1, "accuracy", 6347, 423, 711),
    "mnist": (10, 1, "accuracy", 60000, 0, 10000),
    "flowers102": (102, 1, "mean_per_class", 1020, 1020, 6149),
    "oxford_pets": (37, 1, "mean_per_class", 3680, 0, 3669),
    "patch_camelyon": (2, 1, "accuracy", 262144, 32768, 32768),
    "rendered_sst2": (2, 1, "accuracy", 6920, 827, 1821),
    "resisc45": (45, 18, "accuracy", 3150, 3150, 25200),
    "stanford_cars": (196, 8, "accuracy", 8144, 0, 8041),
    "voc2007": (20, 1, "map11", 2501, 2510, 4952),
}
EXTRA = {
    "stl10": (10, 2),
    "sun397": (397, 2),
    "birdsnap": (500, 1),
    "ucf101": (101, 48),
    "clevr_counts": (8, 1),
    "kinetics700": (700, 28),
}
ALL = [task for suite in SUITES for task in load_suite(suite).tasks]


def test_elevater_is_as_published():
    found = {
        task.name: (
            *(task.num_classes, len(task.templates), task.metric),
            *(task.sizes.get(split, 0) for split in SPLITS),
        )
        for task in load_suite("elevater20").tasks
    }
    assert found == ELEVATER
    tasks = {task.name: task for task in load_suite("elevater20").tasks}
    assert [name for name, task in tasks.items() if task.squash] == ["kitti_distance"]
    multi = [name for name, task in tasks.items() if task.kind == "multi_label"]
    assert multi == ["voc2007"]


def test_clips_other_sets_are_as_published():
    found = {
        task.name: (task.num_classes, len(task.templates))
        for task in load_suite("clip_extra").tasks
    }
    assert found == EXTRA


def test_imagenet_suite_has_unicls_templates_and_the_subsets_of_200():
    tasks = {task.name: task for task in load_suite("imagenet").tasks}
    assert {t.templates for t in tasks.values()} == {TEMPLATES["unicl_81"]()}
    counts = {name: task.num_classes for name, task in tasks.items()}
    assert counts.pop("imagenet_a") == counts.pop("imagenet_r") == 200
    assert set(counts.values()) == {1000}
    assert tasks["imagenet_real"].kind == "multi_label"
    whole = dict(
        zip(
            tasks["imagenet"].class_keys,
            tasks["imagenet"].class_names,
            strict=True,
        )
    )
    # The list that sources have by the name "imagenet" is the same, in synset order.
    assert tuple(whole.values()) == load_class_names("test", "imagenet")
    assert [*whole] == sorted(whole)
    for name in ("imagenet_a", "imagenet_r"):
        task = tasks[name]
        names = [whole[key] for key in task.class_keys]
        assert [*task.class_names] == names, name
    assert whole["n01443537"] == "goldfish" and whole["n03773504"] == "missile"
    assert whole["n04008634"] == "projectile"


@pytest.mark.parametrize("task", ALL, ids=lambda task: f"{task.suite}/{task.name}")
def test_tasks_are_whole(task):
    assert task.title and task.where
    if task.kind == "retrieval":
        assert not task.class_names and not task.templates and not task.metric
        return
    assert task.metric in METRICS
    assert len(task.class_names) == len(task.class_keys) == task.num_classes >= 2
    # Two classes of one name would share a text: no model could tell them apart.
    twice = collections.Counter(map(name_key, task.class_names)).most_common(1)[0]
    assert twice[1] == 1, twice
    # Whatever order data has, a class is found by its key, its name or an alias.
    order = list(range(task.num_classes))
    random.Random(0).shuffle(order)
    for names in (task.class_keys, task.class_names):
        shuffled = [names[i] for i in order]
        assert task.join(shuffled).tolist() == order
    for alias, label in task.aliases.items():
        others = [task.class_keys[i] for i in order[:3] if i != label]
        assert task.join([alias, *others])[0] == label


def test_provisional_suites_say_why():
    for name in SUITES:
        suite = load_suite(name)
        is_guess = name in ("unicl14", "unicl18")
        assert bool(suite.provisional) == is_guess
        if is_guess:
            assert len(suite.tasks) == int(name[-2:])
            assert "not known" in suite.provisional
            by_name = {t.name: t for t in load_suite("elevater20").tasks}
            for task in suite.tasks:
                assert task.class_keys == by_name[task.name].class_keys


def test_every_file_has_its_source_and_is_used():
    used = {"class_names": set(), "templates": set()}
    for name in SUITES:
        text = (resources.files("unicl_jax.evaluation.suites") / f"{name}.toml").open()
        with text:
            for line in text:
                field, _, value = line.partition(" = ")
                if field in ("class_names", "classes"):
                    used["class_names"].add(value.strip().strip('"'))
                if field == "templates":
                    used["templates"].add(value.strip().strip('"'))
    for folder, names in used.items():
        files = resources.files("unicl_jax.evaluation.suites") / folder
        found = {file.name for file in files.iterdir()}
        assert "SOURCES.md" in found
        stems = {name.rsplit(".", 1)[0] for name in found} - {"SOURCES"}
        assert stems <= names


def _tfds_tasks():
    return [
        pytest.param(task, place, id=f"{task.suite}/{task.name}")
        for task in ALL
        for place in task.where
        if place.format == "tfds"
    ]


@pytest.mark.parametrize("task, place", _tfds_tasks())
def test_keys_are_the_labels_of_tfds(task, place, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="its labels are compared")
    if place.labels == "middle_frame":
        pytest.skip("its builder asks for ffmpeg's import, which takes long")
    info = tfds.builder(place.path, data_dir=tmp_path).info  # so much is there
    assert info.full_name.startswith(place.path + "/") or ":" in info.full_name
    if task.kind == "retrieval" or place.labels in ("nearest_vehicle", "count"):
        return
    feature = {
        "objects": lambda f: f["objects"]["label"],
        "real": lambda f: f["real_label"].feature,
    }.get(place.labels, lambda f: f["label"])(info.features)
    if task.name in ("cifar10", "cifar100", "stl10"):
        assert feature.num_classes == task.num_classes  # names come with the data
        return
    labels = task.join(feature.names)
    assert sorted(labels[labels >= 0].tolist()) == [*range(task.num_classes)]
    if task.name not in ("imagenet_a", "imagenet_r"):
        assert (labels >= 0).all()


def test_the_offline_suite_is_there_without_a_folder():
    for task in load_suite("offline").tasks:
        splits = task.splits(None)
        assert {s: len(task.open(s, None, 32)) for s in splits} == task.sizes
    tasks = {task.name: task for task in load_suite("offline").tasks}
    large = tasks["fashion_mnist"].open("test", None, 40)
    small = tasks["fashion_mnist"].open("test", None, 32)
    two = [next(s.stream([_ask(range(20))])) for s in (large, small)]
    assert two[0].images.shape == (20, 40, 40, 3)
    assert two[1].images.shape == (20, 32, 32, 3)
    assert two[0].labels.tolist() == two[1].labels.tolist()
    rows = next(tasks["twemoji_captions"].open("test", None, 32).stream([_ask([0])]))
    assert rows.texts[0][0] == "grinning face" and len(rows.texts[0]) == 5


def _ask(indices):
    indices = np.array(indices)
    return Request(indices, np.zeros(len(indices), np.uint32))


def test_what_is_missing_is_said_with_how_to_get_it(tmp_path):
    tasks = {task.name: task for task in load_suite("elevater20").tasks}
    for task in tasks.values():
        with pytest.raises(Missing) as raised:
            task.open("test", str(tmp_path), 32)
        assert raised.value.task == task.name and raised.value.split == "test"
        assert str(tmp_path) in raised.value.how and "{" not in raised.value.how
        assert str(tmp_path) in raised.value.why
    how = {name: task.how_to_get("test", str(tmp_path)) for name, task in tasks.items()}
    assert (
        f"`tfds build cifar10 --data_dir={tmp_path}/tensorflow_datasets`"
        in (how["cifar10"])
    )
    assert "accept the licence" in how["hateful_memes"]
    assert "404" in how["stanford_cars"]
    assert f"datasets/clip-benchmark/wds_gtsrb into {tmp_path}" in how["gtsrb"]
    with pytest.raises(Missing, match="has no val split"):
        load_suite("offline").task("fashion_mnist").open("val", None, 32)
    with pytest.raises(InputError, match='one of train, val, test: got "tset"'):
        tasks["imagenet"].find("tset", None)


ROW = {"name": "pets", "class_names": ["cat", "dog"], "templates": ["a {}"]}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"metrics": "accuracy"}, 'known: got "metrics"; did you mean "metric"'),
        ({"metric": "acuracy"}, 'metric: got "acuracy"; did you mean "accuracy"'),
        ({"kind": "retreival"}, 'kind: got "retreival"; did you mean "retrieval"'),
        ({"kind": "retrieval"}, "class_names must be left out of a retrieval"),
        ({"class_names": ["cat", "Cat"]}, 'different: got "cat" and "Cat"'),
        ({"class_names": ["cat"]}, "two classes or more: got 1"),
        ({"class_names": ["cat", ""]}, "list of texts"),
        ({"class_names": "cifar1O"}, 'got "cifar1O"; did you mean "cifar10"'),
        ({"class_names": "no/such.tsv"}, "must be readable: .*no/such.tsv"),
        ({"templates": "short_"}, 'got "short_"; did you mean "short"'),
        ({"templates": ["a photo"]}, "templates: a template must hold {} exactly"),
        ({"classes": ["bird", "cat"]}, '"bird" is none'),
        ({"sizes": {"tset": 3}}, "sizes must map train, val, test"),
        ({"where": [{"format": "tdfs", "path": "x"}]}, 'did you mean "tfds"'),
        ({"where": [{"format": "tfds"}]}, "path must be a text: got None"),
        ({"where": [{"format": "tfds", "pathh": "x"}]}, 'did you mean "path"'),
        ({"where": [{"format": "tfds", "path": "x", "labels": "y"}]}, "labels: got"),
        ({"name": "my pets"}, "name must be letters"),
        ({"like": "elevater20/cifar"}, 'did you mean "cifar10"'),
        ({"like": "elevator/cifar10"}, 'must be "suite/task" of offline'),
        ({"squash": "yes"}, "squash must be true or false"),
    ],
)
def test_a_wrong_row_is_told_with_file_task_and_field(change, said):
    with pytest.raises(InputError, match=said) as raised:
        load_tasks([{**ROW, **change}], "mine", "mine.toml")
    assert str(raised.value).startswith('mine.toml: task "')


def test_rows_may_stand_in_a_recipe():
    row = {**ROW, "where": ({"format": "folder", "path": "/data/pets"},)}
    (task,) = load_tasks([ConfigDict(row)], "recipe", "recipe.py")
    assert task.where[0].path == "/data/pets" and task.class_names == ("cat", "dog")


def test_a_suite_of_ones_own(tmp_path):
    (tmp_path / "names.tsv").write_text("n01\tcat\tpussy\nn02\tdog\n")
    file = tmp_path / "mine.toml"
    file.write_text(
        'title = "Mine"\ntake = ["elevater20/cifar10"]\n\n[[task]]\nname = "pets"\n'
        'class_names = "names.tsv"\ntemplates = "oxford_pets"\n\n[[task]]\n'
        'like = "elevater20/mnist"\nname = "digits"\nmetric = "mean_per_class"\n'
    )
    suite = load_suite(str(file))
    assert (suite.name, suite.title) == ("mine", "Mine")
    assert [task.name for task in suite.tasks] == ["cifar10", "pets", "digits"]
    pets = suite.task("pets")
    assert pets.class_names == ("cat", "dog") and pets.class_keys == ("n01", "n02")
    assert pets.join(["dog", "Pussy"]).tolist() == [1, 0]
    assert pets.templates == ("a photo of a {}, a type of pet.",)
    digits = suite.task("digits")
    assert digits.metric == "mean_per_class" and digits.num_classes == 10
    with pytest.raises(InputError, match='got task "pet".*did you mean "pets"'):
        suite.task("pet")
    file.write_text('titel = "Mine"\n')
    with pytest.raises(InputError, match='got "titel"; did you mean "title"'):
        load_suite(str(file))
    file.write_text("title = \n")
    with pytest.raises(InputError, match="must be TOML"):
        load_suite(str(file))
    with pytest.raises(InputError, match='did you mean "elevater20"'):
        load_suite("elevater")
    file.write_text("")
    with pytest.raises(InputError, match="must hold a task"):
        load_suite(str(file))
    with pytest.raises(InputError, match='two are "pets"'):
        load_tasks([ROW, ROW], "mine", "mine.toml")


def test_a_row_like_another_finds_the_others_folders_too(tmp_path):
    path = tmp_path / "mine.toml"
    row = 'like = "elevater20/food101"\nname = "food_81"\ntemplates = "unicl_81"'
    path.write_text(f"[[task]]\n{row}\n")
    task = load_suite(str(path)).task("food_81")
    data = tmp_path / "data"
    (data / "food101" / "test" / "apple_pie").mkdir(parents=True)
    (data / "food101" / "test" / "apple_pie" / "1.jpg").touch()
    assert task.find("test", str(data)).folder == str(data / "food101")
    (data / "food_81" / "test" / "apple_pie").mkdir(parents=True)
    (data / "food_81" / "test" / "apple_pie" / "1.jpg").touch()
    assert task.find("test", str(data)).folder == str(data / "food_81")
