"""The config itself: what of it the trainer would refuse, and what it makes of it."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unicl_jax import data, encoders, init_from, objectives, validation
from unicl_jax.checks.report import PROBLEM, Section, some
from unicl_jax.errors import InputError
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import init_state
from unicl_jax.workdir import has_saved, prepare_workdir


@dataclasses.dataclass
class Setting:
    """What is looked at, and what the sections have found of it so far.

    Attributes:
      config: the resolved config.
      workdir: of the run; None if it was not said.
      out: folder of the contact sheet.
      processes: of the run.
      devices: of the run, over all processes.
      records: how many of each source are read.
      model: the two towers; this and what follows is None if it cannot be made.
      tokenizer: of the text tower.
      optimizer: of the run.
      towers: shapes of the model's parameters and state, once they were asked for.
      sources: those that open, by name.
      evaluations: the same.
      samples: `records.Sample` by the source's name.
      batches: the training batches, if all sources open and can be mixed.
      is_good: whether nothing was found that training would stop at.
    """

    config: ConfigDict
    workdir: Path | None
    out: Path
    processes: int
    devices: int
    records: int
    model: encoders.TwoTower | None = None
    tokenizer: data.Tokenizer | None = None
    optimizer: Any = None
    towers: Any = None
    sources: dict[str, data.Source] = dataclasses.field(default_factory=dict)
    evaluations: dict[str, data.Source] = dataclasses.field(default_factory=dict)
    samples: dict[str, Any] = dataclasses.field(default_factory=dict)
    batches: data.TrainIterator | None = None
    is_good: bool = True

    @property
    def model_size(self) -> int:
        """Pixels of a side of the images that the model sees."""
        size = self.config.model.image.get("image_size")
        if type(size) is not int or size < 1:
            raise InputError(
                f"model.image.image_size must be a number of pixels: got {size}; set "
                "it in the recipe."
            )
        return size

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that training reads."""
        return self.config.data.image_size or self.model_size

    @property
    def text_length(self) -> str:
        """A key of `text_length.TEXT_LENGTHS`, as the trainer takes it."""
        entry = objectives.OBJECTIVES[self.config.objective]
        return "full" if "text" in entry.unused else self.config.data.text_length


def look_at_config(section: Section, setting: Setting) -> None:
    """Says all that the trainer would refuse before it looks at the data.

    Args:
      section: to add to.
      setting: gets its model, tokenizer and optimizer.
    """
    config = setting.config
    for problem in validation.problems(config, setting.devices, setting.processes):
        section.refuse(problem)
    _made(section, lambda: objectives.check(config))
    text = _made(section, lambda: encoders.options("text", config.model.text))
    setting.model = _made(section, lambda: encoders.from_config(config.model))
    if text is not None:
        sizes = text["context_length"], text["vocab_size"]
        setting.tokenizer = _made(section, lambda: data.Tokenizer(*sizes))
        _made(section, lambda: data.make_text_length(setting.text_length, text))
    _made(section, lambda: setting.model_size)
    _made(section, lambda: data.load_templates(config.data.templates))
    made = _made(section, lambda: make_optimizer(config.optimizer, config.total_steps))
    setting.optimizer = made and made[0]
    if setting.workdir is not None:
        _made(section, lambda: prepare_workdir(setting.workdir, config, write=False))
    starts = True
    with contextlib.suppress(OSError):  # of a bucket, said above
        starts = setting.workdir is None or not has_saved(setting.workdir)
    if setting.model is not None and starts:
        _made(section, lambda: init_from.read(config, setting.model))
    if section.count(PROBLEM):
        return
    section.good(
        f"objective {config.objective}, {config.total_steps:,} steps, batch_size "
        f"{config.batch_size:,} on {some(setting.devices, 'device')} of "
        f"{some(setting.processes, 'process')}"
    )
    params = abstract_state(setting).params
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    section.good(
        f"model: {config.model.image.name} at {setting.model_size} pixels, "
        f"{config.model.text.name} at {text['context_length']} tokens, "
        f"{count / 1e6:,.1f} million parameters"
    )


def abstract_state(setting: Setting, num_concepts: int = 0) -> Any:
    """The shapes of all that training carries from step to step.

    Args:
      setting: with its model and optimizer.
      num_concepts: of the concept table, for objectives that hold a row for each.

    Returns:
      A TrainState of `jax.ShapeDtypeStruct`s.
    """
    config = setting.config
    objective = objectives.make_objective(
        config.objective, setting.model, num_concepts=max(1, num_concepts)
    )
    if setting.towers is None:  # which take the longest to trace
        setting.towers = jax.eval_shape(setting.model.init, jax.random.key(0))

    def made(towers):
        return init_state(
            *(setting.model._replace(init=lambda key: towers), objective),
            *(setting.optimizer, config.seed),
            frozen=tuple(config.frozen),
            ema_decay=config.ema_decay,
        )

    return jax.eval_shape(made, setting.towers)


def _made(section: Section, make: Callable):
    """What `make` makes; None if the trainer refuses it."""
    try:
        return make()
    except InputError as error:
        if str(error) not in {_whole(finding) for finding in section.findings}:
            section.refuse(error)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        if not section.count(PROBLEM):
            raise
        # It follows from what is wrong above.
    return None


def _whole(finding):
    return f"{finding.text}; {finding.todo}" if finding.todo else finding.text
