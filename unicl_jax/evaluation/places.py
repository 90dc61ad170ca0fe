"""Where a task's data may lie, and whether it is there."""

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from unicl_jax.data.shards import gfile, is_remote, open_shard
from unicl_jax.errors import InputError

SPLITS = ("train", "val", "test")
# Of a format: what its splits are called, "{}" standing for one of SPLITS.
FORMATS = {
    "quickstart": "{}",
    "tfds": "{}",
    "webdataset": "{}/*.tar",
    "folder": "{}",
    "prepared": "{}",
    "tfrecord": "{}*.tfrecord*",
    "csv": "{}.csv",
    "npz": "{}.npz",
}
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Place(NamedTuple):
    """Where a task's data may lie.

    Attributes:
      format: a key of FORMATS.
      path: below the folder of evaluation data, or of its own; for tfds the builder,
        "name" or "name/config".
      names: split -> what it is called there: for tfds a split or a slice of one,
        else a path or pattern below `path`; "" if there is none.
      options: more of a source's settings.
      labels: a key of `derived.RULES`, where labels have to be worked out; "" if not.
      order: the keys of the classes in the order of the numbers there, where names
        don't tell; () if they do.
    """

    format: str
    path: str
    names: Mapping[str, str] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    labels: str = ""
    order: tuple[str, ...] = ()

    def name_of(self, split: str) -> str:
        """What a split is called there; "" if there is none."""
        if split in self.names:
            return self.names[split]
        name = FORMATS[self.format].format(split)
        if self.format == "tfds" and split == "val":
            name = "validation"
        return "" if name in self.names.values() else name


class Found(NamedTuple):
    """A split that is there.

    Attributes:
      place: where.
      path: of its data, as a source's config has it; of a pattern, the pattern.
      folder: what the place's path came to.
      name: what the split is called there.
    """

    place: Place
    path: str
    folder: str
    name: str


def locate(where: Sequence[Place], split: str, data_dir: str | None) -> Found | None:
    """The first place that has a split.

    Args:
      where: the places, best first.
      split: one of SPLITS.
      data_dir: the folder of evaluation data; None: TFDS's alone.

    Returns:
      What is there; None if nothing is.
    """
    for place in where:
        name = place.name_of(split)
        for folder in _folders(place, data_dir) if name else ():
            path = _path(place, folder, name)
            if path:
                return Found(place, path, folder, name)
    return None


def looked_at(
    where: Sequence[Place], split: str, data_dir: str | None
) -> tuple[str, ...]:
    """Every path that `locate` looks at, for a message."""
    paths = []
    for place in where:
        name = place.name_of(split)
        for folder in _folders(place, data_dir) if name else ():
            end = "" if place.format in ("tfds", "quickstart") else name
            paths.append(os.path.join(folder, end))
    return tuple(dict.fromkeys(paths))


def _folders(place: Place, data_dir: str | None) -> list[str]:
    path = os.path.expanduser(place.path)
    if place.format == "quickstart" or os.path.isabs(path) or is_remote(path):
        return [path]
    roots = []
    if data_dir:
        data_dir = os.path.expanduser(data_dir)
        roots = [data_dir]
        if place.format == "tfds":
            roots.insert(0, os.path.join(data_dir, "tensorflow_datasets"))
    elif place.format == "tfds":
        default = os.path.join("~", "tensorflow_datasets")
        root = os.environ.get("TFDS_DATA_DIR") or default
        roots = [os.path.expanduser(root)]
    return [os.path.join(root, path) for root in roots]


def _path(place: Place, folder: str, name: str) -> str:
    """What a source's config has to say to read the split; "" if it is not there."""
    if place.format == "quickstart":
        return folder
    if place.format == "tfds":
        return _tfds_version(folder, name)
    path = os.path.join(folder, name)
    if place.format in ("prepared", "folder"):
        is_prepared = exists(os.path.join(path, "manifest.json"))
        return (
            path if exists(path) and is_prepared == (place.format == "prepared") else ""
        )
    return path if matches(path) else ""


def _tfds_version(folder: str, split: str) -> str:
    """The newest version below a folder that has a split; "" if there is none."""
    versions = [folder] if _VERSION.fullmatch(os.path.basename(folder)) else []
    if not versions:
        found = [v for v in list_folder(folder) if _VERSION.fullmatch(v)]
        found.sort(key=lambda v: tuple(map(int, v.split("."))), reverse=True)
        versions = [os.path.join(folder, version) for version in found]
    for version in versions:
        info = os.path.join(version, "dataset_info.json")
        if exists(info):
            if re.split(r"[\[+]", split)[0] in _splits_of(info):
                return version
    return ""


def _splits_of(info: str) -> list[str]:
    try:
        with open_shard(info) as file:
            return [each["name"] for each in json.loads(file.read())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{info} must say the splits of a prepared TFDS dataset: it does not "
            f"({error!r}); prepare the data again."
        ) from error


def exists(path: str) -> bool:
    """Whether there is such a file or folder, local or remote."""
    return gfile().exists(path) if is_remote(path) else os.path.exists(path)


def matches(pattern: str) -> list[str]:
    """What a path or pattern stands for, local or remote, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    return sorted(gfile().glob(pattern))


def list_folder(folder: str) -> list[str]:
    """The names in a folder, local or remote; [] if there is none."""
    if not is_remote(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if not gfile().isdir(folder):
        return []
    return sorted(name.rstrip("/") for name in gfile().listdir(folder))
