"""Reading in blocks: each is fetched once, memory stays bounded, errors pass."""

import collections
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from iterator_test import Bytes
from real_files import captioned, encoded, example, labelled, picture, tf

from unicl_jax import data
from unicl_jax.data import shards, stream
from unicl_jax.data.block_cache import BlockCache
from unicl_jax.data.concepts import make_concept_table
from unicl_jax.data.iterator import TrainIterator

# --- The cache.


def test_blocks_asked_for_by_many_threads_are_fetched_once_and_side_by_side():
    fetched, both = collections.Counter(), threading.Barrier(2, timeout=20)

    def fetch(key):
        fetched[key] += 1
        both.wait()  # two fetches must be under way at once
        return b"%d" % key

    cache = BlockCache(fetch, 8)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(cache.get, [0, 0, 0, 0, 1, 1, 1, 1]))
    assert got == [b"0"] * 4 + [b"1"] * 4
    assert fetched == {0: 1, 1: 1}


def test_the_blocks_used_last_are_kept_and_no_more():
    fetched = []

    def fetch(key):
        fetched.append(key)
        return bytes(1)

    cache = BlockCache(fetch, 3)
    for key in [0, 1, 2, 0, 3, 0, 2]:  # 1 was not used for the longest time
        cache.get(key)
    assert fetched == [0, 1, 2, 3] and len(cache._blocks) == 3
    cache.get(1)
    assert fetched == [0, 1, 2, 3, 1] and len(cache._blocks) == 3
    cache.forget(1)
    cache.get(1)
    assert fetched[-2:] == [1, 1]


def test_an_error_reaches_all_who_wait_and_is_not_kept():
    waiting, fails = threading.Event(), [OSError("network is down")]

    def fetch(key):
        del key
        waiting.wait(20)
        if fails:
            raise fails.pop()
        return b"good"

    cache = BlockCache(fetch, 2)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(cache.get, 0) for _ in range(3)]
        waiting.set()
        errors = [future.exception() for future in futures]
    # All three saw it, or came after it and fetched anew.
    assert "down" in str(errors[0] or errors[1] or errors[2]) and not fails
    assert cache.get(0) == b"good"


