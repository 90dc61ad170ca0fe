"""From serialized records to fields, from encoded bytes to pixels, as TensorFlow ops.

Decodable: JPEG (grey, RGB, CMYK), PNG, GIF (its first frame), BMP and WebP. Transparent
pixels are laid on white; EXIF rotation is not applied. Letters in shapes: H and W
pixels of the stored image.
"""

import functools
import os

from unicl_jax.errors import InputError

# Caption bytes are joined by this on their way out of TensorFlow: 0xff is in no valid
# UTF-8 text.
SEPARATOR = b"\xff\x00\xff"


@functools.cache  # set up once, before any function of ours is traced
def import_tensorflow():
    """Imports TensorFlow, hidden from accelerators.

    Returns:
      The `tensorflow` module.

    Raises:
      InputError: if it is not installed.
    """
    # Its start-up notes are no news to who trains a model; a user's own level stays.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
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
        tf.io.is_jpeg(data), lambda: decode_jpeg(data), lambda: decode_other(data)
    )


def decode_jpeg(data, window=None):
    """Decodes a JPEG, or a window of it: blocks outside of that are skipped.

    Args:
      data: scalar string tensor, the file's bytes.
      window: [4] int32: top, left, height, width; None for all.

    Returns:
      [H, W, 3] uint8, H and W of the window.
    """
    tf = import_tensorflow()
    # The exact DCT costs nothing measurable and equals PIL's.
    options = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}
    if window is None:
        return tf.io.decode_jpeg(data, **options)
    return tf.io.decode_and_crop_jpeg(data, window, **options)


def decode_other(data):
    """Decodes the formats that cannot be decoded in part; see `decode`."""
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
