"""RandAugment and random erasing on uint8 images, as stateless TensorFlow ops.

The policy is timm's `rand-m9-mstd0.5-inc1`, which UniCL and Swin train with: each of
two ops, drawn with replacement from fifteen, acts on half of the images, at a level
from N(9, 0.5) within [0, 10]; a higher level is always a stronger change. Every op
equals Pillow's of that name. Letters in shapes: S pixels a side.

Source: Cubuk et al., NeurIPS 2020, arXiv 1909.13719; Zhong et al., AAAI 2020, arXiv
1708.04896. Ranges of the ops and of the erased area: timm/data/auto_augment.py and
random_erasing.py, release 0.4.12. One difference: timm, told so by UniCL's config,
samples rotated and sheared images bicubically; here it is bilinear.
"""

import math

import numpy as np

from unicl_jax.data.decode import import_tensorflow

DEFAULTS = {"num_ops": 2, "magnitude": 9.0, "magnitude_std": 0.5}

_MAX_LEVEL = 10.0
_APPLY = 0.5  # timm applies a drawn op with this probability
_FILL = (124, 116, 104)  # 255 x the ImageNet mean, for what comes from outside
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel, of values in [0, 1]
_STD = (0.229, 0.224, 0.225)

_ERASED_AREA = (0.02, 1 / 3)  # of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)
_ERASING_TRIES = 10


def randaugment(
    image, seed, num_ops: int = 2, magnitude: float = 9.0, magnitude_std: float = 0.5
):
    """Applies randomly drawn ops.

    Args:
      image: [S, S, 3] uint8.
      seed: scalar int64, the record's.
      num_ops: drawn with replacement.
      magnitude: mean level, in [0, 10].
      magnitude_std: of the level.

    Returns:
      [S, S, 3] uint8.
    """
    tf = import_tensorflow()
    uniform = tf.random.stateless_uniform(
        [num_ops, 3], tf.stack([seed, 1]), alg="philox"
    )
    normal = tf.random.stateless_normal([num_ops], tf.stack([seed, 2]), alg="philox")
    levels = tf.clip_by_value(magnitude + magnitude_std * normal, 0.0, _MAX_LEVEL)
    ops = list(OPS.values())
    for step in range(num_ops):
        strength = levels[step] / _MAX_LEVEL
        sign = tf.where(uniform[step, 1] < 0.5, -1.0, 1.0)
        chosen = tf.cast(uniform[step, 0] * len(ops), tf.int32)
        # One more branch, the last, leaves the image alone.
        branch = tf.where(uniform[step, 2] < _APPLY, chosen, len(ops))
        image = tf.switch_case(
            branch,
            [lambda op=op, i=image, a=strength, s=sign: op(i, a, s) for op in ops]
            + [lambda i=image: i],
        )
    return tf.ensure_shape(image, [None, None, 3])


def _apply_table(image, table):
    """Maps each channel's values through a [256, 3] table of int32 or float."""
    tf = import_tensorflow()
    table = tf.cast(tf.clip_by_value(table, 0, 255), tf.uint8)
    flat = tf.reshape(table, [-1])
    return tf.gather(flat, tf.cast(image, tf.int32) * 3 + np.arange(3, dtype=np.int32))


def _values():
    """Returns [256, 1] int32, the values a channel can have."""
    return np.arange(256, dtype=np.int32)[:, None]


def _auto_contrast(image):
    """Stretches each channel to [0, 255]."""
    tf = import_tensorflow()
    low = tf.cast(tf.reduce_min(image, [0, 1]), tf.float64)
    high = tf.cast(tf.reduce_max(image, [0, 1]), tf.float64)
    scale = 255.0 / tf.maximum(high - low, 1.0)
    values = _values().astype(np.float64)
    stretched = values * scale - low * scale
    return _apply_table(image, tf.where(high > low, stretched, values))


