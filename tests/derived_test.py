"""Labels and captions that are worked out of what a data set has."""

import io

import numpy as np
import pytest

from tests.real_files import ask, encoded
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
from unicl_jax.errors import InputError
from unicl_jax.evaluation import derived
from unicl_jax.evaluation.suites import load_suite


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
