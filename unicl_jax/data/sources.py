"""Sources read from files, from their settings: shards, class folders and tables."""

import os
from collections.abc import Mapping

import numpy as np
from absl import logging

from unicl_jax.config import MAX_PIXELS
from unicl_jax.data.indexing import index_tars, index_tfrecords
from unicl_jax.data.labels import (
    NO_CLASS,
    load_class_names,
    number_cells,
    number_folders,
)
from unicl_jax.data.listing import FileIndex, Strings, list_class_folders
from unicl_jax.data.prepared import open_prepared
from unicl_jax.data.readers import FileReader, TFRecordReader, WebDatasetReader
from unicl_jax.data.records import KINDS, SEPARATOR
from unicl_jax.data.shards import find_shards
from unicl_jax.data.tables import read_tables
from unicl_jax.data.tensorflow import import_tensorflow
from unicl_jax.data.tfds_folder import read_info
from unicl_jax.errors import InputError, choose, did_you_mean


def make_file_source(
    name: str, config: Mapping, image_size: int, train: bool
) -> "FileSource":  # noqa: F821
    """Opens a source whose records lie in files.

    Args:
      name: the source's name, for errors and logs.
      config: the source's settings:
        kind: "image_label" (the default) or "image_text".
        format: a key of FORMATS.
        path: a file, folder, glob, `{000..099}` range or a list of these; for tfds the
          folder of a version, e.g. ".../imagenet2012/5.1.0", or the name of what is
          there, "imagenet2012:5.1.0"; for folder the one that holds the class folders;
          for prepared what `python -m unicl_jax.prepare` wrote.
        split: tfds only; default "train".
        fields: where `image`, `text` and `label` are, over the format's defaults.
        class_names: a list, the path of a text file with one name a line, or a key of
          labels.CLASS_NAMES; for folder and csv, see `labels.number_folders`, too.
        label_offset: the first class's label in the files; default 0.
        root, delimiter: csv only; see `tables.read_tables`.
        preprocess: see `preprocess.make_preprocess`.
        max_skips_in_a_row: unreadable neighbours before the run stops; default 100.
        in_blocks: shards only; with a window, whether local ones are read in blocks, as
          remote ones always are: for disks that seek and mounted buckets.
        max_pixels: of an image that is decoded; default config.MAX_PIXELS.
        index_cache: folder that keeps the index of the shards; default none. Worth it
          for gs:// paths, whose first index reads all the data once.
      image_size: pixels of a side of the images.
      train: random crops and flips (True) or the centre crop (False).

    Returns:
      The source, indexed.

    Raises:
      InputError: if a setting is wrong, no record is found, or the fields are not those
        of the files.
    """
    reader, class_names = open_reader(name, config)
    source = _file_source()(
        name,
        _kind(config),
        class_names,
        reader,
        preprocess=config.get("preprocess") or {},
        image_size=image_size,
        train=train,
        max_skips_in_a_row=int(config.get("max_skips_in_a_row") or 100),
        in_blocks=bool(config.get("in_blocks")),
        max_pixels=int(config.get("max_pixels") or MAX_PIXELS),
    )
    source.check_records()
    return source


def open_reader(name: str, config: Mapping):
    """Indexes a source and says how its records are read.

    Args:
      name: the source's name, for errors.
      config: the source's settings, as for `make_file_source`.

    Returns:
      A reader of `data.readers`, and the class names; () for image-text.

    Raises:
      InputError: as `make_file_source`.
    """
    choose(dict.fromkeys(KINDS), _kind(config), f'source "{name}": kind')
    make_reader = choose(FORMATS, config.get("format"), f'source "{name}": format')
    reader, class_names = make_reader(name, config)
    reader.check_fields(name)
    return reader, class_names


def _file_source():
    """The class, whose room needs what the extra "data" installs."""
    try:
        from unicl_jax.data.stream import FileSource
    except ImportError as error:
        raise InputError(
            f"reading image files needs OpenCV and simplejpeg: {error}; run "
            '`pip install "unicl_jax[data]"`.'
        ) from error
    return FileSource


