"""Cloud Storage for `storage`: what a run needs of a bucket, through gcsfs.

Objects are written whole or not at all, and nothing can be appended to them; a folder
is no more than the objects whose names begin so, and cannot be renamed at once.
"""

import concurrent.futures
import contextlib
import errno
import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unicl_jax.errors import InputError

SCHEME = "gs://"
_SECONDS = 60  # between two writes of an object that grows
_COMMITTED = "commit_success.txt"  # Orbax writes it last, where it cannot rename
_ROLES = "roles/storage.objectUser and roles/storage.legacyBucketReader"


def path(given: str) -> Any:
    """A path of etils, which joins, lists and reads as pathlib's do.

    Args:
      given: "gs://bucket/runs/x".

    Returns:
      The path.

    Raises:
      InputError: if a library is missing.
    """
    _file_system()
    from etils import epath

    return epath.Path(given.rstrip("/"))


def check(folder: Path) -> None:
    """Makes sure that a folder's bucket is there and can be read.

    Args:
      folder: of a run.

    Raises:
      InputError: saying what to do.
    """
    bucket, _, name = str(folder).removeprefix(SCHEME).partition("/")
    if not (bucket and name):
        raise InputError(
            "a run's folder in Cloud Storage must be gs://bucket/folder: got "
            f'"{folder}"; name a folder.'
        )
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
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
            f"{grant(folder)}."
        ) from error
    except (exceptions.GoogleAPIError, GoogleAuthError, OSError) as error:
        raise InputError(
            f'a run\'s bucket must be readable: "{folder}" gave {_said(error)}; on a '
            "machine of Google Cloud its service account is used, elsewhere run "
            "`gcloud auth application-default login` and set GOOGLE_CLOUD_PROJECT."
        ) from error


def grant(folder: Path) -> str:
    """What to do about a folder that cannot be read or written."""
    bucket = str(folder).removeprefix(SCHEME).partition("/")[0]
    return f'grant this account {_ROLES} on "{bucket}"'


def names(folder: Path) -> set[str]:
    """What lies in a folder."""
    with _os_errors(folder):
        try:
            found = _file_system().ls(str(folder), detail=False)
        except FileNotFoundError:
            return set()
    own = str(folder).removeprefix(SCHEME)
    # What made an empty folder may be an object named as the folder.
    return {name.removeprefix(f"{own}/").rstrip("/") for name in found} - {"", own}


def read_text(path: Path) -> str:
    """An object's text."""
    with _os_errors(path):
        return _file_system().cat_file(str(path)).decode(errors="replace")


def write(path: Path, content: bytes) -> None:
    """Writes an object at once."""
    with _os_errors(path):
        _file_system().pipe_file(str(path), content)


def remove(path: Path) -> None:
    """Removes an object."""
    with _os_errors(path):
        _file_system().rm_file(str(path))


def rename_folder(old: Path, new: Path) -> None:
    """Copies a checkpoint within its bucket, and then removes it.

    Whenever a kill comes, what is left of `old` is as it was, or counts as half
    written.

    Args:
      old: there.
      new: not there.
    """
    with _os_errors(old):
        files, target = _file_system(), f"{new}".removeprefix(SCHEME)
        source, found = str(old).removeprefix(SCHEME), files.find(str(old))
        files.copy(found, [target + name.removeprefix(source) for name in found])
    remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Removes a checkpoint, its mark of being whole first."""
    files = _file_system()
    with _os_errors(folder):
        with contextlib.suppress(FileNotFoundError):
            files.rm_file(f"{folder}/{_COMMITTED}")
        with contextlib.suppress(FileNotFoundError):
            files.rm(str(folder), recursive=True)


def committed(folder: Path, steps: list[str]) -> list[str]:
    """Those of some checkpoints that have Orbax's mark of being whole.

    Args:
      folder: of the checkpoints.
      steps: names in it.

    Returns:
      Some of these names.
    """
    with _os_errors(folder), concurrent.futures.ThreadPoolExecutor(16) as pool:
        marks = [f"{folder}/{name}/{_COMMITTED}" for name in steps]
        there = [*pool.map(_file_system().exists, marks)]
    return [name for name, is_there in zip(steps, there, strict=True) if is_there]


def is_unreachable(error: Exception) -> bool:
    """Whether reading failed for the network or for rights, not for what was read.

    Args:
      error: of Orbax, tensorstore or gcsfs, which have many types.

    Returns:
      A guess by what it says.
    """
    if isinstance(error, FileNotFoundError):
        return False
    said = f"{type(error).__name__} {error}"
    of_tensorstore = (
        *("UNAVAILABLE", "DEADLINE_EXCEEDED"),
        *("PERMISSION_DENIED", "UNAUTHENTICATED"),
    )
    of_gcsfs = ("ClientError", "ClientConnector", "HttpError", "Timeout", "Forbidden")
    return any(sign in said for sign in of_tensorstore + of_gcsfs)


class GrowingObject:
    """A log: kept in memory, and written whole now and then."""

    def __init__(self, path: Path):
        """Reads what is there.

        Args:
          path: of the object, there or not.
        """
        self._path, self._lock = path, threading.Lock()
        try:
            self._parts = [read_text(path)]
        except FileNotFoundError:
            self._parts = []
        self._is_new, self._tried = False, time.monotonic()

    def write(self, text: str) -> None:
        """Appends."""
        with self._lock:
            self._parts.append(text)
            self._is_new = True

    def flush(self) -> None:
        """Writes the object, if its turn has come; what fails waits for the next."""
        if time.monotonic() - self._tried >= _SECONDS:
            with contextlib.suppress(OSError):
                self.sync()

    def sync(self) -> None:
        """Writes the object, if something is new."""
        with self._lock:
            if not self._is_new:
                return
            self._tried = time.monotonic()
            self._parts = ["".join(self._parts)]
            write(self._path, self._parts[0].encode())
            self._is_new = False

    def close(self) -> None:
        """The same."""
        self.sync()

    def __enter__(self) -> "GrowingObject":
        """Returns itself."""
        return self

    def __exit__(self, *_) -> None:
        """Closes."""
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


@contextlib.contextmanager
def _os_errors(path) -> Iterator[None]:
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
