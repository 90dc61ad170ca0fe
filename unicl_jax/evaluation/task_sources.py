"""Sources of tasks: data as it lies, with labels in the task's order."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unicl_jax.data import make_source, quickstart
from unicl_jax.data.arrays import ArraySource, make_npz_source
from unicl_jax.data.records import Request, Rows, Source, hash_of
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
    if found.place.format == "quickstart":
        source = _quickstart(task, split, found.path)
    elif found.place.format == "npz":
        kind = "image_text" if task.kind == "retrieval" else "image_label"
        config = {**found.place.options, "path": found.path, "kind": kind}
        source = make_npz_source(task.name, config, None, False)
    else:
        config = _config(task, found, preprocess)
        source = make_source(task.name, config, image_size, train=False)
    if task.kind == "retrieval":
        return TaskSource(source, (), None, image_size)
    lost = task.unknown(source.class_names)
    if lost and found.place.format != "tfds":
        raise InputError(
            f'task "{task.name}": classes of the data must be classes of the task: '
            f"{lost} in {found.folder} are not; rename them there, or add them as "
            "aliases to the task's class_names (a third column)."
        )
    table = task.join(source.class_names)
    return TaskSource(source, task.class_names, table, image_size)


def _quickstart(task, split, path) -> ArraySource:
    if task.kind == "retrieval":
        images, captions = quickstart.evaluation_captions(path)
        return ArraySource(task.name, images, texts=captions)
    images, labels, names = quickstart.evaluation_set(path)
    if split == "train":
        images, labels = quickstart.training_examples(path)
    return ArraySource(task.name, images, labels=labels, class_names=names)


def _config(task, found, preprocess):
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
    return config
