"""Whether the records that a run goes on with are those that it started with."""

import numpy as np
import pytest
from real_files import encoded, photo

from unicl_jax.data.arrays import ArraySource
from unicl_jax.data.records import hash_of
from unicl_jax.data.sources import make_file_source
from unicl_jax.workdir import keep_records

FOUND = {"labels": (3, "a"), "captions": (5, "b")}


@pytest.fixture
def started(tmp_path):
    """A run's directory with its records saved, and a checkpoint."""
    assert keep_records(tmp_path, FOUND, write=True) == []
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    return tmp_path


def test_the_same_records_go_on_in_silence(started):
    assert keep_records(started, FOUND, write=True) == []


@pytest.mark.parametrize("now", [(4, "c"), (3, "c")])
@pytest.mark.parametrize("write", [True, False])
def test_other_records_are_named_at_every_start(started, now, write):
    for _ in range(2):
        (line,) = keep_records(started, {**FOUND, "labels": now}, write)
        assert line.startswith("labels: ") and f"3 then, {now[0]} now" in line


def test_a_start_that_saved_nothing_binds_nobody(tmp_path):
    keep_records(tmp_path, FOUND, write=True)
    others = {**FOUND, "labels": (9, "z")}
    assert keep_records(tmp_path, others, write=True) == []
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    assert keep_records(tmp_path, others, write=True) == []
    assert len(keep_records(tmp_path, FOUND, write=True)) == 1


def test_a_file_that_is_cut_off_is_said(started):
    (started / "records.json").write_text('{"labels": {"rec')
    (line,) = keep_records(started, FOUND, write=True)
    assert "cannot be read" in line


def test_parts_are_told_from_their_sum():
    assert hash_of(b"ab", b"c") != hash_of(b"a", b"bc") != hash_of(b"abc")
    assert hash_of(np.arange(3)) == hash_of(np.arange(6)[:3])


def opened(root, **more):
    """A folder as a source."""
    config = dict(kind="image_label", format="folder", path=str(root), **more)
    return make_file_source("made", config, 8, train=True)


def test_files_may_move_but_not_come_or_be_called_otherwise(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "a" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "a" / name / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
    before = opened(tmp_path / "a").fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert opened(tmp_path / "b").fingerprint() == before
    assert opened(tmp_path / "b", class_names=["dog", "cat"]).fingerprint() != before
    added = tmp_path / "b" / "cat" / "2.png"
    added.write_bytes(encoded(photo(2), "PNG"))
    assert opened(tmp_path / "b").fingerprint() != before
    added.unlink()
    assert opened(tmp_path / "b").fingerprint() == before
    (tmp_path / "b" / "cat" / "1.png").rename(tmp_path / "b" / "cat" / "9.png")
    assert opened(tmp_path / "b").fingerprint() != before


def test_arrays_are_known_by_all_that_they_hold():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    options = [
        dict(labels=np.array([0, 1, 1]), class_names=("cat", "dog")),
        dict(labels=np.array([0, 1, 0]), class_names=("cat", "dog")),
        dict(texts=["a", "b", "c"]),
        dict(texts=["a", "b", ("c", "d")]),
    ]
    marks = [ArraySource("made", images, **each).fingerprint() for each in options]
    marks.append(ArraySource("made", images + 1, **options[0]).fingerprint())
    assert len({*marks}) == 5
