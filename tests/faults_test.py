"""Every fault in real bytes, on every format of files: the run goes on without it."""

import json
import os

import numpy as np
import pytest
from header_test import promising
from real_files import (
    CENTRE,
    SIZE,
    Image,
    encoded,
    example,
    photo,
    picture,
    read,
    shown,
    write_tar,
    write_tfrecord,
)

from unicl_jax.data import Tokenizer, tokenizer
from unicl_jax.data.header import TOO_LARGE
from unicl_jax.data.sources import make_file_source
from unicl_jax.errors import InputError

CAPTIONED = ["csv", "tfrecord", "webdataset"]
FORMATS = ["folder", *CAPTIONED]


def write(form, root, records):
    """Writes (image bytes, caption) records in their order, in shards of 8."""
    root.mkdir(exist_ok=True)
    shards = [records[i : i + 8] for i in range(0, len(records), 8)]
    if form == "tfrecord":
        for i, shard in enumerate(shards):
            write_tfrecord(
                root / f"{i}.tfrecord",
                [example(image=image, caption=text) for image, text in shard],
            )
    elif form == "webdataset":
        for i, shard in enumerate(shards):
            members = [
                (f"{j}.{extension}", data)
                for j, record in enumerate(shard)
                for extension, data in zip(("jpg", "txt"), record, strict=True)
            ]
            write_tar(root / f"{i}.tar", members)
    else:
        folder = root / ("a" if form == "folder" else ".")
        folder.mkdir(exist_ok=True)
        for i, (image, _) in enumerate(records):
            (folder / f"{i:03d}.png").write_bytes(image)
        if form == "csv":
            lines = [
                b'%03d.png,"%s"\n' % (i, text) for i, (_, text) in enumerate(records)
            ]
            (root / "t.csv").write_bytes(b"path,caption\n" + b"".join(lines))


def opened(form, root, train=False, **changes):
    """Opens what `write` wrote."""
    config = {"format": form, "preprocess": CENTRE, "path": str(root), **changes}
    config["kind"] = "image_label" if form == "folder" else "image_text"
    if form == "tfrecord":
        config["fields"] = {"image": "image", "text": "caption"}
    if form == "csv":
        config["path"] = str(root / "t.csv")
    return make_file_source("mine", config, SIZE, train)


def good(index):
    return encoded(picture(index), "PNG"), b"record %d" % index


