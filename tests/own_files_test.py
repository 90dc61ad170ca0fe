"""Sources of one's own: class folders of images, tables of captions or labels."""

import os
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from ml_collections import ConfigDict
from real_files import CENTRE, SIZE, encoded, picture, read, shown, tf

from unicl_jax import data
from unicl_jax.data import listing
from unicl_jax.data.labels import load_class_names
from unicl_jax.data.records import NO_LABEL
from unicl_jax.data.sources import make_file_source
from unicl_jax.errors import InputError


def write(path, index, kind="PNG"):
    """Writes one `picture`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(index), kind))


def write_table(path, *lines, mark=b""):
    """Writes lines, some of which are bytes."""
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(mark + b"".join(line + b"\n" for line in lines))
    return path


def folder(path, **changes):
    """Opens class folders."""
    config = {"kind": "image_label", "format": "folder", "path": str(path)}
    return make_file_source(
        "mine", {**config, "preprocess": CENTRE, **changes}, SIZE, False
    )


def table(path, kind="image_text", **changes):
    """Opens a CSV or TSV file."""
    config = {"kind": kind, "format": "csv", "path": str(path)}
    return make_file_source(
        "mine", {**config, "preprocess": CENTRE, **changes}, SIZE, False
    )


@pytest.fixture
def said(monkeypatch):
    """The warnings of a source, as they are logged."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *a: lines.append(text % a))
    return lines


@pytest.fixture
def pets(tmp_path):
    """Three classes, pictures 0 to 5 in the order of their paths."""
    root = tmp_path / "pets"
    write(root / "big_dog" / "a.png", 0)
    write(root / "big_dog" / "b" / "c.JPG", 1, "JPEG")
    write(root / "big_dog" / "z.bmp", 2, "BMP")
    write(root / "cat" / "10.gif", 3, "GIF")
    write(root / "cat" / "9.webp", 4, "WEBP")
    write(root / "owl" / "é 猫.jpeg", 5, "JPEG")
    return root


# Class folders.


def test_a_folder_gives_its_images_in_order_with_its_classes(pets):
    source = folder(pets)
    assert source.class_names == ("big dog", "cat", "owl")
    assert len(source) == 6 and not source.skipped
    (rows,) = read(source, [5, 0, 3, 1, 2, 4])
    assert shown(rows.images) == [5, 0, 3, 1, 2, 4]
    assert rows.labels.tolist() == [2, 0, 1, 0, 0, 1]
    assert rows.texts == [()] * 6


def test_the_order_is_that_of_the_names_not_of_the_disk(pets, monkeypatch):
    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return self.entries

        def __exit__(self, *error):
            pass

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", Backwards)
    assert shown(read(folder(pets), range(6))[0].images) == list(range(6))


def test_what_is_no_image_is_left_out_and_counted(pets, said):
    write(pets / "cat" / ".hidden.png", 9)
    write(pets / "cat" / ".cache" / "x.png", 9)
    write(pets / ".git" / "x.png", 9)
    write(pets / "top.png", 9)
    (pets / "cat" / "notes.txt").write_text("x")
    (pets / "owl" / "Thumbs.db").write_text("x")
    (pets / "unicorn").mkdir()
    os.mkfifo(pets / "owl" / "pipe.png")
    (pets / "owl" / "gone.png").symlink_to("nowhere")
    (pets / "owl" / "again").symlink_to(pets)
    (pets / "owl" / "linked.png").symlink_to(pets / "cat" / "9.webp")
    source = folder(pets)
    assert source.class_names == ("big dog", "cat", "owl", "unicorn")
    assert source.skipped == {
        "hidden": 3,
        "no image suffix": 2,
        "in no class folder": 1,
        "no file": 2,
        "link to itself": 1,
    }
    assert shown(read(source, range(7))[0].images) == [0, 1, 2, 3, 4, 4, 5]
    assert len(said) == 2 and "unicorn" in said[0] and "3 x hidden" in said[1]


