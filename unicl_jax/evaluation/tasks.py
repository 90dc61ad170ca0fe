"""A task: one row of a suite. What is asked of a model, and of which data."""

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from unicl_jax.data.records import Source
from unicl_jax.data.synonyms import name_key
from unicl_jax.errors import InputError
from unicl_jax.evaluation import places

KINDS = ("classification", "multi_label", "retrieval")
METRICS = ("accuracy", "mean_per_class", "roc_auc", "map11")
SPLITS = places.SPLITS
# CLIP_benchmark's shards.
_PUBLISHED = "https://huggingface.co/datasets/clip-benchmark/"
_NAMED = 3  # examples in a message


class Missing(InputError):
    """A task's data is not there.

    Attributes:
      task: its name.
      split: the one that was asked for.
      why: in a few words, with every place that was looked at.
      how: how to get the data, and where to put it.
    """

    def __init__(self, task: str, split: str, why: str, how: str):
        """Keeps what must be said."""
        super().__init__(f'task "{task}": {why}; {how}')
        self.task, self.split, self.why, self.how = task, split, why, how


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of a suite.

    Attributes:
      name: letters, digits and "_".
      title: for people.
      suite: the one it was read from.
      kind: one of KINDS.
      metric: one of METRICS, the one that is reported; "" for retrieval.
      templates: of the prompts; () for retrieval.
      class_names: what prompts call the classes, in label order; () for retrieval.
      class_keys: what the data calls them, in the same order; data of any order is
        joined by these.
      aliases: other names that data has for a class -> its label.
      sizes: split -> the records that the protocol has.
      how: how to get the data.
      where: the places that data is looked for in, best first.
      squash: whether images are resized to a square rather than cropped.
    """

    name: str
    title: str
    suite: str
    kind: str
    metric: str
    templates: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    class_keys: tuple[str, ...] = ()
    aliases: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    how: str = ""
    where: tuple[places.Place, ...] = ()
    squash: bool = False

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 for retrieval."""
        return len(self.class_names)

    def join(self, names: Sequence[str]) -> np.ndarray:
        """The task's label of each class of some data, by name.

        All of them are among the keys, or else among keys, class names and aliases.

        Args:
          names: the data's, in its own order; upper case, "_" and commas don't count.

        Returns:
          [len(names)] int32; -1 where the task has no such class.

        Raises:
          InputError: if two names are the same.
        """
        wanted = [name_key(name) for name in names]
        known = self._by_key
        if not all(name in known for name in wanted):
            known = self._by_name
        twice = [n for n, count in collections.Counter(wanted).items() if count > 1]
        if twice:
            raise InputError(
                f'task "{self.name}": classes of the data must have names of their '
                f'own: two or more are called "{names[wanted.index(twice[0])]}"; '
                "rename one, or say the place's `order`."
            )
        return np.array([known.get(name, -1) for name in wanted], np.int32)

    @functools.cached_property
    def _by_key(self) -> dict[str, int]:
        return {name_key(key): i for i, key in enumerate(self.class_keys)}

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        aliases = {name_key(alias): i for alias, i in self.aliases.items()}
        names = {name_key(name): i for i, name in enumerate(self.class_names)}
        return aliases | names | self._by_key

    def unknown(self, names: Sequence[str]) -> str:
        """Names of data that are no class of the task, for a message; "" if none."""
        labels = self.join(names)
        lost = [f'"{n}"' for n, i in zip(names, labels, strict=True) if i < 0]
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        return ", ".join(lost[:_NAMED]) + more

    def splits(self, data_dir: str | None) -> tuple[str, ...]:
        """Those of SPLITS whose data is there.

        Args:
          data_dir: the folder of evaluation data, local or remote; None: TFDS's alone.

        Returns:
          In the order of SPLITS.
        """
        there = [s for s in SPLITS if places.locate(self.where, s, data_dir)]
        return tuple(there)

    def find(self, split: str, data_dir: str | None) -> places.Found:
        """Where a split's data lies; nothing of it is read.

        Args:
          split: one of SPLITS.
          data_dir: the folder of evaluation data, local or remote; None: TFDS's alone.

        Returns:
          The first place that has it.

        Raises:
          InputError: if there is no such split.
          Missing: if its data is not there.
        """
        if split not in SPLITS:
            raise InputError(
                f'task "{self.name}": split must be one of {", ".join(SPLITS)}: got '
                f'"{split}".'
            )
        found = places.locate(self.where, split, data_dir)
        if found is not None:
            return found
        tried = places.looked_at(self.where, split, data_dir)
        why = f"no {split} data" + (f" at {', '.join(tried)}" if tried else "")
        if not any(place.name_of(split) for place in self.where):
            raise Missing(self.name, split, f"has no {split} split", "there is none")
        raise Missing(self.name, split, why, self.how_to_get(split, data_dir))

    def how_to_get(self, split: str, data_dir: str | None) -> str:
        """What to do to get a split's data, and where to put it.

        Args:
          split: one of SPLITS.
          data_dir: the folder of evaluation data; None: "DATA_DIR" stands for it.

        Returns:
          One line; every way is said.
        """
        ways = [self.how] if self.how else []
        for place in self.where:
            path = os.path.join("{data_dir}", place.path)
            name = place.name_of(split)
            if not name:
                continue
            if place.format == "tfds" and not self.how:
                root = os.path.join("{data_dir}", "tensorflow_datasets")
                ways.append(f"run `tfds build {place.path} --data_dir={root}`")
            elif place.format == "webdataset" and place.path.startswith("wds_"):
                ways.append(f"put {_PUBLISHED}{place.path} into {path}")
            elif place.format == "folder" and place.path == self.name and not self.how:
                ways.append(f"put images into class folders, {path}/{name}/CLASS")
        ways = list(dict.fromkeys(ways))
        return "; or ".join(ways).replace("{data_dir}", data_dir or "DATA_DIR") + "."

    def open(
        self,
        split: str,
        data_dir: str | None,
        image_size: int,
        preprocess: Mapping[str, Any] = MappingProxyType({}),
    ) -> Source:
        """Opens a split, with labels in the task's order.

        Args:
          split: one of SPLITS.
          data_dir: the folder of evaluation data, local or remote; None: TFDS's alone.
          image_size: pixels, square.
          preprocess: settings of `data.preprocess.make_preprocess` over the task's.

        Returns:
          The source. Its rows hold `labels` [n] int32, or for a multi-label task
          [n, num_classes] uint8, or for retrieval the tuple of all captions of an
          image in `texts`.

        Raises:
          InputError: if the data does not fit the task.
          Missing: if it is not there.
        """
        from unicl_jax.evaluation import task_sources

        found = self.find(split, data_dir)
        preprocess = {**preprocess, **({"name": "resize"} if self.squash else {})}
        return task_sources.open_found(self, split, found, image_size, preprocess)
