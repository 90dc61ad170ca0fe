"""Datasets that TFDS has prepared, by folder or by name; nothing is downloaded."""

import os
import re

from unicl_jax.data.shards import is_remote
from unicl_jax.errors import InputError

# name, name/config, and either with ":" and a version.
_NAME = r"[a-zA-Z]\w*(/[\w.\-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?"


def read_info(source: str, path: str):
    """Reads what TFDS says of a dataset.

    Args:
      source: the source's name, for errors.
      path: the folder of a version, e.g. ".../imagenet2012/5.1.0"; or a name, as
        "imagenet2012:5.1.0" or "imagenet2012", of what lies in TFDS's data_dir
        (TFDS_DATA_DIR, or ~/tensorflow_datasets).

    Returns:
      Its tfds.core.DatasetInfo.

    Raises:
      InputError: if TFDS is not installed, or no such dataset is there.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f'source "{source}": format "tfds" needs tensorflow_datasets: it cannot be '
            f'imported ({error}); run `pip install "unicl_jax[data]"`.'
        ) from error
    if isinstance(path, str):
        path = os.path.expanduser(path)
        is_folder = is_remote(path) or os.path.isdir(path)
        if not is_folder and re.fullmatch(_NAME, path):
            return _read_by_name(source, path)
    try:
        return tfds.builder_from_directory(path).info
    except Exception as error:  # whatever TFDS finds wrong
        raise InputError(
            f'source "{source}": path must be the folder of a prepared TFDS version '
            "(it holds dataset_info.json), or a name as imagenet2012:5.1.0: got "
            f"{path!r} ({error}); prepare the data with TFDS or set `path`."
        ) from error


def _read_by_name(source, name):
    from tensorflow_datasets.core import read_only_builder

    try:
        # By its files alone; the code of a dataset is what would download it.
        folder = os.environ.get("TFDS_DATA_DIR")
        return read_only_builder.builder_from_files(name, data_dir=folder).info
    except Exception as error:  # whatever TFDS finds wrong
        place = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        raise InputError(
            f'source "{source}": path must be a dataset that TFDS has prepared, or the '
            f'folder of one: "{name}" is no folder, and is not in {place}; run '
            f'`tfds build {name}`, or `python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}').download_and_prepare()\"`, or set `path` or "
            "TFDS_DATA_DIR."
        ) from error