def _kind(config: Mapping) -> str:
    return config.get("kind") or KINDS[0]  # an evaluation need not say


def source_fields(source: str, config: Mapping) -> dict[str, str]:
    """Says where a source's images and its texts or labels are.

    Args:
      source: the source's name, for errors.
      config: the source's settings, `kind` and `format` already checked.

    Returns:
      The field of "image" and of "label" (image-label) or "text" (image-text); of
      several names with ";" between them, the first one present counts.

    Raises:
      InputError: if `fields` has an unknown role.
    """
    defaults = _FIELDS[config["format"]]
    given = dict(config.get("fields") or {})
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise InputError(
            f'source "{source}": fields must map image, text or label to a field: got '
            f'"{unknown[0]}"; {did_you_mean(unknown[0], defaults)}'
        )
    fields = {**defaults, **{role: field for role, field in given.items() if field}}
    other = "label" if _kind(config) == "image_label" else "text"
    return {"image": fields["image"], other: fields[other]}


_FIELDS = {
    # Of several, the first one there counts: as TensorFlow's ImageNet scripts and
    # img2dataset name them.
    "tfrecord": {
        "image": "image/encoded;image;jpg;jpeg;png;webp;image_bytes",
        "label": "image/class/label;label;cls;class",
        "text": "caption;text;txt;image/caption",
    },
    "tfds": {"image": "image", "label": "label", "text": "caption"},
    # Extensions of members; of several for the image the first one present counts.
    "webdataset": {"image": "jpg;jpeg;png;webp", "label": "cls", "text": "txt"},
    # Columns; "" takes one of tables.COLUMNS.
    "csv": {"image": "", "label": "", "text": ""},
}


def _make_tfrecord(source: str, config: Mapping):
    fields = source_fields(source, config)
    shards = find_shards(source, config.get("path"), "tfrecord")
    index = index_tfrecords(source, shards, cache=config.get("index_cache") or "")
    reader = TFRecordReader(index, fields, int(config.get("label_offset") or 0))
    return reader, _class_names(source, config)


def _make_tfds(source: str, config: Mapping):
    import_tensorflow()
    fields = source_fields(source, config)
    path, split = config.get("path"), config.get("split") or "train"
    info = read_info(source, path)
    file_format = info.file_format and info.file_format.value
    if file_format not in (None, "tfrecord"):
        raise InputError(
            f'source "{source}": TFDS files must be TFRecords: {path} holds '
            f'{file_format}; prepare it with file_format="tfrecord".'
        )
    try:
        pieces = info.splits[split].file_instructions
    except Exception as error:  # KeyError or a ValueError of the slice's syntax
        raise InputError(
            f'source "{source}": split must exist in {path}: got "{split}"; '
            f"{did_you_mean(split, info.splits)}"
        ) from error
    index = index_tfrecords(
        source,
        [piece.filename for piece in pieces],
        [(piece.skip, piece.take) for piece in pieces],
        cache=config.get("index_cache") or "",
    )
    label = dict(info.features or {}).get(fields.get("label"))
    offset = int(config.get("label_offset") or 0)
    reader = TFRecordReader(index, fields, offset)
    known = tuple(getattr(label, "names", None) or ())
    names = _class_names(source, config, known)
    classes = getattr(label, "num_classes", None)
    if names and classes and len(names) not in (classes, classes - offset):
        raise InputError(
            f'source "{source}": class_names must name every class: "{fields["label"]}"'
            f" in {path} has {classes} classes, label_offset is {offset}, and there are"
            f" {len(names)} names; set `class_names`, or leave it out for those that "
            "TFDS knows."
        )
    return reader, names