@pytest.mark.parametrize("names", [["Hund", "Katze", "Eule"], "names.txt"])
def test_names_that_are_no_folders_are_one_a_folder(names, pets, tmp_path):
    if names == "names.txt":
        names = str(tmp_path / names)
        Path(names).write_text("Hund\nKatze\nEule\n", encoding="utf-8-sig")
    source = folder(pets, class_names=names)
    assert source.class_names == ("Hund", "Katze", "Eule")
    assert read(source, range(6))[0].labels.tolist() == [0, 0, 0, 1, 1, 2]


def test_names_of_folders_keep_their_own_order(pets):
    source = folder(pets, class_names=["Owl", "cow", "cat", "Big dog"])
    assert source.class_names == ("Owl", "cow", "cat", "Big dog")
    assert read(source, range(6))[0].labels.tolist() == [3, 3, 3, 2, 2, 0]


@pytest.mark.parametrize("form", ["dict", "ConfigDict", "file"])
def test_a_mapping_names_folders(form, pets, tmp_path):
    names = {"owl": "barn owl", "cow": "cow", "cat": "cat", "big_dog": "hound"}
    if form == "ConfigDict":
        names = ConfigDict(names)
    elif form == "file":
        lines = [f"{key}\t{name}\n" for key, name in names.items()]
        names = str(tmp_path / "names.tsv")
        Path(names).write_text("".join(lines))
    source = folder(pets, class_names=names)
    assert source.class_names == ("hound", "cat", "barn owl")
    assert read(source, range(6))[0].labels.tolist() == [0, 0, 0, 1, 1, 2]


def test_a_broken_image_is_replaced_and_counted(pets):
    (pets / "big_dog" / "a.png").write_bytes(b"")
    (pets / "cat" / "9.webp").write_bytes(b"<html>gone</html>")
    source = folder(pets)
    (pets / "big_dog" / "z.bmp").unlink()
    (rows,) = read(source, range(6))
    assert shown(rows.images) == [1, 1, 3, 3, 5, 5]
    assert rows.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.skipped == {"image cannot be decoded": 2, "file is missing": 1}


def test_a_remote_folder_and_table_are_read_alike(pets, tmp_path):
    write(pets / "cat" / ".hidden" / "x.png", 9)
    (pets / "cat" / "notes.txt").write_text("x")
    for path in sorted(p for p in pets.rglob("*") if p.is_file()):
        remote = f"ram://own_files/pets/{path.relative_to(pets)}"
        tf.io.gfile.makedirs(os.path.dirname(remote))
        with tf.io.gfile.GFile(remote, "wb") as file:
            file.write(path.read_bytes())
    with tf.io.gfile.GFile("ram://own_files/pets/t.csv", "w") as file:
        file.write('path,text\ncat/10.gif,"a\ncat"\nowl/no.png,none\n')
    near, far = folder(pets), folder("ram://own_files/pets")
    for a, b in zip(*(read(s, range(6))[0] for s in (near, far)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert near.class_names == far.class_names
    assert near.skipped == {"hidden": 1, "no image suffix": 1}
    # A remote top folder holds the table, too.
    assert far.skipped == {"hidden": 1, "no image suffix": 2}
    source = table("ram://own_files/pets/t.csv")
    assert read(source, [0, 1])[0].texts == [("a\ncat",)] * 2
    assert source.skipped == {"file is missing": 1}


def test_files_of_a_listing_are_not_looked_at(pets, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a look at a file")

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, refuse)
    folders, images, skipped = listing.list_class_folders("mine", str(pets))
    assert [len(found) for found in images] == [3, 2, 1] and not skipped


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(path=""), r"one folder a class: got ''; set the source's `path`"),
        (dict(path="/nowhere"), r'"/nowhere" cannot be listed .*No such file'),
        (dict(path="{}/cat/9.webp"), r"cannot be listed .*Not a directory"),
        (dict(path="{}/cat"), r"holds no folder and no .*2 x in no class folder"),
        (dict(path="{}/up"), r"holds test, train, which are splits; .*up/test"),
        (dict(path="{}/texts"), r"holds a, b and no image .*\(1 x no image suffix\)"),
        (dict(kind="image_text"), r'got kind image_text; .*format to "csv"'),
        (dict(class_names=["a", "b"]), r"got 2 names and 3 folders, from \"big_dog\""),
        (dict(class_names={"cat": "x"}), r"2 of 3 have no name, as \"big_dog\", \"ow"),
        (dict(class_names=["a", " ", "b"]), r"entry 2 is empty; mend it"),
        (dict(class_names="/no.txt"), r"one name a line: /no.txt is not"),
    ],
)
def test_what_a_folder_must_be_is_said(change, said, pets):
    write(pets / "up" / "train" / "cat" / "x.png", 0)
    write(pets / "up" / "test" / "cat" / "x.png", 0)
    (pets / "texts" / "a").mkdir(parents=True)
    (pets / "texts" / "b").mkdir()
    (pets / "texts" / "b" / "x.txt").write_text("x")
    if "path" not in change:
        for unused in ("up", "texts"):
            os.rename(pets / unused, pets.parent / unused)
    changes = {k: v.format(pets) if k == "path" else v for k, v in change.items()}
    with pytest.raises(InputError, match='source "mine": .*' + said):
        folder(changes.pop("path", pets), **changes)


