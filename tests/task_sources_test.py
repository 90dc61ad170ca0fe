"""Data of tasks as it lies on disk: TFDS, CLIP_benchmark's shards, folders, tables."""

import io
import json

import numpy as np
import pytest

from tests.real_files import ask, encoded, tf, write_tar
from unicl_jax.data import quickstart
from unicl_jax.errors import InputError
from unicl_jax.evaluation import derived
from unicl_jax.evaluation.suites import load_suite, load_tasks
from unicl_jax.evaluation.tasks import Missing

Image = pytest.importorskip("PIL.Image", reason="the tests write images with Pillow")
SIZE = 32
WHOLE = {"name": "resize"}


def elevater(name):
    return load_suite("elevater20").task(name)


def rows_of(source):
    return next(source.stream([ask(range(len(source)))]))


def png(pixels):
    return encoded(Image.fromarray(pixels), "PNG")


def fashion(count=20):
    """Real pictures, their classes by name and the names."""
    images, labels, names = quickstart.fashion_mnist("test")
    return images[:count], [names[label] for label in labels[:count]], names


def emoji_folder(root, names):
    """Class folders of real drawings, called in upper case with "_" for spaces."""
    images, labels, subgroups = quickstart.evaluation_set("twemoji_subgroups")
    for name in names:
        folder = root / name.upper().replace(" ", "_")
        folder.mkdir(parents=True)
        for i in np.flatnonzero(labels == subgroups.index(name))[:4]:
            (folder / f"{i:05d}.png").write_bytes(png(images[i]))


SUBGROUPS = ("plane food", "face smiling", "animal bug", "sky & weather")


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


def write_tfds(data_dir, builder, split, examples, names=(), features=None):
    """A prepared dataset of TFDS's own schema; `names`: of classes it has none for."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="the format under test")
    features = features or tfds.builder(builder, data_dir=data_dir).info.features
    if names:
        features["label"].names = list(names)
    folder = data_dir / builder / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=str(folder),
        dataset_name=builder.split("/")[0],
        split=split,
        filetype_suffix="tfrecord",
    )
    path = str(template.sharded_filepath(shard_index=0, num_shards=1))
    with tf.io.TFRecordWriter(path) as writer:
        for example in examples:
            writer.write(features.serialize_example(features.encode_example(example)))
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(examples)],
                num_bytes=1,
                filename_template=template,
            )
        ],
        check_data=False,
    )


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


def write_wds(folder, split, members, names=(), kind=""):
    """Shards as CLIP_benchmark writes them."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    half = len(members) // 2
    for shard, part in enumerate((members[:half], members[half:])):
        files = [
            (f"s{shard * half + i:07d}.{extension}", data)
            for i, record in enumerate(part)
            for extension, data in record.items()
        ]
        write_tar(folder / split / f"{shard}.tar", files)
    (folder / split / "nshards.txt").write_text("2\n")
    if names:
        (folder / "classnames.txt").write_text("".join(f"{n}\n" for n in names))
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")


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


def test_several_labels_from_clip_benchmarks_arrays(tmp_path):
    task = elevater("voc2007")
    images, _, _ = fashion(6)
    order = [*reversed(task.class_names)]
    given = np.random.default_rng(0).integers(0, 2, (6, 20))
    members = []
    for image, row in zip(images, given, strict=True):
        file = io.BytesIO()
        np.save(file, row.astype(np.float32))
        members.append({"webp": png(image), "npy": file.getvalue()})
    folder = tmp_path / "wds_voc2007_multilabel"
    write_wds(folder, "test", members, order, "multilabel")
    source = task.open("test", str(tmp_path), SIZE, WHOLE)
    rows = next(source.stream([ask([3, 0, 5])]))
    assert rows.labels.dtype == np.uint8
    np.testing.assert_array_equal(rows.labels, given[[3, 0, 5], ::-1])
    np.testing.assert_array_equal(rows.images, images[[3, 0, 5]])
    write_wds(folder, "test", members, order[:-1])
    with pytest.raises(InputError, match="20 labels for 19 class names"):
        task.open("test", str(tmp_path), SIZE)