def _equalize(image):
    """Makes the values of each channel about equally frequent."""
    tf = import_tensorflow()
    bins = tf.cast(image, tf.int32) * 3 + np.arange(3, dtype=np.int32)
    counts = tf.math.bincount(tf.reshape(bins, [-1]), minlength=768, maxlength=768)
    counts = tf.reshape(counts, [256, 3])
    highest = tf.cast(tf.reduce_max(image, [0, 1]), tf.int32)
    last = tf.gather_nd(counts, tf.stack([highest, np.arange(3)], 1))
    step = (tf.reduce_sum(counts, 0) - last) // 255
    below = tf.cumsum(counts, exclusive=True)
    table = (below + step // 2) // tf.maximum(step, 1)
    return _apply_table(image, tf.where(step > 0, table, _values()))


def _posterize(image, bits):
    """Keeps the highest bits."""
    tf = import_tensorflow()
    unit = tf.bitwise.left_shift(1, 8 - bits)
    return tf.cast(tf.cast(image, tf.int32) // unit * unit, tf.uint8)


def _solarize(image, threshold):
    """Inverts the values from a threshold on."""
    tf = import_tensorflow()
    return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


def _solarize_add(image, addition):
    """Brightens the values below 128."""
    tf = import_tensorflow()
    brighter = tf.cast(tf.cast(image, tf.int32) + addition, tf.uint8)
    return tf.where(image < 128, brighter, image)


def _blend(degenerate, image, factor):
    """Goes from `degenerate` (factor 0) to `image` (1) and beyond; cuts as Pillow."""
    tf = import_tensorflow()
    degenerate = tf.cast(degenerate, tf.float32)
    blended = degenerate + factor * (tf.cast(image, tf.float32) - degenerate)
    return tf.cast(tf.clip_by_value(blended, 0.0, 255.0), tf.uint8)


def _grey(image):
    """Returns [S, S, 1] int32: ITU-R 601 luma in Pillow's fixed point."""
    tf = import_tensorflow()
    weights = np.array([19595, 38470, 7471], np.int32)  # of 2^16
    luma = tf.reduce_sum(tf.cast(image, tf.int32) * weights, 2, keepdims=True)
    return (luma + 2**15) // 2**16


def _color(image, factor):
    """Changes the saturation; factor 0 is grey."""
    return _blend(_grey(image), image, factor)


def _contrast(image, factor):
    """Changes the distance to the mean grey; factor 0 is uniform."""
    tf = import_tensorflow()
    mean = tf.reduce_mean(tf.cast(_grey(image), tf.float64))
    return _blend(tf.floor(mean + 0.5), image, factor)


def _brightness(image, factor):
    """Changes the distance to black; factor 0 is black."""
    return _blend(0, image, factor)


def _sharpness(image, factor):
    """Changes the distance to the smoothed image; a rim of one pixel stays."""
    tf = import_tensorflow()
    pixels = tf.cast(image, tf.int32)
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    # Pillow's SMOOTH: 5 in the middle, 1 around, over 13, rounded.
    smooth = (2 * (box + 4 * pixels[1:-1, 1:-1]) + 13) // 26
    inner = _blend(smooth, image[1:-1, 1:-1], factor)
    middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], 1)
    return tf.concat([image[:1], middle, image[-1:]], 0)


def _affine(image, matrix):
    """Takes output (x, y) from (a x + b y + c, d x + e y + f), bilinearly.

    Coordinates of pixel centres end in .5; _FILL stands for what lies outside.
    """
    tf = import_tensorflow()
    a, b, c, d, e, f = (tf.cast(value, tf.float32) for value in matrix)
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    # The op counts from pixel centres: shift both sides by half a pixel.
    shifted = [a, b, c + (a + b - 1) / 2, d, e, f + (d + e - 1) / 2, 0.0, 0.0]
    sampled = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(image, tf.float32)[None],
        transforms=tf.stack(shifted)[None],
        output_shape=tf.stack([height, width]),
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )[0]
    x = tf.range(width, dtype=tf.float32)[None, :] + 0.5
    y = tf.range(height, dtype=tf.float32)[:, None] + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    is_inside = (from_x >= 0) & (from_x < tf.cast(width, tf.float32))
    is_inside &= (from_y >= 0) & (from_y < tf.cast(height, tf.float32))
    fill = np.array(_FILL, np.uint8)
    return tf.where(is_inside[..., None], tf.cast(sampled, tf.uint8), fill)


def _rotate(image, degrees):
    """Rotates around the centre, counter-clockwise."""
    tf = import_tensorflow()
    angle = -degrees * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    x = tf.cast(tf.shape(image)[1], tf.float32) / 2
    y = tf.cast(tf.shape(image)[0], tf.float32) / 2
    return _affine(
        image, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    )