# Tables.


def test_a_table_gives_captions_and_joins_the_rows_of_an_image(pets):
    path = write_table(
        pets / "t.csv",
        "Title,filepath,when",
        "a dog,big_dog/a.png,1",
        '"a ""big"" dog,',
        'at night",cat/9.webp,2',
        "",
        "ein Hund – größer 🐶 ,big_dog/a.png,3",
        f"an owl,{pets}/owl/é 猫.jpeg,4",
        mark=b"\xef\xbb\xbf",
    )
    source = table(path)
    assert source.class_names == () and len(source) == 3 and not source.skipped
    (rows,) = read(source, [2, 0, 1])
    assert shown(rows.images) == [5, 0, 4]
    assert rows.texts == [
        ("an owl",),
        ("a dog", "ein Hund – größer 🐶"),
        ('a "big" dog,\nat night',),
    ]
    assert rows.labels.tolist() == [NO_LABEL] * 3


@pytest.mark.parametrize("image", ["filepath", "Path", "image", "file", "filename"])
@pytest.mark.parametrize(
    "value", ["caption", "TEXT", "title", "label", "class", "class_name"]
)
def test_common_columns_are_found(image, value, pets):
    path = write_table(pets / "t.csv", f"id,{value}, {image} ", "7,owl,cat/9.webp")
    if value in ("caption", "TEXT", "title"):
        assert read(table(path), [0])[0].texts == [("owl",)]
    else:
        assert table(path, "image_label").class_names == ("owl",)


def test_columns_delimiter_and_root_can_be_named(pets, tmp_path):
    lines = ["path|caption|b", "x|y|cat/9.webp|", "x|z|cat/10.gif|"]
    path = write_table(tmp_path / "t.txt", *lines)
    settings = dict(fields={"image": "b", "text": "caption"}, root=str(pets))
    (rows,) = read(table(path, delimiter="|", **settings), [1, 0])
    assert shown(rows.images) == [3, 4] and rows.texts == [("z",), ("y",)]
    for name, mark in (("t.tsv", None), ("t.txt", "tab"), ("t.txt", r"\t")):
        path = write_table(tmp_path / name, *[s.replace("|", "\t") for s in lines])
        source = table(path, delimiter=mark, **settings)
        assert read(source, [0])[0].texts == [("y",)]


def test_paths_of_windows_are_read_and_names_with_a_backslash_too(pets):
    lines = ["path,text", r"cat\9.webp,a", "cat/10.gif,b", r"cat\10.gif,c"]
    rows = read(table(write_table(pets / "t.csv", *lines)), [0, 1])[0]
    assert shown(rows.images) == [4, 3] and rows.texts == [("a",), ("b", "c")]
    os.rename(pets / "cat" / "9.webp", pets / r"cat\9.webp")
    rows = read(table(write_table(pets / "t.csv", *lines)), [0, 1])[0]
    assert shown(rows.images) == [4, 3]


