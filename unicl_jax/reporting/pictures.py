"""Pictures of an evaluation, small enough to be part of a page."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from unicl_jax.reporting.markup import Html, el
from unicl_jax.reporting.results import read_arrays

LARGEST = 64  # pixels of a side
MARKS = {True: "\u2713", False: "\u2717", None: ""}
SAID = {True: "right: ", False: "wrong: ", None: ""}


class Pictures:
    """The thumbnails of a task, by the index of their record."""

    def __init__(self, folder: Path):
        """Opens `thumbnails.npz`, if it is there."""
        arrays = read_arrays(folder / "thumbnails.npz")
        images, index = arrays.get("images"), arrays.get("index")
        self._images, self._place = None, {}
        if images is None or index is None or images.dtype != np.uint8:
            return
        if images.ndim != 4 or images.shape[3] != 3 or len(images) != index.size:
            return
        self._images = images
        self._place = {int(x): i for i, x in enumerate(index.reshape(-1))}

    def __contains__(self, index: int | None) -> bool:
        """Whether there is a picture of a record."""
        return index in self._place

    @property
    def indices(self) -> list[int]:
        """The records that have a picture."""
        return list(self._place)

    def show(self, index: int, text: str, right: bool | None = None) -> Html | None:
        """A picture, framed and marked where it is right or wrong.

        Args:
          index: of the record.
          text: what it is, for those who don't see it.
          right: whether the model was; None: not said.

        Returns:
          Its markup; None if there is no such picture.
        """
        if index not in self:
            return None
        image = self._images[self._place[index]]
        side = max(image.shape[:2])
        source = data_uri(image)
        picture = el(
            "img",
            src=source,
            alt=SAID[right] + text,
            title=text,
            width=64,
            height=64,
            loading="lazy",
            class_="pixels" if side <= LARGEST // 2 else None,
        )
        mark = el("span", MARKS[right], aria_hidden="true") if MARKS[right] else None
        kind = {True: "pic right", False: "pic wrong", None: "pic"}[right]
        return el("span", picture, mark, class_=kind)


def data_uri(image: np.ndarray) -> str:
    """Pixels as a `data:` address: PNG or JPEG, whichever is smaller.

    Args:
      image: [H, W, 3] uint8; larger ones are made smaller.

    Returns:
      The address.
    """
    picture = Image.fromarray(image)
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST))
    found = []
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 82})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        found.append((file.tell(), kind.lower(), file.getvalue()))
    _, kind, content = min(found)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
