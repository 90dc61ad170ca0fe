"""Small data sets of tasks, made of the quick start's real pictures."""

import pytest

from tests.real_files import ask, encoded, tf, write_tar
from unicl_jax.data import quickstart
from unicl_jax.evaluation.suites import load_suite

Image = pytest.importorskip("PIL.Image", reason="the tests write images with Pillow")
SIZE = 32
WHOLE = {"name": "resize"}


def elevater(name):
    return load_suite("elevater20").task(name)


def rows_of(source):
    return next(source.stream([ask(range(len(source)))]))


def png(pixels):
    return encoded(Image.fromarray(pixels), "PNG")


def fashion(count=20):
    """Real pictures, their classes by name and the names."""
    images, labels, names = quickstart.fashion_mnist("test")
    return images[:count], [names[label] for label in labels[:count]], names


def write_tfds(data_dir, builder, split, examples, names=(), features=None):
    """A prepared dataset of TFDS's own schema; `names`: of classes it has none for."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="the format under test")
    features = features or tfds.builder(builder, data_dir=data_dir).info.features
    if names:
        features["label"].names = list(names)
    folder = data_dir / builder / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=str(folder),
        dataset_name=builder.split("/")[0],
        split=split,
        filetype_suffix="tfrecord",
    )
    path = str(template.sharded_filepath(shard_index=0, num_shards=1))
    with tf.io.TFRecordWriter(path) as writer:
        for example in examples:
            writer.write(features.serialize_example(features.encode_example(example)))
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(examples)],
                num_bytes=1,
                filename_template=template,
            )
        ],
        check_data=False,
    )


def write_wds(folder, split, members, names=(), kind=""):
    """Shards as CLIP_benchmark writes them."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    half = len(members) // 2
    for shard, part in enumerate((members[:half], members[half:])):
        files = [
            (f"s{shard * half + i:07d}.{extension}", data)
            for i, record in enumerate(part)
            for extension, data in record.items()
        ]
        write_tar(folder / split / f"{shard}.tar", files)
    (folder / split / "nshards.txt").write_text("2\n")
    if names:
        (folder / "classnames.txt").write_text("".join(f"{n}\n" for n in names))
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
