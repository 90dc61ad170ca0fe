"""Where a run's files lie: a directory, or a folder of a Cloud Storage bucket.

The other rooms take paths of either kind, join them by "/", and come here to read,
write, list and rename; what a bucket does otherwise is in `bucket`. What fails raises
OSError, with a `strerror` that says why, for either kind.
"""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from unicl_jax import bucket
from unicl_jax.errors import InputError

_TORN = "*.orbax-checkpoint-tmp*"  # where Orbax writes until it can rename


def is_bucket(path: Any) -> bool:
    """Whether a path is one of Cloud Storage."""
    return str(path).startswith(bucket.SCHEME)


def path(given: str | Path) -> Path:
    """A path of either kind: `Path`, or one of etils for Cloud Storage.

    Args:
      given: "runs/x" or "gs://bucket/runs/x".

    Returns:
      The path.

    Raises:
      InputError: if it is of another kind, or a library is missing.
    """
    if is_bucket(given):
        return bucket.path(str(given))
    if "://" in str(given):  # it would be a folder here, named "s3:"
        raise InputError(
            "a run's folder must be a directory or in Cloud Storage (gs://): got "
            f'"{given}"; mount what it names, and name that.'
        )
    return Path(given)


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
    if is_bucket(folder):
        bucket.check(folder)


def advice(folder: Path) -> str:
    """What to do about a folder that cannot be written."""
    known = f"{bucket.grant(folder)}, or " if is_bucket(folder) else ""
    return f"{known}name another directory"


def names(folder: Path) -> set[str]:
    """What lies in a folder; nothing where there is none."""
    if is_bucket(folder):
        return bucket.names(folder)
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def read_text(path: Path) -> str:
    """A file's text; bytes that are none are marked."""
    if is_bucket(path):
        return bucket.read_text(path)
    return path.read_text("utf-8", errors="replace")


def lines(path: Path) -> Iterator[str]:
    """A text file's lines, each with its end; of a file here one at a time."""
    if is_bucket(path):
        yield from io.StringIO(bucket.read_text(path))
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file


def write_text(path: Path, text: str) -> None:
    """Writes a file at once: a kill leaves the old one or the new one."""
    with written_whole(path) as file:
        file.write(text)


@contextmanager
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
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        temporary = Path(folder) / path.name
        with temporary.open(mode, encoding=encoding) as file:
            yield file
        bucket.write(path, temporary.read_bytes())


def open_log(path: Path) -> IO:
    """A text file to append lines to; see `sync`.

    Args:
      path: of the file; there already or not.

    Returns:
      The open file: its `write`, `flush` and `close` are to be used.
    """
    if is_bucket(path):
        return bucket.GrowingObject(path)
    return path.open("a", encoding="utf-8")


def sync(log: IO | None) -> None:
    """Has all that was written to a log be there when this returns.

    What `flush` was called for is there at once in a directory; in a bucket, up to a
    minute later.

    Args:
      log: of `open_log`; None: nothing.
    """
    if isinstance(log, bucket.GrowingObject):
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
                bucket.write(self._folder / file.name, file.read_bytes())

    def close(self) -> None:
        """Copies a last time."""
        self.copy()
        if self.is_copied:
            self._temporary.cleanup()


def remove(path: Path) -> None:
    """Removes a file."""
    if is_bucket(path):
        bucket.remove(path)
    else:
        path.unlink()


def rename_folder(old: Path, new: Path) -> None:
    """Renames a checkpoint's folder; in a bucket it is copied, and then removed.

    Args:
      old: there.
      new: not there.
    """
    if is_bucket(old):
        bucket.rename_folder(old, new)
    else:
        old.rename(new)


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
    return bucket.committed(folder, steps) if is_bucket(folder) else steps


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
        bucket.remove_folder(folder / name)


def is_unreachable(folder: Path, error: Exception) -> bool:
    """Whether reading failed for the network or for rights, not for what was read.

    Args:
      folder: of what was read.
      error: that reading raised.

    Returns:
      False for directories: their errors say it by their types.
    """
    return is_bucket(folder) and bucket.is_unreachable(error)
