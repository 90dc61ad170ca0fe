"""Where records lie in shards: TFRecord files and WebDataset tars.

A TFRecord file is a chain of length-prefixed payloads; a WebDataset tar holds the
members of a record side by side under one key. Both become an `Index`, compact arrays
with n entries over all shards, so that any record is one positioned read away.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import struct
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from unicl_jax.data.damage import Damage
from unicl_jax.data.records import hash_of
from unicl_jax.data.shards import gfile, is_remote, open_shard, written_whole
from unicl_jax.errors import InputError

CUT_OFF, EMPTY = "rest of a damaged shard", "empty shard"
_KEPT_FORM = 2  # of kept indices: those of another are made anew
_NUM_THREADS = 16
_MAX_RECORD_SIZE = 2**31 - 1  # protobuf's limit; a larger length is damage


@dataclasses.dataclass(frozen=True)
class Index:
    """Where every record lies.

    Attributes:
      shards: paths, sorted.
      shard: [n] int32, position in `shards`.
      offset: [n] int64, bytes from the shard's start to the record or, in a tar, to its
        image.
      size: [n] int32, bytes.
      text_offset: [n] int64, the same of a tar's text or label member; [0] elsewhere.
      text_size: [n] int32; [0] elsewhere.
      damaged: what could not be indexed.
    """

    PLACE = "shard"  # what a record's place is called

    shards: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray
    damaged: Damage

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self.shard)

    def fingerprint(self) -> str:
        """As `records.Source.fingerprint`; shards may lie in another folder."""
        return hash_of(self.shard, self.offset, self.size)

    @property
    def shard_sizes(self) -> np.ndarray:
        """[s] records of each shard, which lie side by side in the index."""
        return np.bincount(self.shard, minlength=len(self.shards))

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards from the first to the last record of each."""
        sizes = self.shard_sizes[self.shard_sizes > 0]
        firsts = np.cumsum(sizes) - sizes
        _, begins, ends = self.spans(slice(None))
        begins = np.minimum.reduceat(begins, firsts)
        return int((np.maximum.reduceat(ends, firsts) - begins).sum())

    def spans(self, indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where records lie, with image and text: [n] shard, start and end in bytes."""
        start = self.offset[indices]
        stop = start + self.size[indices]
        if len(self.text_offset):
            text = self.text_offset[indices]
            start = np.minimum(start, text)
            stop = np.maximum(stop, text + self.text_size[indices])
        return self.shard[indices], start, stop

    def in_next_shard(self, index: int) -> int:
        """Returns the record at the same place in the next shard, round about."""
        shard = self.shard[index]
        first, end = np.searchsorted(self.shard, [shard, shard + 1])
        start = int(end) % len(self)
        stop = np.searchsorted(self.shard, self.shard[start], "right")
        return start + (index - int(first)) % (int(stop) - start)


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C_TABLE = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """Checksum of a TFRecord's length or payload.

    Args:
      data: the bytes to check.

    Returns:
      Unsigned 32-bit integer.

    Source: CRC-32C (Castagnoli, RFC 3720 appendix B.4), rotated and shifted as in
    TensorFlow's TFRecord format (tensorflow.org/tutorials/load_data/tfrecord).
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class _Spans(NamedTuple):
    """What one shard holds: a row (offset, size[, text offset, text size]) a record."""

    rows: list[tuple[int, ...]]
    damaged: Damage
    extensions: set[str]


def index_tfrecords(
    source: str,
    shards: Sequence[str],
    slices: Sequence[tuple[int, int]] | None = None,
    cache: str = "",
) -> Index:
    """Indexes the records of TFRecord files by walking their length prefixes.

    Args:
      source: the source's name, for errors.
      shards: paths of uncompressed TFRecord files.
      slices: the (skip, take) records of each shard; None takes all.
      cache: folder that keeps the index for the next run; "" keeps none.

    Returns:
      The index. A shard damaged in the middle keeps the records before that.

    Raises:
      InputError: if a file is no TFRecord file or no shard has a record.
    """
    slices = slices or [(0, None)] * len(shards)

    def scan(path, skip, take):
        spans = _scan_tfrecord(source, path)
        return spans._replace(rows=spans.rows[skip : take and skip + take])

    return _index(source, shards, slices, scan, cache)


def index_tars(
    source: str,
    shards: Sequence[str],
    image_extensions: Sequence[str],
    text_extension: str,
    cache: str = "",
) -> Index:
    """Indexes WebDataset tars: a record is the members of one key, side by side.

    Args:
      source: the source's name, for errors.
      shards: paths of uncompressed tar files.
      image_extensions: of the image member; the first one present counts.
      text_extension: of the caption or label member.
      cache: folder that keeps the index for the next run; "" keeps none.

    Returns:
      The index. Keys without both members are left out and counted in `damaged`.

    Raises:
      InputError: if a file is no tar file or no shard has a record.
    """
    wanted = (tuple(image_extensions), text_extension)

    def scan(path, images, text):
        return _scan_tar(source, path, images, text)

    return _index(source, shards, [wanted] * len(shards), scan, cache)


def _index(source, shards, arguments, scan, cache) -> Index:
    """Scans every shard, or loads what an earlier run has scanned."""
    sizes = [_size(source, path) for path in shards]
    key = repr((_KEPT_FORM, list(shards), sizes, list(arguments)))
    kept = f"{cache}/{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if cache and (gfile().exists(kept) if is_remote(kept) else os.path.exists(kept)):
        with open_shard(kept) as file:
            return index_from_bytes(file.read(), tuple(shards))
    # Remote files wait on the network, so threads help; local ones hardly care.
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = list(pool.map(scan, shards, *zip(*arguments, strict=True)))
    counts = [len(part.rows) for part in parts]
    if not sum(counts):
        seen = sorted(set().union(*(part.extensions for part in parts)))
        hint = f" (members end in {', '.join(seen)}; see `fields`)" if seen else ""
        raise InputError(
            f'source "{source}": at least one shard must have a record: got '
            f"{len(shards)} shards, {sum(sizes)} bytes and no record{hint}, from "
            f"{shards[0]}; set `path` to shards that are whole."
        )
    width = max(len(part.rows[0]) for part in parts if part.rows)
    rows = np.concatenate(
        [np.array(part.rows, np.int64).reshape(-1, width) for part in parts]
    )
    text = rows[:, 2:] if width == 4 else np.zeros((0, 2), np.int64)
    index = Index(
        shards=tuple(shards),
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        offset=rows[:, 0].copy(),
        size=rows[:, 1].astype(np.int32),
        text_offset=text[:, 0].copy(),
        text_size=text[:, 1].astype(np.int32),
        damaged=functools.reduce(Damage.join, (p.damaged for p in parts), Damage()),
    )
    if cache:
        gfile().makedirs(os.path.dirname(kept))
        with written_whole(kept) as partial, gfile().GFile(partial, "wb") as file:
            file.write(index_to_bytes(index))
    return index


_ARRAYS = ("shard", "offset", "size", "text_offset", "text_size")


def index_to_bytes(index: Index) -> bytes:
    """An index as the bytes of an .npz file, without the shards' paths."""
    buffer = io.BytesIO()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    damaged = np.array(json.dumps(index.damaged.to_lists()))
    np.savez(buffer, damaged=damaged, **arrays)
    return buffer.getvalue()


def index_from_bytes(data: bytes, shards: tuple[str, ...]) -> Index:
    """The index that `index_to_bytes` wrote.

    Args:
      data: the bytes.
      shards: paths, in the order they had.

    Returns:
      The index.
    """
    arrays = dict(np.load(io.BytesIO(data)))
    damaged = Damage()
    if "damaged" in arrays:  # prepared folders of an earlier version have none
        damaged = Damage.from_lists(json.loads(str(arrays["damaged"])))
    arrays = {name: arrays[name] for name in _ARRAYS}
    return Index(shards=shards, damaged=damaged, **arrays)


def _size(source: str, path: str) -> int:
    try:
        return gfile().stat(path).length if is_remote(path) else os.path.getsize(path)
    except Exception as error:  # gfile has error types of its own
        raise InputError(
            f'source "{source}": every shard must be readable: {path} is not '
            f"({error}); fetch it again or set `path`."
        ) from error


def _not_a(kind: str, source: str, path: str, head: bytes) -> InputError:
    packed = head[:2] == b"\x1f\x8b"
    found = "it is gzip-compressed" if packed else f"it starts with {head[:8]!r}"
    todo = "unpack it" if packed else "take it out of `path` or set `format`"
    return InputError(
        f'source "{source}": every shard must be a {kind} file from its first '
        f"byte: {path} is not ({found}); {todo}."
    )


def _report_damage(source: str, path: str, offset: int, kept: int) -> None:
    logging.warning(
        'source "%s": %s is cut off or damaged at byte %d; its first %d records are '
        "kept, the rest is lost: fetch the shard again.",
        *(source, path, offset, kept),
    )


def _scan_tfrecord(source: str, path: str) -> _Spans:
    """Walks [length 8][its checksum 4][payload][checksum 4] to the end."""
    rows, damaged, offset, end = [], Damage(), 0, _size(source, path)
    with open_shard(path) as file:
        while offset < end:
            file.seek(offset)
            header = file.read(12)
            valid = len(header) == 12
            if valid:
                length, checksum = struct.unpack("<QI", header)
                valid = checksum == masked_crc32c(header[:8])
            if not valid and offset == 0 and len(header) == 12:
                raise _not_a("TFRecord", source, path, header)
            if not valid or length > _MAX_RECORD_SIZE or offset + length + 16 > end:
                _report_damage(source, path, offset, len(rows))
                damaged.add(CUT_OFF, path, f"byte {offset}", is_record=False)
                break
            rows.append((offset + 12, length))
            offset += length + 16
    return _Spans(rows, damaged, set())


def _scan_tar(source: str, path: str, images: tuple[str, ...], text: str) -> _Spans:
    """Groups the members by key: the path up to the first dot of the file's name."""
    rows, damaged, extensions = [], Damage(), set()
    end = _size(source, path)
    if not end:
        damaged.add(EMPTY, path, is_record=False)
    key, members, position, is_whole = None, {}, 0, False

    def close(is_cut=False):
        image = next((members[e] for e in images if e in members), None)
        if image and text in members:
            rows.append(image + members[text])
        elif members and not is_cut:
            lacks = text if image else images[0]
            damaged.add(f"no .{lacks} member", path, "/".join(key).lstrip("/"))

    with open_shard(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > end:
                        break
                    position = member.offset_data + member.size
                    folder, name = os.path.split(member.name)
                    stem, _, extension = name.partition(".")
                    if not member.isreg() or not stem:  # stem: ".DS_Store", "._a.jpg"
                        continue
                    if (folder, stem) != key:
                        close()
                        key, members = (folder, stem), {}
                    members[extension.lower()] = (member.offset_data, member.size)
                    extensions.add("." + extension.lower())
                else:
                    # tarfile stops in silence at a header it cannot read, but a whole
                    # archive ends in a block of zeros.
                    file.seek(tar.offset)
                    is_whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except tarfile.ReadError as error:
            if end and not position:
                file.seek(0)
                raise _not_a("tar", source, path, file.read(8)) from error
    close(is_cut=not is_whole)
    if end and not is_whole:
        _report_damage(source, path, position, len(rows))
        damaged.add(CUT_OFF, path, f"byte {position}", is_record=False)
    return _Spans(rows, damaged, extensions)
