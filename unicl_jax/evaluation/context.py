"""What a protocol is given: a model, a task, its sets and their features."""

import contextlib
import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unicl_jax.data.prompts import fill
from unicl_jax.data.records import Source, hash_of
from unicl_jax.data.shards import is_remote
from unicl_jax.evaluation import features, places
from unicl_jax.evaluation.embedder import Embedder
from unicl_jax.evaluation.features import Features
from unicl_jax.evaluation.tasks import Task


@dataclasses.dataclass(frozen=True)
class Options:
    """What protocols can be told.

    Attributes:
      neighbors: k, of k-NN.
      shots: images a class, of few-shot.
      seeds: of few-shot's draws.
      text_head: whether a linear probe starts at the classes' text embeddings.
    """

    neighbors: int = 20
    shots: tuple[int, ...] = (5, 20, 50)
    seeds: tuple[int, ...] = (0, 1, 2)
    text_head: bool = True


class Outcome(NamedTuple):
    """What a protocol found.

    Attributes:
      score: by the task's own metric, a fraction.
      metrics: by name.
      records: of the test set.
      details: more, for the protocol's own file.
      arrays: too large for it.
      interval: half the width of the score's 95 % interval, where there is one.
      intervals: of metrics.
      examples: records that a report should have pictures of.
      said: in a line, what the score alone does not say.
    """

    score: float | None
    metrics: dict[str, float]
    records: int
    details: dict[str, Any]
    arrays: dict[str, np.ndarray] = {}
    interval: float | None = None
    intervals: dict[str, float] = {}
    examples: list[int] | None = None
    said: str = ""


class Progress(NamedTuple):
    """Where an evaluation says what it is at.

    Attributes:
      start: called with a few words when something long begins.
      done: called with how many of its parts are done, of how many; 0: who knows.
      say: called with a line that stays.
    """

    start: Callable[[str], None] = lambda what: None
    done: Callable[[int, int], None] = lambda done, of: None
    say: Callable[[str], None] = lambda line: None


class Context:
    """A model and a task: sets are opened, features extracted, once and when asked."""

    def __init__(
        self,
        embedder: Embedder,
        task: Task,
        folder: Path,
        data_dir: str | None,
        options: Options,
        progress: Progress,
    ):
        """Opens nothing yet.

        Args:
          embedder: the model.
          task: the task.
          folder: where features and results are kept.
          data_dir: where data lies.
          options: of the protocols.
          progress: who is told of it.
        """
        self.embedder, self.task, self.folder = embedder, task, folder
        self.options, self.progress = options, progress
        self.records: dict[str, int] = {}
        self._data_dir, self._sources, self._features = data_dir, {}, {}
        self._classes, self._fingerprints = None, {}

    def source(self, split: str) -> Source:
        """The set of a split; see `Task.open`."""
        if split not in self._sources:
            pct = self.embedder.crop_pct
            cut = dict(name="center", crop_pct=pct) if pct else dict(name="resize")
            self._sources[split] = self.task.open(
                split, self._data_dir, self.embedder.image_size, cut
            )
            self.records[split] = found = len(self._sources[split])
            if found != (wanted := self.task.sizes.get(split, found)):
                self.progress.say(
                    f"{self.task.name}, {split}: {found:,} records, where the protocol "
                    f"has {wanted:,}: a score of others is no score of it"
                )
        return self._sources[split]

    def fingerprint(self, split: str) -> str:
        """Tells a split from others, and from itself before its files were changed."""
        if split not in self._fingerprints:
            source, found = self.source(split), self.task.find(split, self._data_dir)
            parts = (
                source.fingerprint(),
                repr((self.task.squash, found.place.labels, found.place.options)),
                *_stamps(source, found.path),
            )
            self._fingerprints[split] = hash_of(*(part.encode() for part in parts))
        return self._fingerprints[split]

    @functools.cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits whose data is there."""
        return self.task.splits(self._data_dir)

    def features(self, split: str) -> Features:
        """The features of a split."""
        if split not in self._features:
            source = self.source(split)
            self.progress.start(f"{self.task.name}: features of {split}")
            self._features[split] = features.extract(
                self.embedder,
                source,
                self.folder / f"features_{split}.npz",
                self.progress.done,
                self.fingerprint(split),
            )
            if skipped := sum(source.skipped.values()):
                self.progress.say(
                    f"{self.task.name}, {split}: {skipped:,} records cannot be read, "
                    "and are left out"
                )
        return self._features[split]

    def training(self) -> Features:
        """What may be learnt from: train and, where there is one, val."""
        if "val" not in self.splits:
            return self.features("train")
        return Features(
            *(
                np.concatenate(both)
                for both in zip(
                    self.features("train"), self.features("val"), strict=True
                )
            )
        )

    def classes(self) -> np.ndarray:
        """The zero-shot classifier, [K, D] of unit norm."""
        if self._classes is None:
            self.progress.start(f"{self.task.name}: class names")
            names, templates = self.task.class_names, self.task.templates
            texts = [fill(t, name) for name in names for t in templates]
            found = self.texts(texts)
            self._classes = unit(found.reshape(len(names), len(templates), -1).mean(1))
        return self._classes

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts, [n, D] of unit norm, and says how far it is."""
        done = 0

        def between():
            nonlocal done
            done += 1
            self.progress.done(done, 0)

        return self.embedder.texts(texts, between)


def _stamps(source, path):
    """Size and time of each file of a set, where they are local.

    A source knows its records' names and places: a picture that was mended has the
    same name, and another label in a shard the same place.
    """
    files = {source.where(index) for index in range(len(source))}
    if not is_remote(path):
        files.update(places.matches(path))
    for file in sorted(file for file in files if file and not is_remote(file)):
        with contextlib.suppress(OSError):  # where() may be no path
            found = os.stat(file)
            if stat.S_ISREG(found.st_mode):
                yield f"{os.path.basename(file)} {found.st_size} {found.st_mtime_ns}"


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit L2 norm."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.maximum(norms, 1e-12)