def test_several_tables_are_read_in_the_order_of_their_paths(pets):
    write_table(pets / "1.csv", "path,text", "cat/9.webp,b", "cat/10.gif,c")
    write_table(pets / "0.csv", "text,path", "a,cat/9.webp")
    source = table(pets)  # all of a folder's
    assert read(source, [0, 1])[0].texts == [("a", "b"), ("c",)]


def test_a_tables_labels_are_names_or_numbers(pets):
    lines = ["file,class", "cat/9.webp,house_cat", "owl/é 猫.jpeg,1", "cat/10.gif,0"]
    lines += ["big_dog/a.png, OWL ", "big_dog/z.bmp,2", "big_dog/a.png,cow"]
    path = write_table(pets / "t.csv", *lines)
    source = table(path, "image_label", class_names=["owl", "house cat"])
    assert source.class_names == ("owl", "house cat")
    (rows,) = read(source, range(4))
    assert rows.labels.tolist() == [1, 1, 0, 0]
    assert shown(rows.images) == [4, 5, 3, 0]
    assert len(source) == 4
    assert source.skipped == {"label out of range": 1, "label is no class": 1}
    from_one = dict(class_names=["owl", "house cat"], label_offset=1)
    source = table(path, "image_label", **from_one)
    assert read(source, range(4))[0].labels.tolist() == [1, 0, 0, 1]
    source = table(path, "image_label")  # "0" is as good a name as "cow"
    assert source.class_names == ("0", "1", "2", "OWL", "cow", "house cat")
    named = {"0": "owl", "house_cat": "cat"}
    source = table(path, "image_label", class_names=named)
    assert source.class_names == ("owl", "cat")
    assert read(source, range(2))[0].labels.tolist() == [1, 0]
    assert source.skipped == {"label is no class": 4}


def test_a_cell_without_a_word_is_no_class(pets):
    lines = ["file,class", "cat/9.webp,house_cat", "owl/é 猫.jpeg,_", "cat/10.gif,+"]
    source = table(write_table(pets / "t.csv", *lines), "image_label")
    assert source.class_names == ("house cat",) and len(source) == 1
    assert source.skipped == {"label is no class": 2}


def test_a_folder_or_name_without_a_word_names_its_source(pets):
    with pytest.raises(InputError, match=r'entry 2 holds no word \("_"\); mend it'):
        folder(pets, class_names=["a", "_", "b"])
    (pets / "owl").rename(pets / "_")
    with pytest.raises(
        InputError, match='source "mine": a class folder must.* got "_"'
    ):
        folder(pets)


def test_bad_rows_are_left_out_and_counted_by_reason(pets, said):
    path = write_table(
        pets / "t.csv",
        "path,text",
        "cat/9.webp, ",
        b"cat/9.webp,na\xefve",
        "cat/10.gif",
        " ,x",
        "https://example.com/a.png,x",
        "cat/9.webp,good",
        "cat/gone.png,gone",
        b"owl/\xe9.png,another name",
        b"owl/\xe8.png,no such name",
        '"' + "long " * 30_000,
        "cat/10.gif,good too",
    )
    (pets / "cat" / "broken.png").write_bytes(b"x")
    os.rename(pets / "cat" / "broken.png", os.fsencode(pets) + b"/owl/\xe9.png")
    source = table(path)
    reasons = {
        "empty caption": 1,
        "caption is no UTF-8": 1,
        "path is no UTF-8": 1,
        "row is too short": 1,
        "empty path": 1,
        "path is a web address": 1,
        "row cannot be parsed": 1,
    }
    assert source.skipped == reasons and len(source) == 4
    assert len(said) == 1 and "1 x empty caption" in said[0] and "t.csv" in said[0]
    (rows,) = read(source, range(4))
    assert rows.texts == [("good",), ("good too",), ("good too",), ("good too",)]
    reasons |= {"file is missing": 1, "image cannot be decoded": 2}
    assert source.skipped == reasons


