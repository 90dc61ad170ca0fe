"""The data of the quick start, which ships with the package.

1,898 emoji with names, keywords and subgroups, drawn by four vendors at 32 pixels, and
5,000 Fashion-MNIST images. Twemoji's drawings and Fashion-MNIST's test images are for
evaluation only. Sources and licences: `quickstart_data/NOTICE`.
"""

import csv
import functools
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

from unicl_jax.data.arrays import ArraySource
from unicl_jax.errors import InputError, choose

TRAIN_VENDORS = ("noto", "fluent", "openmoji")
TEST_VENDOR = "twemoji"
SIZE = 32  # pixels
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_EMOJI_COLUMNS, _FASHION_COLUMNS = 48, 50
_KEYWORDS = 3  # in a caption that has keywords
_KEYWORD_CAPTIONS = 7  # of a drawing that has keywords
_CAPTIONS = 5  # of a drawing, for retrieval: as many as Flickr30k and COCO have
_NAMES = 3  # bare names to each of those, for names are what evaluation asks


class Labelled(NamedTuple):
    """A set of images with the names of what they show."""

    images: np.ndarray  # [n, 32, 32, 3] uint8
    labels: np.ndarray  # [n] int32
    class_names: tuple[str, ...]


def _open(name):
    return resources.files(__package__) / "quickstart_data" / name


def _tiles(name, columns, size):
    """Cuts a sheet into tiles, row by row: [tiles, size, size, 3] uint8."""
    with _open(name).open("rb") as f, Image.open(f) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = pixels.reshape(-1, size, columns, size, 3).swapaxes(1, 2)
    return rows.reshape(-1, size, size, 3)


@functools.cache
def _emoji_table():
    with _open("emoji.tsv").open("r", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


@functools.cache
def emoji(vendor: str) -> tuple[np.ndarray, np.ndarray]:
    """One vendor's drawings.

    Args:
      vendor: noto, fluent, openmoji or twemoji.

    Returns:
      images [n, 32, 32, 3] uint8 on white, and the emoji's row in the table [n] int32.
    """
    places = np.array([int(row[vendor]) for row in _emoji_table()])
    rows = np.flatnonzero(places >= 0)
    tiles = _tiles(f"emoji_{vendor}.png", _EMOJI_COLUMNS, SIZE)
    return tiles[places[rows]], rows.astype(np.int32)


def emoji_names() -> tuple[str, ...]:
    """The 1,898 names, by row of the table."""
    return tuple(row["name"] for row in _emoji_table())


def emoji_subgroups() -> tuple[np.ndarray, tuple[str, ...]]:
    """Unicode's subgroups, such as "animal bug".

    Returns:
      The label of each row of the table [1898] int32, and the 99 names.
    """
    given = [row["subgroup"].replace("-", " ") for row in _emoji_table()]
    names = tuple(dict.fromkeys(given))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[g] for g in given], np.int32), names


def emoji_captions(seed: int = 0) -> list[tuple[str, ...]]:
    """Captions of each row: its name, and its name with three keywords at a time.

    Args:
      seed: of the choice of keywords.

    Returns:
      1,898 tuples; three in four captions are the bare name, the first among them.
    """
    rng = np.random.default_rng(seed)
    captions = []
    for row in _emoji_table():
        name = row["name"]
        words = [k for k in row["keywords"].split("|") if k.isascii() and k != name]
        size = min(_KEYWORDS, len(words))
        with_keywords = [
            ", ".join([name, *rng.choice(words, size, replace=False)])
            for _ in range(_KEYWORD_CAPTIONS if words else 0)
        ]
        names = [name] * max(1, _NAMES * len(with_keywords))
        captions.append((*names, *with_keywords))
    return captions


def fashion_mnist(split: str) -> Labelled:
    """Fashion-MNIST, centred on 32 pixels of black.

    Args:
      split: "train" (4,000) or "test" (1,000).

    Returns:
      Images, labels and the ten names.
    """
    images = _tiles(f"fashion_{split}.png", _FASHION_COLUMNS, 28)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    labels = np.frombuffer(_open(f"fashion_{split}.labels").read_bytes(), np.uint8)
    return Labelled(images, labels.astype(np.int32), FASHION_CLASSES)


