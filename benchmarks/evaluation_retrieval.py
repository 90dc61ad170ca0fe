"""Recall of retrieval in tiles, beside the whole matrix; and a size that has none.

python -m benchmarks.evaluation retrieval
python -m benchmarks.evaluation retrieval --sizes=1000x5000 --large=

Made-up unit features of 512 numbers, each text near its image, five an image. The
methods take turns, each in a process of its own; `product` is the bare products of all
tiles, which nothing can be faster than. Memory is what is resident beside the features.
"""

import os
import statistics
import time

import numpy as np

from benchmarks import harness
from benchmarks.harness import Worker, say

DIM, AT = 512, (1, 5, 10)
NOISE = 8.0  # beside an image of length 1: a few of the best ten are right


def add_options(parser):
    """The options of this part."""
    parser.add_argument("--sizes", default="1000x5000,5000x25000", help="IMAGESxTEXTS")
    parser.add_argument(
        "--large", default="50000x250000", help="ours alone, once; or ''"
    )
    parser.add_argument("--repeats", type=int, default=3)


def features(images, texts):
    """Unit rows of images and texts, and each text's image."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((images, DIM), dtype=np.float32)
    v = rng.standard_normal((texts, DIM), dtype=np.float32)
    owners = np.arange(texts) % images
    rng.shuffle(owners)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    for i in range(0, texts, 4096):
        part = slice(i, i + 4096)
        v[part] = v[part] * np.float32(NOISE / DIM**0.5) + u[owners[part]]
        v[part] /= np.linalg.norm(v[part], axis=1, keepdims=True)
    return u, v, owners


class _Method:
    """Holds a size's features."""

    def give(self, images, texts):
        """Makes them."""
        self._given = features(images, texts)

    def run(self):
        """Seconds of a call, and the recalls."""
        start = time.perf_counter()
        found = self._recalls(*self._given)
        return time.perf_counter() - start, found


class Ours(_Method):
    """`evaluation.retrieval`."""

    def __init__(self):
        """Loads jax."""
        import jax

        self._about = {
            "backend": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
        }

    def about(self):
        """The device."""
        return self._about

    def _recalls(self, *given):
        from unicl_jax.evaluation.retrieval import retrieval

        found = retrieval(*given, at=AT).metrics
        return {key: x for key, x in found.items() if "median" not in key}

    def product(self, tiles=None):
        """Seconds of the bare products, by so many tiles of them; None: of all."""
        import jax
        from jax import lax

        from unicl_jax.evaluation import retrieval

        u, v, _ = self._given
        rows, texts = min(retrieval.ROWS, len(u)), min(retrieval.TEXTS, len(v))

        @jax.jit
        def corner(u, v):
            scores = lax.dot_general(
                u, v, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
            )
            return scores[0, 0]

        u, v = jax.device_put((u[:rows], v[:texts]))
        corner(u, v).block_until_ready()
        all_tiles = len(self._given[0]) / rows * len(self._given[1]) / texts
        tiles = tiles or int(np.ceil(all_tiles))
        start = time.perf_counter()
        for _ in range(tiles):
            corner(u, v).block_until_ready()
        return (time.perf_counter() - start) * all_tiles / tiles


class Torch(_Method):
    """The whole matrix in PyTorch, and the best ten of each row and column."""

    def __init__(self):
        """Loads torch."""
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch = torch

    def _recalls(self, u, v, owners):
        torch = self._torch
        scores = torch.from_numpy(u) @ torch.from_numpy(v).T
        owners = torch.from_numpy(owners)
        found = {}
        texts = scores.topk(max(AT), 1).indices  # of each image
        right = owners[texts] == torch.arange(len(u))[:, None]
        images = scores.topk(max(AT), 0).indices  # of each text
        right_image = images == owners[None, :]
        for k in AT:
            found[f"image_to_text_r{k}"] = float(right[:, :k].any(1).float().mean())
            found[f"text_to_image_r{k}"] = float(right_image[:k].any(0).float().mean())
        return found


