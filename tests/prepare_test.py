"""Prepared folders: the same records, whole or refused, however often interrupted."""

import collections
import io
import json
import os

import numpy as np
import pytest
from real_files import (
    CENTRE,
    CLASSES,
    SIZE,
    Image,
    encoded,
    example,
    photo,
    picture,
    read,
    tf,
    write_tar,
    write_tfrecord,
)

from unicl_jax import data
from unicl_jax.data import prepared
from unicl_jax.data.indexing import index_tfrecords
from unicl_jax.data.prepare_plan import Options
from unicl_jax.data.preparing import prepare
from unicl_jax.data.raw import open_raw
from unicl_jax.errors import InputError
from unicl_jax.validation import SOURCE_FIELDS

KINDS = ["JPEG", "PNG", "GIF", "WEBP", "BMP"]
BROKEN = encoded(photo(0))[:900]


def run(config, folder, options=None, workers=2, name="mine", **more):
    """Prepares a source."""
    options = options or Options()
    return prepare(name, config, str(folder), options, workers=workers, **more)


def opened(folder, kind="image_label", **changes):
    """Opens a prepared folder as a source."""
    config = {"format": "prepared", "kind": kind, "path": str(folder)}
    config |= {"preprocess": CENTRE, **changes}
    return data.make_source("again", config, SIZE, False)


