"""Which checkpoint a run goes on from: the newest one that is whole.

With `checkpoint`, the rooms that know Orbax.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from unicl_jax import storage
from unicl_jax.digest import digest
from unicl_jax.errors import InputError
from unicl_jax.step import ADDED, TrainState
from unicl_jax.workdir import saved_steps


class _Damaged(Exception):
    """Why a checkpoint is not whole, in a line."""


def newest_whole(
    directory: Path,
    like: TrainState,
    say: Callable[[str], None] = print,
    check: Callable[[int, Any, Any], None] = lambda *_: None,
) -> tuple[TrainState, dict[str, Any]] | None:
    """Reads the newest checkpoint that every process finds whole.

    Damaged ones are renamed `<step>.damaged` once an older whole one was read; until
    then nothing changes on disk.

    Args:
      directory: of the run's checkpoints.
      like: shapes, dtypes and shardings; fields that a checkpoint is too old to have
        are made as `step.ADDED` says.
      say: where a line about each damaged one goes.
      check: (step, saved, wanted parameters) -> None: refuses another model's.

    Returns:
      The state, and the data position; None if there is no checkpoint at all.

    Raises:
      InputError: if there are checkpoints and none is whole, or of this model.
    """
    damaged, of_other_models = {}, []
    for step in reversed(_same_steps(directory.parent)):
        state, position, why = None, None, ""
        try:
            state, position, expected = _read(directory / str(step), step, like, check)
        except _Damaged as error:
            why = str(error)
        except InputError as error:
            # One flipped bit may make of its shapes another model's.
            of_other_models.append(error)
            why = first_line(error)
        if why:
            _forget_other_reads()
        # One that cannot read it, for all: a part of it may lie where others look.
        if said := _any_process(why):
            damaged[step] = said
            continue
        if why := _difference(expected, state):
            damaged[step] = why
            continue
        for other, why in damaged.items():
            say(_set_aside(directory, other, why))
        return _completed(state, like), position
    for error in of_other_models:
        raise error
    if damaged:
        listed = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        raise InputError(
            f'a run goes on from a whole checkpoint: of those in "{directory}" none '
            f"is ({listed}). Put a copy of one back; or, to start from step 0, remove "
            "that directory."
        )
    return None


def _same_steps(workdir):
    """The steps of the checkpoints as process 0 sees them: NFS may show others less."""
    steps = saved_steps(workdir)
    if jax.process_count() == 1:
        return steps
    padded = np.zeros(256, np.int32)
    padded[: len(steps)] = steps[-len(padded) :]
    told = multihost_utils.broadcast_one_to_all(padded)
    return sorted(int(step) for step in told if step)


def _forget_other_reads():
    """Orbax's go on after one has failed, and complain that their loop is closed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _read(path, step, like, check):
    """One checkpoint: what it has of the fields of `like`, its position, its digest."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(path / "state").tree
        check(step, saved.get("params", {}), like.params)
        wanted = {k: v for k, v in like._asdict().items() if k in saved}
        # Not by a Checkpointer: one that fails would leave the others at its barriers.
        state = handler.restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
        jax.block_until_ready(state)
        position = json.loads(storage.read_text(path / "data" / "metadata"))
    except (InputError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # not of the checkpoint's making
    except Exception as error:  # tensorstore's are of any type
        if storage.is_unreachable(path, error):
            raise
        raise _Damaged(f"reading it failed ({first_line(error)})") from error
    finally:
        handler.close()
    if (position or {}).get("step") != step:
        raise _Damaged(f"its data position is {position}, not step {step}")
    expected = {}  # older ones have none
    if (path / "digest").exists():
        try:
            expected = json.loads(storage.read_text(path / "digest" / "metadata"))
            expected = {str(k): int(v) for k, v in expected.items()}
        except Exception as error:
            raise _Damaged(f"its digest cannot be read ({error!r})") from error
    return state, position, expected


def _any_process(why):
    """What one process found wrong, on all of them; "" if none did."""
    if jax.process_count() == 1:
        return why
    mine = np.zeros(240, np.uint8)
    text = why.encode()[: len(mine)]
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    found = multihost_utils.process_allgather(mine)
    for process, row in enumerate(found):
        if row.any():
            text = bytes(row[row > 0]).decode(errors="replace")
            return f"{text}, on process {process}"
    return ""


def _difference(expected, state):
    """The first arrays that are not those that were saved."""
    if not expected:
        return ""
    found = digest(state)
    wrong = [name for name in found if found[name] != expected.get(name)]
    if not wrong:
        return ""
    named = ", ".join(wrong[:2])
    return f"{len(wrong)} of its arrays are not what was saved, as {named}"


def _set_aside(directory, step, why):
    """Renames a damaged checkpoint; the line that says so."""
    name = f"{step}.damaged"
    for number in range(2, 1000):
        if not (directory / name).exists():
            break
        name = f"{step}.damaged.{number}"
    failed = ""
    if jax.process_index() == 0:
        try:
            storage.rename_folder(directory / str(step), directory / name)
        except OSError as error:
            failed = f"renaming it failed ({error.strerror})"
    if failed := _any_process(failed):
        raise InputError(
            f'a damaged checkpoint must be set aside: "{directory / str(step)}" is '
            f"damaged ({why}), and {failed}. Move it away."
        )
    return f"checkpoint {step} is damaged: {why}. It is {name} from now on"


def _completed(state, like):
    """The state with the fields that its checkpoint is too old to have."""
    for name, field in like._asdict().items():
        if name not in state:
            layout = jax.tree.map(lambda x: x.sharding, field)
            state[name] = jax.jit(ADDED[name], out_shardings=layout)(state)
    return TrainState(**state)


def first_line(error: Exception) -> str:
    """What an error of Orbax says, without the pages of settings that follow."""
    return str(error).splitlines()[0][:200] if str(error) else repr(error)