class NumpySort(_Method):
    """The whole matrix in NumPy, and every row and column sorted."""

    def _recalls(self, u, v, owners):
        scores = u @ v.T
        found = {}
        texts = np.argsort(-scores, 1)
        rank = (owners[texts] == np.arange(len(u))[:, None]).argmax(1)
        images = np.argsort(-scores.T, 1)
        rank_image = (images == owners[:, None]).argmax(1)
        for k in AT:
            found[f"image_to_text_r{k}"] = float((rank < k).mean())
            found[f"text_to_image_r{k}"] = float((rank_image < k).mean())
        return found


METHODS = {"unicl_jax": Ours, "torch topk": Torch, "numpy sort": NumpySort}


def measure(options):
    """Every size by every method in turn, then the large one."""
    machine, sizes = harness.machine(), {}
    workers = {name: Worker(make) for name, make in METHODS.items()}
    for size in options.sizes.split(","):
        sizes[size] = _by_all(workers, _numbers(size), options.repeats)
    about = workers["unicl_jax"].ask("about")
    for worker in workers.values():
        worker.close()
    if options.large:
        sizes[options.large] = _large(_numbers(options.large))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": harness.command("benchmarks.evaluation"),
        "machine": machine | about,
        "versions": harness.versions("numpy"),
        "dim": DIM,
        "repeats": options.repeats,
        "sizes": sizes,
    }


def _numbers(size):
    return [int(n) for n in size.split("x")]


def _by_all(workers, size, repeats):
    """Medians of a size; every method's first call, which may compile, is not timed."""
    found = {}
    for name, worker in workers.items():
        worker.ask("give", *size)
        seconds, recalls = worker.ask("run")
        found[name] = {"recalls": recalls, "first_seconds": seconds}
        found[name] |= {"seconds": [], "bytes": _beside(worker)}
        say(f"{size} {name}: {seconds:.2f} s at first")
    found["product"] = {"seconds": []}
    for _ in range(repeats):
        for name, worker in workers.items():
            found[name]["seconds"].append(worker.ask("run")[0])
        found["product"]["seconds"].append(workers["unicl_jax"].ask("product"))
    for way in found.values():
        way["seconds"] = statistics.median(way["seconds"])
    return found


def _beside(worker):
    """Bytes at most resident in a call, beside what was before it."""
    worker.ask("reset_peak")
    before = worker.ask("rss_peak")
    worker.ask("run")
    return worker.ask("rss_peak") - before


def _large(size):
    """Ours alone, once, with the products of some tiles before and after."""
    worker = Worker(Ours)
    worker.ask("give", *size)
    products = [worker.ask("product", 40)]
    worker.ask("reset_peak")
    before = worker.ask("rss_peak")
    say(f"{size}: the products alone would take {products[0]:.0f} s")
    seconds, recalls = worker.ask("run")
    peak = worker.ask("rss_peak")
    products.append(worker.ask("product", 40))
    worker.close()
    ours = {
        "seconds": seconds,
        "recalls": recalls,
        "bytes": peak - before,
        "bytes_in_all": peak,
    }
    return {"unicl_jax": ours, "product": {"seconds": statistics.mean(products)}}


def rows_of(found):
    """A table: a header, and a row for each size and method."""
    rows = [["images x texts", "method", "s", "of ours", "MiB beside", "R@1", "R@1"]]
    for size, ways in found["sizes"].items():
        ours = ways["unicl_jax"]["seconds"]
        for name, way in ways.items():
            recalls, beside = way.get("recalls"), way.get("bytes")
            rows.append(
                [
                    size.replace("x", " x "),
                    name,
                    f"{way['seconds']:,.2f}",
                    f"{way['seconds'] / ours:.2f} x",
                    "" if beside is None else f"{beside / 2**20:,.0f}",
                    *(
                        f"{recalls[key]:.4f}" if recalls else ""
                        for key in ("image_to_text_r1", "text_to_image_r1")
                    ),
                ]
            )
    return rows


def title(found):
    """What the table is of."""
    return (
        f"R@1/5/10 both ways, features of {found['dim']} float32; "
        f"{harness.where(found['machine'])}"
    )
