"""Sources read from real bytes on disk: TFRecord, TFDS and WebDataset."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from real_files import (
    CENTRE,
    CLASSES,
    SIZE,
    ask,
    captioned,
    encoded,
    example,
    labelled,
    photo,
    picture,
    read,
    shown,
    tf,
    write_tar,
    write_ten,
    write_tfrecord,
)

from unicl_jax.data import made_up
from unicl_jax.data.records import NO_LABEL
from unicl_jax.data.sources import make_file_source
from unicl_jax.errors import InputError


@pytest.fixture
def ten(tmp_path):
    """A folder with two TFRecord shards of ten records."""
    write_ten(tmp_path)
    return tmp_path


# Formats.


def test_a_tfrecord_gives_image_label_and_text_of_the_index_asked_for(ten):
    order = [9, 0, 5, 6, 3]
    (rows,) = read(labelled(ten / "x.tfrecord-*"), order)
    assert rows.images.shape == (5, SIZE, SIZE, 3)
    assert rows.images.dtype == np.uint8
    assert shown(rows.images) == order
    assert rows.labels.dtype == np.int32
    assert rows.labels.tolist() == [i % 7 for i in order]
    assert rows.texts == [()] * 5
    source = captioned(ten)  # a folder
    (rows,) = read(source, order)
    assert shown(rows.images) == order
    assert rows.texts == [(f"record {i}",) for i in order]
    assert rows.labels.tolist() == [NO_LABEL] * 5
    assert len(source) == 10 and source.class_names == () and not source.skipped


def test_a_label_offset_makes_the_first_class_zero(tmp_path):
    write_tfrecord(
        tmp_path / "a", [example(jpg=encoded(picture(i)), cls=i + 1) for i in range(7)]
    )
    source = labelled(tmp_path / "a", label_offset=1)
    assert read(source, range(7))[0].labels.tolist() == list(range(7))
    assert source.class_names == tuple(CLASSES)


def test_the_common_layouts_of_tfrecords_need_no_fields(tmp_path):
    image, meta = encoded(picture(4)), dict(key=b"000000001", status=b"success")
    layouts = {
        # As img2dataset writes them, with its columns of other kinds.
        "jpg": dict(jpg=image, caption=b"a dog", label=3, width=60, **meta),
        "png": dict(png=encoded(picture(4), "PNG"), text=b"a dog", cls=3, **meta),
        "slim": dict(image__encoded=image, image__class__label=3, txt=b"a dog"),
        # What is named alike but holds something else is passed over.
        "class": {**dict(image=image, label=b"x"), "class": 3, "caption": b"a dog"},
    }
    for name, fields in layouts.items():
        write_tfrecord(tmp_path / name, [example(**fields)])
        source = captioned(tmp_path / name, fields={})
        (rows,) = read(source, [0])
        assert shown(rows.images) == [4] and rows.texts == [("a dog",)]
        source = labelled(tmp_path / name, fields={})
        assert read(source, [0])[0].labels.tolist() == [3]
    write_tfrecord(tmp_path / "none", [example(picture=image, caption=b"x")])
    with pytest.raises(
        InputError,
        match='fields.image must.*"image/encoded" or "image" or "jpg".* is none in the '
        r"first 8 records, which hold caption \(bytes_list\), picture",
    ):
        captioned(tmp_path / "none", fields={})
    source = captioned(tmp_path / "none", fields={"image": "photo;picture"})
    assert shown(read(source, [0])[0].images) == [4]


def test_several_captions_of_a_record_stay_apart_and_whole(tmp_path):
    captions = ["a dog", "ein Hund – größer\x00!", "犬 🐶"]
    listed = [c.encode() for c in captions]
    write_tfrecord(
        tmp_path / "a", [example(jpg=encoded(picture(1)), caption=[*listed, b" "])]
    )
    assert read(captioned(tmp_path / "a"), [0])[0].texts == [tuple(captions)]


def test_webdataset_members_meet_by_key(tmp_path):
    members = [(".DS_Store", b"junk")]
    for i in range(4):
        image = encoded(picture(i), "PNG" if i % 2 else "JPEG")
        members += [
            (f"part.0/{i:03d}.txt", f" record {i}\n".encode()),
            (f"part.0/{i:03d}.{'png' if i % 2 else 'JPG'}", image),
            (f"part.0/{i:03d}.json", json.dumps({"caption": ["a", f"{i}"]}).encode()),
            (f"part.0/{i:03d}.cls", str(i).encode()),
        ]
    write_tar(tmp_path / "s-000.tar", members)
    write_tar(
        tmp_path / "s-001.tar",
        [("004.jpg", encoded(picture(4))), ("004.txt", b"record 4")]
        + [("no_text.jpg", encoded(picture(0)))],
    )
    source = captioned(tmp_path / "s-{000..001}.tar", format="webdataset", fields={})
    (rows,) = read(source, [4, 1, 2])
    assert shown(rows.images) == [4, 1, 2]
    assert rows.texts == [("record 4",), ("record 1",), ("record 2",)]
    assert len(source) == 5 and source.skipped == {"no .txt member": 1}
    source = captioned(
        tmp_path / "s-000.tar", format="webdataset", fields={"text": "json.caption"}
    )
    assert read(source, [3])[0].texts == [("a", "3")]
    source = labelled(tmp_path / "s-000.tar", format="webdataset", fields={})
    assert read(source, [3, 0])[0].labels.tolist() == [3, 0]


def test_a_prepared_tfds_folder_brings_its_class_names_and_splits(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="the format under test")
    config = {
        "birds": {
            "kind": "image_label",
            "format": "tfds",
            "path": "/nowhere",
            "split": "train",
            "preprocess": CENTRE,
        }
    }
    config = made_up.write_made_up(config, str(tmp_path), 30, seed=0)["birds"]
    del config["class_names"]
    source = make_file_source("birds", config, SIZE, train=False)
    assert source.class_names == made_up.NAMES
    (rows,) = read(source, range(30))
    cut = {**config, "split": "train[10:20]"}
    part = make_file_source("birds", cut, SIZE, train=False)
    assert len(part) == 10
    (some,) = read(part, range(10))
    np.testing.assert_array_equal(some.images, rows.images[10:20])
    np.testing.assert_array_equal(some.labels, rows.labels[10:20])
    with pytest.raises(InputError, match='split must exist.*got "trian".*train'):
        make_file_source("birds", {**config, "split": "trian"}, SIZE, train=False)


def test_a_prepared_tfds_dataset_goes_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets", reason="the format under test")
    birds = {"kind": "image_label", "format": "tfds", "preprocess": CENTRE}
    made = made_up.write_made_up({"birds": birds}, str(tmp_path), 9, seed=0)["birds"]
    home = tmp_path / "made_up"
    monkeypatch.setenv("TFDS_DATA_DIR", str(home))
    whole = make_file_source("birds", {**birds, "path": made["path"]}, SIZE, False)
    for name in ("birds", "birds:1.0.0", "birds:1.*.*"):
        source = make_file_source("birds", {**birds, "path": name}, SIZE, False)
        assert source.class_names == made_up.NAMES
        (one,), (two,) = read(source, range(9)), read(whole, range(9))
        np.testing.assert_array_equal(one.images, two.images)
    for name in ("birds:2.0.0", "mnist", "no_such_birds", "no_such/config:1.0.0"):
        said = f"{name}.* is not in {home}; run `tfds build {name}`.*download_and_prep"
        with pytest.raises(InputError, match=said):
            make_file_source("birds", {**birds, "path": name}, SIZE, False)
    with pytest.raises(InputError, match="must be the folder of a prepared TFDS"):
        make_file_source("birds", {**birds, "path": "/no/such"}, SIZE, False)


@pytest.mark.parametrize("form", ["tfrecord", "tfds", "webdataset"])
@pytest.mark.parametrize("kind", ["image_label", "image_text"])
def test_made_up_shards_read_back_as_what_they_show(form, kind, tmp_path):
    if form == "tfds":
        pytest.importorskip("tensorflow_datasets", reason="the format under test")
    config_dict = pytest.importorskip("ml_collections").ConfigDict
    sources = config_dict(
        {
            "some": {
                "kind": kind,
                "format": form,
                "path": "/nowhere/*",
                "label_offset": 1,
                "fields": {"webdataset": {"text": "json.caption"}}.get(form, {}),
                "class_names": "/nowhere/names.txt",
            }
        }
    ).lock()
    made = made_up.write_made_up(sources, str(tmp_path), 48, seed=3)
    assert sources.some.path == "/nowhere/*" and isinstance(made, config_dict)
    source = make_file_source("some", made.some, SIZE, train=False)
    (rows,) = read(source, range(len(source)))
    assert len(source) == 48 and not source.skipped
    seen = set()
    for image, texts, label in zip(*rows[:3], strict=True):
        name = source.class_names[label] if kind == "image_label" else texts[0][2:]
        # The most colourful pixel is the shape's; the ground is dark grey.
        flat = image.reshape(-1, 3).astype(int)
        best = flat[np.argmax(flat.max(1) + np.ptp(flat, 1))]
        nearest = min(
            made_up.COLOURS,
            key=lambda c: np.abs(np.array(made_up.COLOURS[c]) - best).sum(),
        )
        assert name.split()[0] == nearest
        seen.add(name)
    assert seen == set(made_up.NAMES)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*0000*") if p.is_file()}
    made_up.write_made_up(sources, str(tmp_path), 48, seed=3)
    assert files and files == {p: p.read_bytes() for p in files}


def test_remote_paths_go_through_gfile():
    # ram:// is the remote file system that needs no network.
    config = {
        "some": {"kind": "image_text", "format": "tfrecord", "preprocess": CENTRE},
        "tars": {"kind": "image_label", "format": "webdataset", "preprocess": CENTRE},
    }
    remote = made_up.write_made_up(config, "ram://made_up_test", 10, seed=0)
    for name, source_config in remote.items():
        assert source_config["path"].startswith("ram://made_up_test/made_up/")
        cached = {**source_config, "index_cache": "ram://made_up_test/index"}
        for _ in range(2):  # the second index is the kept one
            source = make_file_source(name, cached, SIZE, train=False)
            (rows,) = read(source, range(10))
            assert not source.skipped
            assert len(set(rows.texts if name == "some" else rows.labels)) == 10
    assert len(tf.io.gfile.glob("ram://made_up_test/index/*")) == 2
    with pytest.raises(InputError, match='"ram://nowhere/x-\\*" matches none'):
        captioned("ram://nowhere/x-*")


# Streams.


def test_rows_answer_requests_in_order_whatever_their_sizes(ten):
    sizes = [3, 0, 1, 20, 0, 0, 2, 0]
    indices = np.random.default_rng(0).integers(0, 10, sum(sizes))
    requests = np.split(indices, np.cumsum(sizes)[:-1])
    answers = read(captioned(ten), *requests)
    assert [len(rows.images) for rows in answers] == sizes
    assert [len(rows.texts) for rows in answers] == sizes
    for rows, wanted in zip(answers, requests, strict=True):
        assert shown(rows.images) == wanted.tolist()
        assert rows.texts == [(f"record {i}",) for i in wanted]
    assert read(captioned(ten)) == []


def test_pixels_depend_on_index_and_seed_alone(tmp_path):
    write_tfrecord(
        tmp_path / "a",
        [
            example(jpg=encoded(photo(i), kind), caption=b"x")
            for i, kind in enumerate(["JPEG", "PNG", "JPEG", "BMP"])
        ],
    )
    source = captioned(tmp_path / "a", train=True, preprocess={"flip": True})
    indices, seeds = np.arange(40) % 4, np.arange(40) * 99_999_999 % 2**32
    (whole,) = read(source, ask(indices, seeds))
    order = np.random.default_rng(1).permutation(40)
    pieces = read(
        source,
        *(ask(indices[part], seeds[part]) for part in np.array_split(order, 7)),
    )
    shuffled = np.concatenate([rows.images for rows in pieces])
    np.testing.assert_array_equal(shuffled, whole.images[order])
    # And another seed is another crop.
    assert len({image.tobytes() for image in whole.images}) == 40


def test_an_endless_sampler_may_be_left_at_any_time(ten):
    def forever():
        while True:
            yield ask([1, 2])

    stream = captioned(ten).stream(forever())
    for _ in range(3):
        assert shown(next(stream).images) == [1, 2]
    stream.close()


def test_a_request_does_not_wait_for_the_ones_behind_it(ten):
    """A source may get no row for many steps; its rows must come out all the same."""
    taken = []

    def mostly_empty():
        for step in range(10_000):
            taken.append(step)
            yield ask([step % 10] if step % 1000 == 3 else [])

    stream = labelled(ten, class_names=CLASSES[:4]).stream(mostly_empty())
    counts = [len(next(stream).images) for _ in range(1004)]
    assert counts == [int(step % 1000 == 3) for step in range(1004)]
    assert taken[-1] < 1200  # and it reads ahead a little, not to the end
    stream.close()


def test_an_error_of_the_sampler_arrives_after_the_rows_before_it(ten):
    def failing():
        yield ask([4])
        raise RuntimeError("the sampler broke")

    stream = captioned(ten).stream(failing())
    assert shown(next(stream).images) == [4]
    with pytest.raises(RuntimeError, match="the sampler broke"):
        next(stream)
    with pytest.raises(InputError, match=r"indices must lie in \[0, 10\): got 3 to 10"):
        read(captioned(ten), [3, 10])


# Settings.


def test_a_field_that_no_record_has_stops_at_the_start(ten):
    with pytest.raises(
        InputError,
        match=r'"class" is none in the first 8.*cls \(int64_list\).*fields.label',
    ):
        labelled(ten, fields={"image": "jpg", "label": "class"})
    with pytest.raises(InputError, match="fields.label must name a int64_list field"):
        labelled(ten, fields={"image": "jpg", "label": "caption"})
    write_tar(
        ten / "t.tar", [("0.jpg", encoded(picture(0))), ("0.json", b'{"text": "x"}')]
    )
    with pytest.raises(InputError, match='no "caption" in the JSON.*`fields`'):
        captioned(ten / "t.tar", format="webdataset", fields={"text": "json.caption"})


def test_a_typo_lists_what_exists(ten):
    with pytest.raises(InputError, match='did you mean "tfrecord"'):
        captioned(ten, format="tfrecords")
    with pytest.raises(InputError, match='did you mean "image_text"'):
        captioned(ten, kind="image_texts")
    with pytest.raises(InputError, match='did you mean "text"'):
        captioned(ten, fields={"texts": "caption"})
    with pytest.raises(InputError, match='did you mean "scale"'):
        captioned(ten, preprocess={"scales": (0.1, 1)})
    with pytest.raises(InputError, match='did you mean "center"'):
        captioned(ten, preprocess={"name": "centre"})
    with pytest.raises(InputError, match="preprocess.scale must be"):
        captioned(ten, preprocess={"scale": (0.5, 2.0)})


def test_class_names_come_from_a_list_or_a_file(ten):
    path = ten / "names.txt"
    path.write_text("\n".join(CLASSES) + "\n\n")
    assert labelled(ten, class_names=str(path)).class_names == tuple(CLASSES)
    path.write_text("a\n\nb\n")
    with pytest.raises(InputError, match="line 2 is empty"):
        labelled(ten, class_names=str(path))
    with pytest.raises(InputError, match="got none"):
        labelled(ten, class_names=None)
    with pytest.raises(InputError, match="nowhere.txt is not"):
        labelled(ten, class_names="/nowhere.txt")


def test_imagenets_names_ship_with_the_package_one_a_class(ten):
    names = labelled(ten, class_names="imagenet").class_names
    assert len(set(names)) == 1000  # no two classes share a text
    # Spot checks in the order of the sorted synset ids, which is the label order.
    assert (names[0], names[207], names[999]) == (
        "tench",
        "Golden Retriever",
        "toilet paper",
    )


def test_tensorflow_prints_nothing_of_ours(tmp_path):
    """AutoGraph, where it fails, prints the environment; its passwords, too."""
    write_tfrecord(
        tmp_path / "a.tfrecord",
        [example(caption=b"x", image__encoded=encoded(picture(1)))],
    )
    code = (
        "from unicl_jax.data.sources import make_file_source\n"
        "from unicl_jax.data.records import Request\n"
        "import numpy as np\n"
        f"config = dict(kind='image_text', format='tfrecord', path={str(tmp_path)!r},\n"
        "  preprocess=dict(randaugment=dict(num_ops=2, magnitude=9), erasing=0.5))\n"
        "source = make_file_source('s', config, 32, True)\n"
        "request = Request(np.zeros(4, np.int64), np.arange(4, dtype=np.uint32))\n"
        "print(next(source.stream([request])).texts)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SECRET": "hunter2"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "'x'" in done.stdout, done.stderr
    assert "hunter2" not in done.stderr and "AutoGraph" not in done.stderr
