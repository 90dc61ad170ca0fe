"""Labels that data does not have as such, worked out of what it has.

A rule looks at one record and says which image it shows and what classes that is of,
by the data's own names. It is a reader's work, so that a record is read once.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unicl_jax.data.records import SEPARATOR
from unicl_jax.errors import InputError

if TYPE_CHECKING:
    from unicl_jax.evaluation.places import Found
    from unicl_jax.evaluation.tasks import Task

# VTAB's "closest vehicle": where the depth in metres of its nearest car, van or truck
# lies (Zhai et al. 2019, arXiv 1910.04867; Google's task_adaptation).
VEHICLES = ("Car", "Van", "Truck")
NEAR, FAR = 8.0, 20.0


class Shown(NamedTuple):
    """What a record shows."""

    image: bytes
    classes: Sequence[str]


class Rule(NamedTuple):
    """How labels are worked out.

    Attributes:
      formats: of the places it is for.
      fields: what a record must have for it, over the format's defaults.
      make: (reader, found) -> (index -> Shown).
    """

    formats: tuple[str, ...]
    fields: Mapping[str, str]
    make: Callable[..., Callable[[int], Shown]]


def nearest_vehicle(types: Sequence[str], depths: Sequence[float]) -> str:
    """VTAB's class of a KITTI image.

    Args:
      types: of the objects, as KITTI calls them.
      depths: of the objects, metres before the camera.

    Returns:
      A key of the task kitti_distance.

    Source: VTAB (arXiv 1910.04867), whose bounds belong to the nearer class.
    """
    near = [z for t, z in zip(types, depths, strict=True) if t in VEHICLES]
    if not near:
        return "no_vehicle"
    nearest = min(near)
    if nearest <= NEAR:
        return "below_8_m"
    return "8_to_20_m" if nearest <= FAR else "above_20_m"


class DerivedReader:
    """A reader whose labels a rule works out; see `data.readers`.

    A record's label is its index: what that stands for is in `table` once it is read,
    for labels of several classes have no room in a row.

    Attributes:
      table: [records] int32, or [records, classes] uint8.
    """

    settings = "`where`"

    def __init__(self, task: "Task", reader, show: Callable[[int], Shown]):
        """Holds what to read.

        Args:
          task: whose labels they are.
          reader: of the records.
          show: a rule, made.
        """
        self.index = reader.index
        self._task, self._reader, self._show = task, reader, show
        self._labels: dict[str, int] = {}
        shape, dtype = [len(reader.index)], np.int32
        if task.kind == "multi_label":
            shape, dtype = [*shape, task.num_classes], np.uint8
        self.table = np.zeros(shape, dtype)

    def read(self, index: int) -> tuple[bytes, bytes, int]:
        """Returns the image bytes, b"" and the index; fills the table's row."""
        from unicl_jax.data.readers import Unreadable

        shown = self._show(index)
        labels = [self._label(name) for name in shown.classes]
        if -1 in labels:
            raise Unreadable("class is none of the task", shown.classes)
        if self.table.ndim == 2:
            self.table[index, labels] = 1
        elif len(labels) != 1:
            raise Unreadable(f"{len(labels)} classes")
        else:
            self.table[index] = labels[0]
        return shown.image, b"", index

    def _label(self, name: str) -> int:
        if name not in self._labels:
            self._labels[name] = int(self._task.join([name])[0])
        return self._labels[name]

    def key(self, index: int) -> str:
        """Returns where a record lies, and where there."""
        return self._reader.key(index)

    def where(self, index: int) -> str:
        """Returns the file of a record."""
        return self._reader.where(index)

    def has(self) -> str:
        """Returns what the first records hold, for an error."""
        return self._reader.has()


class LinesReader:
    """A reader of captions that stand one a line, as CLIP_benchmark writes them."""

    settings = "`where`"

    def __init__(self, reader):
        """Wraps a reader of captions."""
        self.index, self._reader = reader.index, reader
        self.key, self.where, self.has = reader.key, reader.where, reader.has

    def read(self, index: int) -> tuple[bytes, bytes, int]:
        """Returns the image bytes, the captions joined by SEPARATOR, 0."""
        image, text, _ = self._reader.read(index)
        return image, SEPARATOR.join(text.splitlines()), 0


def open_reader(task: "Task", rule: str, found: "Found", config: Mapping[str, Any]):
    """Opens the records of a place whose labels must be worked out.

    Args:
      task: whose they are.
      rule: a key of RULES.
      found: the place.
      config: of the source, as `data.sources.open_reader` takes it.

    Returns:
      A DerivedReader, or a LinesReader for "lines".

    Raises:
      InputError: if the rule is not for such a place, or the files don't fit.
    """
    from unicl_jax.data import sources

    of_rule = RULES[rule]
    if found.place.format not in of_rule.formats:
        raise InputError(
            f'task "{task.name}": labels "{rule}" are for format '
            f"{' or '.join(of_rule.formats)}: got {found.place.format}; leave `labels` "
            "out."
        )
    fields = {**of_rule.fields, **(config.get("fields") or {})}
    config = {**config, "kind": "image_text", "fields": fields}
    if "label" in of_rule.fields:
        config["kind"] = "image_label"
    reader, _ = sources.open_reader(task.name, config)
    if rule == "lines":
        return LinesReader(reader)
    return DerivedReader(task, reader, of_rule.make(task, reader, found))