def contents(folder):
    """The bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def raw(config, name="mine"):
    """The records of a source, without their keys."""
    records = open_raw(name, config, True)
    return [records.read(i)[:3] for i in range(len(records))]


def of_folder(root):
    for i in range(12):
        path = root / "pets" / ["big_dog", "cat", "owl"][i % 3] / f"{i}.{KINDS[i % 5]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i), KINDS[i % 5]))
    (root / "pets" / "cat" / "notes.txt").write_bytes(b"no picture")
    return {"format": "folder", "kind": "image_label", "path": str(root / "pets")}


def of_csv(root):
    lines = ["file,caption"]
    for i in range(12):
        (root / f"{i}.{KINDS[i % 5]}").write_bytes(encoded(photo(i), KINDS[i % 5]))
        lines += [f'{i}.{KINDS[i % 5]}," größer, {i} 🐶"', f"{i}.{KINDS[i % 5]},b {i}"]
    (root / "t.csv").write_text("\n".join([*lines, "0.JPEG,", ""]))
    return {"format": "csv", "kind": "image_text", "path": str(root / "t.csv")}


def of_labels_in_a_csv(root):
    of_csv(root)
    lines = [f"{i}.{KINDS[i % 5]},{['b', 'a'][i % 2]}" for i in range(12)]
    (root / "l.csv").write_text("\n".join(["path,label", *lines]))
    return {"format": "csv", "kind": "image_label", "path": str(root / "l.csv")}


def of_webdataset(root):
    for shard in range(2):
        members = []
        for i in range(6 * shard, 6 * shard + 6):
            texts = json.dumps({"caption": [f"one {i}", f"two\n{i} "]}).encode()
            members += [(f"{i}.jpg", encoded(photo(i))), (f"{i}.json", texts)]
        write_tar(root / f"{shard}.tar", members)
    fields = {"text": "json.caption"}
    path = str(root / "{0..1}.tar")
    form = {"format": "webdataset", "kind": "image_text"}
    return {**form, "path": path, "fields": fields}


def of_tfrecord(root):
    payloads = [
        example(image__encoded=encoded(photo(i)), image__class__label=i % 7 + 1)
        for i in range(12)
    ]
    write_tfrecord(root / "a.tfrecord-0", payloads[:5])
    write_tfrecord(root / "a.tfrecord-1", payloads[5:])
    form = {"format": "tfrecord", "kind": "image_label", "path": str(root)}
    return {**form, "class_names": CLASSES, "label_offset": 1}


def of_npz(root):
    images = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
    labels, names = np.arange(12) % 3, np.array(["cat", "dog", "owl"])
    np.savez(root / "a.npz", images=images, labels=labels, class_names=names)
    return {"format": "npz", "kind": "image_label", "path": str(root / "a.npz")}


def of_quickstart(root):
    return {"format": "quickstart", "kind": "image_text", "path": "emoji_captions"}


SOURCES = [of_folder, of_csv, of_labels_in_a_csv, of_webdataset, of_tfrecord, of_npz]


# The same records.


@pytest.mark.parametrize("make", SOURCES)
def test_a_source_and_its_prepared_form_hold_the_same(make, tmp_path):
    (tmp_path / "from").mkdir()
    config = make(tmp_path / "from")
    manifest = run(config, tmp_path / "to", Options(shards=5))
    again = {"format": "prepared", "kind": config["kind"], "path": str(tmp_path / "to")}
    before, after = raw(config), raw(again)
    assert after == before and len(after) == manifest["records"] == 12
    size = {"preprocess": {"name": "resize"}} if config["format"] != "npz" else {}
    source = data.make_source("mine", {**config, **size}, SIZE, False)
    other = opened(tmp_path / "to", config["kind"], preprocess={"name": "resize"})
    assert other.class_names == source.class_names and other.kind == source.kind
    assert not other.skipped
    order = np.random.default_rng(1).permutation(12)
    for one, two in zip(read(source, order), read(other, order), strict=True):
        np.testing.assert_array_equal(one.images, two.images)
        np.testing.assert_array_equal(one.labels, two.labels)
        assert one.texts == two.texts


def test_the_quick_start_keeps_its_pixels_and_its_captions(tmp_path):
    config = of_quickstart(tmp_path)
    manifest = run(config, tmp_path / "to", Options(shards=3, check=False))
    source = data.make_source("mine", config, SIZE, True)
    other = opened(tmp_path / "to", "image_text", preprocess={"name": "resize"})
    assert len(other) == len(source) == manifest["records"]
    assert manifest["captions"] == sum(map(len, source.texts))
    order = range(0, len(source), 50)
    (one,), (two,) = read(source, order), read(other, order)
    np.testing.assert_array_equal(one.images, two.images)
    assert one.texts == two.texts


def test_the_manifest_says_what_is_there(tmp_path):
    config = of_folder(tmp_path)
    (tmp_path / "pets" / "owl" / "broken.jpg").write_bytes(BROKEN)
    to = tmp_path / "to"
    run(config, to, Options(shards=2))
    manifest = json.loads((to / "manifest.json").read_text())
    assert manifest["version"] == 1 and manifest["kind"] == "image_label"
    assert manifest["class_names"] == ["big dog", "cat", "owl"]
    assert manifest["class_counts"] == [4, 4, 4] and manifest["records"] == 12
    skipped = {"image cannot be decoded": 1, "no image suffix": 1}
    assert manifest["skipped"] == skipped and manifest["source_records"] == 13
    assert manifest["source"] == config
    files = [f"mine-{i:05d}-of-00002.tfrecord" for i in range(2)]
    assert sorted(contents(to)) == ["index.npz", "manifest.json", *files]
    assert [shard["file"] for shard in manifest["shards"]] == files
    for entry in prepared.files(manifest):
        assert (to / entry["file"]).stat().st_size == entry["bytes"]
    assert sum(s["records"] for s in manifest["shards"]) == 12
    # Readable as any TFRecord, checksums and all.
    payloads = [
        p.numpy() for p in tf.data.TFRecordDataset([str(to / f) for f in files])
    ]
    features = [tf.train.Example.FromString(p).features.feature for p in payloads]
    assert all(set(f) == {"image", "label", "key"} for f in features)
    keys = [f["key"].bytes_list.value[0].decode() for f in features]
    assert keys[0] == str(tmp_path / "pets" / "big_dog" / "0.JPEG")
    # The index is what a scan finds.
    index, _ = prepared.open_prepared("mine", str(to), "image_label")
    scanned = index_tfrecords("mine", index.shards)
    for name in ("shard", "offset", "size", "text_offset", "text_size"):
        np.testing.assert_array_equal(getattr(index, name), getattr(scanned, name))
        assert getattr(index, name).dtype == getattr(scanned, name).dtype


def test_shards_have_about_the_size_asked_for(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    (tmp_path / "pets" / "a").mkdir(parents=True)
    for i in range(20):
        path = tmp_path / "pets" / "a" / f"{i:02d}.png"
        path.write_bytes(encoded(Image.fromarray(noise), "PNG"))
    config = {"format": "folder", "kind": "image_label", "path": str(tmp_path / "pets")}
    manifest = run(config, tmp_path / "to", Options(shard_mib=1))
    sizes = [shard["bytes"] for shard in manifest["shards"]]
    assert len(sizes) == 6 and max(sizes) < 1.1 * 2**20 and sum(sizes) > 5 * 2**20


@pytest.mark.parametrize("make", [of_folder, of_quickstart])
def test_the_bytes_do_not_depend_on_the_workers(make, tmp_path):
    (tmp_path / "from").mkdir()
    config, options = make(tmp_path / "from"), Options(shards=3, max_side=40)
    if make is of_quickstart:  # thousands: workers do get in each other's way
        options = Options(shards=3, check=False)
    for workers in (1, 2, 7):
        run(config, tmp_path / str(workers), options, workers)
    found = [contents(tmp_path / str(workers)) for workers in (1, 2, 7)]
    assert found[0] == found[1] == found[2]


# What is left out, what is shrunk.


def test_broken_images_are_left_out_unless_nobody_looks(tmp_path):
    config = of_csv(tmp_path)
    (tmp_path / "3.WEBP").write_bytes(BROKEN)
    (tmp_path / "5.JPEG").write_bytes(b"")
    (tmp_path / "7.GIF").unlink()
    manifest = run(config, tmp_path / "to")
    reasons = {"empty caption": 1, "file is missing": 1, "image cannot be decoded": 2}
    assert manifest["skipped"] == reasons and manifest["records"] == 9
    good = [i for i in range(12) if i not in (3, 5, 7)]
    assert [row[1][1] for row in raw(as_prepared(tmp_path / "to"))] == [
        f"b {i}" for i in good
    ]
    manifest = run(config, tmp_path / "unchecked", Options(check=False))
    assert manifest["records"] == 11
    assert "image cannot be decoded" not in manifest["skipped"]


def as_prepared(folder, kind="image_text"):
    return {"format": "prepared", "kind": kind, "path": str(folder)}


def test_what_training_would_refuse_to_decode_is_left_out(tmp_path):
    config = of_folder(tmp_path)  # of 90 x 70 pixels
    Image.new("RGB", (91, 70)).save(tmp_path / "pets" / "cat" / "large.png")
    manifest = run({**config, "max_pixels": 6300}, tmp_path / "to")
    assert manifest["records"] == 12
    assert manifest["skipped"]["image has more than max_pixels"] == 1
    assert run(config, tmp_path / "all")["records"] == 13


def test_labels_that_are_no_class_are_left_out(tmp_path):
    labels = [0, 7, -1, 2]
    payloads = [example(jpg=encoded(photo(i)), cls=c) for i, c in enumerate(labels)]
    write_tfrecord(tmp_path / "a.tfrecord", payloads)
    config = {"format": "tfrecord", "kind": "image_label", "class_names": CLASSES}
    manifest = run({**config, "path": str(tmp_path / "a.tfrecord")}, tmp_path / "to")
    assert manifest["skipped"] == {"label out of range": 2}
    assert manifest["class_counts"] == [1, 0, 1, 0, 0, 0, 0]


def test_large_images_are_shrunk_and_small_ones_stay_as_they_are(tmp_path):
    (tmp_path / "pets" / "a").mkdir(parents=True)
    large = encoded(picture(3, 400, 300), "PNG")
    small = encoded(picture(4, 400, 100), "PNG")
    (tmp_path / "pets" / "a" / "1.png").write_bytes(large)
    (tmp_path / "pets" / "a" / "2.png").write_bytes(small)
    config = {"format": "folder", "kind": "image_label", "path": str(tmp_path / "pets")}
    run(config, tmp_path / "to", Options(max_side=100))
    one, two = (row[0] for row in raw(as_prepared(tmp_path / "to", "image_label")))
    image = Image.open(io.BytesIO(one))
    assert image.format == "JPEG" and image.size == (133, 100)
    assert two == small
    level = np.asarray(image).mean((0, 1)) - (35, 220, 128)
    assert np.abs(level).max() < 2
    with pytest.raises(InputError, match="max_side must look into every image"):
        run(config, tmp_path / "x", Options(max_side=100, check=False))


def test_too_many_unreadable_records_stop_it_and_bind_nobody(tmp_path):
    payloads = [example(jpg=encoded(photo(0)), cls=9) for _ in range(30)]
    write_tfrecord(tmp_path / "a.tfrecord", payloads)
    config = {"format": "tfrecord", "kind": "image_label", "class_names": CLASSES}
    config["path"] = str(tmp_path / "a.tfrecord")
    for limit, count in ((10, 10), (100, 30)):
        bad = {**config, "max_skips_in_a_row": limit}
        with pytest.raises(InputError, match=f"got {count} x label out of range"):
            run(bad, tmp_path / "to", Options(shards=2))
    manifest = run({**config, "label_offset": 9}, tmp_path / "to", Options(shards=3))
    assert manifest["records"] == 30
    assert len(contents(tmp_path / "to")) == 3 + 2


# Interrupted, finished, another.


class Stop(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("after", [1, 3, 7, 12])
def test_an_interrupted_one_goes_on_and_ends_in_the_same_bytes(tmp_path, after):
    config, options = of_folder(tmp_path), Options(shards=4)
    run(config, tmp_path / "whole", options)
    to, said = tmp_path / "to", []

    def stop(progress):
        if progress.done >= after:
            raise Stop

    with pytest.raises(Stop):
        run(config, to, options, watch=stop)
    there = contents(to)
    assert "manifest.json" not in there
    assert not [name for name in there if name.endswith(".part")]
    shards = {n: d for n, d in there.items() if n.endswith(".tfrecord")}
    whole = contents(tmp_path / "whole")
    assert shards == {name: whole[name] for name in shards}
    assert len(shards) == (after - 1) // 3
    with pytest.raises(InputError, match="is not finished.*it goes on"):
        opened(to)
    read_again = []
    run(config, to, options, workers=1, say=said.append, watch=read_again.append)
    assert contents(to) == whole
    assert len(read_again) == 12 - 3 * len(shards)
    assert [line.startswith("going on") for line in said] == [True] * bool(shards)


def test_a_shard_that_a_kill_left_without_its_facts_is_written_again(tmp_path):
    config, options = of_folder(tmp_path), Options(shards=4)
    run(config, tmp_path / "whole", options)
    to = tmp_path / "to"
    with pytest.raises(Stop):
        run(config, to, options, watch=lambda p: stop_at(p, 10))
    # A shard cut off, one without facts, and what a dead process has left behind.
    (to / "mine-00000-of-00004.tfrecord").write_bytes(b"")
    (to / "unfinished" / "00001.json").unlink()
    part = f"mine-00003-of-00004.tfrecord.{os.uname().nodename}.999999999.part"
    (to / part).write_bytes(b"half")
    run(config, to, options)
    assert contents(to) == contents(tmp_path / "whole")


def stop_at(progress, count):
    if progress.done >= count:
        raise Stop


def test_a_finished_one_says_so_and_needs_no_source(tmp_path):
    config, said = of_folder(tmp_path), []
    run(config, tmp_path / "to")
    before = contents(tmp_path / "to")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "to").iterdir()}
    (tmp_path / "pets").rename(tmp_path / "moved")
    run(config, tmp_path / "to", say=said.append)
    assert said == ["it is prepared already; the source was not looked at again."]
    assert contents(tmp_path / "to") == before
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "to").iterdir()}
    # What only training asks of a source is no difference.
    of_training = {"preprocess": CENTRE, "weight": 2.0, "max_skipped": 0.5, "root": ""}
    run({**config, **of_training}, tmp_path / "to")


@pytest.mark.parametrize("after", [5, 100])
def test_other_settings_are_refused_with_what_differs(tmp_path, after):
    config, options = of_folder(tmp_path), Options(shards=4)
    try:
        run(config, tmp_path / "to", options, watch=lambda p: stop_at(p, after))
    except Stop:
        pass
    before = contents(tmp_path / "to")
    for other, changed, said in [
        ({"class_names": ["a", "b", "c"]}, options, "source.class_names: it has None"),
        ({"path": "x"}, options, "source.path: it has .*pets, now x"),
        ({}, Options(shards=5), "options.shards: it has 4, now 5"),
        ({}, Options(shards=4, max_side=9), "options.max_side: it has None, now 9"),
    ]:
        with pytest.raises(InputError, match=said):
            run({**config, **other}, tmp_path / "to", changed)
    with pytest.raises(InputError, match="name: it has mine, now yours"):
        run(config, tmp_path / "to", options, name="yours")
    assert contents(tmp_path / "to") == before


def test_a_source_that_has_changed_in_the_meantime_is_refused(tmp_path):
    config, options, to = of_folder(tmp_path), Options(shards=4), tmp_path / "to"
    with pytest.raises(Stop):
        run(config, to, options, watch=lambda p: stop_at(p, 5))
    cats = tmp_path / "pets" / "cat"
    (cats / "1.PNG").rename(cats / "x.PNG")
    with pytest.raises(InputError, match="it lies elsewhere or says other things"):
        run(config, to, options)
    (cats / "new.PNG").write_bytes((cats / "x.PNG").read_bytes())
    with pytest.raises(InputError, match="it had 12 records and now has 13"):
        run(config, to, options)
    cats.rename(tmp_path / "pets" / "kitten")
    with pytest.raises(InputError, match="it has other class names"):
        run(config, to, options)


def test_a_folder_of_something_else_is_refused(tmp_path):
    config = of_folder(tmp_path)
    with pytest.raises(InputError, match="--out must be new.* holds pets; name"):
        run(config, tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InputError, match="--out must be a folder that can be written"):
        run(config, tmp_path / "file" / "to")
    for options, said in [
        (Options(shards=13), "--shards must be at most the number of records: got 13"),
        (Options(shards=0), "--shards must be at least 1: got 0"),
        (Options(shard_mib=0), "--shard_mib must be at least 1"),
        (Options(max_side=0), "--max_side must be at least 1"),
    ]:
        with pytest.raises(InputError, match=said):
            run(config, tmp_path / "to", options)
    assert not contents(tmp_path / "to")
    with pytest.raises(InputError, match='did you mean "folder"'):
        run({**config, "format": "folders"}, tmp_path / "to")


# Damaged.


@pytest.fixture
def whole(tmp_path):
    """A prepared folder of three shards, and its source."""
    config = of_folder(tmp_path)
    run(config, tmp_path / "to", Options(shards=3))
    return tmp_path / "to", config


def shard(number):
    return f"mine-{number:05d}-of-00003.tfrecord"


def test_a_missing_or_cut_off_file_stops_before_the_first_step(whole):
    to, config = whole
    before = contents(to)
    for name in (shard(1), "index.npz"):
        (to / name).write_bytes(before[name][:-1])
        size = len(before[name])
        with pytest.raises(InputError, match=f"{name} has {size - 1:,} bytes, not"):
            opened(to)
        (to / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing.*--verify --out="):
            opened(to)
        said = []
        run(config, to, Options(shards=3), say=said.append)
        assert said == ["1 files are missing or cut off: they are written anew."]
        assert contents(to) == before
    (to / shard(0)).unlink()
    (to / shard(2)).unlink()
    with pytest.raises(InputError, match="and 1 more files are wrong"):
        opened(to)


def test_verifying_finds_a_single_bit(whole):
    to, config = whole
    before, manifest = contents(to), prepared.read_manifest(str(to))
    assert prepared.verify(str(to), manifest) == {}
    for name in (shard(0), shard(2), "index.npz"):
        changed = bytearray(before[name])
        changed[len(changed) // 2] ^= 1
        (to / name).write_bytes(changed)
        said = {name: "has other bytes than were written"}
        assert prepared.verify(str(to), manifest) == said
        (to / name).unlink()
        assert prepared.verify(str(to), manifest) == {name: "is missing"}
        run(config, to, Options(shards=3))
        assert contents(to) == before


def test_an_index_of_another_folder_is_refused(whole):
    to, _ = whole
    changed = bytearray((to / "index.npz").read_bytes())
    changed[100] ^= 1
    (to / "index.npz").write_bytes(changed)
    with pytest.raises(InputError, match="index.npz is another; delete it and run"):
        opened(to)


def test_a_shard_that_comes_out_otherwise_is_not_mended(whole):
    to, config = whole
    first = next((to.parent / "pets" / "big_dog").iterdir())
    (to / shard(0)).unlink()
    first.write_bytes(encoded(photo(99)))
    with pytest.raises(InputError, match="must come out as it was: it did not"):
        run(config, to, Options(shards=3))
    with pytest.raises(InputError, match="00000-of-00003.tfrecord is missing"):
        opened(to)


def test_wrong_folders_say_what_to_do(whole, tmp_path):
    to, _ = whole
    with pytest.raises(InputError, match='"to" has no manifest.json.*unicl_jax.pre'):
        opened("to")
    with pytest.raises(InputError, match="path must be a prepared folder: got ''"):
        opened("")
    with pytest.raises(InputError, match="got image_text.*holds image_label"):
        opened(to, "image_text")
    manifest = json.loads((to / "manifest.json").read_text())
    for text, said in [
        ("{", "must be readable JSON"),
        ("[]", "must say its version"),
        (json.dumps({**manifest, "version": 2}), "version 1 or older: got 2"),
        ('{"version": 1}', "it lacks class_names"),
    ]:
        (to / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=said):
            opened(to)
    assert "class_names" not in SOURCE_FIELDS["prepared"]


# Elsewhere.


def test_remote_folders_are_prepared_and_read(tmp_path):
    # ram:// is the remote file system that needs no network.
    config, to = of_folder(tmp_path), "ram://prepare_test/to"
    with pytest.raises(Stop):
        run(config, to, Options(shards=4), watch=lambda p: stop_at(p, 8))
    run(config, to, Options(shards=4))
    run(config, tmp_path / "to", Options(shards=4))
    local = contents(tmp_path / "to")
    remote = {
        name: tf.io.gfile.GFile(f"{to}/{name}", "rb").read()
        for name in tf.io.gfile.listdir(to)
        if not name.startswith("unfinished")
    }
    assert remote == local
    assert prepared.verify(to, prepared.read_manifest(to)) == {}
    (rows,) = read(opened(to), range(12))
    (same,) = read(opened(tmp_path / "to"), range(12))
    np.testing.assert_array_equal(rows.images, same.images)
    tf.io.gfile.remove(f"{to}/mine-00002-of-00004.tfrecord")
    with pytest.raises(InputError, match="mine-00002-of-00004.tfrecord is missing"):
        opened(to)


def test_keys_of_shards_say_where_a_record_was(tmp_path):
    config = of_webdataset(tmp_path)
    records = open_raw("mine", config, True)
    keys = [records.read(i).key.decode() for i in range(12)]
    assert collections.Counter(k.split("#")[0] for k in keys) == {
        str(tmp_path / "0.tar"): 6,
        str(tmp_path / "1.tar"): 6,
    }
    shard, offset = keys[7].split("#")
    with open(shard, "rb") as file:
        file.seek(int(offset))
        assert file.read(4) == encoded(photo(7))[:4]