# --- Spans from blocks.


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 KiB, so that small files have many."""
    for module in (shards, stream):
        monkeypatch.setattr(module, "BLOCK", 4096)


class Counted:
    """A remote file that tells what is read of it."""

    def __init__(self, file, path, reads):
        self.file, self.path, self.reads, self.offset = file, path, reads, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def seek(self, offset):
        self.offset = offset
        self.file.seek(offset)

    def read(self, size):
        data = self.file.read(size)
        self.reads.append((self.path, self.offset, len(data)))
        return data


@pytest.fixture
def reads(monkeypatch):
    """What `ShardReader` reads of remote files: (path, offset, bytes)."""
    found, open_shard = [], shards.open_shard
    monkeypatch.setattr(
        shards, "open_shard", lambda path: Counted(open_shard(path), path, found)
    )
    return found


@pytest.mark.parametrize("is_remote", [False, True])
def test_spans_are_the_files_bytes_wherever_blocks_end(
    is_remote, tmp_path, small_blocks, reads
):
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096 + 77, np.uint8).tobytes()
    path = "ram://block_cache/spans" if is_remote else str(tmp_path / "spans")
    if is_remote:
        tf.io.gfile.makedirs("ram://block_cache")
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(data)
    reader = shards.ShardReader([path])
    reader.keep_blocks(2)
    for start in (0, 1, 4095, 4096, 8191, len(data) - 1):
        for size in (0, 1, 2, 100, 4096, 4097, 9000):
            if start + size <= len(data):
                assert reader.read(0, start, size) == data[start : start + size]
            else:
                with pytest.raises(Exception, match="ends before byte|reached end"):
                    reader.read(0, start, size)
    assert {offset % 4096 for _, offset, _ in reads} <= {0}
    assert bool(reads) == is_remote


def test_a_block_that_came_short_is_fetched_again(tmp_path, small_blocks):
    path = tmp_path / "grows"
    path.write_bytes(b"x" * 100)
    reader = shards.ShardReader([str(path)])
    reader.keep_blocks(2)
    with pytest.raises(OSError, match="ends before"):
        reader.read(0, 50, 100)
    path.write_bytes(b"x" * 200)
    assert reader.read(0, 50, 100) == b"x" * 100


# --- An epoch.


NUM_SHARDS, EACH = 16, 24
FOLDER = "ram://block_cache/epoch"


@pytest.fixture(scope="module")
def remote_shards():
    """16 remote shards of 24 records; their bytes."""
    tf.io.gfile.makedirs(FOLDER)
    for s in range(NUM_SHARDS):
        with tf.io.TFRecordWriter(f"{FOLDER}/x.tfrecord-{s:02d}") as writer:
            for i in range(EACH):
                image = encoded(picture((s + i) % 20, 64, 64))
                caption = f"{s * EACH + i}".encode()
                writer.write(example(jpg=image, cls=i % 7, caption=caption))
    paths = tf.io.gfile.glob(f"{FOLDER}/*")
    return sum(tf.io.gfile.stat(path).length for path in paths)


def epoch(reads, process_index=0, process_count=1, epochs=1, **options):
    """Reads whole epochs; the captions that came, and what the run said."""
    source = captioned(f"{FOLDER}/*")
    reads.clear()  # what opening it read
    options = dict(lanes=4, window=48, batch_size=32) | options
    iterator = TrainIterator(
        [source],
        make_concept_table({}),
        ("{}",),
        Bytes(),
        mixture="proportional",
        seed=0,
        process_index=process_index,
        process_count=process_count,
        **options,
    )
    texts = []
    steps = epochs * NUM_SHARDS * EACH // options["batch_size"]
    # Without its thread, which would read batches of the next epoch ahead; the stream
    # does so, some.
    requests = [iterator._local(step) for step in range(steps)]
    made = source.stream(stream.Request(plan.index, plan.seed) for plan in requests)
    for rows in made:
        texts += [int(text) for (text,) in rows.texts]
    assert not source.skipped
    return texts, iterator.said


def test_an_epoch_with_windows_fetches_the_data_about_once(
    remote_shards, small_blocks, reads
):
    texts, said = epoch(reads)
    assert sorted(texts) == list(range(NUM_SHARDS * EACH))
    fetched = sum(size for *_, size in reads)
    assert remote_shards <= fetched <= 1.1 * remote_shards
    assert len(reads) <= 1.1 * remote_shards / 4096 + NUM_SHARDS
    assert said[0].startswith("made: 16 shards in 4 lanes; up to ")
    in_blocks = len(reads)
    texts, said = epoch(reads, window=0)
    assert sorted(texts) == list(range(NUM_SHARDS * EACH))
    assert "record by record" in said[0] and "set data.window" in said[0]
    assert len(reads) == NUM_SHARDS * EACH > 2 * in_blocks  # one request a record


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_shards(processes, remote_shards, small_blocks, reads):
    whole, _ = epoch(reads)
    touched, fetched, texts = collections.Counter(), 0, []
    for p in range(processes):
        texts.append(epoch(reads, p, processes)[0])
        mine = {path for path, *_ in reads}
        assert len(mine) == NUM_SHARDS // processes
        touched.update(mine)
        fetched += sum(size for *_, size in reads)
    assert set(touched.values()) == {1} and len(touched) == NUM_SHARDS
    assert fetched <= 1.1 * remote_shards
    parts = np.array(texts).reshape(processes, -1, 32 // processes)
    assert parts.swapaxes(0, 1).ravel().tolist() == whole


def test_two_epochs_and_chunks_that_cut_shards_cost_their_edges(
    remote_shards, small_blocks, reads
):
    # 24 lanes of 16 records; blocks hold a few.
    texts, said = epoch(reads, lanes=24, window=8, batch_size=96, epochs=2)
    counts = collections.Counter(texts)
    assert set(counts.values()) == {2} and len(counts) == NUM_SHARDS * EACH
    fetched = sum(size for *_, size in reads) / 2
    assert fetched <= (1 + 24 * 4096 / remote_shards) * remote_shards * 1.1
    assert "lanes are short" in said[0]


def test_blocks_are_fetched_before_their_records_are_asked_for(
    remote_shards, small_blocks
):
    source = captioned(f"{FOLDER}/*")
    source.keep_blocks(4 * EACH, 4)
    cache = source._reader.shards._blocks
    fetch, threads = cache._fetch, []

    def noted(key):
        threads.append(threading.current_thread().name)
        return fetch(key)

    cache._fetch = noted
    asked = [stream.Request(np.arange(24) + 24 * k, np.arange(24)) for k in range(5)]
    rows = list(source.stream(asked))
    assert [len(part.texts) for part in rows] == [24] * 5
    # None by who decodes.
    assert threads and {name.split("_")[0] for name in threads} == {"fetch"}
    passed_on = source._fetch_ahead(iter(asked))
    assert next(passed_on) is asked[0]  # when more than 24 records are waited for
    assert list(passed_on) == asked[1:]


def test_local_shards_are_read_in_blocks_if_told(tmp_path, small_blocks):
    with tf.io.TFRecordWriter(str(tmp_path / "x.tfrecord")) as writer:
        for i in range(20):
            writer.write(example(jpg=encoded(picture(i)), cls=i % 7))
    near, far = (labelled(tmp_path, in_blocks=told) for told in (False, True))
    assert (near.is_far, far.is_far) == (False, True)
    for source in (near, far):
        if source.is_far:
            assert source.keep_blocks(10, 2) > 4096
        (rows,) = source.stream([stream.Request(np.arange(20), np.arange(20))])
        assert rows.labels.tolist() == [i % 7 for i in range(20)]
    assert near._reader.shards._blocks is None
    assert len(far._reader.shards._blocks._blocks) > 2


@pytest.mark.parametrize("window, mib", [(0, None), (16, "4")])
def test_with_a_window_google_cloud_storage_is_read_a_block_at_once(
    window, mib, tmp_path, monkeypatch
):
    name = "GCS_READ_CACHE_BLOCK_SIZE_MB"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    config = dict(
        sources={
            "mine": dict(format="npz", kind="image_text", path=f"{tmp_path}/x.npz")
        },
        mixture="proportional",
        templates="short",
        share_prompts=False,
        text_length="full",
        window=window,
    )
    np.savez(
        tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8), texts=["x"] * 4
    )
    data.make_train_iterator(config, 8, 4, 0, Bytes())
    assert os.environ.get(name) == mib
