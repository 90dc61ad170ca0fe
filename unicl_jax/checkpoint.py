"""Saving and restoring a run; with `restoring`, the rooms that know Orbax."""

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from unicl_jax import storage
from unicl_jax.digest import digest
from unicl_jax.errors import InputError
from unicl_jax.restoring import first_line, newest_whole
from unicl_jax.step import TrainState
from unicl_jax.workdir import has_saved, saved_steps


def _write_small_arrays_whole():
    """Has Orbax divide the writing of an array among its copies only where it is large.

    By itself it has every device write a slice of what all of them hold, and compiles
    a program for each shape and device: hundreds at the first save.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of what is meant
    try:
        ocp.type_handlers.register_type_handler(
            jax.Array,
            ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**22),
            override=True,
        )
    finally:
        logging.set_verbosity(verbosity)


_write_small_arrays_whole()


class NotSaved(RuntimeError):
    """A checkpoint could not be written: a full disk, a directory that is gone."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, which would ask for preemption in a numbering of its own."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False  # see signals.StopRequest


class Checkpoints:
    """The checkpoints of a run: written in the background, whole or not at all.

    A checkpoint holds the training state, the data position and a digest of the state's
    arrays. Orbax writes to a temporary directory and renames it when all of it is
    there (in a bucket it leaves a mark), so a kill at any moment leaves the newest
    whole one to go on from.
    """

    def __init__(self, workdir: Path, kept: int, keep_every: int = 0):
        """Opens `workdir/checkpoints`; what kills have left there is removed.

        Args:
          workdir: of the run.
          kept: how many of the newest to keep.
          keep_every: multiples of this many steps are kept, too; 0: none.

        Raises:
          NotSaved: if nothing can be written there.
        """
        self._directory, self._failed = workdir / "checkpoints", False
        policy = ocp.checkpoint_managers.preservation_policy
        preserved = [policy.LatestN(kept)]
        if keep_every:
            preserved.append(policy.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(preserved),
            # In the background a directory that cannot be made is told after 20
            # minutes, for which its files wait.
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=False
            ),
        )
        self._manager = None
        with self._saving():
            if jax.process_index() == 0:
                storage.remove_half_written(self._directory)
            self._manager = _Manager(self._directory, options=options)

    def save(self, state: TrainState, data_state: dict[str, Any]) -> bool:
        """Starts to save; returns when the arrays are copied, before they are written.

        Args:
          state: saved under its own step.
          data_state: the iterator's, a small dict of JSON values.

        Returns:
          False if that step is already there.

        Raises:
          NotSaved: if this or an earlier one could not be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_filled(state)),
            data=ocp.args.JsonSave(data_state),
            digest=ocp.args.JsonSave(digest(state._asdict())),
        )
        with self._saving():
            return self._manager.save(step, args=arguments, force=True)

    def restore(
        self, like: TrainState, say: Callable[[str], None] = print
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest whole checkpoint; damaged ones are said and set aside.

        Args:
          like: shapes, dtypes and shardings: of any mesh, whatever it was saved on.
          say: where lines about damage go.

        Returns:
          The state, laid out as `like`, and the data position; None if there is none.

        Raises:
          InputError: if the checkpoint does not fit the model, or none is whole.
        """
        try:
            found = newest_whole(self._directory, like, say, self._check_model)
        except Exception:
            self._give_up()
            raise
        self._manager.reload()
        return found

    def wait(self) -> None:
        """Returns when everything started is on disk; NotSaved if it cannot be."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing and stops the background threads."""
        try:
            if not self._failed:
                self.wait()
        finally:
            self._give_up()

    def _give_up(self):
        """Stops the background threads, whatever they have to say."""
        with contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self):
        try:
            yield
        except Exception as error:  # Orbax raises what its threads met, of any type
            self._failed = True
            newest = "which are there is not known"
            with contextlib.suppress(OSError):  # it may be what failed
                kept = saved_steps(self._directory.parent)
                newest = f"the newest there is {kept[-1]}" if kept else "none is there"
            raise NotSaved(
                f'checkpoints must be written to "{self._directory}": one could not be '
                f"({first_line(error)}); {newest}. Make room there, or see to it that "
                "it can be written, and run the same command again."
            ) from error

    def _check_model(self, step, saved, params):
        """Refuses another model's checkpoint before Orbax tries to fit it."""
        if differ := differences(saved, params):
            raise InputError(
                f'checkpoint {step} in "{self._directory}" must be of this model: '
                f"{len(differ)} arrays differ, as {'; '.join(differ[:2])}. Go on with "
                "the model it was made with, or name another --workdir."
            )


def check_has_saved(workdir: str | Path) -> None:
    """Refuses a directory to start from that holds no checkpoint.

    Args:
      workdir: what `init_from` says.

    Raises:
      InputError: saying so.
    """
    storage.check_bucket(storage.path(workdir))
    if not has_saved(workdir):
        raise InputError(
            f"init_from must be the workdir of a run that saved, or a weights file: "
            f'"{workdir}" holds no checkpoint; train that one first, or name another.'
        )


