"""What all processes of a run must have in common, and how they differ."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import unicl_jax

# {section: {what: its value}}, of one process.
Facts = dict[str, dict[str, Any]]

# These make the compiled program or speak with the other processes: it must be one.
_SAME_VERSIONS = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin"),
)
# With other ones of these a picture may differ by a grey level.
_BETTER_SAME_VERSIONS = (
    *("numpy", "tensorflow-cpu", "tensorflow"),
    *("opencv-python-headless", "simplejpeg", "pillow"),
)
_VARIABLES = (  # that change the compiled program
    *("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_PLATFORMS"),
    *("JAX_DEFAULT_MATMUL_PRECISION", "JAX_THREEFRY_PARTITIONABLE"),
)
# Where files lie may be a host's own affair; that they hold the same is seen later.
_OWN_FIELDS = ("path", "root", "index_cache")
_NAMED = 8  # differences in a message

# Sections that must be equal, and what to do about each.
_ADVICE = {
    "config": "Start all of them with the same command, from the same recipe.",
    "code": "Install the same unicl_jax on all hosts.",
    "version": "Install the same versions on all hosts.",
    "devices": "Give every process as many devices, of one kind.",
    "data": "All of them must read the same files: copy them to every host, or set the "
    "path to a shared directory.",
    "workdir": "--workdir must be a directory that all processes share (NFS, "
    "Filestore, Lustre) or in a bucket (gs://): they write checkpoints together.",
}


def of_this_process(config: Mapping[str, Any]) -> Facts:
    """What can be told before anything is computed.

    Args:
      config: flat, as `config.flatten` gives it.

    Returns:
      The facts: config, code, versions, and what should rather be the same.
    """
    return {
        "config": {
            key: json.dumps(value)
            for key, value in config.items()
            if key.split(".")[-1] not in _OWN_FIELDS
        },
        "code": code(),
        "version": _versions(_SAME_VERSIONS),
        "better": {
            "Python": ".".join(platform.python_version_tuple()[:2]),
            **_versions(_BETTER_SAME_VERSIONS),
            **{name: os.environ.get(name, "unset") for name in _VARIABLES},
        },
    }


def code() -> dict[str, str]:
    """The package's version and a hash of each of its sources."""
    folder = Path(unicl_jax.__file__).parent
    hashes = {
        f"unicl_jax/{path.relative_to(folder).as_posix()}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:12]
        for path in sorted(folder.rglob("*.py"))
    }
    return {"unicl_jax": unicl_jax.__version__, **hashes}


def of_data(
    records: Mapping[str, tuple[int, str]], devices: int, kind: str
) -> dict[str, dict[str, str]]:
    """What can be told once the data is indexed and devices are there.

    Args:
      records: by source, how many and their fingerprint.
      devices: of this process.
      kind: of devices.

    Returns:
      The facts.
    """
    return {
        "data": {
            name: f"{number:,} records ({mark[:12]})"
            for name, (number, mark) in records.items()
        },
        "devices": {"devices of a process": f"{devices} x {kind}"},
    }


def differences(facts: Mapping[int, Facts]) -> tuple[str | None, list[str]]:
    """Compares what processes told.

    Args:
      facts: by process.

    Returns:
      An error, naming every field that differs and who has what; None if all agree. And
      a line for each difference that a run can live with.
    """
    lines, advice, warnings = [], [], []
    for section in _ADVICE | {"better": ""}:
        found = _differing({p: f.get(section, {}) for p, f in facts.items()})
        if section == "better":
            warnings = [f"processes differ: {line}" for line in found]
        elif found:
            lines += [f"  {section}: {line}" for line in found[:_NAMED]]
            if len(found) > _NAMED:
                lines.append(f"  {section}: and {len(found) - _NAMED} more")
            advice.append(_ADVICE[section])
    if not lines:
        return None, warnings
    said = "\n".join(["all processes must be of one run, and differ:", *lines, *advice])
    return said, warnings


def named(processes: list[int]) -> str:
    """Processes in words, as in "process 3" or "processes 0-5 and 7"."""
    runs: list[list[int]] = []
    for p in sorted(processes):
        if runs and p == runs[-1][1] + 1:
            runs[-1][1] = p
        else:
            runs.append([p, p])
    parts = [
        str(a) if a == b else f"{a} and {b}" if b == a + 1 else f"{a}-{b}"
        for a, b in runs
    ]
    text = parts[0]
    if len(parts) > 1:
        text = ", ".join(parts).replace(" and ", ", ")
        text = " and ".join(text.rsplit(", ", 1))
    return ("process " if len(processes) == 1 else "processes ") + text


def _versions(names):
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _differing(tables):
    """Lines of the keys that are not the same in all; the commonest value first."""
    lines = []
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    for key in keys:
        have: dict[Any, list[int]] = {}
        for process, table in tables.items():
            have.setdefault(table.get(key, "none"), []).append(process)
        if len(have) > 1:
            ordered = sorted(have.items(), key=lambda item: (-len(item[1]), item[1]))
            lines.append(
                f"{key} is "
                + "; ".join(f"{value} on {named(who)}" for value, who in ordered)
            )
    return lines
