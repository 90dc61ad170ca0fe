"""RandAugment and random erasing on uint8 images, with OpenCV and Pillow.

The policy is timm's `rand-m9-mstd0.5-inc1`, which UniCL and Swin train with: each of
two ops, drawn with replacement from fifteen, acts on half of the images, at a level
from N(9, 0.5) within [0, 10]; a higher level is always a stronger change. Every op
comes within a grey value of Pillow's of that name, but for the rim of one pixel where a
moved picture meets what is around it. Letters in shapes: S pixels a side.

Source: Cubuk et al., NeurIPS 2020, arXiv 1909.13719; Zhong et al., AAAI 2020, arXiv
1708.04896. Ranges of the ops and of the erased area: timm/data/auto_augment.py and
random_erasing.py, release 0.4.12. One difference: timm, told so by UniCL's config,
samples rotated and sheared images bicubically; here it is bilinear.
"""

import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from unicl_jax.data.draws import Draws

DEFAULTS = {"num_ops": 2, "magnitude": 9.0, "magnitude_std": 0.5}

_MAX_LEVEL = 10.0
_APPLY = 0.5  # timm applies a drawn op with this probability
_FILL = (124, 116, 104)  # 255 x the ImageNet mean, for what comes from outside
_MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # of ImageNet, of values in [0, 1]
_STD = np.array((0.229, 0.224, 0.225), np.float32)

_ERASED_AREA = (0.02, 1 / 3)  # of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ERASING_TRIES = 10

_VALUES = np.arange(256)  # that a channel can have


def randaugment(
    image: np.ndarray,
    seed: int,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
) -> np.ndarray:
    """Applies randomly drawn ops.

    Args:
      image: [S, S, 3] uint8.
      seed: the record's.
      num_ops: drawn with replacement.
      magnitude: mean level, in [0, 10].
      magnitude_std: of the level.

    Returns:
      [S, S, 3] uint8.
    """
    draws, ops = Draws(seed, 1), list(OPS.values())
    for _ in range(num_ops):
        level = magnitude + magnitude_std * draws.normal()
        strength = min(max(level, 0.0), _MAX_LEVEL) / _MAX_LEVEL
        sign = -1.0 if draws.uniform() < 0.5 else 1.0
        op = ops[draws.below(len(ops))]
        if draws.uniform() < _APPLY:
            image = op(image, strength, sign)
    return image


def _apply_table(image, table):
    """Maps values through a table of 256 numbers, or of 256 for each channel."""
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def _each_channel(image, make_table):
    tables = [make_table(cv2.extractChannel(image, c)) for c in range(3)]
    return _apply_table(image, np.stack(tables, -1)[None])


def _auto_contrast(image):
    """Stretches each channel to [0, 255]."""

    def table(channel):
        low, high = cv2.minMaxLoc(channel)[:2]
        if high <= low:
            return _VALUES
        scale = 255.0 / (high - low)
        return _VALUES * scale - low * scale

    return _each_channel(image, table)


def _equalize(image):
    """Makes the values of each channel about equally frequent."""

    def table(channel):
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256])
        counts = counts.ravel().astype(np.int64)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        if not step:
            return _VALUES
        return (np.cumsum(counts) - counts + step // 2) // step

    return _each_channel(image, table)


def _posterize(image, bits):
    """Keeps the highest bits."""
    return _apply_table(image, _VALUES >> (8 - bits) << (8 - bits))


def _solarize(image, threshold):
    """Inverts the values from a threshold on."""
    return _apply_table(image, np.where(_VALUES < threshold, _VALUES, 255 - _VALUES))


def _solarize_add(image, addition):
    """Brightens the values below 128."""
    return _apply_table(image, np.where(_VALUES < 128, _VALUES + addition, _VALUES))


def _enhance(image, enhancer, factor):
    """Goes from grey, flat, black or smoothed (0) to `image` (1) and beyond."""
    return np.asarray(enhancer(Image.fromarray(image)).enhance(factor))


def _affine(image, matrix):
    """Takes output (x, y) from (a x + b y + c, d x + e y + f), bilinearly.

    Coordinates of pixel centres end in .5; _FILL stands for what lies outside.
    """
    a, b, c, d, e, f = matrix
    # OpenCV counts from pixel centres: shift both sides by half a pixel.
    shifted = [[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]]
    return cv2.warpAffine(
        image,
        np.array(shifted),
        image.shape[1::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderValue=_FILL,
    )


def _rotate(image, degrees):
    """Rotates around the centre, counter-clockwise."""
    angle = -math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return _affine(
        image, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    )


def _translate(image, share, axis: int):
    """Moves the picture left (axis 1) or up (axis 0) by a share of the side."""
    pixels = share * image.shape[axis]
    return _affine(image, (1, 0, pixels, 0, 1, 0) if axis else (1, 0, 0, 0, 1, pixels))


# Name -> function of ([S, S, 3] uint8, strength in [0, 1], sign): timm's list and
# ranges. Four bits less at full strength leave posterize with black, as there.
OPS = {
    "auto_contrast": lambda image, a, s: _auto_contrast(image),
    "equalize": lambda image, a, s: _equalize(image),
    "invert": lambda image, a, s: 255 - image,
    "rotate": lambda image, a, s: _rotate(image, s * 30.0 * a),
    "posterize": lambda image, a, s: _posterize(image, 4 - int(a * 4.0)),
    "solarize": lambda image, a, s: _solarize(image, 256 - int(a * 256.0)),
    "solarize_add": lambda image, a, s: _solarize_add(image, int(a * 110.0)),
    "color": lambda image, a, s: _enhance(image, ImageEnhance.Color, 1 + 0.9 * s * a),
    "contrast": lambda image, a, s: _enhance(
        image, ImageEnhance.Contrast, 1 + 0.9 * s * a
    ),
    "brightness": lambda image, a, s: _enhance(
        image, ImageEnhance.Brightness, 1 + 0.9 * s * a
    ),
    "sharpness": lambda image, a, s: _enhance(
        image, ImageEnhance.Sharpness, 1 + 0.9 * s * a
    ),
    "shear_x": lambda image, a, s: _affine(image, (1, s * 0.3 * a, 0, 0, 1, 0)),
    "shear_y": lambda image, a, s: _affine(image, (1, 0, 0, s * 0.3 * a, 1, 0)),
    "translate_x": lambda image, a, s: _translate(image, s * 0.45 * a, 1),
    "translate_y": lambda image, a, s: _translate(image, s * 0.45 * a, 0),
}


def random_erasing(image: np.ndarray, seed: int, probability: float) -> np.ndarray:
    """Replaces a random rectangle by noise.

    The noise is N(mean, std) of ImageNet per channel, cut to [0, 255]: what timm's
    "pixel" mode draws after normalising, as far as uint8 can hold it.

    Args:
      image: [S, S, 3] uint8.
      seed: the record's.
      probability: of erasing at all, in [0, 1].

    Returns:
      [S, S, 3] uint8.
    """
    draws = Draws(seed, 2)
    if draws.uniform() >= probability:
        return image
    height, width = image.shape[:2]
    low, high = map(math.log, _ERASED_ASPECT)
    for _ in range(_ERASING_TRIES):
        area = draws.uniform(*_ERASED_AREA) * height * width
        aspect = math.exp(draws.uniform(low, high))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            break
    else:
        return image
    top, left = draws.below(height - rows + 1), draws.below(width - columns + 1)
    noise = 255 * (_MEAN + _STD * draws.normals(rows, columns, 3))
    image = image.copy()
    image[top : top + rows, left : left + columns] = np.clip(np.rint(noise), 0, 255)
    return image
