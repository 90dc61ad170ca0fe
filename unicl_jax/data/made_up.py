"""Small made-up shards in a source's own format, for runs that prove the plumbing.

Each record is a JPEG of one coloured shape; its caption or class name says what it
shows, so a model can learn from it within a minute.
"""

import copy
import io
import json
import re
import tarfile
import zlib
from collections.abc import Mapping

import numpy as np

from unicl_jax.data.shards import gfile, written_whole
from unicl_jax.data.sources import source_fields
from unicl_jax.data.tensorflow import import_tensorflow

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 89, 200),
    "yellow": (245, 205, 47),
    "purple": (128, 56, 170),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

_NUM_SHARDS = 2
_MIN_SIDE, _MAX_SIDE = 64, 96  # pixels


def write_made_up(
    sources_config: Mapping, workdir: str, num_records: int, seed: int
) -> Mapping:
    """Writes made-up shards for the sources that read shards, in their own format.

    Args:
      sources_config: source name -> settings, as `sources.make_file_source` takes them.
      workdir: folder, local or gs://; files go to `made_up/` in it. The same arguments
        write the same bytes, so several processes may write at once.
      num_records: per source.
      seed: of the pictures.

    Returns:
      A copy of `sources_config` whose `path` and `class_names` are the made-up ones;
      sources of other formats stay as they are.

    Raises:
      InputError: if a source's `fields` has an unknown role.
    """
    changed = {}
    for name, config in sources_config.items():
        write = _WRITERS.get(config.get("format"))
        if write is None:
            continue
        fields = source_fields(name, config)
        fields = {role: field.split(";")[0] for role, field in fields.items()}
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        concepts = rng.permutation(np.arange(num_records) % len(NAMES))
        records = [(draw(int(concept), rng), int(concept)) for concept in concepts]
        folder = f"{workdir}/made_up/{name}"
        gfile().makedirs(folder)
        new = {"path": write(folder, name, config, fields, records)}
        if "label" in fields:
            new["class_names"] = list(NAMES)
        changed[name] = _replaced(config, new)
    return _replaced(sources_config, changed)


def draw(concept: int, rng: np.random.Generator) -> bytes:
    """Draws one shape at a random place and size on a dark grey ground.

    Args:
      concept: index into NAMES.
      rng: decides the place, the sizes and the ground.

    Returns:
      The bytes of a JPEG file.
    """
    from PIL import Image, ImageDraw

    colour, shape = NAMES[concept].split()
    width, height = rng.integers(_MIN_SIDE, _MAX_SIDE, 2, endpoint=True).tolist()
    image = Image.new("RGB", (width, height), (int(rng.integers(20, 90)),) * 3)
    pen = ImageDraw.Draw(image)
    radius = rng.uniform(0.3, 0.45) * min(width, height)
    x = rng.uniform(radius, width - radius)
    y = rng.uniform(radius, height - radius)
    box = [x - radius, y - radius, x + radius, y + radius]
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
    else:
        arm = radius / 3
        pen.rectangle([x - arm, box[1], x + arm, box[3]], fill=fill)
        pen.rectangle([box[0], y - arm, box[2], y + arm], fill=fill)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _caption(concept: int) -> str:
    return f"a {NAMES[concept]}"


def _replaced(config: Mapping, changes: Mapping) -> Mapping:
    """Returns a copy with other values, of the type of `config`."""
    if isinstance(config, dict):
        return {**config, **changes}
    # A ConfigDict: locked, and strict about the types of what it held.
    new = copy.deepcopy(getattr(config, "as_configdict", lambda: config)())
    with new.unlocked(), new.ignore_type():
        for key, value in changes.items():
            new[key] = value
    return new


def _write_examples(paths, config: Mapping, fields: Mapping, records) -> None:
    """Writes record i to shard i modulo the number of shards."""
    tf = import_tensorflow()
    for shard, path in enumerate(paths):
        with written_whole(path) as partial, tf.io.TFRecordWriter(partial) as writer:
            for image, concept in records[shard :: len(paths)]:
                values = {fields["image"]: _bytes(image)}
                if "label" in fields:
                    label = concept + int(config.get("label_offset") or 0)
                    integers = tf.train.Int64List(value=[label])
                    values[fields["label"]] = tf.train.Feature(int64_list=integers)
                else:
                    values[fields["text"]] = _bytes(_caption(concept).encode())
                features = tf.train.Features(feature=values)
                example = tf.train.Example(features=features)
                # Map entries have no order of their own.
                writer.write(example.SerializeToString(deterministic=True))


def _bytes(value: bytes):
    tf = import_tensorflow()
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _write_tfrecord(folder, name, config, fields, records) -> str:
    paths = [
        f"{folder}/{name}.tfrecord-{shard:05d}-of-{_NUM_SHARDS:05d}"
        for shard in range(_NUM_SHARDS)
    ]
    _write_examples(paths, config, fields, records)
    return f"{folder}/{name}.tfrecord-*-of-{_NUM_SHARDS:05d}"


def _write_tfds(folder, name, config, fields, records) -> str:
    import tensorflow_datasets as tfds

    folder = f"{folder}/1.0.0"  # TFDS reads the version from the path
    gfile().makedirs(folder)
    split = re.match(r"\w*", config.get("split") or "train")[0]
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=re.sub(r"\W", "_", name),
        split=split,
        filetype_suffix="tfrecord",
    )
    paths = [
        str(template.sharded_filepath(shard_index=shard, num_shards=_NUM_SHARDS))
        for shard in range(_NUM_SHARDS)
    ]
    _write_examples(paths, config, fields, records)
    kinds = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=list(NAMES)),
        "text": tfds.features.Text(),
    }
    lengths = [len(records[shard::_NUM_SHARDS]) for shard in range(_NUM_SHARDS)]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_nested({field: kinds[role] for role, field in fields.items()}),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths,
                num_bytes=sum(len(image) for image, _ in records),
                filename_template=template,
            )
        ],
        check_data=False,
    )
    return folder


def _nested(features: Mapping):
    """Turns {"a/b": x} into features a dict of dicts: TFDS writes their keys joined."""
    import tensorflow_datasets as tfds

    tree = {}
    for field, feature in features.items():
        *parents, leaf = field.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = feature
    return tfds.features.FeaturesDict(tree)


def _write_webdataset(folder, name, config, fields, records) -> str:
    extension = fields["image"].strip(" .")
    member, _, key = fields["label" if "label" in fields else "text"].partition(".")
    for shard in range(_NUM_SHARDS):
        path = f"{folder}/{name}-{shard:05d}.tar"
        with written_whole(path) as partial, gfile().GFile(partial, "wb") as file:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for row, (image, concept) in enumerate(records[shard::_NUM_SHARDS]):
                    value = _caption(concept)
                    if "label" in fields:
                        value = concept + int(config.get("label_offset") or 0)
                    text = json.dumps({key: value}) if key else str(value)
                    _add(tar, f"{row:06d}.{extension}", image)
                    _add(tar, f"{row:06d}.{member}", text.encode())
            file.write(buffer.getvalue())
    return f"{folder}/{name}-{{00000..{_NUM_SHARDS - 1:05d}}}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


_WRITERS = {
    "tfrecord": _write_tfrecord,
    "tfds": _write_tfds,
    "webdataset": _write_webdataset,
}
