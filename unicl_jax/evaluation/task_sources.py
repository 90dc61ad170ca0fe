"""Sources of tasks: data as it lies, with labels in the task's order."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unicl_jax.data import make_source, quickstart
from unicl_jax.data.arrays import ArraySource, make_npz_source
from unicl_jax.data.labels import load_class_names
from unicl_jax.data.records import Request, Rows, Source, hash_of
from unicl_jax.data.synonyms import name_key
from unicl_jax.errors import InputError
from unicl_jax.evaluation import places

if TYPE_CHECKING:
    from unicl_jax.evaluation.tasks import Task


class TaskSource:
    """A source whose labels are a task's; see `records.Source` for its attributes."""

    def __init__(
        self,
        source: Source,
        class_names: tuple[str, ...],
        table: np.ndarray | None,
        image_size: int,
        key: str = "",
    ):
        """Wraps a source.

        Args:
          source: whatever opens the data.
          class_names: the task's; () for retrieval.
          table: what a label of `source` stands for, [labels] int32 or
            [labels, classes] uint8; None for retrieval.
          image_size: images are resized to this where they have another.
          key: more that tells these labels from others, for the fingerprint.
        """
        self.name, self.kind, self.skipped = source.name, source.kind, source.skipped
        self.shard_sizes, self.is_far = source.shard_sizes, source.is_far
        self.class_names = class_names
        self._source, self._table, self._size = source, table, image_size
        self._key = key

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._source)

    def fingerprint(self) -> str:
        """See `records.Source`."""
        parts = [self._source.fingerprint(), self._key, "\n".join(self.class_names)]
        found = [part.encode() for part in parts]
        if self._table is not None and not self._key:
            found.append(self._table)
        return hash_of(*found)

    def where(self, index: int) -> str:
        """Returns where a record lies; "" in memory."""
        where = getattr(self._source, "where", None)
        return where(index) if where else ""

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Yields the rows of each request; see `records.Source`."""
        for rows in self._source.stream(requests):
            if self._table is not None:
                labels = self._table[rows.labels]
                if labels.ndim == 1 and (labels < 0).any():
                    row = int(np.flatnonzero(labels < 0)[0])
                    name = self._source.class_names[rows.labels[row]]
                    raise InputError(
                        f'task "{self.name}": every record must be of a class of the '
                        f'task: one is of "{name}", which is none; take it out of the '
                        "data, or name its class in the task."
                    )
                rows = rows._replace(labels=labels)
            if rows.images.shape[1] != self._size:
                rows = rows._replace(images=_resized(rows.images, self._size))
            yield rows


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """[n, H, W, 3] uint8 -> [n, size, size, 3], bicubic."""
    square = (size, size)
    made = [
        np.asarray(Image.fromarray(x).resize(square, Image.Resampling.BICUBIC))
        for x in images
    ]
    return np.stack(made) if made else np.empty([0, size, size, 3], np.uint8)


def open_found(
    task: "Task",
    split: str,
    found: places.Found,
    image_size: int,
    preprocess: Mapping[str, Any],
) -> TaskSource:
    """Opens a split that was found.

    Args:
      task: whose it is.
      split: one of places.SPLITS.
      found: where it lies.
      image_size: pixels, square.
      preprocess: settings of `data.preprocess.make_preprocess`.

    Returns:
      The source.

    Raises:
      InputError: if the data does not fit the task.
    """
    place = found.place
    rule = place.labels or _RULES.get((task.kind, place.format), "")
    if place.format == "quickstart":
        source = _quickstart(task, split, found.path)
    elif place.format == "npz":
        return _npz(task, found, image_size)
    elif rule:
        return _derived(task, rule, found, image_size, preprocess)
    elif task.kind == "multi_label":
        raise InputError(
            f'task "{task.name}": several labels an image must lie in a table, a '
            f'WebDataset or an .npz: got format "{place.format}"; or set `labels`.'
        )
    else:
        config = _config(task, found, preprocess)
        source = make_source(task.name, config, image_size, train=False)
    if task.kind == "retrieval":
        return TaskSource(source, (), None, image_size)
    table = _join(task, found, source.class_names)
    return TaskSource(source, task.class_names, table, image_size)


# What several labels or captions take, where a place does not say.
_RULES = {
    ("multi_label", "webdataset"): "npy",
    ("multi_label", "csv"): "names",
    ("classification", "csv"): "names",
    ("retrieval", "webdataset"): "lines",
}


def _join(task, found, names):
    """The task's label of each class of the data."""
    lost = task.unknown(names)
    # TFDS gives the subsets of ImageNet all of its class names.
    if lost and found.place.format != "tfds":
        raise InputError(
            f'task "{task.name}": classes of the data must be classes of the task: '
            f"{lost} in {found.folder} are not; rename them there, or add them as "
            "aliases to the task's class_names (a third column)."
        )
    return task.join(names)


