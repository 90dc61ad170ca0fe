"""From encoded bytes to a square uint8 image, as TensorFlow ops.

Everything here is a pure function of (bytes, seed). Decodable: JPEG (grey, RGB, CMYK),
PNG, GIF (its first frame), BMP and, since TensorFlow 2.19, WebP. Transparent pixels are
laid on white; EXIF rotation is not applied. Letters in shapes: H and W pixels of the
stored image, S the side of the result.
"""

import math
from collections.abc import Callable, Mapping

from unicl_jax.errors import InputError, choose, did_you_mean

# Caption bytes are joined by this on their way out of TensorFlow: 0xff is in no valid
# UTF-8 text.
SEPARATOR = b"\xff\x00\xff"

# Inception style crops as in timm's create_transform, which UniCL and Swin train with.
DEFAULTS = {
    "name": "random_resized_crop",
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "flip": False,
    "interpolation": "bicubic",
}
_INTERPOLATIONS = ("bicubic", "bilinear")
_NUM_TRIES = 10
_EVAL_RESIZE = 256 / 224  # the shorter side before the centre crop, over S


def import_tensorflow():
    """Imports TensorFlow, hidden from accelerators.

    Returns:
      The `tensorflow` module.

    Raises:
      InputError: if it is not installed.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise InputError(
            "reading image files needs TensorFlow: it cannot be imported "
            f'({error}); run `pip install "unicl_jax[data]"`.'
        ) from error
    for kind in ("GPU", "TPU"):
        try:
            tf.config.set_visible_devices([], kind)
        except RuntimeError:
            pass  # someone in this process has used TensorFlow before
    return tf


def parse_example(payload, image_key: str, text_key: str | None, label_key: str | None):
    """Takes the wanted fields out of a serialized tf.Example.

    Args:
      payload: scalar string tensor.
      image_key: the feature with the encoded image.
      text_key: the feature with one or more captions, or None.
      label_key: the feature with one integer, or None.

    Returns:
      (image bytes, captions joined by SEPARATOR or "", int64 label or 0), scalars.

    Raises:
      tf.errors.InvalidArgumentError: if it is no tf.Example or a field is missing.
    """
    tf = import_tensorflow()
    wanted = {image_key: tf.io.FixedLenFeature([], tf.string)}
    if text_key:
        wanted[text_key] = tf.io.VarLenFeature(tf.string)
    if label_key:
        wanted[label_key] = tf.io.FixedLenFeature([], tf.int64)
    fields = tf.io.parse_single_example(payload, wanted)
    text = tf.constant(b"")
    if text_key:
        captions = fields[text_key].values
        text = tf.strings.reduce_join(captions, separator=SEPARATOR)
    label = fields[label_key] if label_key else tf.constant(0, tf.int64)
    return fields[image_key], text, label


def make_preprocess(source: str, config: Mapping, image_size: int, train: bool):
    """Makes the function from encoded bytes to pixels.

    Args:
      source: the source's name, for errors.
      config: a source's `preprocess`, over DEFAULTS. `name` is a key of PREPROCESS;
        `scale` (share of the area) and `ratio` (width over height) bound the random
        crop; `flip` mirrors half of the images; `interpolation` is bicubic or bilinear,
        both antialiased.
      image_size: S.
      train: evaluation (False) always takes the centre, unflipped.

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
        settings.update(name="center", flip=False)
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
        return tf.ensure_shape(image, [image_size, image_size, 3])

    return preprocess


def _check_settings(source: str, settings: Mapping) -> None:
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


def decode(data):
    """Decodes a whole image to RGB.

    Args:
      data: scalar string tensor, the file's bytes.

    Returns:
      [H, W, 3] uint8.

    Raises:
      tf.errors.InvalidArgumentError: if the bytes are cut off or no known format.
    """
    tf = import_tensorflow()
    return tf.cond(
        tf.io.is_jpeg(data), lambda: _decode_jpeg(data), lambda: _decode_other(data)
    )


def _decode_jpeg(data, window=None):
    """Decodes [top, left, height, width] of a JPEG; its blocks outside are skipped."""
    tf = import_tensorflow()
    # The exact DCT costs nothing measurable and equals PIL's.
    options = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}
    if window is None:
        return tf.io.decode_jpeg(data, **options)
    return tf.io.decode_and_crop_jpeg(data, window, **options)


def _decode_other(data):
    tf = import_tensorflow()
    image = tf.io.decode_image(data, expand_animations=False)
    channels = tf.shape(image)[2]  # grey, grey + alpha, RGB, RGB + alpha
    rgb = tf.cond(
        channels < 3, lambda: tf.repeat(image[..., :1], 3, 2), lambda: image[..., :3]
    )

    def on_white():
        alpha = tf.cast(image[..., -1:], tf.int32)
        laid = tf.cast(rgb, tf.int32) * alpha + 255 * (255 - alpha)
        return tf.cast((laid + 127) // 255, tf.uint8)

    return tf.cond(channels % 2 == 0, on_white, lambda: rgb)


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
        return _decode_jpeg(data, window_of(tf.image.extract_jpeg_shape(data)))

    def from_other():
        image = _decode_other(data)
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


PREPROCESS: dict[str, Callable] = {
    "random_resized_crop": _random_resized_crop,
    "center": _center,
}