def _make_webdataset(source: str, config: Mapping):
    fields = source_fields(source, config)
    is_label = "label" in fields
    member, _, key = fields["label" if is_label else "text"].partition(".")
    if bool(key) != (member == "json"):
        raise InputError(
            f'source "{source}": the text or label field must be a member\'s '
            f'extension, with a key if it is JSON: got "{member}{key and "."}{key}"; '
            'for example "txt", "cls", "json.caption".'
        )
    shards = find_shards(source, config.get("path"), ".tar")
    images = [extension.strip(" .") for extension in fields["image"].split(";")]
    cache = config.get("index_cache") or ""
    index = index_tars(source, shards, images, member, cache)
    offset = int(config.get("label_offset") or 0)
    reader = WebDatasetReader(index, key, is_label, offset)
    return reader, _class_names(source, config)


def _make_folder(source: str, config: Mapping):
    if _kind(config) != "image_label":
        raise InputError(
            f'source "{source}": format "folder" holds classes, not captions: got kind '
            f'{_kind(config)}; set kind to "image_label", or format to "csv".'
        )
    folders, images, skipped = list_class_folders(source, config.get("path"))
    names, numbers = number_folders(source, folders, config.get("class_names"))
    counts = [len(found) for found in images]
    index = FileIndex(
        paths=Strings([path for found in images for path in found]),
        labels=np.repeat(np.array(numbers), counts),
        texts=Strings(),
        damaged=skipped,
    )
    return FileReader(index, "`path`"), names


def _make_csv(source: str, config: Mapping):
    """A row is a record; with captions, the rows of one image are."""
    fields = source_fields(source, config)
    tables = find_shards(source, config.get("path"), ".csv")
    root, delimiter = config.get("root") or "", config.get("delimiter") or ""
    rows, skipped = read_tables(source, tables, fields, root, delimiter)
    if "text" in fields:
        captions = {}
        for path, text in rows:
            captions.setdefault(path, []).append(text.encode())
        index = FileIndex(
            paths=Strings([*captions]),
            labels=np.zeros(0, np.int64),
            texts=Strings([SEPARATOR.join(each) for each in captions.values()]),
            damaged=skipped,
        )
        return FileReader(index, "`path` or `root`"), ()
    names, labels = number_cells(
        source,
        {cell for _, cell in rows},
        config.get("class_names"),
        int(config.get("label_offset") or 0),
    )
    good = [(path, labels[cell]) for path, cell in rows if type(labels[cell]) is int]
    unknown = [cell for _, cell in rows if type(labels[cell]) is not int]
    for path, cell in rows:
        if type(labels[cell]) is not int:
            # What has no name may have been left out on purpose.
            is_record = labels[cell] != NO_CLASS
            place = tables[0] if len(tables) == 1 else os.path.dirname(tables[0])
            skipped.add(labels[cell], place, os.fsdecode(path), is_record=is_record)
    if not good:
        raise InputError(
            f'source "{source}": labels must be among the class_names, or their '
            f'numbers: none of {len(rows)} is, as "{unknown[0]}"; set `class_names`, '
            "`fields.label` or `label_offset`."
        )
    if unknown:
        logging.warning(
            'source "%s": %d rows are left out: "%s", for one, is no class.',
            *(source, len(unknown), unknown[0]),
        )
    index = FileIndex(
        paths=Strings([path for path, _ in good]),
        labels=np.array([label for _, label in good]),
        texts=Strings(),
        damaged=skipped,
    )
    return FileReader(index, "`path` or `root`"), names


def _make_prepared(source: str, config: Mapping):
    kind = _kind(config)
    index, names = open_prepared(source, config.get("path"), kind)
    other = "label" if kind == "image_label" else "text"
    return TFRecordReader(index, {"image": "image", other: other}, 0), names


def _class_names(source: str, config: Mapping, known: tuple[str, ...] = ()):
    """The names of a source whose labels are numbers; () for image-text."""
    if _kind(config) != "image_label":
        return ()
    return load_class_names(source, config.get("class_names") or known)


FORMATS = {
    "tfrecord": _make_tfrecord,
    "tfds": _make_tfds,
    "webdataset": _make_webdataset,
    "folder": _make_folder,
    "csv": _make_csv,
    "prepared": _make_prepared,
}