def _features(task, found, *path) -> Sequence[str]:
    """The names of a class feature of a TFDS dataset."""
    from unicl_jax.data.tfds_folder import read_info

    feature = read_info(task.name, found.path).features
    for name in path:
        feature = feature[name] if name else feature.feature
    return feature.names


def _ints(features, name) -> list[int]:
    return list(features[name].int64_list.value) if name in features else []


def _nearest_vehicle(task, reader, found):
    names = _features(task, found, "objects", "type")

    def show(index):
        features = _example(reader, index)
        depths = features["objects/location"].float_list.value[2::3]
        types = [names[i] for i in _ints(features, "objects/type")]
        return Shown(_image(features), [nearest_vehicle(types, depths)])

    return show


def _objects(task, reader, found):
    """Whatever is in the picture, what is marked as difficult, too."""
    names = _features(task, found, "objects", "label")

    def show(index):
        features = _example(reader, index)
        classes = sorted({names[i] for i in _ints(features, "objects/label")})
        return Shown(_image(features), classes)

    return show


def _real(task, reader, found):
    names = _features(task, found, "real_label", "")

    def show(index):
        features = _example(reader, index)
        labels = _ints(features, "real_label")
        return Shown(_image(features), [names[i] for i in labels])

    return show


def _count(task, reader, found):
    def show(index):
        features = _example(reader, index)
        return Shown(_image(features), [str(len(_ints(features, "objects/size")))])

    return show


def _middle_frame(task, reader, found):
    names = _features(task, found, "label")

    def show(index):
        features = _example(reader, index)
        frames = features["video"].bytes_list.value
        label = _first(_ints(features, "label"), "label")
        return Shown(_first(frames[len(frames) // 2 :], "frame"), [names[label]])

    return show


def _npy(task, reader, found):
    """An array with 1 for each class of classnames.txt that is in the picture."""
    from unicl_jax.data.labels import load_class_names
    from unicl_jax.data.readers import Unreadable

    path = os.path.join(found.folder, "classnames.txt")
    names = load_class_names(task.name, path)

    def show(index):
        image, text, _ = reader.read(index)
        try:
            given = np.load(io.BytesIO(text), allow_pickle=False).reshape(-1)
        except (ValueError, EOFError, OSError) as error:
            raise Unreadable("label is no .npy array") from error
        if len(given) != len(names):
            raise Unreadable(f"{len(given)} labels for {len(names)} class names")
        return Shown(image, [names[i] for i in np.flatnonzero(given)])

    return show


def _names(task, reader, found):
    """Texts that are names of classes: the rows of one image in a table."""
    texts = reader.index.texts
    given = {n for i in range(len(texts)) for n in _texts(texts[i])}
    lost = sorted(name for name in given if task.join([name])[0] < 0)
    if lost:
        raise InputError(
            f'task "{task.name}": classes of the data must be classes of the task: '
            f'"{lost[0]}" in {found.path} is not, nor are {len(lost) - 1} more; rename '
            "them there, or add them as aliases to the task's class_names (a third "
            "column)."
        )

    def show(index):
        image, text, _ = reader.read(index)
        return Shown(image, _texts(text))

    return show


def _texts(joined: bytes) -> list[str]:
    return [text.decode().strip() for text in joined.split(SEPARATOR)]


def _example(reader, index):
    from unicl_jax.data.readers import Unreadable

    features = reader.features(index)
    if features is None:
        raise Unreadable("not a tf.Example")
    return features


def _image(features) -> bytes:
    return _first(features["image"].bytes_list.value, "image")


def _first(values, what):
    from unicl_jax.data.readers import Unreadable

    if not values:
        raise Unreadable(f"no {what}")
    return values[0]


RULES: dict[str, Rule] = {
    "nearest_vehicle": Rule(("tfds",), {"text": "image/file_name"}, _nearest_vehicle),
    "objects": Rule(("tfds",), {"text": "image/filename"}, _objects),
    "real": Rule(("tfds",), {"text": "file_name"}, _real),
    "count": Rule(("tfds",), {"text": "file_name"}, _count),
    "middle_frame": Rule(
        ("tfds",), {"image": "video", "label": "label"}, _middle_frame
    ),
    "npy": Rule(("webdataset",), {"text": "npy"}, _npy),
    "names": Rule(("csv",), {"text": "label"}, _names),
    "lines": Rule(("webdataset",), {}, lambda *_: None),
}
