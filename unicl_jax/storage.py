"""Where a run's files lie: a directory, or a folder of a Cloud Storage bucket.

A bucket's objects are written whole or not at all, and nothing can be appended to them;
a folder is no more than the objects whose names begin so, and cannot be renamed at
once. What follows from that for a run is here; the other rooms take paths of either
kind, join them by "/", and come here to read, write, list and rename.

What fails raises OSError, with a `strerror` that says why, for either kind.
"""

import concurrent.futures
import contextlib
import errno
import functools
import io
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from unicl_jax.errors import InputError

_SCHEME = "gs://"
_SECONDS = 60  # between two writes of an object that grows
_COMMITTED = "commit_success.txt"  # Orbax writes it last, where it cannot rename
_TORN = "*.orbax-checkpoint-tmp*"  # and where it can, it writes there before
_ROLES = "roles/storage.objectUser and roles/storage.legacyBucketReader"


def is_bucket(path: Any) -> bool:
    """Whether a path is one of Cloud Storage."""
    return str(path).startswith(_SCHEME)


def path(given: str | Path) -> Path:
    """A path of either kind: `Path`, or one of etils for Cloud Storage.

    Args:
      given: "runs/x" or "gs://bucket/runs/x".

    Returns:
      The path.

    Raises:
      InputError: if it is of another kind, or a library is missing.
    """
    if not is_bucket(given):
        if "://" in str(given):  # it would be a folder here, named "s3:"
            raise InputError(
                "a run's folder must be a directory or in Cloud Storage (gs://): got "
                f'"{given}"; mount what it names, and name that.'
            )
        return Path(given)
    _file_system()
    from etils import epath

    return epath.Path(str(given).rstrip("/"))


def absolute(given: str | Path) -> Path:
    """The same, from the root of the file system or in its bucket."""
    found = path(given)
    return found if is_bucket(found) else found.absolute()


def check_bucket(folder: Path) -> None:
    """Makes sure that a folder's bucket can be read; of directories nothing is asked.

    Args:
      folder: of a run.

    Raises:
      InputError: saying what to do.
    """
    if not is_bucket(folder):
        return
    bucket, _, name = str(folder).removeprefix(_SCHEME).partition("/")
    if not (bucket and name):
        raise InputError(
            "a run's folder in Cloud Storage must be gs://bucket/folder: got "
            f'"{folder}"; name a folder.'
        )
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        storage.Client().get_bucket(bucket)  # as Orbax does, before it saves
        names(folder)
    except exceptions.NotFound as error:
        raise InputError(
            f'a run\'s bucket must be there: "{bucket}" is not; make it, or mend the '
            "name."
        ) from error
    except (exceptions.Forbidden, exceptions.Unauthorized, PermissionError) as error:
        raise InputError(
            f'a run\'s bucket must be readable: "{folder}" gave {_said(error)}; '
            f"{_grant(bucket)}."
        ) from error
    except (DefaultCredentialsError, OSError) as error:
        raise InputError(
            f'a run\'s bucket must be readable: "{folder}" gave {_said(error)}; on a '
            "machine of Google Cloud its service account is used, elsewhere run "
            "`gcloud auth application-default login` and set GOOGLE_CLOUD_PROJECT."
        ) from error


def advice(folder: Path) -> str:
    """What to do about a folder that cannot be written."""
    if is_bucket(folder):
        bucket = str(folder).removeprefix(_SCHEME).partition("/")[0]
        return f"{_grant(bucket)}, or name another directory"
    return "name another directory"


