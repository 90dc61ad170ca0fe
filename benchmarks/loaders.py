"""Ways to read JPEGs for training, ours and other people's, for `benchmarks/data.py`.

Each is a class that yields batches of 224-pixel images without end, on two cores. The
others' names, settings and transforms are those that their own trainers use.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import time
import warnings
from pathlib import Path

SIZE = 224
TOKENS = 77
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TEXT = "a photo"


class Ours:
    """`data.make_train_iterator` over tars or a folder."""

    def __init__(self, protocol, folder, batch_size, workers, format):
        """Opens the source."""
        del workers  # a thread a core
        from unicl_jax import data

        full = dict(flip=True, randaugment=dict(num_ops=2), erasing=0.25)
        preprocess = dict(name="random_resized_crop", scale=SCALE, ratio=RATIO)
        source = {
            "tars": dict(kind="image_text", format="webdataset"),
            "folder": dict(kind="image_label", format="folder"),
        }[format]
        path = {"tars": "tars", "folder": "jpegs"}[format]
        source |= dict(
            path=f"{folder}/{path}",
            preprocess=preprocess | (full if protocol == "full" else {}),
        )
        config = dict(
            sources={"photos": source},
            mixture="proportional",
            templates="short",
            share_prompts=False,
            text_length="full",
        )
        self.batches = data.make_train_iterator(
            config, SIZE, batch_size, 0, data.Tokenizer(TOKENS)
        )

    def count(self, batch):
        """How many images a batch has; raises if they are not ready."""
        assert batch["image"].shape[1:] == (SIZE, SIZE, 3)
        return len(batch["image"])


def _pil_transform(protocol):
    """What open_clip and timm train with, on Pillow's images."""
    if protocol == "crop":
        from open_clip.transform import image_transform

        return image_transform(
            SIZE, is_train=True, aug_cfg=dict(scale=SCALE, ratio=RATIO)
        )
    import timm.data.auto_augment as auto_augment
    from timm.data import create_transform

    posterize = auto_augment.posterize  # Pillow has come to refuse 0 bits
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **k: posterize(
        image, max(1, bits), **k
    )
    return create_transform(
        SIZE,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )


class OpenClip:
    """open_clip's WebDataset pipeline, shards drawn with replacement."""

    def __init__(self, protocol, folder, batch_size, workers):
        """Starts its worker processes."""
        import open_clip
        import open_clip_train.data

        tars = sorted(Path(folder, "tars").glob("*.tar"))
        arguments = argparse.Namespace(
            train_data=f"{folder}/tars/{{00000..{len(tars) - 1:05d}}}.tar",
            train_num_samples=10**9,
            train_data_upsampling_factors=None,
            dataset_resampled=True,
            seed=0,
            workers=workers,
            batch_size=batch_size,
            world_size=1,
        )
        info = open_clip_train.data.get_wds_dataset(
            arguments,
            _pil_transform(protocol),
            True,
            tokenizer=open_clip.get_tokenizer("ViT-B-32"),
        )
        self.batches = iter(info.dataloader)

    def count(self, batch):
        """How many images a batch has."""
        assert batch[0].shape[1:] == (3, SIZE, SIZE) and len(batch[1]) == len(batch[0])
        return len(batch[0])


class TorchFiles:
    """PyTorch's DataLoader over single files."""

    def __init__(self, protocol, folder, batch_size, workers):
        """Starts its worker processes."""
        import torch

        loader = torch.utils.data.DataLoader(
            _Files(protocol, folder),
            batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            persistent_workers=True,
        )
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def count(self, batch):
        """How many images a batch has."""
        assert batch.shape[1:] == (3, SIZE, SIZE)
        return len(batch)


class _Files:
    """Images by index, as PyTorch's datasets and grain's sources give them."""

    def __init__(self, protocol, folder, as_numpy=False):
        self.paths = sorted(map(str, Path(folder, "jpegs").rglob("*.jpg")))
        self.transform, self.as_numpy = _pil_transform(protocol), as_numpy

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image

        data = Path(self.paths[index]).read_bytes()
        image = self.transform(Image.open(io.BytesIO(data)).convert("RGB"))
        return image.numpy() if self.as_numpy else image


class Grain:
    """grain's MapDataset over single files, read and changed by its threads."""

    def __init__(self, protocol, folder, batch_size, workers):
        """Builds the pipeline."""
        import grain

        source = _Files(protocol, folder, as_numpy=True)
        data = grain.MapDataset.source(source).seed(0).shuffle().repeat()
        data = data.batch(batch_size, drop_remainder=True)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4)
        data = data.to_iter_dataset(options)
        self.batches = iter(data)

    count = TorchFiles.count


LOADERS = {
    "unicl_jax, tars": lambda *a: Ours(*a, "tars"),
    "unicl_jax, folder": lambda *a: Ours(*a, "folder"),
    "open_clip, tars": OpenClip,
    "PyTorch, files": TorchFiles,
    "grain, files": Grain,
}


class Loader:
    """One of LOADERS, timed: the object that a benchmark's process holds."""

    def __init__(self, name, *arguments):
        """Starts it, and throws its first batches away."""
        warnings.simplefilter("ignore")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not name.startswith("unicl_jax"):
            import torch

            # Linux's own way, which open_clip needs; a benchmark's process has another.
            multiprocessing.set_start_method("fork", force=True)

            torch.set_num_threads(1)
        self._loader = LOADERS[name](*arguments)
        self.read(4)

    def read(self, batches):
        """Images a second, and seconds of processors an image, all processes."""
        start, used, images = time.perf_counter(), cpu_seconds(), 0
        for batch in itertools.islice(self._loader.batches, batches):
            images += self._loader.count(batch)
        seconds = time.perf_counter() - start
        return {
            "images_per_second": images / seconds,
            "cpu_ms_per_image": 1e3 * (cpu_seconds() - used) / images,
        }

    def resident(self):
        """Bytes of this process and its children, what they share counted once."""
        return sum(_pss(pid) for pid in family())


def family():
    """This process and all below it."""
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                todo += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def cpu_seconds():
    """Of processors, used by this process and all below it."""
    ticks = 0
    for pid in family():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(stat[11]) + int(stat[12])  # user, system
    return ticks / os.sysconf("SC_CLK_TCK")


def _pss(pid):
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    line = next(x for x in rollup.splitlines() if x.startswith("Pss:"))
    return int(line.split()[1]) * 1024
