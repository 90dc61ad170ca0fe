"""Shard files: finding them, and reading spans of bytes from them.

Local paths need no TensorFlow; gs:// paths go through tf.io.gfile.
"""

import contextlib
import glob
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence

from unicl_jax.data.block_cache import BlockCache
from unicl_jax.data.tensorflow import import_tensorflow
from unicl_jax.errors import InputError

_MAX_OPEN_FILES = 256  # below the common limit of 1024 a process
BLOCK = 4 << 20  # bytes; a whole number of MiB, which GCS reads are told in


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_remote(path: str) -> bool:
    """Returns whether `path` needs tf.io.gfile (gs:// and its like)."""
    return "://" in path


def gfile():
    """Returns tf.io.gfile."""
    return import_tensorflow().io.gfile


def set_gcs_reads(num_bytes: int) -> None:
    """Says how much TensorFlow fetches from Google Cloud Storage at once: 64 MiB else.

    Args:
      num_bytes: whole MiB. TensorFlow looks as it is imported: the first call counts,
        and one after that import has no effect. A user's own setting stays.
    """
    os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", str(num_bytes >> 20))


def find_shards(source: str, path: str | Iterable[str], suffix: str) -> tuple[str, ...]:
    """Expands a path, glob, `{000..099}` range, folder or list of these.

    Args:
      source: the source's name, for errors.
      path: what the config says.
      suffix: what the name of a shard holds, e.g. ".tar"; picks files of a folder.

    Returns:
      Sorted paths of the shards.

    Raises:
      InputError: if some part of `path` matches no file.
    """
    patterns = [path] if isinstance(path, str) else list(path or ())
    if not any(patterns):
        raise InputError(
            f'source "{source}": path must name the shards: got none; set `path` to a '
            "file, a folder, a glob or a list of these."
        )
    shards = set()
    for pattern in patterns:
        for part in _expand_braces(os.path.expanduser(pattern)):
            found = _matches(part, suffix)
            if not found:
                raise InputError(
                    f'source "{source}": path must match at least one file: '
                    f'"{part}" matches none{_what_is_there(part, suffix)}; check the '
                    "spelling and that the disk or bucket is there, then set the "
                    "source's `path`."
                )
            shards.update(found)
    return tuple(sorted(shards))


def _expand_braces(pattern: str) -> list[str]:
    """Expands `{00..12}` and `{a,b}`, which globs do not know."""
    match = re.search(r"\{([^{}]+)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        values = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    else:
        values = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [done for value in values for done in _expand_braces(head + value + tail)]


def _matches(pattern: str, suffix: str) -> list[str]:
    if is_remote(pattern):
        files = gfile()
        is_folder, exists, expand = files.isdir, files.exists, files.glob
    else:
        is_folder, exists = os.path.isdir, os.path.exists

        def expand(p):
            return glob.glob(p, recursive=True)

    if is_folder(pattern):
        inside = expand(os.path.join(pattern, "*"))
        return [p for p in inside if suffix in os.path.basename(p)]
    if exists(pattern):
        return [pattern]
    return [p for p in expand(pattern) if not is_folder(p)]


def _what_is_there(pattern: str, suffix: str) -> str:
    if is_remote(pattern) or not os.path.isdir(pattern):
        return ""
    names = sorted(os.listdir(pattern))[:3]
    return f' (a folder with no "*{suffix}*"; it holds {", ".join(names) or "nothing"})'


def open_shard(path: str, buffered: bool = False):
    """Opens a file for reading bytes and seeking; one thread at a time.

    Args:
      path: local or remote.
      buffered: for local files that are read line by line.

    Returns:
      The open file.
    """
    if is_remote(path):
        return gfile().GFile(path, "rb")
    return open(path, "rb", -1 if buffered else 0)


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[str]:
    """Gives a path to write to and renames it at the end, so nobody reads half a file.

    Args:
      path: local or remote. Several processes may write it at once; the last one wins.

    Yields:
      The partial file's path, this process's own.
    """
    partial = f"{path}.{os.uname().nodename}.{os.getpid()}.part"
    yield partial
    gfile().rename(partial, path, overwrite=True)


class ShardReader:
    """Reads bytes by (shard, offset, size), from any number of threads."""

    def __init__(self, shards: Sequence[str]):
        """Opens nothing yet.

        Args:
          shards: paths; `read` names them by position.
        """
        self._shards = shards
        self._lock = threading.Lock()
        self._files = {}  # shard -> open file, the least recently used first
        self._blocks = None

    def keep_blocks(self, num_blocks: int) -> None:
        """Reads whole blocks from now on, for records asked for near each other.

        Args:
          num_blocks: of BLOCK bytes, that are kept at most.
        """
        self._blocks = BlockCache(self._block, num_blocks)

    def fetch_ahead(
        self, shard: Sequence[int], start: Sequence[int], stop: Sequence[int]
    ) -> None:
        """Begins to fetch the blocks in which spans begin and end.

        Args:
          shard: [n] positions in `shards`.
          start: [n] bytes.
          stop: [n] bytes, beyond the last ones.
        """
        spans = zip(shard, start, stop, strict=True)
        keys = ((s, at // BLOCK) for s, *ends in spans for at in (ends[0], ends[1] - 1))
        for key in dict.fromkeys(keys):
            self._blocks.start(key)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Reads one span.

        Args:
          shard: position in `shards`.
          offset: in bytes.
          size: in bytes.

        Returns:
          Exactly `size` bytes.

        Raises:
          OSError: if the file cannot be read or ends before that.
        """
        if self._blocks is None:
            data = self._span(shard, offset, size)
        else:
            data = self._from_blocks(shard, offset, offset + size)
        if len(data) != size:
            raise OSError(f"{self._shards[shard]} ends before byte {offset + size}")
        return data

    def _from_blocks(self, shard, start, stop):
        parts = []
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            key, first = (shard, number), number * BLOCK
            block = self._blocks.get(key)
            if first + len(block) < min(stop, first + BLOCK):
                self._blocks.forget(key)  # cut short: the next reader may have luck
            parts.append(block[max(start - first, 0) : stop - first])
        return b"".join(parts)

    def _block(self, key):
        shard, number = key
        return self._span(shard, number * BLOCK, BLOCK)

    def _span(self, shard, offset, size):
        """What of the span the file has."""
        path = self._shards[shard]
        if not is_remote(path):
            return os.pread(self._local(shard).fd, size, offset)
        with open_shard(path) as file:  # one a read: gfile's are not thread-safe
            file.seek(offset)
            return file.read(size)

    def _local(self, shard: int) -> "_Descriptor":
        with self._lock:
            file = self._files.pop(shard, None) or _Descriptor(self._shards[shard])
            self._files[shard] = file
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files)))
        return file


class _Descriptor:
    """An open file that closes when its last reader lets go of it."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # at Python's exit `os` may be gone before
        if hasattr(self, "fd"):
            close(self.fd)
