"""What a prepared folder is to hold, and whether a folder may become that."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from unicl_jax.config import flatten
from unicl_jax.data.prepared import UNFINISHED
from unicl_jax.data.shard_writer import list_folder, remove
from unicl_jax.errors import InputError

# Of a source's settings, those that say what training makes of its records.
NOT_OF_RECORDS = ("weight", "templates", "preprocess", "max_skipped", "in_blocks")
_NOT_COMPARED = (*NOT_OF_RECORDS, "index_cache", "max_skips_in_a_row")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a prepared folder is to be like.

    Attributes:
      shard_mib: about this many MiB a shard.
      shards: exactly so many instead; None: as `shard_mib` says.
      max_side: see `raw.make_filter`.
      check: the same.
    """

    shard_mib: int = 128
    shards: int | None = None
    max_side: int | None = None
    check: bool = True


def wanted(name: str, config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Says what makes two prepared folders the same.

    Args:
      name: the source's.
      config: its settings.
      options: of the folder.

    Returns:
      `name`, `source` and `options`, as JSON has them.
    """
    return {
        "name": name,
        "source": {k: v for k, v in flatten(config).items() if _is_compared(k, v)},
        "options": dataclasses.asdict(options),
    }


def shard_name(name: str, shard: int, num_shards: int) -> str:
    """Returns the file name of a shard of the source called `name`."""
    return f"{_stem(name)}-{shard:05d}-of-{num_shards:05d}.tfrecord"


def _stem(name):
    return re.sub(r"[^\w.\-]", "_", name)


def is_begun(folder: str) -> bool:
    """Whether a shard of an unfinished folder is whole."""
    inside = list_folder(os.path.join(folder, UNFINISHED))
    return any(re.fullmatch(r"\d{5,}\.json", name) for name in inside)


def discard(folder: str, plan: Mapping[str, Any]) -> None:
    """Removes what an unfinished folder holds.

    Args:
      folder: local or remote.
      plan: its.
    """
    shard = rf"{re.escape(_stem(plan['name']))}-\d{{5,}}-of-\d{{5,}}\.tfrecord"
    for name in list_folder(folder):
        if re.fullmatch(shard, name):
            remove(os.path.join(folder, name))
    remove(os.path.join(folder, UNFINISHED))


def check_options(options: Options, workers: int) -> None:
    """Refuses numbers below 1.

    Args:
      options: of the folder.
      workers: threads.

    Raises:
      InputError: naming the option.
    """
    for name, value in {
        "shard_mib": options.shard_mib,
        "shards": options.shards,
        "max_side": options.max_side,
        "workers": workers,
    }.items():
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1: got {value}.")


def _is_compared(field: str, value) -> bool:
    is_empty = value in (None, "", {})  # it says nothing
    return field.split(".")[0] not in _NOT_COMPARED and not is_empty


def check_folder(folder: str, plan: Mapping | None, wanted: Mapping) -> None:
    """Makes sure that a folder is new, or of the same source and options.

    Args:
      folder: local or remote.
      plan: what is known of it, its manifest or its plan; None: nothing.
      wanted: see `wanted`.

    Raises:
      InputError: saying what differs.
    """
    if plan is None:
        others = set(list_folder(folder)) - {UNFINISHED}
        others = sorted(name for name in others if not name.endswith(".part"))
        if others:
            raise InputError(
                "--out must be new, empty, or of an earlier start of this command: "
                f'"{folder}" holds {", ".join(others[:3])}; name another folder.'
            )
        return
    old, new = flatten({key: plan[key] for key in wanted}), flatten(wanted)
    differ = [
        f"  {key}: it has {old.get(key)}, now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise InputError(
            f'--out "{folder}" holds another source, or one with other settings:\n'
            + "\n".join(differ)
            + "\nTake those, or name another folder."
        )


def check_unchanged(folder: str, plan: Mapping, found: Mapping) -> None:
    """Makes sure that a source is what it was when its folder was begun.

    Args:
      folder: local or remote.
      plan: what is known of it.
      found: what the source is now.

    Raises:
      InputError: saying what has changed.
    """
    differ = [key for key in found if plan[key] != found[key]]
    if differ:
        key = differ[0]
        what = {
            "source_records": f"had {plan[key]} records and now has {found[key]}",
            "class_names": "has other class names",
        }
        raise InputError(
            f'the source must be as it was when "{folder}" was begun: it '
            f"{what.get(key, 'lies elsewhere or says other things of its records')}; "
            "delete that folder, or name another one."
        )
