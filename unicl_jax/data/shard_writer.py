"""Writing TFRecord shards: whole files or none, the same bytes each time."""

import collections
import concurrent.futures
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from unicl_jax.data.damage import Damage
from unicl_jax.data.indexing import Index, index_to_bytes
from unicl_jax.data.prepared import hash_file
from unicl_jax.data.raw import Raw
from unicl_jax.data.shards import gfile, is_remote, written_whole
from unicl_jax.data.tensorflow import import_tensorflow

FRAME = 16  # bytes of a TFRecord around its payload


class Row(NamedTuple):
    """A record as it is written, or the reason why it is not.

    Attributes:
      payload: a serialized tf.Example.
      reason: "" if it is good.
      label: class index; not used where there are captions.
      num_texts: captions.
    """

    payload: bytes
    reason: str
    label: int
    num_texts: int


def serialize(raw: Raw) -> bytes:
    """Returns a record as a tf.Example: `image`, `text` or `label`, and `key`."""
    tf = import_tensorflow()

    def of_bytes(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    feature = {"image": of_bytes(raw.image), "key": of_bytes(raw.key)}
    if raw.texts:
        feature["text"] = of_bytes(*(text.encode() for text in raw.texts))
    else:
        integers = tf.train.Int64List(value=[raw.label])
        feature["label"] = tf.train.Feature(int64_list=integers)
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    # Map entries have no order of their own.
    return example.SerializeToString(deterministic=True)


def in_order(
    pool: concurrent.futures.Executor,
    function: Callable,
    arguments: Iterable,
    ahead: int,
) -> Iterator:
    """Maps over arguments, in parallel and in their order.

    Args:
      pool: runs the function.
      function: of one argument.
      arguments: taken as they are needed.
      ahead: no more results than that wait to be taken.

    Yields:
      Its results.
    """
    pending = collections.deque()
    for argument in arguments:
        pending.append(pool.submit(function, argument))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def made_whole(path: str) -> Iterator[str]:
    """Gives a local path to write to, and puts what is there where it belongs.

    Args:
      path: where, local or remote; nothing of it is there before the end, nor if that
        is an exception.

    Yields:
      The local path.
    """
    with contextlib.ExitStack() as stack:
        if is_remote(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            local = os.path.join(folder, "shard")
            yield local
            with written_whole(path) as partial:
                gfile().copy(local, partial, overwrite=True)
            return
        partial = None
        try:
            with written_whole(path) as partial:
                yield partial
        except BaseException:
            if partial and os.path.exists(partial):
                os.remove(partial)
            raise


def write_json(path: str, value) -> None:
    """Writes JSON, whole or not at all."""
    with made_whole(path) as local, open(local, "w") as file:
        json.dump(value, file, indent=1)


def write_shard(path: str, rows: Iterable[Row]) -> dict[str, Any]:
    """Writes the good rows of a shard.

    Args:
      path: local or remote.
      rows: in order.

    Returns:
      What the index and the manifest need: `records`, `bytes`, `sha256`, `sizes` of
      the payloads, `skipped` and `labels` with how often each, number of `captions`.
    """
    sizes, skipped, labels, captions = (
        [],
        collections.Counter(),
        collections.Counter(),
        0,
    )
    with made_whole(path) as local:
        with import_tensorflow().io.TFRecordWriter(local) as writer:
            for row in rows:
                if row.reason:
                    skipped[row.reason] += 1
                    continue
                writer.write(row.payload)
                sizes.append(len(row.payload))
                captions += row.num_texts
                if not row.num_texts:
                    labels[str(row.label)] += 1
        digest = hash_file(local)
    return {
        "records": len(sizes),
        "bytes": sum(sizes) + FRAME * len(sizes),
        "sha256": digest,
        "skipped": skipped,
        "labels": labels,
        "captions": captions,
        "sizes": sizes,
    }


def make_index(facts: Iterable[dict[str, Any]]) -> bytes:
    """The index of the shards, as a scan of them would find it.

    Args:
      facts: what `write_shard` returned for each.

    Returns:
      See `indexing.index_to_bytes`.
    """
    sizes = [np.array(each["sizes"], np.int64) for each in facts]
    offsets = [np.cumsum(each + FRAME) - each - 4 for each in sizes]
    return index_to_bytes(
        Index(
            shards=(),
            shard=np.repeat(
                np.arange(len(facts), dtype=np.int32), [len(each) for each in sizes]
            ),
            offset=np.concatenate(offsets),
            size=np.concatenate(sizes).astype(np.int32),
            text_offset=np.zeros(0, np.int64),
            text_size=np.zeros(0, np.int32),
            damaged=Damage(),
        )
    )


def list_folder(folder: str) -> list[str]:
    """Returns the names in a folder, none if there is no such folder."""
    if is_remote(folder):
        is_there = gfile().isdir(folder)
        return [n.rstrip("/") for n in gfile().listdir(folder)] if is_there else []
    return os.listdir(folder) if os.path.isdir(folder) else []


def remove_leftovers(folder: str) -> None:
    """Removes what processes of this machine left half written when they were killed.

    Args:
      folder: local; a remote one has none, for objects are written at once.
    """
    name = re.compile(rf".*\.{re.escape(os.uname().nodename)}\.(\d+)\.part")
    for path in [] if is_remote(folder) else os.listdir(folder):
        match = name.fullmatch(path)
        if match and not _is_running(int(match[1])):
            os.remove(os.path.join(folder, path))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove(path: str) -> None:
    """Removes a file, or a folder with what is in it; nothing if it is not there."""
    if gfile().exists(path):
        (gfile().rmtree if gfile().isdir(path) else gfile().remove)(path)
