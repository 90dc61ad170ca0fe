"""Records that are image files of their own: in class folders, or named by a table.

Both become a `FileIndex`, compact arrays with n entries, as `indexing` makes of shards.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging

from unicl_jax.data.damage import Damage
from unicl_jax.data.records import hash_of
from unicl_jax.data.shards import gfile, is_remote
from unicl_jax.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
HIDDEN, NO_IMAGE, NO_CLASS_FOLDER = "hidden", "no image suffix", "in no class folder"
_NOT_A_FILE, _UNREADABLE, _LOOP = "no file", "folder cannot be read", "link to itself"
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_NUM_THREADS = 16
_NAMED = 5  # folders in a message


class Strings:
    """Bytes by index, in two arrays: a million paths are no million objects."""

    def __init__(self, strings: Sequence[bytes] = ()):
        """Joins them.

        Args:
          strings: n of them.
        """
        self._bytes = b"".join(strings)
        self._ends = np.cumsum([0, *map(len, strings)])

    def __len__(self) -> int:
        """Returns n."""
        return len(self._ends) - 1

    @property
    def nbytes(self) -> int:
        """Returns the size of both arrays."""
        return len(self._bytes) + self._ends.nbytes

    def __getitem__(self, index: int) -> bytes:
        """Returns the one at `index` in [0, n)."""
        return self._bytes[self._ends[index] : self._ends[index + 1]]


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """Which files there are, and what is said of each.

    Attributes:
      paths: n of them, as os.fsencode gives them.
      labels: [n] int64; [0] where there are captions.
      texts: n captions, several of a record joined by decode.SEPARATOR; or none.
      damaged: what was left out.
    """

    PLACE = "path"  # what a record's place is called

    paths: Strings
    labels: np.ndarray
    texts: Strings
    damaged: Damage

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self.paths)

    def fingerprint(self) -> str:
        """As `records.Source.fingerprint`; files may lie in another folder."""
        names = (os.path.basename(self.paths[i]) for i in range(len(self.paths)))
        texts = (self.texts[i] for i in range(len(self.texts)))
        return hash_of(b"\0".join(names), self.labels, b"\0".join(texts))

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """(): a file is a record."""
        return ()


def list_class_folders(
    source: str, root: str
) -> tuple[list[str], list[list[bytes]], Damage]:
    """Lists the images of a folder that holds one folder a class.

    What is nested in a class's folder is the class's. Hidden entries, and files that
    have not one of IMAGE_SUFFIXES, are left out and counted. No file is looked at.

    Args:
      source: the source's name, for errors.
      root: local or remote.

    Returns:
      The class folders' names, sorted; the sorted paths of each one's images; what was
      left out.

    Raises:
      InputError: if `root` is no such folder, or there is no image.
    """
    if not isinstance(root, str) or not root:
        raise InputError(
            f'source "{source}": path must be a folder that holds one folder a class: '
            f"got {root!r}; set the source's `path`."
        )
    root = os.path.expanduser(root)
    skipped = Damage()
    try:
        files, folders = _list(root, skipped)
    except Exception as error:  # gfile has error types of its own
        raise InputError(
            f'source "{source}": path must be a folder that holds one folder a class: '
            f'"{root}" cannot be listed ({error}); set the source\'s `path`.'
        ) from error
    for name in files:
        skipped.add(NO_CLASS_FOLDER, root, name, is_record=False)
    if folders and {name.lower() for name in folders} <= _SPLITS:
        raise InputError(
            f'source "{source}": path must be a folder that holds one folder a class: '
            f'"{root}" holds {_some(folders)}, which are splits; set `path` to one of '
            f'them, as in "{os.path.join(root, folders[0])}".'
        )
    # Remote folders wait on the network, so threads help; local ones hardly care.
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = [*pool.map(lambda name: _walk(os.path.join(root, name)), folders)]
    images = [found for found, _ in parts]
    for _, found in parts:
        skipped.join(found)
    if not any(images):
        raise InputError(
            f'source "{source}": path must be a folder that holds one folder a class '
            f'with images ({" ".join(IMAGE_SUFFIXES)}): "{root}" holds '
            f"{_some(folders)} and no image in them{_counts(skipped)}; set the "
            "source's `path`."
        )
    empty = [name for name, found in zip(folders, images, strict=True) if not found]
    if empty:
        logging.warning(
            'source "%s": %s under %s: these classes have no image.',
            *(source, _some(empty), root),
        )
    if skipped:
        logging.warning('source "%s": left out%s.', source, _counts(skipped))
    return folders, images, skipped


def _walk(top: str) -> tuple[list[bytes], Damage]:
    """The sorted images below a folder, and what was left out."""
    images, skipped, todo = [], Damage(), [top]
    while todo:
        folder = todo.pop()
        try:
            files, folders = _list(folder, skipped)
        except Exception:  # gfile has error types of its own
            skipped.add(_UNREADABLE, folder, is_record=False)
            continue
        images += [os.fsencode(os.path.join(folder, name)) for name in files]
        todo += [os.path.join(folder, name) for name in folders]
    return sorted(images), skipped


def _list(folder: str, skipped: Damage) -> tuple[list[str], list[str]]:
    """The names of image files, and the sorted ones of folders, in a folder."""
    files, folders = [], []
    for name, kind in _remote(folder) if is_remote(folder) else _local(folder):
        if name.startswith("."):
            skipped.add(HIDDEN, folder, name, is_record=False)
        elif kind == "folder":
            folders.append(name)
        elif kind != "file":
            skipped.add(kind, folder, name, is_record=False)
        elif name.lower().endswith(IMAGE_SUFFIXES):
            files.append(name)
        else:
            skipped.add(NO_IMAGE, folder, name, is_record=False)
    return files, sorted(folders)


def _local(folder: str) -> Iterator[tuple[str, str]]:
    """Names and kinds; the kinds come with the names, but for links."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                is_loop = entry.is_symlink() and _is_above(entry.path, folder)
                yield entry.name, _LOOP if is_loop else "folder"
            else:  # a pipe of that name would be waited on for ever
                yield entry.name, "file" if entry.is_file() else _NOT_A_FILE


def _is_above(link: str, folder: str) -> bool:
    target, folder = os.path.realpath(link), os.path.realpath(folder)
    return os.path.commonpath([target, folder]) == target


def _remote(folder: str) -> Iterator[tuple[str, str]]:
    """Names and kinds; what is named as an image is not looked at."""
    for name in gfile().listdir(folder):
        # Buckets list their folders with a "/", other file systems without one.
        is_folder = name.endswith("/")
        name = name.rstrip("/")
        if name and not is_folder and not name.lower().endswith(IMAGE_SUFFIXES):
            is_folder = gfile().isdir(os.path.join(folder, name))
        if name:
            yield name, "folder" if is_folder else "file"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "no folder") + more


def _counts(skipped: Damage) -> str:
    counts = ", ".join(f"{n} x {reason}" for reason, n in skipped.most_common())
    return f" ({counts})" if counts else ""
