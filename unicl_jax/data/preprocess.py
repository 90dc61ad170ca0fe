"""From encoded bytes to a square uint8 image: crop, flip, augment.

Everything is a pure function of (bytes, seed). Letters in shapes: H and W pixels of the
stored image, S the side of the result.
"""

import math
from collections.abc import Callable, Mapping

import cv2
import numpy as np
from PIL import Image

from unicl_jax.data.decode import decode, jpeg_size
from unicl_jax.data.draws import Draws
from unicl_jax.data.randaugment import DEFAULTS as RANDAUGMENT
from unicl_jax.data.randaugment import randaugment, random_erasing
from unicl_jax.errors import InputError, choose, did_you_mean

# Inception style crops as in timm's create_transform, which UniCL and Swin train with.
DEFAULTS = {
    "name": "random_resized_crop",
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "flip": False,
    "interpolation": "bicubic",
    "randaugment": None,
    "erasing": 0.0,
    "exact": False,
    "crop_pct": 224 / 256,
}
# Pillow's and OpenCV's filters of a name.
_INTERPOLATIONS = {
    "bicubic": (Image.Resampling.BICUBIC, cv2.INTER_CUBIC),
    "bilinear": (Image.Resampling.BILINEAR, cv2.INTER_LINEAR),
}
_NUM_TRIES = 10

# So many times as long as wide, an image is not enlarged as a whole: a line of pixels
# would become gigabytes.
_STRIP = 16

# One thread an image, which is what many images at once want.
cv2.setNumThreads(1)


