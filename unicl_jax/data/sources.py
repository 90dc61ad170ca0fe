"""Sources read from files, from their settings: TFRecord, TFDS and WebDataset."""

from collections.abc import Mapping
from importlib import resources

from unicl_jax.data.decode import import_tensorflow
from unicl_jax.data.indexing import index_tars, index_tfrecords
from unicl_jax.data.readers import TFRecordReader, WebDatasetReader
from unicl_jax.data.records import KINDS
from unicl_jax.data.shards import find_shards, gfile, is_remote
from unicl_jax.data.stream import FileSource
from unicl_jax.errors import InputError, choose, did_you_mean


def make_file_source(
    name: str, config: Mapping, image_size: int, train: bool
) -> FileSource:
    """Opens a source whose records lie in shard files.

    Args:
      name: the source's name, for errors and logs.
      config: the source's settings:
        kind: "image_label" (the default) or "image_text".
        format: a key of FORMATS.
        path: a file, folder, glob, `{000..099}` range or a list of these; for tfds the
          folder of a prepared version, e.g. ".../imagenet2012/5.1.0".
        split: tfds only; default "train".
        fields: where `image`, `text` and `label` are, over the format's defaults.
        class_names: a list, the path of a text file with one name a line, or a key of
          CLASS_NAMES.
        label_offset: the first class's label in the files; default 0.
        preprocess: see `preprocess.make_preprocess`.
        max_skips_in_a_row: unreadable neighbours before the run stops; default 100.
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
    kind = _kind(config)
    choose(dict.fromkeys(KINDS), kind, f'source "{name}": kind')
    make_reader = choose(FORMATS, config.get("format"), f'source "{name}": format')
    reader, known_names = make_reader(name, config)
    class_names = ()
    if kind == "image_label":
        class_names = load_class_names(name, config.get("class_names") or known_names)
    reader.check_fields(name)
    return FileSource(
        name,
        kind,
        class_names,
        reader,
        preprocess=config.get("preprocess") or {},
        image_size=image_size,
        train=train,
        max_skips_in_a_row=int(config.get("max_skips_in_a_row") or 100),
    )


def _kind(config: Mapping) -> str:
    return config.get("kind") or KINDS[0]  # an evaluation need not say


# Names that ship with the package: TFDS, for one, knows ImageNet's classes by id only.
CLASS_NAMES = {"imagenet": "imagenet.txt"}


def load_class_names(source: str, value) -> tuple[str, ...]:
    """Class names from a list, a text file with one a line, or a key of CLASS_NAMES.

    Args:
      source: the source's name, for errors.
      value: what its config says.

    Returns:
      The names, in label order.

    Raises:
      InputError: if there is none, or a name is empty.
    """
    if isinstance(value, str) and value in CLASS_NAMES:
        file = resources.files(__package__) / "class_names" / CLASS_NAMES[value]
        value = file.read_text(encoding="utf-8").splitlines()
    if isinstance(value, str):
        try:
            with gfile().GFile(value) if is_remote(value) else open(value) as file:
                value = file.read().rstrip().splitlines()
        except Exception as error:  # gfile has error types of its own
            raise InputError(
                f'source "{source}": class_names must be a list or a readable text '
                f"file with one name a line: {value} is not ({error}); set "
                "`class_names`."
            ) from error
    names = tuple(str(name).strip() for name in value or ())
    if not all(names) or not names:
        what = f"line {names.index('') + 1} is empty" if names else "got none"
        raise InputError(
            f'source "{source}": class_names must name every class of an image-label '
            f"source: {what}; set `class_names` to a list or a text file with one name "
            "a line."
        )
    return names


def source_fields(source: str, config: Mapping) -> dict[str, str]:
    """Says where a source's images and its texts or labels are.

    Args:
      source: the source's name, for errors.
      config: the source's settings, `kind` and `format` already checked.

    Returns:
      The field of "image" and of "label" (image-label) or "text" (image-text).

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
    # As the ImageNet scripts of TensorFlow name them.
    "tfrecord": {
        "image": "image/encoded",
        "label": "image/class/label",
        "text": "caption",
    },
    "tfds": {"image": "image", "label": "label", "text": "caption"},
    # Extensions of members; of several for the image the first one present counts.
    "webdataset": {"image": "jpg;jpeg;png;webp", "label": "cls", "text": "txt"},
}


def _make_tfrecord(source: str, config: Mapping):
    fields = source_fields(source, config)
    shards = find_shards(source, config.get("path"), "tfrecord")
    index = index_tfrecords(source, shards, cache=config.get("index_cache") or "")
    return TFRecordReader(index, fields, int(config.get("label_offset") or 0)), ()


def _make_tfds(source: str, config: Mapping):
    import_tensorflow()
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f'source "{source}": format "tfds" needs tensorflow_datasets: it cannot be '
            f'imported ({error}); run `pip install "unicl_jax[data]"`.'
        ) from error
    fields = source_fields(source, config)
    path, split = config.get("path"), config.get("split") or "train"
    try:
        info = tfds.builder_from_directory(path).info
    except Exception as error:  # whatever TFDS finds wrong
        raise InputError(
            f'source "{source}": path must be the folder of a prepared TFDS version '
            f"(it holds dataset_info.json): got {path!r} ({error}); prepare the data "
            "with TFDS or set `path`."
        ) from error
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
    names = tuple(getattr(label, "names", None) or ())
    return TFRecordReader(index, fields, int(config.get("label_offset") or 0)), names


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
    return WebDatasetReader(index, key, is_label, offset), ()


FORMATS = {
    "tfrecord": _make_tfrecord,
    "tfds": _make_tfds,
    "webdataset": _make_webdataset,
}