def _quickstart(task, split, path) -> ArraySource:
    if task.kind == "retrieval":
        images, captions = quickstart.evaluation_captions(path)
        return ArraySource(task.name, images, texts=captions)
    images, labels, names = quickstart.evaluation_set(path)
    if split == "train":
        images, labels = quickstart.training_examples(path)
    return ArraySource(task.name, images, labels=labels, class_names=names)


def _npz(task, found, image_size):
    kind = "image_text" if task.kind == "retrieval" else "image_label"
    config = {**found.place.options, "path": found.path, "kind": kind}
    if task.kind != "multi_label":
        source = make_npz_source(task.name, config, None, False)
        if task.kind == "retrieval":
            return TaskSource(source, (), None, image_size)
        table = _join(task, found, source.class_names)
        return TaskSource(source, task.class_names, table, image_size)
    with np.load(found.path, allow_pickle=False) as arrays:
        missing = {"images", "labels", "class_names"} - set(arrays.files)
        if missing:
            raise InputError(
                f'task "{task.name}": a multi-label .npz must hold images, labels, '
                f'class_names: "{found.path}" holds {", ".join(arrays.files)}.'
            )
        images, given = arrays["images"], arrays["labels"]
        names = [str(name) for name in arrays["class_names"]]
    if given.shape != (len(images), len(names)) or not np.isin(given, (0, 1)).all():
        raise InputError(
            f'task "{task.name}": labels of a multi-label .npz must be [records, '
            f"classes] of 0 and 1: got {given.shape} {given.dtype} for {len(images)} "
            f"images and {len(names)} class names."
        )
    table = np.zeros([len(images), task.num_classes], np.uint8)
    table[:, _join(task, found, names)] = given
    # A label is the number of a row of the table.
    rows = [str(row) for row in range(len(images))]
    numbers = np.arange(len(images))
    source = ArraySource(task.name, images, labels=numbers, class_names=rows)
    return TaskSource(source, task.class_names, table, image_size)


def _derived(task, rule, found, image_size, preprocess):
    from unicl_jax.data.stream import FileSource
    from unicl_jax.evaluation import derived

    config = _config(task, found, preprocess)
    reader = derived.open_reader(task, rule, found, config)
    is_text = task.kind == "retrieval"
    source = FileSource(
        task.name,
        "image_text" if is_text else "image_label",
        () if is_text else tuple(map(str, range(len(reader.index)))),
        reader,
        preprocess=preprocess,
        image_size=image_size,
        train=False,
    )
    source.check_records()
    if is_text:
        return TaskSource(source, (), None, image_size, rule)
    return TaskSource(source, task.class_names, reader.table, image_size, rule)


def _config(task, found, preprocess):
    """The config of a source, its classes called by the data's own names."""
    place = found.place
    config = {
        "kind": "image_text" if task.kind == "retrieval" else "image_label",
        "format": place.format,
        "path": found.path,
        "preprocess": dict(preprocess),
        **place.options,
    }
    if place.format == "tfds":
        config["split"] = found.name
    if task.kind == "retrieval":
        return config
    if place.order:
        config["class_names"] = place.order
        _check_order(task, found)
    elif place.format == "webdataset":
        config["class_names"] = os.path.join(found.folder, _CLASS_NAMES)
        if not places.exists(config["class_names"]):
            raise InputError(
                f'task "{task.name}": numbered labels must be told by name: there is '
                f"no {_CLASS_NAMES} in {found.folder}; write one, a class a line in "
                "the order of the numbers."
            )
    elif place.format == "tfrecord":
        raise InputError(
            f'task "{task.name}": numbered labels of TFRecords must be told by name: '
            f"{found.folder} has no names; set `order` of the place to the keys of the "
            "classes in the order of their numbers."
        )
    return config


_CLASS_NAMES = "classnames.txt"  # beside CLIP_benchmark's shards


def _check_order(task, found):
    """Stops if a list of names beside the data has another order than the place."""
    path = os.path.join(found.folder, _CLASS_NAMES)
    if found.place.format != "webdataset" or not places.exists(path):
        return
    names = load_class_names(task.name, path)
    keys = [name_key(name) for name in names]
    ours = task.join(found.place.order)
    fits = len(names) == len(ours)
    for name, key, label in zip(names, keys, ours, strict=False):
        # Two classes of ImageNet are called "missile" in CLIP's list.
        found_label = task.join([name])[0] if keys.count(key) == 1 else -1
        fits = fits and found_label in (-1, label)
    if not fits:
        raise InputError(
            f'task "{task.name}": {path} must name the classes in the order that the '
            "task says of that place: it has another; take `order` out of the task, or "
            "mend the file."
        )
