"""Small real files of every kind, and ways to open and read them."""

import io
import tarfile

import numpy as np
import pytest

from unicl_jax.data.records import Request
from unicl_jax.data.sources import make_file_source

tf = pytest.importorskip("tensorflow", reason="image files are read with TensorFlow")
Image = pytest.importorskip("PIL.Image", reason="the tests write images with Pillow")

SIZE = 32
CLASSES = [f"class {i}" for i in range(7)]
CENTRE = {"name": "center"}


def picture(index, width=60, height=48):
    """A flat picture whose level names the record: exact in PNG, close in JPEG."""
    return Image.new("RGB", (width, height), (10 * index + 5, 250 - 10 * index, 128))


def photo(seed, width=90, height=70):
    """A smooth, uneven picture: no two crops of it are alike."""
    rough = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    """The bytes of an image file."""
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def example(**fields):
    """A serialized tf.Example; `__` in a name stands for `/`."""

    def feature(value):
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    made = {k.replace("__", "/"): feature(v) for k, v in fields.items()}
    return tf.train.Example(
        features=tf.train.Features(feature=made)
    ).SerializeToString()


def write_tfrecord(path, payloads):
    """Writes one TFRecord file."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for payload in payloads:
            writer.write(payload)


def write_tar(path, members):
    """Writes (name, bytes) members into one tar."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def labelled(path, train=False, preprocess=CENTRE, **changes):
    """Opens an image-label TFRecord source."""
    config = {
        "kind": "image_label",
        "format": "tfrecord",
        "path": str(path),
        "fields": {"image": "jpg", "label": "cls"},
        "class_names": CLASSES,
        "preprocess": preprocess,
        **changes,
    }
    return make_file_source("made", config, SIZE, train)


def captioned(path, train=False, preprocess=CENTRE, **changes):
    """Opens an image-text source in img2dataset's TFRecord layout."""
    config = {
        "kind": "image_text",
        "format": "tfrecord",
        "path": str(path),
        "fields": {"image": "jpg", "text": "caption"},
        "preprocess": preprocess,
        **changes,
    }
    return make_file_source("made", config, SIZE, train)


def ask(indices, seeds=None):
    """A request; the seeds default to the indices."""
    indices = np.array(indices, np.int64)
    return Request(indices, np.array(indices if seeds is None else seeds, np.uint32))


def read(source, *requests):
    """All Rows of a stream over requests or lists of indices."""
    requests = [r if isinstance(r, Request) else ask(r) for r in requests]
    return list(source.stream(iter(requests)))


def shown(images):
    """Which `picture` each row shows."""
    levels = images[:, 4:-4, 4:-4, 0].mean((1, 2))
    return np.round((levels - 5) / 10).astype(int).tolist()


def write_ten(folder):
    """Writes two TFRecord shards with records 0..9; labels 0..6."""
    payloads = [
        example(jpg=encoded(picture(i)), cls=i % 7, caption=f"record {i}".encode())
        for i in range(10)
    ]
    write_tfrecord(folder / "x.tfrecord-00000-of-00002", payloads[:6])
    write_tfrecord(folder / "x.tfrecord-00001-of-00002", payloads[6:])