def load_towers(
    workdir: str | Path, like: TrainState, parts: Collection[str]
) -> tuple[TrainState, int]:
    """Starts from another run's model: the newest checkpoint's weights and statistics.

    Args:
      workdir: of that run.
      like: the state to start from, of whose model some parts are replaced. Its
        objective's own parameters, its optimizer and its step stay.
      parts: which, by name.

    Returns:
      The state, and the step at which that run saved.

    Raises:
      InputError: if there is no whole checkpoint, or its model is another one.
    """
    check_has_saved(workdir)
    directory = storage.absolute(workdir) / "checkpoints"
    manager = ocp.CheckpointManager(directory)
    step = manager.latest_step()
    path = directory / str(step) / "state"

    def taken(tree):
        return {name: part for name, part in tree.items() if name in parts}

    try:
        saved = ocp.PyTreeCheckpointHandler().metadata(path).tree
        # Averages, where that run kept some.
        ema = taken(saved.get("ema", {}))
        own = taken(like.params)
        here = {
            "params": {k: x for k, x in own.items() if k not in ema},
            "ema": {k: x for k, x in own.items() if k in ema},
            "model_state": taken(like.model_state),
        }
        here = {k: x for k, x in here.items() if jax.tree.leaves(x)}
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, here)
        there = {k: x for k, x in taken(saved["params"]).items() if k not in ema}
        saved = {
            "params": there,
            "ema": ema,
            "model_state": taken(saved["model_state"]),
        }
        saved = {k: x for k, x in saved.items() if jax.tree.leaves(x)}
        if differ := differences(saved, wanted):
            raise InputError(
                f"init_from must be a run of this model: {len(differ)} arrays of "
                f'"{path}" differ, as {"; ".join(differ[:2])}. Set the model as that '
                "run's config.json has it."
            )
        arguments = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        restored = manager.restore(step, args=ocp.args.Composite(state=arguments))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f'init_from must hold a whole checkpoint: reading "{path}" failed '
            f"({first_line(error)}); name another run's workdir, or remove that step."
        ) from error
    finally:
        manager.close()
    state = restored["state"]
    params = {**like.params, **state.get("params", {}), **state.get("ema", {})}
    model_state = {**like.model_state, **state.get("model_state", {})}
    return like._replace(params=params, model_state=model_state), step


def read_towers(workdir: str | Path) -> tuple[Any, Any]:
    """What a run has learnt: parameters and state of its newest checkpoint.

    Args:
      workdir: of the run.

    Returns:
      (params, model_state), NumPy arrays; the objective's own are among the first. Of
      parameters of which the run kept averages these are the averages.

    Raises:
      InputError: if there is no whole checkpoint.
    """
    directory = storage.absolute(workdir) / "checkpoints"
    if not has_saved(workdir):  # the manager would make the directory
        raise InputError(
            f'a run must have saved: "{workdir}" holds no checkpoint yet; let it train '
            "to its first."
        )
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        path = directory / str(step) / "state"
        try:
            saved = ocp.PyTreeCheckpointHandler().metadata(path).tree
            ema = saved.get("ema", {})
            wanted = {k: _abstract(saved[k]) for k in ("params", "model_state")}
            if ema:
                own = {k: x for k, x in wanted["params"].items() if k not in ema}
                wanted |= {"params": own, "ema": _abstract(ema)}
            if not jax.tree.leaves(wanted["params"]):
                del wanted["params"]
            as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
            arguments = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=jax.tree.map(lambda _: as_numpy, wanted),
                partial_restore=True,
            )
            arguments = ocp.args.Composite(state=arguments)
            state = manager.restore(step, args=arguments)["state"]
        except Exception as error:
            raise InputError(
                f'a run must hold a whole checkpoint: reading "{path}" failed '
                f"({first_line(error)})."
            ) from error
    return {**state.get("params", {}), **state.get("ema", {})}, state["model_state"]


def _filled(state: TrainState) -> dict[str, Any]:
    """Fields to save; `ema`, which older checkpoints lack, if it holds something."""
    fields = state._asdict()
    return {k: v for k, v in fields.items() if k != "ema" or jax.tree.leaves(v)}


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def differences(theirs: Any, ours: Any) -> list[str]:
    """What is not of the same shape in two trees of arrays.

    Args:
      theirs: of arrays, or their shapes.
      ours: the same.

    Returns:
      A line for each array that one of them lacks, or that has another shape.
    """
    theirs, ours = _shapes(theirs), _shapes(ours)
    return [
        f"{name}: {theirs.get(name, 'nothing')} there, {ours.get(name, 'nothing')} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
        for path, x in leaves
    }
