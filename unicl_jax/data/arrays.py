"""A source that lies in memory; needs no TensorFlow."""

import collections
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from unicl_jax.data.labels import load_class_names
from unicl_jax.data.records import KINDS, NO_LABEL, Request, Rows, hash_of
from unicl_jax.errors import InputError, choose


class ArraySource:
    """Images with labels, or images with captions, as arrays.

    Attributes:
      name: the source's name in the config.
      kind: "image_label" or "image_text".
      class_names: names by class index; () for image-text.
      skipped: stays empty: nothing in memory is unreadable.
      shard_sizes: (): there are no shards.
      is_far: False.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] = (),
        texts: Sequence[str | Sequence[str]] | None = None,
    ):
        """Makes an image-label source of `labels`, or an image-text one of `texts`.

        Args:
          name: the source's name.
          images: [n, H, W, 3] uint8.
          labels: [n] integer in [0, len(class_names)), or None.
          class_names: one for each class.
          texts: n captions, or n sequences of captions of which one is drawn each
            time; or None.

        Raises:
          InputError: if neither or both are given, or sizes, dtypes or ranges don't
            fit.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise InputError(
                f'source "{name}": images must be [n, H, W, 3] uint8: got '
                f"{images.shape} {images.dtype}."
            )
        if (labels is None) == (texts is None):
            raise InputError(f'source "{name}": give either labels or texts.')
        given = labels if labels is not None else texts
        if len(given) != len(images) or not len(images):
            raise InputError(
                f'source "{name}": every image needs its label or text: got '
                f"{len(images)} images and {len(given)}."
            )
        self.name, self.images = name, images
        self.shard_sizes, self.is_far = (), False
        self.class_names = tuple(class_names)
        self.skipped = collections.Counter()
        if labels is not None:
            self.kind = "image_label"
            labels = np.asarray(labels)
            if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
                raise InputError(
                    f'source "{name}": labels must be [n] integers: got '
                    f"{labels.shape} {labels.dtype}; number the classes from 0."
                )
            # In their own dtype: a cast first would wrap a large one around.
            bad = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
            if len(bad):
                raise InputError(
                    f'source "{name}": labels must be in [0, {len(class_names)}), one '
                    f"class name each: got {labels[bad[0]]} at index {bad[0]}."
                )
            self.labels = labels.astype(np.int32)
            self.texts = [()] * len(images)
        else:
            self.kind = "image_text"
            self.labels = np.full(len(images), NO_LABEL, np.int32)
            self.texts = [(t,) if isinstance(t, str) else tuple(t) for t in texts]
            empty = next(
                (
                    i
                    for i, each in enumerate(self.texts)
                    if not each or not all(t.strip() for t in each)
                ),
                -1,
            )
            if empty >= 0:
                raise InputError(
                    f'source "{name}": captions must not be empty: got '
                    f"{self.texts[empty]!r} at index {empty}."
                )

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self.images)

    def fingerprint(self) -> str:
        """See `records.Source`."""
        return hash_of(self.images, self.labels, repr(self.texts).encode())

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Yields the rows of each request; see `records.Source`."""
        for indices, _ in requests:
            texts = [self.texts[i] for i in indices]
            yield Rows(self.images[indices], texts, self.labels[indices])


def make_npz_source(
    name: str, config: Mapping, image_size: int | None, train: bool
) -> ArraySource:
    """Reads a `.npz` file: `images`, and `labels` with `class_names`, or `texts`.

    Args:
      name: the source's name.
      config: `kind` and `path`; `class_names` may stand here, too.
      image_size: what the images must be, pixels; None: whatever they are.
      train: not used: nothing is cropped here.

    Returns:
      The source. `images` are [n, S, S, 3] uint8, `labels` [n] integers, `class_names`
      and `texts` strings; several texts an image are [n, k], filled up with "".

    Raises:
      InputError: if the file or an array is missing, or does not fit.
    """
    del train
    path = Path(config["path"])
    if not path.is_file():
        what = "is a folder or a pattern" if path.exists() or "*" in str(path) else ""
        raise InputError(
            f'source "{name}": path must be one .npz file: got "{path}", which '
            f"{what or 'is not there'}."
        )
    arrays = _load(name, path)
    kind = config.get("kind", KINDS[0])  # an evaluation need not say
    choose(dict.fromkeys(KINDS), kind, f'source "{name}": kind')
    labelled = kind == "image_label"
    needed = ["images", "labels", "class_names"] if labelled else ["images", "texts"]
    if labelled and config.get("class_names"):
        names = load_class_names(name, config["class_names"])
        arrays["class_names"] = np.array(names)
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise InputError(
            f'source "{name}": an {kind} .npz must hold {", ".join(needed)}: '
            f'"{path}" holds {", ".join(sorted(arrays))}.'
        )
    for key in needed:
        if not arrays[key].ndim:
            raise InputError(
                f'source "{name}": {key} must have one entry a record or a class: '
                f'"{path}" holds a single {arrays[key].dtype}.'
            )
    images = arrays["images"]
    if image_size and images.shape[1:3] != (image_size, image_size):
        raise InputError(
            f'source "{name}": images must be {image_size} x {image_size}, '
            "data.image_size or else model.image.image_size: got "
            f"{images.shape[1:3]}; resize them, or set that."
        )
    if labelled:
        return ArraySource(
            name,
            images,
            labels=arrays["labels"],
            class_names=[str(c) for c in arrays["class_names"]],
        )
    texts = arrays["texts"]
    if texts.ndim not in (1, 2) or texts.dtype.kind not in "US":
        raise InputError(
            f'source "{name}": texts must be strings, [n], or [n, k] for several an '
            f"image: got {texts.shape} {texts.dtype}."
        )
    if texts.dtype.kind == "S":
        texts = np.char.decode(texts, "utf-8")
    # Rows of unlike length are filled up with "".
    each = [[t for t in np.atleast_1d(row).tolist() if t] or [""] for row in texts]
    return ArraySource(name, images, texts=each)


def _load(name: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, none of which may be pickled: nothing is executed."""
    arrays, key = {}, None
    try:
        with open(path, "rb") as file, np.load(file) as data:
            for key in data.files:
                arrays[key] = data[key]
    except (OSError, ValueError, EOFError, TypeError, BadZipFile, zlib.error) as error:
        if key is not None and "Object arrays" in str(error):
            raise InputError(
                f'source "{name}": "{key}" in "{path}" holds Python objects: save '
                "plain strings or numbers, as in names.astype(str)."
            ) from error
        raise InputError(
            f'source "{name}": path must be a .npz file that np.savez wrote: "{path}" '
            "cannot be read as one."
        ) from error
    return arrays
