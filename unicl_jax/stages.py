"""Trainings that follow each other in one command, each from what the last one learnt.

A recipe whose `then` is empty is one run, in the workdir. With `then`, the whole config
of another stage, they are WORKDIR/stage_1, WORKDIR/stage_2, …: runs like any others.
"""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from unicl_jax import objectives, storage, train, validation
from unicl_jax.errors import InputError
from unicl_jax.workdir import has_saved, prepare_workdir, saved_config, saved_steps


def stages(config: ConfigDict) -> list[ConfigDict]:
    """A config for each stage.

    Args:
      config: the resolved one, of which `then` is empty or the next stage's.

    Returns:
      Copies without `then`, the first to run first; the config itself if it is one.
    """
    found = []
    while len(config.then):
        after = config.then
        config = config.copy_and_resolve_references()
        config.then = ConfigDict()
        found.append(config)
        config = after
    return [*found, config]


def run(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains stage after stage, going on in the one that was stopped.

    Args:
      config: the resolved config of a recipe.
      workdir: of the run; of several stages, the folder that holds theirs.

    Returns:
      The last evaluation of the last stage, by metric key.

    Raises:
      InputError: of any stage, before the first one starts, where no file needs to be
        looked at; and as `train.run`, as it raises other errors.
    """
    todo = stages(config)
    if len(todo) == 1:
        return train.run(config, workdir)
    folder = storage.path(workdir)
    if "config.json" in storage.names(folder):
        raise InputError(
            f"--workdir must be new, or of this recipe's {len(todo)} stages: "
            f'"{workdir}" holds a run of one; name another directory.'
        )
    places = [folder / f"stage_{i}" for i in range(1, len(todo) + 1)]
    for before, stage, place in zip([None, *places], todo, places, strict=False):
        if before is not None:
            _start_from(before, stage, place)
        validation.validate(stage, jax.device_count(), jax.process_count())
        objectives.check(stage)
    scores, is_first = {}, jax.process_index() == 0
    for i, (stage, place) in enumerate(zip(todo, places, strict=True)):
        if is_first:
            print(f"stage {i + 1} of {len(todo)}, {stage.objective}: {place}")
        if stage is not todo[-1] and _is_done(place, stage):
            prepare_workdir(place, stage, write=False)  # refuses another config's run
            continue
        scores = train.run(stage, place)
    return scores


def _start_from(before, stage, place):
    """Sets `init_from`; of a run that has begun, to what stands there.

    It has its weights already, and its folder may have moved.
    """
    stage.init_from = str(before)
    if has_saved(place):
        stage.init_from = saved_config(place).get("init_from", str(before))


def _is_done(place, stage):
    return max(saved_steps(place), default=0) >= stage.total_steps