def test_several_labels_from_the_rows_of_a_table(tmp_path):
    images, _, _ = fashion(3)
    folder = tmp_path / "voc2007"
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(png(image))
    (folder / "test.csv").write_text(
        "image,label\n0.png,cat\n0.png,dog\n1.png,Person\n2.png,cat\n"
    )
    task = elevater("voc2007")
    rows = rows_of(task.open("test", str(tmp_path), SIZE))
    found = [[task.class_keys[i] for i in np.flatnonzero(r)] for r in rows.labels]
    assert found == [["cat", "dog"], ["person"], ["cat"]]


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


def test_captions_of_clip_benchmark_stand_one_a_line(tmp_path):
    images, _, _ = fashion(4)
    texts = [(f"a shirt, {i}", f"clothing {i}", "third") for i in range(4)]
    members = [
        {"jpg": encoded(Image.fromarray(x)), "txt": "\n".join(t).encode()}
        for x, t in zip(images, texts, strict=True)
    ]
    write_wds(tmp_path / "wds_flickr30k", "test", members, kind="retrieval")
    task = load_suite("retrieval").task("flickr30k")
    source = task.open("test", str(tmp_path), SIZE)
    assert rows_of(source).texts == texts
    folder = tmp_path / "coco_captions"
    folder.mkdir()
    (folder / "0.png").write_bytes(png(images[0]))
    (folder / "test.csv").write_text("image,caption\n0.png,one\n0.png,two\n")
    task = load_suite("retrieval").task("coco_captions")
    source = task.open("test", str(tmp_path), SIZE)
    assert rows_of(source).texts == [("one", "two")]


def test_cocos_captions_from_tfds(tmp_path):
    images, _, _ = fashion(2)
    examples = [
        {
            "image": np.ascontiguousarray(image),
            "image/filename": f"{i}.jpg",
            "image/id": i,
            "objects": [],
            "captions": [{"text": f"{i} {k}", "id": k} for k in range(5)],
        }
        for i, image in enumerate(images)
    ]
    write_tfds(tmp_path, "coco_captions/2014", "test", examples)
    task = load_suite("retrieval").task("coco_captions")
    rows = rows_of(task.open("test", str(tmp_path), SIZE))
    assert rows.texts == [tuple(f"{i} {k}" for k in range(5)) for i in range(2)]


@pytest.mark.parametrize(
    "types, depths, key",
    [
        (["Car", "Pedestrian"], [8.0, 2.0], "below_8_m"),
        (["Van", "Truck"], [35.0, 8.1], "8_to_20_m"),
        (["Truck"], [20.5], "above_20_m"),
        (["Tram", "Cyclist"], [5.0, 5.0], "no_vehicle"),
        ([], [], "no_vehicle"),
    ],
)
def test_the_distance_of_the_nearest_vehicle(tmp_path, types, depths, key):
    assert derived.nearest_vehicle(types, depths) == key
    box = pytest.importorskip("tensorflow_datasets").features.BBox
    image = np.zeros([40, 120, 3], np.uint8)
    image[:, 60:] = 255
    objects = [
        {
            "type": kind,
            "truncated": 0.0,
            "occluded": 0,
            "alpha": 0.0,
            "bbox": box(0.1, 0.1, 0.2, 0.2),
            "dimensions": [1.0, 1.0, 1.0],
            "location": [-3.0, 1.0, depth],
            "rotation_y": 0.0,
        }
        for kind, depth in zip(types, depths, strict=True)
    ]
    example = {"image": image, "image/file_name": "0.png", "objects": objects}
    write_tfds(tmp_path, "kitti", "test", [example])
    task = elevater("kitti_distance")
    rows = rows_of(task.open("test", str(tmp_path), SIZE))
    assert task.class_keys[rows.labels[0]] == key
    # Squashed, not cropped: both halves are there whole.
    assert rows.images[0, :, :14].max() == 0 and rows.images[0, :, 18:].min() == 255