def names(folder: Path) -> set[str]:
    """What lies in a folder; nothing where there is none."""
    if not is_bucket(folder):
        return {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    with _os_errors(folder):
        try:
            found = _file_system().ls(str(folder), detail=False)
        except FileNotFoundError:
            return set()
    inside = str(folder).removeprefix(_SCHEME) + "/"
    # What made an empty folder may be an object named as the folder.
    found = {name.removeprefix(inside).rstrip("/") for name in found}
    return found - {"", str(folder).removeprefix(_SCHEME)}


def read_text(path: Path) -> str:
    """A file's text; bytes that are none are marked."""
    if not is_bucket(path):
        return path.read_text("utf-8", errors="replace")
    with _os_errors(path):
        return _file_system().cat_file(str(path)).decode(errors="replace")


def lines(path: Path) -> Iterator[str]:
    """A text file's lines, each with its end; of a file here one at a time."""
    if is_bucket(path):
        yield from read_text(path).splitlines(keepends=True)
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file


def write_text(path: Path, text: str) -> None:
    """Writes a file at once: a kill leaves the old one or the new one."""
    with written_whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write, with a descriptor, which replaces another at once when closed.

    Args:
      path: of the file.
      mode: "w" or "wb".

    Yields:
      The open file. If the body raises, `path` stays as it was.
    """
    encoding = None if "b" in mode else "utf-8"
    if not is_bucket(path):
        temporary = path.with_name(f"{path.name}.new")
        with temporary.open(mode, encoding=encoding) as file:
            yield file
        temporary.replace(path)
        return
    with tempfile.TemporaryFile(mode.replace("w", "w+"), encoding=encoding) as file:
        yield file
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        with io.FileIO(file.fileno(), closefd=False) as content:
            _put(path, content.read())


def open_log(path: Path) -> IO:
    """A text file to append lines to; see `sync`.

    Args:
      path: of the file; there already or not.

    Returns:
      The open file: its `write`, `flush` and `close` are to be used.
    """
    if is_bucket(path):
        return _GrowingObject(path)
    return path.open("a", encoding="utf-8")


def sync(log: IO | None) -> None:
    """Has all that was written to a log be there when this returns.

    What `flush` was called for is there at once in a directory; in a bucket, up to a
    minute later.

    Args:
      log: of `open_log`; None: nothing.
    """
    if isinstance(log, _GrowingObject):
        log.sync()


class LocalFolder:
    """A folder for libraries that write files themselves, and only on this machine.

    Attributes:
      path: where they are to write: the folder itself, or another one.
      is_copied: whether it is another one, from which `copy` has to copy.
    """

    def __init__(self, folder: Path):
        """Makes it.

        Args:
          folder: in a directory or in a bucket.
        """
        self._folder, self.is_copied = folder, is_bucket(folder)
        if self.is_copied:
            self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self.path = Path(self._temporary.name)
        else:
            folder.mkdir(exist_ok=True)
            self.path = folder

    def copy(self) -> None:
        """Has what is in it be in the folder."""
        if self.is_copied:
            for file in self.path.iterdir():
                _put(self._folder / file.name, file.read_bytes())

    def close(self) -> None:
        """Copies a last time."""
        self.copy()
        if self.is_copied:
            self._temporary.cleanup()


def remove(path: Path) -> None:
    """Removes a file."""
    if not is_bucket(path):
        path.unlink()
        return
    with _os_errors(path):
        _file_system().rm_file(str(path))


def rename_folder(old: Path, new: Path) -> None:
    """Renames a checkpoint's folder.

    In a bucket it is copied, without passing through here, and then removed, its mark
    of being whole first: whenever a kill comes, what is left of `old` is as it was, or
    counts as half written.

    Args:
      old: there.
      new: not there.
    """
    if not is_bucket(old):
        old.rename(new)
        return
    with _os_errors(old):
        files, target = _file_system(), f"{new}".removeprefix(_SCHEME)
        found = files.find(str(old))
        source = str(old).removeprefix(_SCHEME)
        files.copy(found, [target + name.removeprefix(source) for name in found])
        _remove_folder(old)


def committed(folder: Path, steps: list[str]) -> list[str]:
    """Which checkpoints are whole, of those that have a step's name.

    In a directory all: the name comes last. In a bucket they are written where they
    stay, and a mark comes last.

    Args:
      folder: of the checkpoints.
      steps: names in it.

    Returns:
      Some of these names.
    """
    if not is_bucket(folder):
        return steps
    with _os_errors(folder), concurrent.futures.ThreadPoolExecutor(16) as pool:
        marks = [f"{folder}/{name}/{_COMMITTED}" for name in steps]
        there = [*pool.map(_file_system().exists, marks)]
    return [name for name, is_there in zip(steps, there, strict=True) if is_there]


def remove_half_written(folder: Path) -> None:
    """Removes what kills have left of checkpoints.

    Args:
      folder: of the checkpoints.
    """
    if not is_bucket(folder):
        for torn in folder.glob(_TORN):
            shutil.rmtree(torn)
        return
    steps = [name for name in names(folder) if name.isdigit()]
    for name in {*steps} - {*committed(folder, steps)}:
        with _os_errors(folder):
            _remove_folder(folder / name)


def is_unreachable(folder: Path, error: Exception) -> bool:
    """Whether reading failed for the network or for rights, not for what was read.

    Args:
      folder: of what was read.
      error: of Orbax, tensorstore or gcsfs.

    Returns:
      False for directories: their errors say it by their types.
    """
    if not is_bucket(folder):
        return False
    if isinstance(error, FileNotFoundError):
        return False
    signs = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED")
    said = f"{type(error).__name__} {error}"
    kinds = ("ClientError", "ClientConnector", "HttpError", "Timeout", "Forbidden")
    return any(sign in said for sign in (*signs, *kinds))


class _GrowingObject:
    """A log in a bucket: kept in memory, and written whole now and then."""

    def __init__(self, path):
        self._path, self._lock = path, threading.Lock()
        try:
            self._parts = [read_text(path)]
        except FileNotFoundError:
            self._parts = []
        self._is_new, self._tried = False, time.monotonic()

    def write(self, text):
        with self._lock:
            self._parts.append(text)
            self._is_new = True

    def flush(self):
        if time.monotonic() - self._tried >= _SECONDS:
            with contextlib.suppress(OSError):  # the next one brings all of it
                self.sync()

    def sync(self):
        with self._lock:
            if not self._is_new:
                return
            self._tried = time.monotonic()  # one that fails waits for its next turn
            self._parts = ["".join(self._parts)]
            _put(self._path, self._parts[0].encode())
            self._is_new = False

    def close(self):
        self.sync()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _file_system():
    """gcsfs, the same instance that etils has, and nothing remembered of listings."""
    try:
        import fsspec
        import gcsfs  # noqa: F401
        from google.cloud import storage  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a run in Cloud Storage needs gcsfs: it cannot be imported ({error}); run "
            '`pip install "unicl_jax[gcs]"`.'
        ) from error
    if os.environ.setdefault("EPATH_USE_TF", "false") == "false":
        _forget_tensorflow()
    for name in ("gs", "gcs"):  # other processes write there, too
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)


@functools.cache
def _forget_tensorflow():
    """Has etils look again at EPATH_USE_TF: jax's compilation cache may have asked.

    By itself it takes TensorFlow where that is installed, whose listings may be old and
    whose errors are its own.
    """
    from etils.epath import gpath

    if forget := getattr(getattr(gpath, "_is_tf_installed", 0), "cache_clear", None):
        forget()


def _put(path, content):
    with _os_errors(path):
        _file_system().pipe_file(str(path), content)


def _remove_folder(folder):
    """Its mark of being whole first: what a kill leaves counts as half written."""
    files = _file_system()
    with contextlib.suppress(FileNotFoundError):
        files.rm_file(f"{folder}/{_COMMITTED}")
    files.rm(str(folder), recursive=True)


@contextlib.contextmanager
def _os_errors(path):
    """gcsfs raises errors of many types; their callers know one, with `strerror`."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from error
    except Exception as error:
        said = _said(error)
        is_refused = "Forbidden" in said or getattr(error, "code", 0) in (401, 403)
        kind = PermissionError if is_refused else OSError
        number = errno.EACCES if is_refused else errno.EIO
        raise kind(number, said, str(path)) from error


def _said(error):
    said = getattr(error, "strerror", None) or str(error) or repr(error)
    return " ".join(said.split())[:300]


def _grant(bucket):
    return f'grant this account {_ROLES} on "{bucket}"'
