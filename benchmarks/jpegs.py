"""Realistic photographs to read: cut from real ones that PyPI packages bring along.

python -m benchmarks.jpegs FOLDER [20000]

Writes FOLDER/jpegs/000/000000.jpg and on, some 420 x 390 pixels and 46 KB each, and the
same bytes with captions as FOLDER/tars/00000.tar and on, 1,000 records each. Needs
`pip install scikit-image scikit-learn foolbox==3.3.4 --no-deps`.
"""

import importlib.util
import io
import multiprocessing
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

IN_A_SHARD = 1000
PACKAGES = {
    "sklearn": "datasets/images/*.jpg",
    "skimage": "data/*.[jp][pn]g",
    "foolbox": "data/imagenet*.jpg",
}


def photographs():
    """The packages' images of at least 300 pixels a side."""
    found = []
    for package, pattern in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise SystemExit(f"{package} is not installed; see the head of this file")
        for path in sorted(Path(spec.submodule_search_locations[0]).glob(pattern)):
            image = Image.open(path)
            if min(image.size) >= 300:
                found.append(image.convert("RGB"))
    return found


def cut(images, index):
    """A JPEG of a random part of one of them, 350 to 500 pixels wide."""
    rng = np.random.default_rng(index)
    image = images[rng.integers(len(images))]
    width, height = image.size
    w = int(width * rng.uniform(0.6, 1))
    h = int(min(height, w * rng.uniform(0.7, 1.2)))
    left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
    side = int(rng.integers(350, 500))
    image = image.resize(
        (side, side * h // w), box=(left, top, left + w, top + h), resample=3
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(85, 96)))
    return file.getvalue()


def write_shard(folder, shard, images):
    """A folder and a tar of the same records."""
    out = folder / "jpegs" / f"{shard:03d}"
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "tars" / f"{shard:05d}.tar", "w") as tar:
        for index in range(shard * IN_A_SHARD, (shard + 1) * IN_A_SHARD):
            data = cut(images, index)
            (out / f"{index:06d}.jpg").write_bytes(data)
            caption = f"photograph number {index} of many".encode()
            for suffix, content in (("jpg", data), ("txt", caption)):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make(folder, count):
    """Writes what is not there yet, with a process a core."""
    (folder / "tars").mkdir(parents=True, exist_ok=True)
    done = len(list((folder / "tars").glob("*.tar")))
    images = photographs()
    work = [(folder, s, images) for s in range(done, count // IN_A_SHARD)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.starmap(write_shard, work, chunksize=1)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