def test_what_is_in_a_voc_picture(tmp_path):
    box = pytest.importorskip("tensorflow_datasets").features.BBox(0.0, 0.0, 1.0, 1.0)
    images, _, _ = fashion(3)
    shown = [["dog", "person", "dog"], ["aeroplane"], ["tvmonitor", "bottle"]]
    examples = [
        {
            "image": np.ascontiguousarray(image),
            "image/filename": f"{i}.jpg",
            "objects": [
                {
                    "label": name,
                    "bbox": box,
                    "pose": "frontal",
                    "is_truncated": False,
                    "is_difficult": False,
                }
                for name in names
            ],
            "labels": sorted(set(names)),
            "labels_no_difficult": sorted(set(names)),
        }
        for i, (image, names) in enumerate(zip(images, shown, strict=True))
    ]
    write_tfds(tmp_path, "voc/2007", "test", examples)
    task = elevater("voc2007")
    source = task.open("test", str(tmp_path), SIZE)
    rows = next(source.stream([ask([2, 0, 1])]))
    found = [{task.class_keys[i] for i in np.flatnonzero(r)} for r in rows.labels]
    assert found == [set(shown[2]), set(shown[0]), set(shown[1])]


def test_any_of_the_labels_of_imagenet_real(tmp_path):
    task = load_suite("imagenet").task("imagenet_real")
    images, _, _ = fashion(3)
    labels = [[7, 3], [], [999]]
    examples = [
        {
            "image": np.ascontiguousarray(image),
            "original_label": 0,
            "real_label": given,
            "file_name": f"{i}.jpg",
        }
        for i, (image, given) in enumerate(zip(images, labels, strict=True))
    ]
    write_tfds(tmp_path, "imagenet2012_real", "validation", examples)
    rows = rows_of(task.open("test", str(tmp_path), SIZE))
    assert rows.labels.shape == (3, 1000)
    found = [np.flatnonzero(row).tolist() for row in rows.labels]
    assert found == [[3, 7], [], [999]]


def test_how_many_objects_clevr_shows(tmp_path):
    images, _, _ = fashion(3)
    thing = {
        "color": 0,
        "material": 0,
        "shape": 0,
        "size": 0,
        "rotation": 0.0,
        "3d_coords": [0.0] * 3,
        "pixel_coords": [0.0] * 3,
    }
    examples = [
        {
            "image": image,
            "file_name": f"{i}.png",
            "objects": [thing] * count,
            "question_answer": [],
        }
        for i, (image, count) in enumerate(zip(images, (10, 3, 2), strict=True))
    ]
    write_tfds(tmp_path, "clevr", "validation", examples)
    task = load_suite("clip_extra").task("clevr_counts")
    source = task.open("test", str(tmp_path), SIZE)
    rows = next(source.stream([ask([0, 1, 2])]))
    # Two objects are no class: the next record stands in, and it is said.
    assert [task.class_keys[i] for i in rows.labels] == ["10", "3", "10"]
    assert [(s.row, s.reason) for s in rows.skipped] == [
        (2, "class is none of the task")
    ]


def test_a_video_is_its_middle_frame(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the format under test")
    images, _, _ = fashion(8)
    features = tfds.features.FeaturesDict(
        {
            "video": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
            "label": tfds.features.ClassLabel(names=["Archery", "ApplyEyeMakeup"]),
        }
    )
    examples = [
        {"video": list(images[:5]), "label": "Archery"},
        {"video": list(images[5:]), "label": "ApplyEyeMakeup"},
    ]
    write_tfds(tmp_path, "ucf101/ucf101_1", "test", examples, features=features)
    task = load_suite("clip_extra").task("ucf101")
    rows = rows_of(task.open("test", str(tmp_path), SIZE, WHOLE))
    found = [task.class_names[i] for i in rows.labels]
    assert found == ["Archery", "Apply Eye Makeup"]
    np.testing.assert_array_equal(rows.images, images[[2, 6]])


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
