"""TensorFlow, for what reads with it; the rest of this room does without."""

import functools
import os

from unicl_jax.errors import InputError


@functools.cache  # set up once, before anything of it is used
def import_tensorflow():
    """Imports TensorFlow, hidden from accelerators.

    Returns:
      The `tensorflow` module.

    Raises:
      InputError: if it is not installed.
    """
    # Its start-up notes are no news to who trains a model; a user's own level stays.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it says so where it is on
    # Its client of Google Cloud Storage fetches 64 MiB at once unless told otherwise as
    # it is imported; a record here or there is far less.
    os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")
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
