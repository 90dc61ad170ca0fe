"""Times the loss and its gradient, and their memory, beside PyTorch's.

python -m benchmarks.loss
python -m benchmarks.loss --sizes=1024,4096 --methods=dense,blockwise,torch
python -m benchmarks.loss --markdown

Every method in a process of its own; at each size they take turns. Half of the rows are
captions, the others share a label with three more on average. `benchmarks/README.md`
says what is compared.
"""

import argparse
import datetime
import importlib.util
import math
import os
import statistics
import sys
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.harness import Worker, say
from unicl_jax.host_memory import restart_with_huge_pages

SCALE = 20.0
MIN_SAMPLE_SECONDS = 0.2
MIB = 2**20
# Whole matrices of logits that each holds at once, by what was seen; the others none.
MATRICES = {"dense": 5, "torch": 8, "open_clip": 5}


def batch(size, dim):
    """Unit rows and labels of one batch."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, size, dim)).astype(np.float32)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    labels = rng.integers(0, max(size // 8, 1), size).astype(np.int32)
    labels[rng.permutation(size)[: size // 2]] = -1
    return u, v, labels


class Ours:
    """`unicl_loss` by one implementation, on all devices of this process."""

    def __init__(self, implementation, dtype, block_size, devices):
        """Starts jax with so many devices, if it is on the CPU."""
        import jax

        if devices > 1:
            jax.config.update("jax_num_cpu_devices", devices)
        self._implementation, self._dtype = implementation, dtype
        self._block_size = block_size if implementation != "dense" else None
        self._device = jax.devices()[0]

    def about(self):
        """The backend."""
        return {
            "backend": self._device.platform,
            "device_kind": self._device.device_kind,
        }

    def prepare(self, size, dim):
        """Compiles for a size; temporary bytes on a device."""
        import jax
        import jax.numpy as jnp

        from unicl_jax import sharding
        from unicl_jax.losses import sharded, unicl_loss

        u, v, labels = batch(size, dim)
        mesh = sharding.make_mesh()
        rows, whole = sharding.over_batch(mesh), sharding.replicated(mesh)
        u, v = (jnp.asarray(x, self._dtype) for x in (u, v))
        placed = jax.device_put((u, v, labels), rows)
        self._arguments = (*placed, jax.device_put(jnp.float32(SCALE), whole))
        loss = sharded(unicl_loss, mesh)
        options = dict(implementation=self._implementation, block_size=self._block_size)

        def mean(u, v, labels, scale):
            return loss(u, v, labels, scale, **options).mean()

        step = jax.jit(jax.value_and_grad(mean, (0, 1, 3)))
        self._step = step.lower(*self._arguments).compile()
        return self._step.memory_analysis().temp_size_in_bytes

    def time(self, calls):
        """Seconds a call, and the loss."""
        import time

        import jax

        start = time.perf_counter()
        for _ in range(calls):
            result = jax.block_until_ready(self._step(*self._arguments))
        return (time.perf_counter() - start) / calls, float(result[0])

    def device_peak(self):
        """Peak bytes on the device, or None for the CPU."""
        if self._device.platform == "cpu":
            return None
        return self._device.memory_stats()["peak_bytes_in_use"]


class Torch:
    """The loss in PyTorch: UniCL's with soft targets, or a public CLIP loss."""

    def __init__(self, kind, dtype):
        """Takes torch or open_clip."""
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._kind, self._dtype = kind, getattr(torch, dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(self, size, dim):
        """Makes the tensors; what it will need is not known before."""
        import torch

        u, v, labels = batch(size, dim)
        self._u, self._v = (
            torch.from_numpy(x).to(self._device, self._dtype).requires_grad_()
            for x in (u, v)
        )
        self._labels = torch.from_numpy(labels).to(self._device)
        self._scale = torch.tensor(SCALE, device=self._device, requires_grad=True)
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def time(self, calls):
        """Seconds a call, and the loss."""
        import time

        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            for x in (self._u, self._v, self._scale):
                x.grad = None
            loss = getattr(self, "_" + self._kind)()
            loss.backward()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls, float(loss.detach())

    def device_peak(self):
        """Peak bytes on the device, or None for the CPU."""
        import torch

        return None if self._device == "cpu" else torch.cuda.max_memory_allocated()

    def _torch(self):
        import torch
        from torch.nn import functional

        y = self._labels
        own = torch.eye(len(y), dtype=torch.bool, device=y.device)
        same = (y[:, None] == y[None]) & (y != -1)[:, None]
        target = (same | own).float()
        target /= target.sum(1, keepdim=True)  # symmetric, and so for the columns
        logits = (self._scale * self._u @ self._v.T).float()
        return (
            functional.cross_entropy(logits, target)
            + functional.cross_entropy(logits.T, target.T)
        ) / 2

    def _open_clip(self):
        from open_clip.loss import ClipLoss

        return ClipLoss()(self._u, self._v, self._scale)


def _make(method, options):
    if method in ("dense", "blockwise", "ring"):
        devices = options["ring_devices"] if method == "ring" else 1
        return Ours(method, options["dtype"], options["block_size"], devices)
    return Torch(method, options["dtype"])


METHODS = {
    "dense": "unicl_jax dense",
    "blockwise": "unicl_jax blockwise",
    "ring": "unicl_jax ring",
    "torch": "PyTorch, soft targets",
    "open_clip": "open_clip ClipLoss",
}


def available():
    """The methods whose libraries are here."""
    needs = {"torch": "torch", "open_clip": "open_clip"}
    return [m for m in METHODS if m not in needs or importlib.util.find_spec(needs[m])]


def measure(options):
    """Runs the whole benchmark; returns what goes to JSON."""
    machine = harness.machine()
    plain = vars(options) | {"out": None}
    workers = {method: Worker(_make, method, plain) for method in options.methods}
    about = next(
        (
            workers[m].ask("about")
            for m in ("dense", "blockwise", "ring")
            if m in workers
        ),
        {},
    )
    rows, alive = [], dict(workers)
    for size in options.sizes:
        say(f"batch {size}")
        found = _measure_size(options, size, alive)
        rows.append({"batch": size, "methods": found})
        alive = {
            method: worker
            for method, worker in alive.items()
            if found[method].get("seconds", {}).get("median", math.inf)
            < options.max_seconds
        }
        if not alive:
            break
    for worker in workers.values():
        worker.close()
    return {
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.loss"),
        "machine": machine | about,
        "versions": harness.versions(),
        "dim": options.dim,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "ring_devices": options.ring_devices,
        "block_size": options.block_size,
        "sizes": rows,
    }


def _measure_size(options, size, workers):
    found, calls = {}, {}
    for method, worker in workers.items():
        needed = MATRICES.get(method, 0) * size * size * 4
        if needed > options.memory_gib * 2**30:
            found[method] = {"left_out": f"needs {needed / 2**30:.0f} GiB"}
            continue
        temporary = worker.ask("prepare", size, options.dim)
        worker.ask("reset_peak")
        before = worker.ask("rss_peak")
        seconds, loss = worker.ask("time", 1)
        after = worker.ask("device_peak") or worker.ask("rss_peak") - before
        found[method] = {
            "temporary_bytes": temporary,
            "peak_bytes": after,
            "loss": loss,
        }
        seconds = worker.ask("time", 1)[0]
        calls[method] = max(1, min(100, math.ceil(MIN_SAMPLE_SECONDS / seconds)))
    samples = {method: [] for method in calls}
    for turn in range(options.repeats):
        for method in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            samples[method].append(workers[method].ask("time", calls[method])[0])
    for method, values in samples.items():
        found[method]["seconds"] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
    _compare(found, options)
    return found


def _compare(found, options):
    """Those that compute the same loss must agree, or their times mean nothing."""
    losses = [
        found[m]["loss"]
        for m in ("dense", "blockwise", "ring", "torch")
        if "loss" in found.get(m, {})
    ]
    tolerance = 1e-5 if options.dtype == "float32" else 2e-2
    if losses and max(losses) - min(losses) > tolerance * max(losses):
        raise RuntimeError(f"the losses must agree: got {losses}")


def rows_of(found):
    """The table of one JSON file as rows of text."""
    methods = list(found["sizes"][0]["methods"])
    names = [METHODS[m] for m in methods]
    if found["ring_devices"] > 1:
        names = [
            n + f", {found['ring_devices']} devices" * (m == "ring")
            for m, n in zip(methods, names, strict=True)
        ]
    rows = [["batch", *names]]
    for size in found["sizes"]:
        cells = [f"{size['batch']:,}"]
        for method in methods:
            value = size["methods"].get(method, {})
            if "seconds" in value:
                cells.append(
                    f"{1e3 * value['seconds']['median']:,.0f} ms, "
                    f"{value['peak_bytes'] / MIB:,.0f} MiB"
                )
            else:
                cells.append(value.get("left_out", ""))
        rows.append(cells)
    return rows


def title(found):
    """One line: what was measured, on what."""
    machine = found["machine"]
    where = harness.where(machine)
    return (
        f"loss and gradient, {found['dim']} wide, {found['dtype']}; {where}: "
        "median time, memory beyond the inputs"
    )


def _list_of(kind):
    return lambda text: [kind(item) for item in text.split(",")]


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", type=_list_of(int), default=[2**k for k in range(10, 18)]
    )
    parser.add_argument("--methods", type=_list_of(str), default=available())
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--block_size", type=int, help="default: the library's")
    parser.add_argument("--ring_devices", type=int, default=1, help="CPU devices")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max_seconds", type=float, default=4, help="then no larger")
    parser.add_argument("--memory_gib", type=float, default=8, help="for one method")
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    options = parser.parse_args(argv)
    if wrong := [m for m in options.methods if m not in METHODS]:
        parser.error(f"--methods must be some of {', '.join(METHODS)}: got {wrong}")
    return options


def main(argv):
    """Measures, prints a table and writes JSON; or prints what was measured before."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    harness.report("loss", _options(argv), measure, title, rows_of)


if __name__ == "__main__":
    restart_with_huge_pages("benchmarks.loss")
    main(sys.argv[1:])