@pytest.mark.parametrize(
    ("lines", "change", "said"),
    [
        (["a,b", "x,y"], {}, r'image paths \(one of filepath, .*has "a", "b"; set `f'),
        (
            ["path,b"],
            {},
            r'captions \(one of caption, .*has "path", "b"; .*fields.text',
        ),
        (["path,b"], dict(kind="image_label"), r"labels \(one of label,.*fields.label"),
        (["path;text", "x;y"], {}, r'has "path;text"; set `delimiter` to ";"'),
        (["path\ttext", "x\ty"], {}, 'set `delimiter` to "tab"'),
        (
            ["path,text"],
            dict(fields={"text": "txet"}),
            r'"txet"\).*did you mean "text"',
        ),
        (["path,text"], dict(fields={"texts": "x"}), r'got "texts"; did you mean "te'),
        ([], {}, "has nothing"),
        (["path,text"], {}, "got no row in .*t.csv; mend the table"),
        (["path,text", "x, ", ",y"], {}, "got 1 x empty caption, 1 x empty path in"),
        (["path,text", "a.png,x"], {}, r"file is missing \(/.*/a.png\); .*or `root`"),
        (["path,text", "x,y"], dict(delimiter="::"), "delimiter must be one char"),
        ([b"\xff\xfep\0a\0"], {}, r"in UTF-8: .*t.csv is .*UTF-16; save"),
        ([b"\x1f\x8b\x08"], {}, "t.csv is gzip-compressed; unpack it"),
        (["path,label", "x,3"], dict(kind="image_label"), 'got "3" and no class_names'),
        (
            ["path,label", "x,cow"],
            dict(kind="image_label", class_names=["cat"]),
            'none of 1 is, as "cow"; set `class_names`, `fields.label`',
        ),
        (["path,text"], dict(path="{}/x.csv"), 'x.csv" matches none; check the spell'),
        (["path,text"], dict(path=""), "path must name the shards: got none"),
    ],
)
def test_what_a_table_must_be_is_said(lines, change, said, tmp_path):
    path = write_table(tmp_path / "t.csv", *lines)
    changes = {k: v.format(tmp_path) if k == "path" else v for k, v in change.items()}
    with pytest.raises(InputError, match='source "mine": .*' + said):
        table(changes.pop("path", path), **changes)


def test_where_labels_are_numbers_names_are_in_their_order():
    with pytest.raises(InputError, match='label order.*a name for each of "cat"; set'):
        load_class_names("mine", {"cat": "x"})


# Both in a run.


def test_batches_go_on_from_a_saved_position(pets):
    rows = [
        f"cat/{name},caption {i}" for i in range(2) for name in ("9.webp", "10.gif")
    ]
    write_table(pets / "t.csv", "path,text", *rows)
    config = ConfigDict(
        dict(
            sources=dict(
                mine=dict(format="folder", kind="image_label", path=str(pets)),
                said=dict(format="csv", kind="image_text", path=str(pets / "t.csv")),
            ),
            mixture="balanced",
            templates="short",
            share_prompts=False,
            text_length="full",
        )
    )

    def batches():
        tokenize = data.Tokenizer(8, 600)
        return data.make_train_iterator(config, SIZE, 8, 3, tokenize)

    whole = batches()
    expected = [next(whole) for _ in range(5)]
    state = whole.state()
    assert state == {"step": 5}
    expected += [next(whole) for _ in range(2)]
    again = batches()
    again.restore(state)
    for batch in expected[5:]:
        for key, value in next(again).items():
            np.testing.assert_array_equal(value, batch[key])
    for iterator in (whole, again):
        iterator.close()
    assert whole.skipped() == {"mine/no image suffix": 1}  # the table
    seen = np.concatenate([batch["label"] for batch in expected])
    assert set(seen.tolist()) == {NO_LABEL, 0, 1, 2}