JPEG, PNG, GIF = (encoded(photo(0), kind) for kind in ("JPEG", "PNG", "GIF"))
WEBP, BMP = encoded(photo(0), "WEBP"), encoded(photo(0), "BMP")
NO_IMAGES = [
    b"",
    b"<html>gone</html>",
    bytes(1000),
    *(data[: len(data) // 2] for data in (JPEG, PNG, WEBP, BMP)),
    *(data[:20] for data in (JPEG, PNG, GIF, WEBP, BMP)),
    JPEG[:3],
    encoded(photo(0), "TIFF"),
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
]


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_whole_image_is_replaced(form, tmp_path):
    records = [good(0)]
    for i, data in enumerate(NO_IMAGES, 1):
        records += [(data, b"broken"), good(i)]
    write(form, tmp_path, records)
    source = opened(form, tmp_path, train=True, preprocess={"name": "resize"})
    (rows,) = read(source, range(len(records)))
    expected = [0] + [i for k in range(1, len(NO_IMAGES) + 1) for i in (k, k)]
    assert shown(rows.images) == expected
    if form != "folder":
        assert rows.texts == [(f"record {i}",) for i in expected]
    assert source.skipped == {"image cannot be decoded": len(NO_IMAGES)}
    assert [skip.row for skip in rows.skipped] == [*range(1, len(records), 2)]
    assert [skip.index for skip in rows.skipped] == [*range(1, len(records), 2)]


@pytest.mark.parametrize("form", FORMATS)
def test_bombs_are_not_decoded(form, tmp_path, monkeypatch):
    bombs = [promising(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP")]
    records = [
        record for i, bomb in enumerate(bombs) for record in (good(i), (bomb, b"x"))
    ]
    large = encoded(picture(6, 101, 100), "PNG"), b"large"
    write(form, tmp_path, [*records, large, good(5)])
    source = opened(form, tmp_path, max_pixels=10_000)
    decoded = []
    preprocess = source._preprocess
    monkeypatch.setattr(
        source, "_preprocess", lambda d, seed: decoded.append(d) or preprocess(d, seed)
    )
    (rows,) = read(source, range(12))
    assert shown(rows.images) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert source.skipped == {TOO_LARGE: 7}  # one of them twice
    assert not {*bombs, large[0]} & {*decoded}
    assert shown(read(opened(form, tmp_path, max_pixels=10_100), [10])[0].images) == [6]


def sixteen_bits(image):
    """A 16-bit grey PNG."""
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def odd(image):
    """One picture in the modes that web crawls hold."""
    second = {"save_all": True, "append_images": [photo(9, *image.size)]}
    return {
        "CMYK JPEG": encoded(image.convert("CMYK"), "JPEG"),
        "grey JPEG": encoded(image.convert("L"), "JPEG"),
        "16-bit PNG": sixteen_bits(image),
        "palette PNG": encoded(image.convert("P"), "PNG"),
        "palette BMP": encoded(image.convert("P"), "BMP"),
        "LA PNG": encoded(image.convert("LA"), "PNG"),
        "1-bit PNG": encoded(image.convert("1"), "PNG"),
        "1-bit BMP": encoded(image.convert("1"), "BMP"),
        "animated GIF": encoded(image, "GIF", **second),
        "animated WebP": encoded(image, "WEBP", **second),
    }


GREY = ("grey JPEG", "16-bit PNG", "LA PNG")


@pytest.mark.parametrize("form", FORMATS)
def test_odd_modes_show_what_they_hold(form, tmp_path):
    image = photo(3, SIZE, SIZE)
    modes = odd(image)
    write(form, tmp_path, [(data, b"x") for data in modes.values()])
    source = opened(form, tmp_path, train=True, preprocess={"name": "resize"})
    (rows,) = read(source, range(len(modes)))
    assert not source.skipped and not rows.skipped
    for mode, found in zip(modes, rows.images.astype(int), strict=True):
        expected = image.convert("L") if mode in GREY else image
        if mode.startswith("1-bit"):
            expected = image.convert("1")
        error = np.abs(found - np.asarray(expected.convert("RGB"))).mean()
        assert error < 20, mode  # palettes of 216 colours, and dots of two of them
    assert len({row.tobytes() for row in rows.images}) >= 7


def captions(form, *texts):
    return [(encoded(picture(i), "PNG"), text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("form", CAPTIONED)
def test_captions_that_cannot_be_used_are_replaced(form, tmp_path):
    long = ("größer " * 15_000).strip().encode()  # 120 kB
    texts = [b"zero", b"", b"two", b"na\xefve", b"four", b" \t ", long]
    write(form, tmp_path, captions(form, *texts))
    source = opened(form, tmp_path)
    assert source.skipped == (
        {"empty caption": 2, "caption is no UTF-8": 1} if form == "csv" else {}
    )
    (rows,) = read(source, range(len(source)))
    expected = ["zero", "two", "two", "four", "four", long.decode(), long.decode()]
    if form == "csv":  # which leaves such rows out
        expected = expected[:1] + expected[2:3] + expected[4:6]
    assert rows.texts == [(text,) for text in expected]
    assert source.skipped == {"empty caption": 2, "caption is no UTF-8": 1}
    tokens = Tokenizer()([text for (text,) in rows.texts])
    assert tokens.shape == (len(expected), 77)


@pytest.mark.parametrize(
    ("member", "text", "reason"),
    [
        ("json.caption", b'{"caption": "half \\ud83d"}', "caption is no UTF-8"),
        ("json.caption", b"[" * 100_000, 'no "caption" in the JSON'),
        ("json.caption", b'{"caption": null}', "empty caption"),
        ("json.caption", b'{"text": "x"}', 'no "caption" in the JSON'),
        ("cls", b"99999999999999999999", "label out of range"),
        ("cls", b"-1", "label out of range"),
        ("cls", b"2", "label out of range"),
        ("cls", b"dog", "label is no integer"),
        ("cls", b"9" * 100_000, "label is no integer"),
    ],
)
def test_odd_members_of_a_tar_are_replaced(member, text, reason, tmp_path):
    extension, _, key = member.partition(".")
    fine = b'{"caption": "fine"}' if key else b"1"
    members = []
    for i, value in enumerate([fine, text, fine]):
        members += [(f"{i}.jpg", encoded(picture(i))), (f"{i}.{extension}", value)]
    write_tar(tmp_path / "0.tar", members)
    config = dict(format="webdataset", path=str(tmp_path), preprocess=CENTRE)
    config |= (
        dict(kind="image_text", fields={"text": member})
        if key
        else dict(kind="image_label", class_names=["a", "b"])
    )
    source = make_file_source("mine", config, SIZE, False)
    assert shown(read(source, [0, 1, 2])[0].images) == [0, 2, 2]
    assert source.skipped == {reason: 1}


def test_members_that_are_missing_are_counted_with_their_keys(tmp_path):
    members = [("0.jpg", JPEG), ("0.txt", b"x"), ("d/1.jpg", JPEG), ("2.txt", b"x")]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "1.tar").touch()
    source = opened("webdataset", tmp_path)
    assert len(source) == 1
    assert {found[:3]: found.first for found in source.damage.places()} == {
        ("no .txt member", f"{tmp_path}/0.tar", 1): ("d/1",),
        ("no .jpg member", f"{tmp_path}/0.tar", 1): ("2",),
        ("empty shard", f"{tmp_path}/1.tar", 1): (),
    }
    assert source.damage.lost == 2


@pytest.mark.parametrize("form", ["tfrecord", "webdataset"])
def test_a_shard_that_is_cut_off_in_the_middle_gives_what_it_has(form, tmp_path):
    write(form, tmp_path, [good(i) for i in range(16)])
    path = sorted(p for p in tmp_path.iterdir())[1]
    os.truncate(path, path.stat().st_size // 2 + 5)
    source = opened(form, tmp_path)
    assert 8 < len(source) < 16
    (rows,) = read(source, range(len(source)))
    assert shown(rows.images) == [*range(len(source))] and not rows.skipped
    (found,) = source.damage.places()
    assert (found.reason, found.place) == ("rest of a damaged shard", str(path))


def test_a_shard_that_is_cut_off_in_its_first_bytes_is_damage(tmp_path):
    write("tfrecord", tmp_path, [good(i) for i in range(24)])
    os.truncate(sorted(tmp_path.iterdir())[1], 5)
    source = opened("tfrecord", tmp_path)
    assert len(source) == 16 and source.skipped == {"rest of a damaged shard": 1}


@pytest.mark.parametrize("form", ["tfrecord", "webdataset"])
def test_a_shard_may_go_while_the_run_is_on(form, tmp_path):
    write(form, tmp_path, [good(i) for i in range(24)])
    paths = sorted(p for p in tmp_path.iterdir())
    source = opened(form, tmp_path, max_skips_in_a_row=2)  # fewer than are gone
    assert shown(read(source, [8])[0].images) == [8]
    paths[1].unlink()
    assert shown(read(source, [9])[0].images) == [9]  # for it is open
    source._reader.shards._files.clear()
    (rows,) = read(source, [7, 8, 15, 11, 16])
    # Its records are replaced by those at their places in the next shard.
    assert shown(rows.images) == [7, 16, 23, 19, 16]
    assert [skip.index for skip in rows.skipped] == [8, 15, 11]
    assert {skip.reason for skip in rows.skipped} == {"shard cannot be read"}
    assert source.place(8) == {"shard": str(paths[1])}
    for path in (paths[0], paths[2]):
        path.unlink()
    source._reader.shards._files.clear()
    with pytest.raises(InputError, match="shard cannot be read .as .*max_skips_in_a_"):
        read(source, [3])


@pytest.mark.parametrize("form", ["folder", "csv"])
def test_a_file_may_go_while_the_run_is_on(form, tmp_path):
    write(form, tmp_path, [good(i) for i in range(8)])
    source = opened(form, tmp_path)

    assert shown(read(source, [3])[0].images) == [3]
    os.unlink(source.where(3))
    assert shown(read(source, [2, 3, 4])[0].images) == [2, 4, 4]
    assert source.skipped == {"file is missing": 1}


# A setting that fits no record stops at the start.


@pytest.mark.parametrize("form", FORMATS)
def test_a_field_that_holds_no_image_stops_at_the_start(form, tmp_path):
    write(form, tmp_path, [(b"record %d" % i, b"record") for i in range(9)])
    where = {"tfrecord": r".*caption \(bytes_list\), image \(bytes_list\)"}
    todo = {"folder": "`path`", "csv": "`path` or `root`"}.get(form, "`fields`")
    with pytest.raises(
        InputError,
        match=r'source "mine": its records.*of 8 .*8 x image cannot be decoded \(/.*'
        rf"whose image is b'record 0'\){where.get(form, '')}; set the source's {todo}",
    ):
        opened(form, tmp_path)
    write(form, tmp_path / "b", [good(0)] + [(b"broken", b"x")] * 7)
    assert shown(read(opened(form, tmp_path / "b"), [1])[0].images) == [0]


@pytest.mark.parametrize("form", ["tfrecord", "webdataset"])
def test_a_text_field_that_holds_no_text_stops_at_the_start(form, tmp_path):
    write(form, tmp_path, [(JPEG, JPEG)] * 9)
    with pytest.raises(InputError, match="8 x caption is no UTF-8.*`fields`"):
        opened(form, tmp_path)


@pytest.mark.parametrize("form", ["tfrecord", "webdataset"])
@pytest.mark.parametrize("first", [1, 1000])
def test_labels_without_classes_stop_at_the_start(form, first, tmp_path):
    """Labels from 1 are met later, one by one; these are the first records'."""
    labels = [first + i % 4 for i in range(8)]
    if form == "tfrecord":
        payloads = [example(image=JPEG, label=label) for label in labels]
        write_tfrecord(tmp_path / "0.tfrecord", payloads)
    else:
        members = [
            member
            for i, label in enumerate(labels)
            for member in ((f"{i}.jpg", JPEG), (f"{i}.cls", str(label).encode()))
        ]
        write_tar(tmp_path / "0.tar", members)
    config = dict(kind="image_label", format=form, path=str(tmp_path))
    if form == "tfrecord":
        config["fields"] = {"image": "image", "label": "label"}
    config["class_names"] = ["a", "b"]
    low, count = (2, 6) if first == 1 else (1000, 8)
    with pytest.raises(
        InputError,
        match=rf"labels must lie in \[0, 2\).*: {count} of 8 .*, from {low} to "
        rf"{first + 3} .*"
        r"`class_names`, `label_offset` or `fields.label`",
    ):
        make_file_source("mine", config, SIZE, False)
    config["class_names"] = ["a", "b", "c"]
    if first == 1:  # 2 of 8 are none of these: damage
        make_file_source("mine", config, SIZE, False)
    config.pop("class_names")
    with pytest.raises(InputError, match="must name every class.*set `class_names`"):
        make_file_source("mine", config, SIZE, False)


def test_as_many_names_as_tfds_has_classes(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the format under test")
    from unicl_jax.data import made_up

    config = {"kind": "image_label", "format": "tfds", "path": "/nowhere"}
    made = made_up.write_made_up({"a": config}, str(tmp_path), 24, seed=0)["a"]
    names = list(tfds.builder_from_directory(made["path"]).info.features["label"].names)
    make_file_source("mine", {**made, "class_names": names}, SIZE, False)
    with pytest.raises(InputError, match=f'"label" in .* {len(names)} classes, .*5 n'):
        make_file_source("mine", {**made, "class_names": names[:5]}, SIZE, False)
    made |= {"kind": "image_text", "fields": {"text": "caption"}}
    with pytest.raises(
        InputError, match=r'"caption" is none .*label \(int64_list\).*`f'
    ):
        make_file_source("mine", made, SIZE, False)


def test_long_captions_keep_the_tokens_they_would_have_as_a_whole(monkeypatch):
    rng = np.random.default_rng(0)
    letters = [*"aaabcdé犬が走🐶ÃΣ", "!?", "&amp;", "<", "ing"]
    texts = ["".join(rng.choice(letters, 400)) for _ in range(20)]
    texts += ["".join(rng.choice([*letters, " ", "\n"], 6000)) for _ in range(20)]
    texts += ["".join(rng.choice([*"aabcdé犬走", "ing"], 66)) for _ in range(20)]
    # The 75th word goes on where the lines are no longer looked at.
    texts += [" " * (4096 - 2 * 74 - i) + "x " * 74 + "elephants" for i in range(9)]
    found = [Tokenizer(77, size)(texts) for size in (600, 49_408)]
    monkeypatch.setattr(tokenizer, "_MAX_CACHED_CHARS", 10**9)
    monkeypatch.setattr(tokenizer, "_HEAD_CHARS", 10**9)
    expected = [Tokenizer(77, size)(texts) for size in (600, 49_408)]
    np.testing.assert_array_equal(found, expected)


def test_captions_of_100_kb_lose_their_tails_alone():
    tokenize = Tokenizer()
    for text in (
        "a photo of a dog " * 6000,
        "ein größer Hund\n" * 6000,
        "\n" * 100_000 + "é",
        "1234567890" * 10_000,
        "犬が走る。" * 20_000,
        json.dumps({"a": "ü" * 10}) * 5000,
    ):
        tokens = tokenize([text])
        np.testing.assert_array_equal(tokens, [pad(tokenize, tokenize.encode(text))])
        is_long = len(tokenize.encode(text)) > 75
        assert tokenize.cut([text], tokens).tolist() == [is_long]


def pad(tokenize, ids):
    ids = [tokenize.sot, *ids[:75]]
    return ids + [tokenize.eot] * (77 - len(ids))
