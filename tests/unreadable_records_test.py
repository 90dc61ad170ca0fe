"""What happens to records that cannot be read: replaced, counted, never fatal."""

import os

import numpy as np
import pytest
from real_files import (
    CLASSES,
    ask,
    captioned,
    encoded,
    example,
    labelled,
    picture,
    read,
    shown,
    write_ten,
    write_tfrecord,
)

from unicl_jax.data import indexing
from unicl_jax.errors import InputError


@pytest.fixture
def ten(tmp_path):
    """A folder with two TFRecord shards of ten records."""
    write_ten(tmp_path)
    return tmp_path


def broken_source(tmp_path, broken, **changes):
    """Records 0, 1, `broken`, 3: image-text unless the record has a label."""
    good = [
        example(jpg=encoded(picture(i)), caption=f"record {i}".encode(), cls=i)
        for i in range(4)
    ]
    good[2] = broken
    write_tfrecord(tmp_path / "a", good)
    opened = labelled if changes.pop("is_label", False) else captioned
    return opened(tmp_path / "a", **changes)


JPEG = encoded(picture(2))


@pytest.mark.parametrize(
    ("reason", "broken"),
    [
        ("image cannot be decoded", dict(jpg=JPEG[: len(JPEG) // 2], caption=b"x")),
        ("image cannot be decoded", dict(jpg=b"<html>gone</html>", caption=b"x")),
        ("image cannot be decoded", dict(jpg=b"", caption=b"x")),
        ('no field "caption"', dict(jpg=JPEG)),
        ('no field "jpg"', dict(caption=b"x")),
        ('no field "jpg"', dict(jpg=7, caption=b"x")),
        ("2 values of image", dict(jpg=[JPEG] * 2, caption=b"x")),
        ("caption is no UTF-8", dict(jpg=JPEG, caption=b"na\xefve")),
        ("caption is no UTF-8", dict(jpg=JPEG, caption=b"na\xffve")),
        ("empty caption", dict(jpg=JPEG, caption=b" \n")),
    ],
)
def test_the_next_readable_record_stands_in_for_a_broken_one(reason, broken, tmp_path):
    source = broken_source(tmp_path, example(**broken), train=True, preprocess={})
    first, second = read(source, ask([1, 2, 2], [5, 6, 7]), ask([2], [8]))
    assert first.texts == [("record 1",), ("record 3",), ("record 3",)]
    assert second.texts == [("record 3",)]
    assert source.skipped == {reason: 3}
    (rows,) = read(source, ask([1, 3, 3], [5, 6, 7]))
    np.testing.assert_array_equal(first.images, rows.images)


def test_what_is_no_example_is_replaced_too(tmp_path):
    source = broken_source(tmp_path, b"\xff\xff not a protobuf")
    assert read(source, [2])[0].texts == [("record 3",)]
    assert source.skipped == {"not a tf.Example": 1}


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_without_a_class_is_replaced(label, tmp_path):
    broken = example(jpg=JPEG, cls=label)
    source = broken_source(tmp_path, broken, is_label=True)
    assert read(source, [2, 0])[0].labels.tolist() == [3, 0]
    assert source.skipped == {"label out of range": 1}


def test_the_search_for_a_replacement_wraps_around(ten):
    source = labelled(ten, class_names=CLASSES[:2])  # readable: 0, 1, 7, 8
    assert shown(read(source, [9, 2])[0].images) == [0, 7]
    assert source.skipped == {"label out of range": 6}


def test_too_many_broken_neighbours_stop_the_run(ten):
    source = labelled(ten, class_names=CLASSES[:2], max_skips_in_a_row=4)
    with pytest.raises(
        InputError,
        match='(?s)source "made".*record 2 on got 4 x label out of range.*label_offset',
    ):
        read(source, [2])


def test_a_cut_off_shard_gives_its_whole_records_and_is_counted(ten):
    path = ten / "x.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-1])
    source = captioned(ten)
    assert len(source) == 9 and source.skipped == {indexing.CUT_OFF: 1}
    assert shown(read(source, range(9))[0].images) == list(range(9))


def test_a_shard_that_shrinks_under_a_run_is_replaced_by_the_next_one(ten):
    source = captioned(ten)
    os.truncate(ten / "x.tfrecord-00001-of-00002", 20)
    # Each by the one at its place there: one for all would be many times in a batch.
    assert shown(read(source, [7, 5, 6, 9])[0].images) == [1, 5, 0, 3]
    assert source.skipped == {"shard cannot be read": 3}
