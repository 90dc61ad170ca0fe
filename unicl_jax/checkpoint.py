"""Saving and restoring a run; the only room that knows Orbax."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from unicl_jax.errors import InputError
from unicl_jax.step import TrainState


class Checkpoints:
    """The checkpoints of a run: written in the background, whole or not at all.

    A checkpoint holds the training state and the data position. Orbax writes to a
    temporary directory and renames it when all of it is there, so a kill at any moment
    leaves the newest whole one to go on from.
    """

    def __init__(self, workdir: Path, kept: int):
        """Opens `workdir/checkpoints`.

        Args:
          workdir: of the run.
          kept: how many of the newest to keep.
        """
        self._directory = workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=kept)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict[str, Any]) -> bool:
        """Starts to save; returns when the arrays are copied, before they are written.

        Args:
          state: saved under its own step.
          data_state: the iterator's, a small dict of JSON values.

        Returns:
          False if that step is already there.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            data=ocp.args.JsonSave(data_state),
        )
        return self._manager.save(step, args=arguments, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest whole checkpoint.

        Args:
          like: a state of the right shapes, dtypes and shardings.

        Returns:
          The state, laid out as `like`, and the data position.

        Raises:
          InputError: if the checkpoint does not fit the model or cannot be read.
        """
        step = self.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=arguments)
        except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
            raise InputError(
                f"checkpoint {step} must hold this model's state: reading "
                f'"{self._directory / str(step)}" failed ({error}). Remove that '
                "directory to go on from the checkpoint before it."
            ) from error
        return TrainState(**restored["state"]), restored["data"]

    def wait(self) -> None:
        """Returns when everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing and stops the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()
