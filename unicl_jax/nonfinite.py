"""Steps whose loss or gradient was NaN or infinite: listed, with their records.

`nonfinite.jsonl` has one object a line: `step`, `loss` and `grad_norm` as text, and
`records`: of each row of the global batch the `source`, the record's `index` there and,
for sources that lie in files, its `key`, a path, or a shard and the place in it. Where
that record was unreadable, the row held a neighbour: `skipped.jsonl` has those.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl_jax import storage
from unicl_jax.metrics import of_steps_before

FILE = "nonfinite.jsonl"


class NonFiniteSteps:
    """The list of a run; on all processes but the first nothing is written."""

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        active: bool,
        most: int,
        say: Callable[[str], None] = print,
    ):
        """Drops the lines of steps that will be run again.

        Args:
          workdir: of the run.
          first_step: steps done before.
          active: whether this process writes.
          most: `config.max_nonfinite`, for the lines on the console.
          say: where those go.
        """
        self._path, self._active = workdir / FILE, active
        self._most, self._say = most, say
        if active and self._path.exists():
            try:
                of_steps_before(self._path, lambda row: row["step"] <= first_step)
            except OSError as error:
                say(f'"{self._path}" cannot be written: {error.strerror}')

    def add(
        self,
        step: int,
        scalars: Mapping[str, Any],
        records: Callable[[int], Sequence[Mapping[str, Any]]],
    ) -> None:
        """Lists one step, and says so.

        Args:
          step: of the training.
          scalars: its `loss`, `grad_norm`, `nonfinite` and `halted`.
          records: of a step; see `TrainIterator.records`.
        """
        if not self._active:
            return
        loss, norm = f"{scalars['loss']}", f"{scalars['grad_norm']}"
        line = dict(step=step, loss=loss, grad_norm=norm, records=records(step))
        try:
            with storage.open_log(self._path) as file:
                file.write(json.dumps(line) + "\n")
            where = f"its records are in {self._path}"
        except OSError as error:
            where = f'its records cannot be written to "{self._path}": {error.strerror}'
        if not scalars["halted"]:
            self._say(
                f"step {step}: loss {loss}, gradient norm {norm}: the update is "
                f"skipped, the {scalars['nonfinite']:.0f}. of this run (max_nonfinite, "
                f"in a row: {self._most}); {where}"
            )
