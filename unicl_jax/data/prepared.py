"""Prepared folders: shards, their index and a manifest that says what is in them.

`{name}-00000-of-00012.tfrecord` hold tf.Examples with `image`, `text` or `label`, and
`key`, where the record came from; `index.npz` where each lies; `manifest.json` kind,
classes, counts, and the size and SHA-256 of every file.
"""

import concurrent.futures
import hashlib
import json
import os
from typing import Any

from unicl_jax.data.indexing import Index, index_from_bytes
from unicl_jax.data.shards import gfile, is_remote, open_shard
from unicl_jax.errors import InputError

VERSION = 1
MANIFEST, INDEX = "manifest.json", "index.npz"
UNFINISHED, PLAN = "unfinished", "plan.json"  # a folder until all is written
_KEYS = {"name", "kind", "source", "options", "class_names", "shards", "index"}
_NUM_THREADS = 16
_BLOCK = 2**20  # bytes


def read_json(path: str) -> dict[str, Any] | None:
    """Reads a JSON object; None if there is no such file.

    Args:
      path: local or remote.

    Returns:
      What it holds.

    Raises:
      InputError: if it cannot be read.
    """
    if size(path) is None:
        return None
    try:
        with open_shard(path) as file:
            found = json.loads(file.read())
    except Exception as error:  # gfile has error types of its own
        raise InputError(
            f'"{path}" must be readable JSON: it is not ({error}); copy it again, or '
            "prepare the source into another folder."
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("version"), int):
        raise InputError(
            f'"{path}" must say its version: it does not, so it is not of a prepared '
            "folder; name another folder."
        )
    if found["version"] > VERSION:
        raise InputError(
            f'"{path}" must be of version {VERSION} or older: got {found["version"]}; '
            "use the unicl_jax that wrote it, or a newer one."
        )
    return found


def read_manifest(folder: str) -> dict[str, Any] | None:
    """Reads the manifest of a prepared folder; None if there is none.

    Args:
      folder: local or remote.

    Returns:
      What it says.

    Raises:
      InputError: if it cannot be read.
    """
    path = os.path.join(folder, MANIFEST)
    manifest = read_json(path)
    if manifest is None or _KEYS <= manifest.keys():
        return manifest
    raise InputError(
        f'"{path}" must be that of a prepared folder: it lacks '
        f"{', '.join(sorted(_KEYS - manifest.keys()))}; name another folder."
    )


def size(path: str) -> int | None:
    """Returns the bytes of a file, None if there is none."""
    try:
        if is_remote(path):
            return gfile().stat(path).length
        return os.path.getsize(path) if os.path.isfile(path) else None
    except Exception:  # gfile has error types of its own
        return None


def files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns `file`, `bytes` and `sha256` of every shard and of the index."""
    return [*manifest["shards"], manifest["index"]]


def find_damage(folder: str, manifest: dict[str, Any]) -> dict[str, str]:
    """Compares the files' sizes with the manifest.

    Args:
      folder: local or remote.
      manifest: its.

    Returns:
      file name -> what is wrong with it, for those that are missing or cut off.
    """
    entries = files(manifest)
    paths = [os.path.join(folder, entry["file"]) for entry in entries]
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        sizes = [*pool.map(size, paths)]
    return {
        entry["file"]: "is missing"
        if found is None
        else f"has {found:,} bytes, not {entry['bytes']:,}"
        for entry, found in zip(entries, sizes, strict=True)
        if found != entry["bytes"]
    }


def hash_file(path: str) -> str:
    """Returns the SHA-256 of a file, as `sha256sum` prints it."""
    total = hashlib.sha256()
    with open_shard(path) as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def verify(folder: str, manifest: dict[str, Any], watch=lambda done: None):
    """Reads every byte of a prepared folder.

    Args:
      folder: local or remote.
      manifest: its.
      watch: is told how many bytes are done.

    Returns:
      file name -> what is wrong with it.
    """
    damage, done = find_damage(folder, manifest), 0
    for entry in files(manifest):
        if entry["file"] not in damage:
            try:
                found = hash_file(os.path.join(folder, entry["file"]))
            except Exception as error:  # gfile has error types of its own
                damage[entry["file"]] = f"cannot be read ({error})"
            else:
                if found != entry["sha256"]:
                    damage[entry["file"]] = "has other bytes than were written"
        done += entry["bytes"]
        watch(done)
    return damage


def open_prepared(source: str, folder: str, kind: str) -> tuple[Index, tuple[str, ...]]:
    """Opens a prepared folder; no shard is read.

    Args:
      source: the source's name, for errors.
      folder: local or remote.
      kind: what the config says it is.

    Returns:
      The index, and the class names; () for image-text.

    Raises:
      InputError: if it is no such folder or of another kind, or a file of it is
        missing or cut off.
    """
    if not isinstance(folder, str) or not folder:
        raise InputError(
            f'source "{source}": path must be a prepared folder: got {folder!r}; set '
            "the source's `path`."
        )
    folder = os.path.expanduser(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        plan = size(os.path.join(folder, UNFINISHED, PLAN))
        found = "has no manifest.json" if plan is None else "is not finished"
        todo = "set `path` to one that `python -m unicl_jax.prepare` wrote"
        if plan is not None:
            todo = "run the command that prepares it again: it goes on"
        raise InputError(
            f'source "{source}": path must be a prepared folder: "{folder}" {found}; '
            f"{todo}."
        )
    if kind != manifest["kind"]:
        raise InputError(
            f'source "{source}": kind must be that of the prepared folder: got {kind}, '
            f'and "{folder}" holds {manifest["kind"]}; set `kind`, or `path`.'
        )
    damage = find_damage(folder, manifest)
    if damage:
        name, what = next(iter(damage.items()))
        more = f", and {len(damage) - 1} more files are wrong" * (len(damage) > 1)
        raise InputError(
            f'source "{source}": the files of a prepared folder must be whole: '
            f"{os.path.join(folder, name)} {what}{more}; copy the folder again, or run "
            "the command that prepared it, which writes anew what is missing. "
            f"`python -m unicl_jax.prepare --verify --out={folder}` reads every byte."
        )
    shards = tuple(os.path.join(folder, e["file"]) for e in manifest["shards"])
    with open_shard(os.path.join(folder, INDEX)) as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != manifest["index"]["sha256"]:
        raise InputError(
            f'source "{source}": the index of a prepared folder must be the one that '
            f"was written: {os.path.join(folder, INDEX)} is another; delete it and run "
            "the command that prepared the folder: it writes the index anew."
        )
    return index_from_bytes(data, shards), tuple(manifest["class_names"])
