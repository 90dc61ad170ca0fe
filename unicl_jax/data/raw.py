"""The records of any source as they lie there: encoded image, captions or label."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from unicl_jax.config import MAX_PIXELS
from unicl_jax.data.arrays import ArraySource, make_npz_source
from unicl_jax.data.quickstart import SIZE, make_quickstart_source
from unicl_jax.data.readers import Unreadable, check_target
from unicl_jax.data.sources import FORMATS as FILE_FORMATS
from unicl_jax.data.sources import open_reader
from unicl_jax.errors import InputError, choose

# Sources of pixels: how they are made, and the side of the images; None: any.
_ARRAY_FORMATS = {
    "npz": (make_npz_source, None),
    "quickstart": (make_quickstart_source, SIZE),
}
_JPEG_QUALITY = 95


class Raw(NamedTuple):
    """One record.

    Attributes:
      image: the bytes of an image file.
      texts: captions; () for image-label.
      label: class index within the source; NO_LABEL for image-text.
      key: where it came from, as a path or shard#offset.
    """

    image: bytes
    texts: tuple[str, ...]
    label: int
    key: bytes


class FileRecords:
    """The records of a reader."""

    def __init__(self, reader, kind: str, class_names: tuple[str, ...]):
        """Holds the reader.

        Args:
          reader: see `data.readers`.
          kind: one of records.KINDS.
          class_names: in label order; () for image-text.
        """
        self.kind, self.class_names = kind, tuple(class_names)
        self.damaged = reader.index.damaged
        self._reader = reader

    def __len__(self) -> int:
        """Returns the number of records, readable or not."""
        return len(self._reader.index)

    def read(self, index: int) -> Raw:
        """Returns one record, or raises Unreadable."""
        image, text, label = self._reader.read(index)
        texts, label = check_target(self.kind, len(self.class_names), text, label)
        return Raw(image, texts, label, os.fsencode(self._reader.key(index)))

    def fingerprint(self) -> str:
        """Returns a hash of where the records lie and what is said of them."""
        index, parts = self._reader.index, []
        for field in dataclasses.fields(index):
            if field.name != "damaged":
                parts.append(getattr(index, field.name))
        return _hash(*parts)


class ArrayRecords:
    """The records of an ArraySource, the images as PNG: nothing of them is lost."""

    def __init__(self, source: ArraySource, path: str):
        """Holds the source.

        Args:
          source: with its arrays.
          path: of the config, for the keys.
        """
        self.kind, self.class_names = source.kind, source.class_names
        self.damaged = source.skipped
        self._source, self._path = source, path

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._source)

    def read(self, index: int) -> Raw:
        """Returns one record."""
        from PIL import Image

        file, source = io.BytesIO(), self._source
        Image.fromarray(source.images[index]).save(file, "PNG")
        key = os.fsencode(f"{self._path}#{index}")
        label = int(source.labels[index])
        return Raw(file.getvalue(), source.texts[index], label, key)

    def fingerprint(self) -> str:
        """Returns a hash of the arrays."""
        source = self._source
        return _hash(source.images, source.labels, [repr(t) for t in source.texts])


def open_raw(name: str, config: Mapping, train: bool) -> FileRecords | ArrayRecords:
    """Opens a source of a config for its records as they are.

    Args:
      name: the source's name, for errors.
      config: its settings; those that say what becomes of a picture are not looked at.
      train: whether it is a source, or an evaluation: "quickstart" has a menu of each.

    Returns:
      Its records; `read` may be called from any number of threads.

    Raises:
      InputError: if the source cannot be opened.
    """
    choose(_ARRAY_FORMATS | FILE_FORMATS, config["format"], f'source "{name}": format')
    if config["format"] in _ARRAY_FORMATS:
        make, size = _ARRAY_FORMATS[config["format"]]
        return ArrayRecords(make(name, config, size, train), config["path"])
    reader, class_names = open_reader(name, config)
    return FileRecords(reader, config.get("kind") or "image_label", class_names)


def make_filter(
    check: bool, max_side: int | None, max_pixels: int = MAX_PIXELS
) -> Callable[[bytes], bytes]:
    """Makes the function that lets through images that can be decoded.

    Args:
      check: whether to decode them at all.
      max_side: images whose shorter side has more pixels are shrunk to that many and
        encoded as JPEG; None: none is.
      max_pixels: images with more are not let through.

    Returns:
      Function of the bytes of an image file: the same, or those of a smaller one. It
      raises Unreadable; several threads may call it.

    Raises:
      InputError: if `max_side` is below 1, or goes without `check`.
    """
    if max_side is not None and max_side < 1:
        raise InputError(f"max_side must be at least 1 pixel: got {max_side}.")
    if not check:
        if max_side is not None:
            raise InputError(
                "max_side must look into every image: got --no-check, too; leave out "
                "one of the two."
            )
        return lambda image: image
    try:  # needs what the extra "data" installs
        from unicl_jax.data.decode import decode, jpeg_size
        from unicl_jax.data.header import CANNOT_DECODE, refusal
    except ImportError as error:
        raise InputError(
            f"reading image files needs OpenCV and simplejpeg: {error}; run "
            '`pip install "unicl_jax[data]"`.'
        ) from error

    # As training decodes, so that what passes here does not fail there.
    def checked(image: bytes) -> bytes:
        if reason := refusal(image, max_pixels):
            raise Unreadable(reason)
        try:
            size = jpeg_size(image) if max_side else None
            if size and min(size) > max_side:  # its small scale is enough
                shape = _smaller(size, max_side)
                return _encoded(decode(image, shape), shape)
            pixels = decode(image)
        except ValueError as error:
            raise Unreadable(CANNOT_DECODE) from error
        if max_side is None or min(pixels.shape[:2]) <= max_side:
            return image
        return _encoded(pixels, _smaller(pixels.shape[:2], max_side))

    return checked


def _smaller(shape, max_side) -> tuple[int, int]:
    scale = max_side / min(shape)
    return tuple(max(1, round(side * scale)) for side in shape)


def _encoded(pixels, shape) -> bytes:
    """A JPEG of (H, W) pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if pixels.shape[:2] != shape:
        image = image.resize(shape[::-1], Image.Resampling.LANCZOS, reducing_gap=3)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def _hash(*parts) -> str:
    """SHA-256 of arrays, and of sequences of str or bytes."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype}{part.shape}".encode())
            total.update(np.ascontiguousarray(part))
            continue
        total.update(f"{len(part)};".encode())
        for i in range(len(part)):  # `listing.Strings` have no iterator
            each = os.fsencode(part[i])
            total.update(f"{len(each)};".encode() + each)
    return total.hexdigest()
