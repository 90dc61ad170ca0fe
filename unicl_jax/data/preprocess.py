"""From encoded bytes to a square uint8 image: crop, flip, augment, as TensorFlow ops.

Everything is a pure function of (bytes, seed). Letters in shapes: H and W pixels of the
stored image, S the side of the result.
"""

import math
from collections.abc import Callable, Mapping

from unicl_jax.data.decode import (
    decode,
    decode_jpeg,
    decode_other,
    import_tensorflow,
)
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
}
_INTERPOLATIONS = ("bicubic", "bilinear")
_NUM_TRIES = 10
_EVAL_RESIZE = 256 / 224  # the shorter side before the centre crop, over S


def make_preprocess(source: str, config: Mapping, image_size: int, train: bool):
    """Makes the function from encoded bytes to pixels.

    Args:
      source: the source's name, for errors.
      config: a source's `preprocess`, over DEFAULTS. `name` is a key of PREPROCESS;
        `scale` (share of the area) and `ratio` (width over height) bound the random
        crop; `flip` mirrors half of the images; `interpolation` is bicubic or bilinear,
        both antialiased; `randaugment` holds the arguments of `randaugment.randaugment`
        (None: off); `erasing` is the share of images that lose a rectangle.
      image_size: S.
      train: evaluation (False) is never random: the centre crop in place of a random
        one, nothing flipped, augmented or erased.

    Returns:
      Function of (scalar string bytes, scalar int64 seed) -> [S, S, 3] uint8.

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
    tf = import_tensorflow()

    def preprocess(data, seed):
        # One draw a record: row 0 is the flip's, the others are the tries of the crop.
        uniform = tf.random.stateless_uniform(
            [1 + _NUM_TRIES, 4], tf.stack([seed, 0]), alg="philox"
        )
        image = crop(data, uniform[1:], image_size, settings)
        if settings["flip"]:
            image = tf.cond(
                uniform[0, 0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image
            )
        image = tf.ensure_shape(image, [image_size, image_size, 3])
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
    choose(PREPROCESS, settings["name"], f'source "{source}": preprocess.name')
    choose(
        dict.fromkeys(_INTERPOLATIONS),
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


def _resize(image, size, interpolation: str):
    tf = import_tensorflow()
    resized = tf.image.resize(image, size, method=interpolation, antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)  # bicubic overshoots


def sample_crop(height, width, uniform, scale, ratio):
    """Draws the window of an Inception style crop.

    The first of the tries that fits inside counts: area ~ U(scale) of the image, log of
    width / height ~ U(log ratio). If none fits: the largest centred window whose ratio
    is allowed.

    Args:
      height: scalar int32, H.
      width: scalar int32, W.
      uniform: [tries, 4] float32 in [0, 1).
      scale: (low, high) share of the area.
      ratio: (low, high) width over height.

    Returns:
      [4] int32: top, left, height, width, within the image.

    Source: Szegedy et al., CVPR 2015, arXiv 1409.4842, section 6; the law of the draws
    and the fallback are those of timm's RandomResizedCropAndInterpolation.
    """
    tf = import_tensorflow()
    size = tf.cast(tf.stack([height, width]), tf.float32)
    area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * uniform[:, 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = tf.exp(low + (high - low) * uniform[:, 1])
    # [tries, 2]: height and width of each try.
    tries = tf.round(tf.sqrt(tf.stack([area / aspect, area * aspect], 1)))
    fits = tf.reduce_all((tries >= 1) & (tries <= size), 1)
    first = tf.argmax(fits)
    fallback = tf.round(
        tf.minimum(size, tf.stack([size[1] / ratio[0], size[0] * ratio[1]]))
    )
    is_found = tf.reduce_any(fits)
    window = tf.maximum(tf.where(is_found, tries[first], fallback), 1.0)
    room = size - window
    start = tf.where(
        is_found, tf.floor(uniform[first, 2:] * (room + 1.0)), tf.floor(room / 2)
    )
    start = tf.minimum(start, room)  # u (room + 1) may round up to room + 1
    return tf.cast(tf.concat([start, window], 0), tf.int32)


def _random_resized_crop(data, uniform, image_size: int, settings: Mapping):
    tf = import_tensorflow()

    def window_of(shape):
        return sample_crop(
            shape[0], shape[1], uniform, settings["scale"], settings["ratio"]
        )

    def from_jpeg():
        return decode_jpeg(data, window_of(tf.image.extract_jpeg_shape(data)))

    def from_other():
        image = decode_other(data)
        top, left, height, width = tf.unstack(window_of(tf.shape(image)))
        return image[top : top + height, left : left + width]

    cropped = tf.cond(tf.io.is_jpeg(data), from_jpeg, from_other)
    return _resize(cropped, [image_size, image_size], settings["interpolation"])


def _center(data, uniform, image_size: int, settings: Mapping):
    """Shorter side to int(256/224 S), then the centre S x S, as timm evaluates."""
    del uniform
    tf = import_tensorflow()
    image = decode(data)
    shape = tf.shape(image)[:2]
    shorter = int(_EVAL_RESIZE * image_size)
    size = shorter * shape // tf.reduce_min(shape)
    image = _resize(image, size, settings["interpolation"])
    top, left = tf.unstack(tf.cast(tf.round((size - image_size) / 2), tf.int32))
    return image[top : top + image_size, left : left + image_size]


def _squash(data, uniform, image_size: int, settings: Mapping):
    """The whole image as S x S; an image of that size stays as it is."""
    del uniform
    return _resize(decode(data), [image_size, image_size], settings["interpolation"])


PREPROCESS: dict[str, Callable] = {
    "random_resized_crop": _random_resized_crop,
    "center": _center,
    "resize": _squash,
}