def _drawings():
    parts = [emoji(vendor) for vendor in TRAIN_VENDORS]
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


def _caption_source(name):
    images, rows = _drawings()
    captions = emoji_captions()
    return ArraySource(name, images, texts=[captions[r] for r in rows])


def _subgroup_source(name):
    images, rows = _drawings()
    labels, names = emoji_subgroups()
    return ArraySource(name, images, labels=labels[rows], class_names=names)


def _fashion_source(name):
    images, labels, names = fashion_mnist("train")
    return ArraySource(name, images, labels=labels, class_names=names)


SETS = {
    "emoji_captions": ("image_text", _caption_source),
    "emoji_subgroups": ("image_label", _subgroup_source),
    "fashion_mnist": ("image_label", _fashion_source),
}


def make_quickstart_source(
    name: str, config: Mapping, image_size: int, train: bool
) -> ArraySource:
    """One of the quick start's sets.

    Args:
      name: the source's name.
      config: `path`, a key of SETS (training) or EVALUATION_SETS, and for training
        `kind`, which must be that set's.
      image_size: must be 32.
      train: whether it is for training.

    Returns:
      The source.

    Raises:
      InputError: if there is no such set, or kind or size don't fit.
    """
    if image_size != SIZE:
        raise InputError(
            f'source "{name}": the quick start\'s images are {SIZE} x {SIZE}: got '
            f"{image_size}; set model.image.image_size to {SIZE} and leave "
            "data.image_size out."
        )
    if not train:
        images, labels, names = evaluation_set(config["path"])
        return ArraySource(name, images, labels=labels, class_names=names)
    kind, make = choose(SETS, config["path"], f'source "{name}": path')
    if config["kind"] != kind:
        raise InputError(
            f'source "{name}": "{config["path"]}" is of kind {kind}: got '
            f"{config['kind']}."
        )
    return make(name)


def _twemoji_names():
    images, rows = emoji(TEST_VENDOR)
    return Labelled(images, rows, emoji_names())


def _twemoji_without_flags():
    images, rows = emoji(TEST_VENDOR)
    table = _emoji_table()
    keep = [i for i, r in enumerate(rows) if table[r]["group"] != "Flags"]
    return Labelled(images[keep], rows[keep], emoji_names())


def _twemoji_subgroups():
    images, rows = emoji(TEST_VENDOR)
    labels, names = emoji_subgroups()
    return Labelled(images, labels[rows], names)


EVALUATION_SETS = {
    "twemoji_names": _twemoji_names,
    "twemoji_without_flags": _twemoji_without_flags,
    "twemoji_subgroups": _twemoji_subgroups,
    "fashion_mnist": lambda: fashion_mnist("test"),
}


def evaluation_set(name: str) -> Labelled:
    """One of the sets that are never trained on.

    Args:
      name: a key of EVALUATION_SETS. `twemoji_names` has one drawing of each of the
        1,898 names; `twemoji_without_flags` asks the same names of fewer drawings.

    Returns:
      Images, labels and class names.

    Raises:
      InputError: if there is no such set.
    """
    return choose(EVALUATION_SETS, name, "evaluation set")()


def evaluation_captions(name: str) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Drawings that are never trained on, with up to five captions each.

    Args:
      name: "twemoji_captions".

    Returns:
      images [1898, 32, 32, 3] uint8; and of each its name, and its name with keywords.

    Raises:
      InputError: if there is no such set.
    """
    choose({"twemoji_captions": None}, name, "evaluation set")
    images, rows = emoji(TEST_VENDOR)
    captions = emoji_captions()
    return images, [tuple(dict.fromkeys(captions[r]))[:_CAPTIONS] for r in rows]


def training_examples(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What a nearest-neighbour baseline of an evaluation set may look at.

    Args:
      name: a key of EVALUATION_SETS.

    Returns:
      images [n, 32, 32, 3] uint8, and labels [n] in that set's classes.
    """
    if name == "fashion_mnist":
        train = fashion_mnist("train")
        return train.images, train.labels
    images, rows = _drawings()
    return images, emoji_subgroups()[0][rows] if name == "twemoji_subgroups" else rows