def _translate(image, share, axis: int):
    """Moves the picture left (axis 1) or up (axis 0) by a share of the side."""
    tf = import_tensorflow()
    pixels = share * tf.cast(tf.shape(image)[axis], tf.float32)
    return _affine(image, (1, 0, pixels, 0, 1, 0) if axis else (1, 0, 0, 0, 1, pixels))


def _enhanced(strength, sign):
    return 1.0 + sign * 0.9 * strength


def _int(value):
    tf = import_tensorflow()
    return tf.cast(value, tf.int32)  # cuts, as Python's int does


# Name -> function of ([S, S, 3] uint8, strength in [0, 1], sign): timm's list and
# ranges. Four bits less at full strength leave posterize with black, as there.
OPS = {
    "auto_contrast": lambda image, a, s: _auto_contrast(image),
    "equalize": lambda image, a, s: _equalize(image),
    "invert": lambda image, a, s: 255 - image,
    "rotate": lambda image, a, s: _rotate(image, s * 30.0 * a),
    "posterize": lambda image, a, s: _posterize(image, 4 - _int(a * 4.0)),
    "solarize": lambda image, a, s: _solarize(image, 256 - _int(a * 256.0)),
    "solarize_add": lambda image, a, s: _solarize_add(image, _int(a * 110.0)),
    "color": lambda image, a, s: _color(image, _enhanced(a, s)),
    "contrast": lambda image, a, s: _contrast(image, _enhanced(a, s)),
    "brightness": lambda image, a, s: _brightness(image, _enhanced(a, s)),
    "sharpness": lambda image, a, s: _sharpness(image, _enhanced(a, s)),
    "shear_x": lambda image, a, s: _affine(image, (1, s * 0.3 * a, 0, 0, 1, 0)),
    "shear_y": lambda image, a, s: _affine(image, (1, 0, 0, s * 0.3 * a, 1, 0)),
    "translate_x": lambda image, a, s: _translate(image, s * 0.45 * a, 1),
    "translate_y": lambda image, a, s: _translate(image, s * 0.45 * a, 0),
}


def random_erasing(image, seed, probability: float):
    """Replaces a random rectangle by noise.

    The noise is N(mean, std) of ImageNet per channel, cut to [0, 255]: what timm's
    "pixel" mode draws after normalising, as far as uint8 can hold it.

    Args:
      image: [S, S, 3] uint8.
      seed: scalar int64, the record's.
      probability: of erasing at all, in [0, 1].

    Returns:
      [S, S, 3] uint8.
    """
    tf = import_tensorflow()
    shape = tf.shape(image)[:2]
    size = tf.cast(shape, tf.float32)
    uniform = tf.random.stateless_uniform(
        [1 + _ERASING_TRIES, 4], tf.stack([seed, 3]), alg="philox"
    )
    tries = uniform[1:]
    low, high = _ERASED_AREA
    area = (low + (high - low) * tries[:, 0]) * size[0] * size[1]
    low, high = map(math.log, _ERASED_ASPECT)
    aspect = tf.exp(low + (high - low) * tries[:, 1])
    boxes = tf.round(tf.sqrt(tf.stack([area * aspect, area / aspect], 1)))
    fits = tf.reduce_all(boxes < size, 1)
    first = tf.argmax(fits)
    box = boxes[first]
    start = tf.cast(tf.floor(tries[first, 2:] * (size - box + 1.0)), tf.int32)
    box = tf.cast(box, tf.int32)
    start = tf.minimum(start, shape - box)  # u (room + 1) may round up to room + 1

    def erased():
        noise = tf.random.stateless_normal(
            [box[0], box[1], 3], tf.stack([seed, 4]), alg="philox"
        )
        noise = 255 * (np.array(_MEAN, np.float32) + np.array(_STD, np.float32) * noise)
        noise = tf.saturate_cast(tf.round(noise), tf.uint8)
        end = shape - start - box
        paddings = [[start[0], end[0]], [start[1], end[1]], [0, 0]]
        mask = tf.pad(tf.ones([box[0], box[1], 1], tf.bool), paddings)
        return tf.where(mask, tf.pad(noise, paddings), image)

    is_erased = (uniform[0, 0] < probability) & tf.reduce_any(fits)
    image = tf.cond(is_erased, erased, lambda: image)
    return tf.ensure_shape(image, [None, None, 3])
