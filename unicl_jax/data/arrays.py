"""A source that lies in memory; needs no TensorFlow."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from unicl_jax.data.records import KINDS, NO_LABEL, Request, Rows
from unicl_jax.errors import InputError, choose


class ArraySource:
    """Images with labels, or images with captions, as arrays.

    Attributes:
      name: the source's name in the config.
      kind: "image_label" or "image_text".
      class_names: names by class index; () for image-text.
      skipped: stays empty: nothing in memory is unreadable.
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
        self.class_names = tuple(class_names)
        self.skipped = collections.Counter()
        if labels is not None:
            self.kind = "image_label"
            if not np.issubdtype(np.asarray(labels).dtype, np.integer):
                raise InputError(
                    f'source "{name}": labels must be integers: got '
                    f"{np.asarray(labels).dtype}; number the classes from 0."
                )
            self.labels = np.asarray(labels).astype(np.int32)
            bad = np.flatnonzero((self.labels < 0) | (self.labels >= len(class_names)))
            if len(bad):
                raise InputError(
                    f'source "{name}": labels must be in [0, {len(class_names)}), one '
                    f"class name each: got {self.labels[bad[0]]} at index {bad[0]}."
                )
            self.texts = [()] * len(images)
        else:
            self.kind = "image_text"
            self.labels = np.full(len(images), NO_LABEL, np.int32)
            self.texts = [(t,) if isinstance(t, str) else tuple(t) for t in texts]
            empty = next((i for i, t in enumerate(self.texts) if not all(t or [0])), -1)
            if empty >= 0:
                raise InputError(
                    f'source "{name}": captions must not be empty: got '
                    f"{self.texts[empty]!r} at index {empty}."
                )

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self.images)

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Yields the rows of each request; see `records.Source`."""
        for indices, _ in requests:
            texts = [self.texts[i] for i in indices]
            yield Rows(self.images[indices], texts, self.labels[indices])


def make_npz_source(
    name: str, config: Mapping, image_size: int, train: bool
) -> ArraySource:
    """Reads a `.npz` file: `images`, and `labels` with `class_names`, or `texts`.

    Args:
      name: the source's name.
      config: `kind` and `path`.
      image_size: what the images must be, pixels.
      train: not used: nothing is cropped here.

    Returns:
      The source.

    Raises:
      InputError: if the file or an array is missing, or does not fit.
    """
    del train
    path = Path(config["path"])
    if not path.is_file():
        raise InputError(
            f'source "{name}": path must be a .npz file: got "{path}", which is not '
            "there."
        )
    with np.load(path) as data:  # allow_pickle stays False: nothing is executed
        arrays = {key: data[key] for key in data.files}
    kind = config.get("kind", KINDS[0])  # an evaluation need not say
    choose(dict.fromkeys(KINDS), kind, f'source "{name}": kind')
    labelled = kind == "image_label"
    needed = ["images", "labels", "class_names"] if labelled else ["images", "texts"]
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise InputError(
            f'source "{name}": an {kind} .npz must hold {", ".join(needed)}: '
            f'"{path}" holds {", ".join(sorted(arrays))}.'
        )
    images = arrays["images"]
    if images.shape[1:3] != (image_size, image_size):
        raise InputError(
            f'source "{name}": images must be {image_size} x {image_size}, the '
            f"model's image_size: got {images.shape[1:3]}."
        )
    if labelled:
        return ArraySource(
            name,
            images,
            labels=arrays["labels"],
            class_names=[str(c) for c in arrays["class_names"]],
        )
    return ArraySource(name, images, texts=[str(t) for t in arrays["texts"]])
