"""Finding, indexing and reading shard files."""

import io
import os
import subprocess
import sys
import tarfile

import pytest

from unicl_jax.data import indexing, shards
from unicl_jax.errors import InputError

PAYLOADS = [bytes([i]) * (20 + i) + b"\x00" for i in range(4)]


def tfrecord(payloads):
    """The bytes of a TFRecord file."""
    parts = []
    for payload in payloads:
        for part in (len(payload).to_bytes(8, "little"), payload):
            parts += [part, indexing.masked_crc32c(part).to_bytes(4, "little")]
    return b"".join(parts)


def tar(members):
    """The bytes of a tar of (name, bytes) members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def contents(index):
    """What an index points at: payloads, or pairs of image and text."""
    reader = shards.ShardReader(index.shards)
    spans = zip(index.shard, index.offset, index.size, strict=True)
    found = [reader.read(*map(int, span)) for span in spans]
    if not len(index.text_offset):
        return found
    spans = zip(index.shard, index.text_offset, index.text_size, strict=True)
    return list(zip(found, (reader.read(*map(int, s)) for s in spans), strict=True))


def index_tfrecord(path, **options):
    """Indexes one TFRecord file."""
    return indexing.index_tfrecords("made", [str(path)], **options)


def index_tar(path, image="jpg", text="txt"):
    """Indexes one tar."""
    return indexing.index_tars("made", [str(path)], [image], text)


# Finding.


def test_a_path_may_be_file_glob_range_folder_or_list(tmp_path):
    names = [f"a-{i:03d}.tar" for i in range(12)]
    for name in [*names, "notes.md"]:
        (tmp_path / name).write_bytes(b"x")
    os.makedirs(tmp_path / "a-sub")
    paths = [str(tmp_path / name) for name in names]

    def find(path):
        return list(shards.find_shards("made", path, ".tar"))

    assert find(paths[3]) == [paths[3]]
    assert find(str(tmp_path / "a-*")) == paths
    assert find(str(tmp_path / "a-{000..011}.tar")) == paths
    assert find(str(tmp_path / "a-{003,001}.{tar,tar}")) == [paths[1], paths[3]]
    assert find(str(tmp_path)) == paths
    assert find([paths[5], str(tmp_path / "a-00[25].tar")]) == [paths[2], paths[5]]


def test_a_path_without_files_names_source_pattern_and_cure(tmp_path):
    (tmp_path / "s-0.tar").write_bytes(b"x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.md").write_text("no shards")
    for path, message in [
        (str(tmp_path / "y-*"), 'source "made".*y-\\*" matches none; check.*`path`'),
        (str(tmp_path / "s-{0..2}.tar"), "s-1.tar"),  # a hole in the range
        (str(tmp_path / "other"), r'no "\*.tar\*"; it holds readme.md'),
        ([], "path must name the shards: got none"),
        (None, "path must name the shards: got none"),
    ]:
        with pytest.raises(InputError, match=message):
            shards.find_shards("made", path, ".tar")


def test_local_shards_need_no_tensorflow(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(tfrecord(PAYLOADS))
    script = (
        "import sys\n"
        "sys.modules['tensorflow'] = None  # makes an import of it fail\n"
        "from unicl_jax.data import indexing, shards\n"
        f"found = shards.find_shards('made', {str(tmp_path)!r}, 'tfrecord')\n"
        "index = indexing.index_tfrecords('made', found)\n"
        "assert len(index) == 4\n"
        "shards.ShardReader(found).read(0, 12, 21)\n"
        "from unicl_jax.data import sources\n"
        "from unicl_jax.errors import InputError\n"
        "config = dict(kind='image_text', format='tfrecord', path=found[0])\n"
        "try:\n"
        "    sources.make_file_source('made', config, 8, True)\n"
        "except InputError as error:\n"
        "    assert 'pip install \"unicl_jax[data]\"' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# TFRecord.


def test_the_checksum_is_castagnolis_masked_as_in_tfrecord():
    # RFC 3720, B.4: CRC-32C of 32 zero bytes is 0x8a9136aa.
    crc = 0x8A9136AA
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert indexing.masked_crc32c(bytes(32)) == masked


def test_tensorflow_writes_what_the_index_reads(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="it is the reference writer")
    with tf.io.TFRecordWriter(str(tmp_path / "a")) as writer:
        for payload in [*PAYLOADS, b""]:
            writer.write(payload)
    assert (tmp_path / "a").read_bytes() == tfrecord([*PAYLOADS, b""])
    assert contents(index_tfrecord(tmp_path / "a")) == [*PAYLOADS, b""]


def test_records_of_all_shards_follow_each_other(tmp_path):
    for name, payloads in [("a", PAYLOADS[:3]), ("b", []), ("c", PAYLOADS[3:])]:
        (tmp_path / name).write_bytes(tfrecord(payloads))
    paths = [str(tmp_path / name) for name in "abc"]
    index = indexing.index_tfrecords("made", paths)
    assert contents(index) == PAYLOADS and len(index) == 4
    assert index.shard.tolist() == [0, 0, 0, 2] and not index.damaged
    index = indexing.index_tfrecords("made", paths, [(1, 1), (0, 0), (0, 1)])
    assert contents(index) == [PAYLOADS[1], PAYLOADS[3]]


def test_a_cut_off_tfrecord_keeps_its_whole_records(tmp_path):
    path = tmp_path / "a"
    data = tfrecord(PAYLOADS)
    path.write_bytes(data)
    start = int(index_tfrecord(path).offset[2])
    for cut, kept in [
        (start + 5, 2),  # inside the payload
        (start - 3, 2),  # inside the length's checksum
        (start - 12, 2),  # between records: nothing to see
        (len(data) - 1, 3),  # inside the last checksum
    ]:
        path.write_bytes(data[:cut])
        index = index_tfrecord(path)
        assert contents(index) == PAYLOADS[:kept]
        assert index.damaged == ({} if cut == start - 12 else {indexing.CUT_OFF: 1})
    spoilt = bytearray(data)
    spoilt[start - 12] ^= 1  # the length: nothing says where the next record starts
    path.write_bytes(spoilt)
    index = index_tfrecord(path)
    assert contents(index) == PAYLOADS[:2] and index.damaged == {indexing.CUT_OFF: 1}


def test_damage_is_logged_with_shard_and_offset(tmp_path, caplog):
    (tmp_path / "a").write_bytes(tfrecord(PAYLOADS)[:-1])
    with caplog.at_level("WARNING"):
        index_tfrecord(tmp_path / "a")
    start = len(tfrecord(PAYLOADS[:3]))
    assert f"{tmp_path / 'a'} is cut off or damaged at byte {start}" in caplog.text


def test_a_foreign_file_stops_at_the_start(tmp_path):
    path = tmp_path / "a"
    for data, message in [
        (
            b"index,caption\n1,a dog\n" * 10,
            r"must be a TFRecord .*a is not.*b'index,ca",
        ),
        (bytes(1000), "must be a TFRecord file"),
        (b"\x1f\x8b" + bytes(100), "gzip-compressed.*unpack it"),
        (b"", "1 shards, 0 bytes and no record"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            index_tfrecord(path)
    path.write_bytes(tfrecord(PAYLOADS))
    with pytest.raises(InputError, match="must be a tar file"):
        index_tar(path)
    with pytest.raises(InputError, match="every shard must be readable.*gone"):
        index_tfrecord(tmp_path / "gone")


def test_a_kept_index_equals_a_fresh_one_and_follows_the_files(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow", reason="it writes the index, here or on gs://")
    path, cache = tmp_path / "a", str(tmp_path / "kept")
    path.write_bytes(tfrecord(PAYLOADS)[:-1])
    fresh = index_tfrecord(path, cache=cache)
    (kept,) = os.listdir(cache)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_scan_tfrecord", None)  # no file is walked again
        again = index_tfrecord(path, cache=cache)
    assert os.listdir(cache) == [kept]
    assert contents(again) == contents(fresh) == PAYLOADS[:3]
    assert again.damaged == fresh.damaged == {indexing.CUT_OFF: 1}
    assert again.offset.dtype == fresh.offset.dtype
    path.write_bytes(tfrecord(PAYLOADS))
    assert len(index_tfrecord(path, cache=cache)) == 4


# WebDataset.


def test_tar_members_meet_by_key_and_incomplete_keys_are_counted(tmp_path):
    (tmp_path / "a.tar").write_bytes(
        tar(
            [
                ("./._0.jpg", b"macOS"),
                ("d.1/0.JPG", b"image 0"),
                ("d.1/0.txt", b"text 0"),
                ("d.1/0.cls", b"0"),
                ("d.2/0.txt", b"text of another folder"),
                ("1.jpg", b"no text"),
                ("2.txt", b"text 2"),
                ("2.jpg", b"image 2"),
                ("é" * 120 + ".jpg", b"image 3"),  # a name that needs a longer header
                ("é" * 120 + ".txt", b"text 3"),
            ]
        )
    )
    index = index_tar(tmp_path / "a.tar")
    assert contents(index) == [(b"image %d" % i, b"text %d" % i) for i in (0, 2, 3)]
    assert index.damaged == {"no .jpg member": 1, "no .txt member": 1}
    with pytest.raises(InputError, match=r"members end in .cls, .jpg, .txt; see"):
        index_tar(tmp_path / "a.tar", text="json")


def test_a_cut_off_tar_keeps_its_whole_records(tmp_path):
    path = tmp_path / "a.tar"
    wanted = [(b"image %d" % i * 99, b"text %d" % i) for i in range(3)]
    members = [(f"{i}.jpg", image) for i, (image, _) in enumerate(wanted)]
    members += [(f"{i}.txt", text) for i, (_, text) in enumerate(wanted)]
    data = tar(sorted(members))
    path.write_bytes(data)
    whole = index_tar(path)
    image, text = int(whole.offset[2]), int(whole.text_offset[2])
    for cut, kept in [
        (image + 9, 2),  # inside the last image
        (image - 512, 2),  # before its header
        (text - 100, 2),  # inside the last header
        (text + 512, 3),  # before the closing zeros
        (len(data), 3),
    ]:
        path.write_bytes(data[:cut])
        index = index_tar(path)
        assert contents(index) == wanted[:kept]
        assert index.damaged == ({} if cut == len(data) else {indexing.CUT_OFF: 1})
    spoilt = bytearray(data)
    spoilt[image - 512 : image - 400] = b"?" * 112  # a header that is none
    path.write_bytes(spoilt)
    index = index_tar(path)
    assert contents(index) == wanted[:2] and index.damaged == {indexing.CUT_OFF: 1}


# Reading.


def test_a_read_beyond_the_end_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    reader = shards.ShardReader([str(tmp_path / "a")])
    assert reader.read(0, 1, 2) == b"23"
    with pytest.raises(OSError, match="ends before byte 4"):
        reader.read(0, 1, 3)


def test_more_shards_than_open_files_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    for i in range(5):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 4)
    reader = shards.ShardReader([str(tmp_path / str(i)) for i in range(5)])
    for i in [0, 1, 2, 3, 4, 0, 4]:
        assert reader.read(i, 1, 2) == bytes([i]) * 2
    assert len(reader._files) == 2
