"""Disk and memory: what a run will take, and what there is."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np

from unicl_jax import data, storage
from unicl_jax.checks.report import Section, size, some
from unicl_jax.checks.setting import Setting, abstract_state
from unicl_jax.data.iterator import CACHED_TEXTS

# Batches on the host at once: two read ahead, one being made, one on its way.
BATCHES = 4
ROWS_AHEAD = 32 * 16  # of each source that lies in files; see data/stream.py
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def look_at_resources(section: Section, setting: Setting) -> None:
    """Compares checkpoints with the disk, and what is read with the memory.

    Args:
      section: to add to.
      setting: with its model and sources.
    """
    config = setting.config
    concepts = len(setting.batches.concepts.names) if setting.batches else 0
    trees = abstract_state(setting, concepts)
    state = bytes_of(trees)
    kept = config.checkpoints_kept + 1
    text = (
        f"disk: {some(kept, 'checkpoint')} of {size(state)}, one being written, take "
        f"{size(kept * state)}"
    )
    where, disk = setting.workdir or setting.out, np.inf
    if storage.is_bucket(where):
        text += f" of {where}"
    else:
        disk, folder = free_disk(where)
        text += f" of {size(disk)} free in {folder}"
    if kept * state > disk:
        section.warn(
            text, "make room, name another --workdir, or lower checkpoints_kept"
        )
    else:
        section.good(text)

    parts = memory_parts(setting, state + bytes_of(trees.params))
    need, there = sum(parts.values()), free_memory()
    said = ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)
    text = f"memory of the host: {said}: {size(need)}"
    if there is None:
        section.note(text)
        return
    text += f" of {size(there)} free"
    if need > there:
        section.warn(
            text,
            "lower batch_size or data.image_size, keep arrays in files instead of "
            ".npz, or use a machine with more",
        )
    else:
        section.good(text)
    if jax.default_backend() == "cpu":
        section.note("on a CPU, what a step computes in between comes on top")


def bytes_of(tree) -> int:
    """Bytes of arrays, or of their shapes.

    Args:
      tree: of them.

    Returns:
      Their sum.
    """
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def memory_parts(setting: Setting, state: int) -> dict[str, int]:
    """What lies in the host's memory of one process.

    Args:
      setting: with its sources.
      state: bytes of the training state and its gradients, which a CPU's host holds.

    Returns:
      Bytes by what they are.
    """
    config, length = setting.config, setting.tokenizer.context_length
    pixels = 3 * setting.image_size**2
    local = -(-config.batch_size // setting.processes)
    files = sum(hasattr(source, "encoded") for source in setting.sources.values())
    every = [*setting.sources.values(), *setting.evaluations.values()]
    parts = {
        "batches": BATCHES * local * (pixels + 4 * length),
        "read ahead": files * ROWS_AHEAD * pixels,
        "sources": sum(map(source_bytes, every)),
        "tokens": CACHED_TEXTS * 4 * length,
    }
    if jax.default_backend() == "cpu":
        parts["model, optimizer and gradients"] = state
    return parts


def source_bytes(source: data.Source) -> int:
    """What a source holds: its images, or where its records lie."""
    index = getattr(source, "index", None)
    fields = vars(index) if index is not None else vars(source)
    return sum(getattr(value, "nbytes", 0) for value in fields.values())


def free_disk(folder: Path) -> tuple[int, Path]:
    """Bytes free where a folder is or will be, and the part of it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder


def free_memory() -> int | None:
    """Bytes that programs may still take; None where the system does not tell."""
    found = []
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    except (OSError, ValueError):
        pass
    try:  # a container's limit
        limit = int((_CGROUP / "memory.max").read_text())  # or "max"
        found.append(limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    if not found and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)
