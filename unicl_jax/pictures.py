"""Pictures of a user, in whatever form, to the pixels that a model takes."""

from pathlib import Path
from typing import Any

import numpy as np

from unicl_jax.errors import InputError


def square(picture: Any, size: int, shorter: int | None) -> np.ndarray:
    """Any picture to a square of pixels, bicubically.

    Grey is repeated, transparent pixels are laid on white, 16 bits become 8. EXIF's
    orientation is not applied, and of frames the first is taken, as in training.

    Args:
      picture: a PIL image, or a path.
      size: pixels of a side of the result.
      shorter: pixels of the picture's shorter side before its centre is cut out; None:
        all of it is squashed to the square.

    Returns:
      [size, size, 3] uint8.

    Raises:
      InputError: if it is missing, damaged or no picture.
    """
    from PIL import Image

    given = picture
    try:
        if isinstance(given, str | Path):
            with Image.open(given) as picture:
                picture.load()
        elif isinstance(given, Image.Image):
            given.load()
    except Exception as error:  # whatever a decoder raises at damaged bytes
        raise InputError(
            f'pictures must be readable image files: "{given}" is not ({error}); '
            "leave it out."
        ) from error
    if not isinstance(picture, Image.Image):
        raise InputError(
            "pictures must be paths or PIL images: got "
            f"{type(picture).__name__}; Image.fromarray makes one of pixels."
        )
    if not min(picture.size):
        raise InputError(
            f'pictures must have pixels: "{given}" has {picture.width} x '
            f"{picture.height}; leave it out."
        )
    if picture.mode in ("La", "RGBa"):  # colours times alpha
        picture = picture.convert(picture.mode.upper())
    if picture.mode.startswith("I"):  # 16 bits: PIL would cut off all above 255
        values = np.clip(np.asarray(picture, np.int64) // 256, 0, 255)
        picture = Image.fromarray(values.astype(np.uint8))
    if picture.mode == "F":
        raise InputError(
            "pictures must have 8 or 16 bits a channel: got one of floats; bring it to "
            "0..255 first."
        )
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)  # as in training
    picture = picture.convert("RGB")
    if shorter is None:
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    # Whole numbers: a float product rounds 322 pixels to 255 for 256.
    to = [max(size, shorter * side // min(picture.size)) for side in picture.size]
    picture = picture.resize(to, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))