def make_preprocess(source: str, config: Mapping, image_size: int, train: bool):
    """Makes the function from encoded bytes to pixels.

    Args:
      source: the source's name, for errors.
      config: a source's `preprocess`, over DEFAULTS. `name` is a key of PREPROCESS;
        `scale` (share of the area) and `ratio` (width over height) bound the random
        crop; `flip` mirrors half of the images; `interpolation` is bicubic or bilinear,
        both antialiased; `randaugment` holds the arguments of `randaugment.randaugment`
        (None: off); `erasing` is the share of images that lose a rectangle; `exact`
        resizes random crops by Pillow, too, as everything else is: see `resize`;
        `crop_pct` is S over the shorter side before the centre crop.
      image_size: S.
      train: evaluation (False) is never random: the centre crop in place of a random
        one, nothing flipped, augmented or erased.

    Returns:
      Function of (bytes, seed) -> [S, S, 3] uint8; it raises ValueError where the bytes
      are no whole image.

    Raises:
      InputError: if a setting is unknown or out of its range.
    """
    unknown = sorted(set(config) - set(DEFAULTS))
    if unknown:
        raise InputError(
            f'source "{source}": preprocess must hold known settings: got '
            f'"{unknown[0]}"; {did_you_mean(unknown[0], DEFAULTS)}'
        )
    settings = {**DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    _check_settings(source, settings)
    if not train:
        settings.update(flip=False, randaugment=None, erasing=0.0)
        if settings["name"] == "random_resized_crop":
            settings["name"] = "center"
    crop = PREPROCESS[settings["name"]]

    def preprocess(data: bytes, seed: int) -> np.ndarray:
        draws = Draws(seed)
        is_flipped = draws.uniform() < 0.5 and settings["flip"]
        image = crop(data, draws, image_size, settings)
        if is_flipped:
            image = cv2.flip(image, 1)
        if settings["randaugment"] is not None:
            image = randaugment(image, seed, **settings["randaugment"])
        if settings["erasing"]:
            image = random_erasing(image, seed, settings["erasing"])
        return image

    return preprocess


def _check_settings(source: str, settings: Mapping) -> None:
    unknown = sorted(set(settings["randaugment"] or ()) - set(RANDAUGMENT))
    if unknown:
        raise InputError(
            f'source "{source}": preprocess.randaugment must hold known settings: got '
            f'"{unknown[0]}"; {did_you_mean(unknown[0], RANDAUGMENT)}'
        )
    if not 0 <= settings["erasing"] <= 1:
        raise InputError(
            f'source "{source}": preprocess.erasing must be a probability: got '
            f"{settings['erasing']}; UniCL's is 0.25."
        )
    if not 0 < settings["crop_pct"] <= 1:
        raise InputError(
            f'source "{source}": preprocess.crop_pct must be in (0, 1]: got '
            f"{settings['crop_pct']}; ImageNet's is 0.875, CLIP's 1."
        )
    choose(PREPROCESS, settings["name"], f'source "{source}": preprocess.name')
    choose(
        _INTERPOLATIONS,
        settings["interpolation"],
        f'source "{source}": preprocess.interpolation',
    )
    for key, top in (("scale", 1.0), ("ratio", math.inf)):
        bounds = settings[key]
        is_pair = isinstance(bounds, tuple | list) and len(bounds) == 2
        if not is_pair or not 0 < bounds[0] <= bounds[1] <= top:
            raise InputError(
                f'source "{source}": preprocess.{key} must be (low, high) with '
                f"0 < low <= high <= {top}: got {bounds}; the default is "
                f"{DEFAULTS[key]}."
            )


def resize(
    image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray:
    """Resizes as Pillow does, within what JPEG loses, in a quarter of its time.

    Along a side that shrinks by a factor f in (1, 2), [w, 1 - 2w, w] smooths before
    OpenCV looks up, w = 0.24 (f - 1): Pillow's own filter grows with f. That comes
    within 45 dB of Pillow's for every f, and 50 on average. What shrinks by more is
    averaged over whole blocks of pixels first.

    Args:
      image: [H, W, 3] uint8.
      size: (height, width) of the result.
      interpolation: "bicubic" or "bilinear".

    Returns:
      [*size, 3] uint8.
    """
    blocks = [max(1, side // new) for side, new in zip(image.shape, size, strict=False)]
    if max(blocks) > 1:
        height, width = (-(-n // b) for n, b in zip(image.shape, blocks, strict=False))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    # Not worth a pass below 1 %.
    across, down = (
        _SMOOTHING * max(0.0, image.shape[axis] / size[axis] - 1.01) for axis in (1, 0)
    )
    if across or down:
        image = cv2.sepFilter2D(
            image,
            -1,
            np.array([across, 1 - 2 * across, across], np.float32),
            np.array([down, 1 - 2 * down, down], np.float32),
            borderType=cv2.BORDER_REPLICATE,
        )
    return cv2.resize(
        image, size[::-1], interpolation=_INTERPOLATIONS[interpolation][1]
    )


_SMOOTHING = 0.24  # fitted to photographs: 0.20 to 0.26 for factors of 1.05 to 2


def _pillow_resize(image, size, interpolation, box=None):
    """The same by Pillow itself; `box` is (left, top, right, bottom)."""
    if image.shape[:2] == tuple(size) and box is None:
        return image
    filter_ = _INTERPOLATIONS[interpolation][0]
    return np.asarray(Image.fromarray(image).resize(size[::-1], filter_, box=box))


def sample_crop(height: int, width: int, draws: Draws, scale, ratio) -> tuple[int, ...]:
    """Draws the window of an Inception style crop.

    The first of the tries that fits inside counts: area ~ U(scale) of the image, log of
    width / height ~ U(log ratio). If none fits: the largest centred window whose ratio
    is allowed.

    Args:
      height: H.
      width: W.
      draws: of the record.
      scale: (low, high) share of the area.
      ratio: (low, high) width over height.

    Returns:
      Top, left, height, width, within the image.

    Source: Szegedy et al., CVPR 2015, arXiv 1409.4842, section 6; the law of the draws
    and the fallback are those of timm's RandomResizedCropAndInterpolation.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_NUM_TRIES):
        area = height * width * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(low, high))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= h <= height and 1 <= w <= width:
            return draws.below(height - h + 1), draws.below(width - w + 1), h, w
    h = max(1, min(height, round(width / ratio[0])))
    w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _random_resized_crop(data, draws, image_size: int, settings: Mapping):
    size = (image_size, image_size)
    scale, ratio = settings["scale"], settings["ratio"]
    if settings["exact"]:
        image = decode(data)
        top, left, h, w = sample_crop(*image.shape[:2], draws, scale, ratio)
        box = (left, top, left + w, top + h)
        return _pillow_resize(image, size, settings["interpolation"], box)
    sides = jpeg_size(data)
    if sides is None:
        image = decode(data)
        sides = image.shape[:2]
        window = sample_crop(*sides, draws, scale, ratio)
    else:
        window = sample_crop(*sides, draws, scale, ratio)
        # No smaller than leaves the window S pixels a side.
        least = [
            -(-side * image_size // part)
            for side, part in zip(sides, window[2:], strict=True)
        ]
        image = decode(data, tuple(least))
    scales = [now / side for now, side in zip(image.shape, sides, strict=False)]
    top, left, height, width = window
    first = round(top * scales[0]), round(left * scales[1])
    last = round((top + height) * scales[0]), round((left + width) * scales[1])
    last = [max(a + 1, b) for a, b in zip(first, last, strict=True)]
    return resize(
        image[first[0] : last[0], first[1] : last[1]], size, settings["interpolation"]
    )


def _center(data, draws, image_size: int, settings: Mapping):
    """Shorter side to int(S / crop_pct), then the centre S x S, as timm evaluates."""
    del draws
    image = decode(data)
    height, width = image.shape[:2]
    shorter = int(image_size / settings["crop_pct"])
    size = [shorter * side // min(height, width) for side in (height, width)]
    top, left = (round((side - image_size) / 2) for side in size)
    if max(size) > _STRIP * min(size):
        down, across = height / size[0], width / size[1]
        right, bottom = (left + image_size) * across, (top + image_size) * down
        box = (left * across, top * down, right, bottom)
        square = (image_size, image_size)
        return _pillow_resize(image, square, settings["interpolation"], box)
    image = _pillow_resize(image, size, settings["interpolation"])
    return np.ascontiguousarray(image[top : top + image_size, left : left + image_size])


def _squash(data, draws, image_size: int, settings: Mapping):
    """The whole image as S x S; an image of that size stays as it is."""
    del draws
    size = (image_size, image_size)
    return _pillow_resize(decode(data), size, settings["interpolation"])


PREPROCESS: dict[str, Callable] = {
    "random_resized_crop": _random_resized_crop,
    "center": _center,
    "resize": _squash,
}
