"""What a model makes of a set, extracted once and kept in files."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unicl_jax.data.records import Request, Source
from unicl_jax.errors import InputError
from unicl_jax.evaluation.embedder import Embedder

ROWS = 256  # read at a time
PART = 2**15  # rows of a file, while a set is under way: what a kill may lose
THUMBNAIL = 64  # pixels of a side, at most


class Features(NamedTuple):
    """A set's images as a model embeds them, and what is known of each.

    Attributes:
      image: [n, D] float32, as the projection gives them.
      label: [n] int32 class index, or [n, K] uint8 where several classes hold.
      index: [n] int64, of the record in the set: unreadable ones are left out.
      texts: [n] arrays of captions, for retrieval; else empty.
    """

    image: np.ndarray
    label: np.ndarray
    index: np.ndarray
    texts: np.ndarray


def extract(
    embedder: Embedder,
    source: Source,
    path: Path,
    between: Callable[[int, int], None] = lambda done, records: None,
    fingerprint: str = "",
) -> Features:
    """Embeds every image of a set, or reads what an earlier call kept.

    Args:
      embedder: the model.
      source: the set, of which each record is read once, in order.
      path: `.npz` file; beside it, while it is under way, a folder of its parts, from
        which a call that was killed is taken up again.
      between: called after every batch with how many records are done, of how many.
      fingerprint: tells the set's records, as they are read, from others; "": the
        source's own.

    Returns:
      The features.

    Raises:
      InputError: if no record can be read, or the files cannot be written.
    """
    key = f"{embedder.digest} {fingerprint or source.fingerprint()} {len(source)}"
    if (found := read(path, key)) is not None:
        return found
    parts = path.with_suffix(".parts")
    try:
        if not (parts / "key").is_file() or (parts / "key").read_text() != key:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
            (parts / "key").write_text(key)
        done = _whole_parts(parts)
        count, start = len(source), PART * len(done)
        between(min(start, count), count)
        rows = _stream(embedder, source, start, between)
        for first in range(start, count, PART):
            done.append(_joined([next(rows) for _ in range(_batches(first, count))]))
            path_of_part = parts / f"{first // PART:05d}.npz"
            write_arrays(path_of_part, **done[-1]._asdict())
        found = _joined(done)
        write_arrays(path, key=np.array(key), **found._asdict())
        shutil.rmtree(parts)
    except OSError as error:
        raise InputError(
            f'features are kept in files: "{path}" cannot be written '
            f"({error.strerror}); name another folder with --out."
        ) from error
    if not len(found.image):
        raise InputError(
            f'"{source.name}" must hold an image that can be read: none of '
            f"{len(source)} can; look at the files."
        )
    return found


def read(path: Path, key: str | None = None) -> Features | None:
    """Reads kept features.

    Args:
      path: of the file.
      key: what they must be of; None: anything.

    Returns:
      The features; None if there are none, or of something else, or damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if key is None or str(arrays["key"]) == key:
                return _features(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None


def thumbnails(source: Source, indices: np.ndarray) -> np.ndarray:
    """Small pictures of some records.

    Args:
      source: the set.
      indices: [m], which.

    Returns:
      [m, S, S, 3] uint8, S the model's or 64, whichever is less.
    """
    from PIL import Image

    seeds = np.zeros(len(indices), np.uint32)
    rows = next(iter(source.stream([Request(np.asarray(indices), seeds)])))
    size = (min(THUMBNAIL, rows.images.shape[1]),) * 2
    small = [Image.fromarray(image).resize(size) for image in rows.images]
    return np.stack([np.asarray(image) for image in small])


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes a `.npz` file at once: a kill leaves none, or all of it.

    Args:
      path: of the file; its folder is made.
      arrays: by name.

    Raises:
      InputError: if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # room for what can be kept
            temporary.unlink()
        raise InputError(
            f'results are kept in files: "{path}" cannot be written '
            f"({error.strerror}); name another folder with --out."
        ) from error


def _whole_parts(parts):
    """What the files hold, up to the first that is missing or damaged."""
    done = []
    while (part := read(parts / f"{len(done):05d}.npz")) is not None:
        done.append(part)
    return done


def _batches(first, count):
    return -(-min(PART, count - first) // ROWS)


def _stream(embedder, source, start, between):
    count = len(source)
    starts = range(start, count, ROWS)
    wanted = [np.arange(first, min(first + ROWS, count)) for first in starts]
    requests = (Request(rows, np.zeros(len(rows), np.uint32)) for rows in wanted)
    for indices, rows in zip(wanted, source.stream(requests), strict=True):
        # Where a record could not be read stands another, which has its own row.
        good = ~np.isin(indices, [skip.index for skip in rows.skipped])
        images = rows.images[good]
        texts = [t for t, is_good in zip(rows.texts, good, strict=True) if is_good]
        embedded = embedder.images(images)
        between(int(indices[-1]) + 1, count)
        yield Features(embedded, rows.labels[good], indices[good], _table(texts))


def _table(texts):
    """[n, most captions] strings, filled up with ""; nothing without captions."""
    most = max(map(len, texts), default=0)
    if not most:
        return np.zeros((len(texts), 0), "U1")
    return np.array([[*each, *[""] * (most - len(each))] for each in texts])


def _joined(parts):
    columns = list(zip(*parts, strict=True))
    most = max((texts.shape[1] for texts in columns[3]), default=0)
    texts = [
        np.hstack([t, np.full((len(t), most - t.shape[1]), "", "U1")])
        for t in columns[3]
    ]
    return Features(*map(np.concatenate, columns[:3]), np.concatenate(texts))


def _features(arrays):
    return Features(*(arrays[name] for name in Features._fields))
