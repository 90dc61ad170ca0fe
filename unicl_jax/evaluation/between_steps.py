"""Evaluations of a config: what the trainer scores between steps, by any protocol."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from unicl_jax import data
from unicl_jax.data.records import Source
from unicl_jax.errors import InputError, choose
from unicl_jax.evaluation import knn, probe, retrieval, texts
from unicl_jax.evaluation.encoders import Encoders, embedded
from unicl_jax.evaluation.scores import OF_SEVERAL_LABELS
from unicl_jax.evaluation.suites import load_suite
from unicl_jax.evaluation.tasks import Task
from unicl_jax.evaluation.zero_shot import TOP, Scores, ZeroShotTask, measured

NEIGHBORS = 20


class FeatureTask:
    """A set that is judged by its features: k-NN, a linear probe, or retrieval.

    Attributes:
      name: of the task.
      source: the set it is scored on.
    """

    def __init__(
        self,
        name: str,
        protocol: str,
        source: Source,
        train: Source | None,
        tokenize: Callable[[Sequence[str]], np.ndarray],
        encoders: Encoders,
        metric: str = "accuracy",
    ):
        """Reads nothing yet.

        Args:
          name: of the task.
          protocol: "knn", "linear_probe" or "retrieval".
          source: the set.
          train: a labelled set to learn from; None for retrieval.
          tokenize: texts -> [n, L] int32.
          encoders: of the model that will be scored.
          metric: a key of `scores.METRICS`.
        """
        self.name, self.source = name, source
        self._protocol, self._train, self._metric = protocol, train, metric
        self._tokenize, self._encoders = tokenize, encoders

    @property
    def by(self) -> str:
        """What tells the classes apart, as the table says it."""
        return {"knn": "k-NN"}.get(self._protocol, self._protocol.replace("_", " "))

    @property
    def ways(self) -> int:
        """The number of classes; 0 for retrieval."""
        return len(self.source.class_names)

    def __call__(
        self, params, state, between: Callable[[], None] = lambda: None
    ) -> Scores:
        """Scores a model; see `ZeroShotTask`."""

        def features(source, look=lambda rows, indices: None):
            found = embedded(self._encoders, source, params, state, between, look)
            images, labels = zip(*((np.asarray(u), y) for u, y in found), strict=True)
            count = len(source)
            return np.concatenate(images)[:count], np.concatenate(labels)[:count]

        if self._protocol == "retrieval":
            return self._recall(params, state, features, between)
        known, known_labels = features(self._train)
        images, labels = features(self.source)
        between()
        if self._protocol == "knn":
            scores = knn.knn(
                known,
                known_labels,
                images,
                k=min(NEIGHBORS, len(known)),
                classes=self.ways,
            )
        else:
            scores = probe.linear_probe(
                known,
                known_labels,
                images,
                labels,
                classes=self.ways,
                metric=self._metric,
            ).scores
        predictions = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        predictions = predictions.astype(np.int32)
        metrics = measured(self._metric, predictions, labels, self.ways, scores)
        return Scores(metrics, predictions, labels)

    def _recall(self, params, state, features, between):
        captions, owners = [], []

        def look(rows, indices):
            for each, index in zip(rows.texts, indices, strict=True):
                if index < len(self.source):
                    captions.extend(each)
                    owners.extend([index] * len(each))

        images, _ = features(self.source, look)
        tokens = self._tokenize(captions) if captions else None
        tokens, owners = _of_all_processes(tokens, np.array(owners, np.int64))
        found = texts.text_features(
            self._encoders.text,
            params,
            state,
            tokens,
            self._encoders.mesh,
            self._encoders.text_tower,
            between,
        )
        scored = retrieval.retrieval(images, found, owners, mesh=self._encoders.mesh)
        ranks = [name for name in scored.metrics if name.endswith("rank")]
        metrics = {k: v for k, v in scored.metrics.items() if k not in ranks}
        return Scores(metrics)


def _of_all_processes(tokens, owners):
    """The captions that every process read, in the order of their images."""
    if jax.process_count() > 1:
        width = multihost_utils.process_allgather(
            np.array([0 if tokens is None else tokens.shape[1], len(owners)])
        )
        length, most = width.max(0)
        table = np.zeros((most, length + 1), np.int64)
        if tokens is not None:
            table[: len(owners), 0], table[: len(owners), 1:] = owners, tokens
        gathered = multihost_utils.process_allgather(table)
        rows = [part[:n] for part, (_, n) in zip(gathered, width, strict=True)]
        table = np.concatenate(rows)
        owners, tokens = table[:, 0], table[:, 1:].astype(np.int32)
    order = np.argsort(owners, kind="stable")
    return tokens[order], owners[order]


LEARNING = ("knn", "linear_probe")
PROTOCOLS = ("zero_shot", *LEARNING, "retrieval")


def make_task(
    name: str,
    config: Mapping[str, Any],
    image_size: int,
    tokenize: Callable[[Sequence[str]], np.ndarray],
    encoders: Encoders,
) -> ZeroShotTask | FeatureTask:
    """Opens an evaluation of a config.

    Args:
      name: its name there.
      config: a source's fields and `templates`; or `task`, "suite/task", and
        `data_dir`. `protocol` is one of PROTOCOLS; those that learn need `train`, too,
        a source's fields, unless the task has such data.
      image_size: pixels, square.
      tokenize: texts -> [n, L] int32.
      encoders: of the model.

    Returns:
      A call of it scores the model.

    Raises:
      InputError: if a field is wrong, or the data is missing.
    """
    protocol = config.get("protocol") or PROTOCOLS[0]
    choose(dict.fromkeys(PROTOCOLS), protocol, f"evaluations.{name}.protocol")
    metric, templates = "accuracy", config.get("templates")
    train = None
    if config.get("task"):
        task = _task(name, config["task"])
        fits = {
            "retrieval": ("retrieval",),
            "multi_label": ("zero_shot", "linear_probe"),
        }.get(task.kind, PROTOCOLS[:-1])
        if protocol not in fits:
            raise InputError(
                f"evaluations.{name}: a task of {task.kind.replace('_', ' ')} cannot "
                f'be judged by "{protocol}"; set `protocol` to {" or ".join(fits)}.'
            )
        if (
            task.kind == "multi_label"
            and protocol in LEARNING
            and task.metric not in OF_SEVERAL_LABELS
        ):
            raise InputError(
                f'evaluations.{name}: "{protocol}" of a task of several labels needs '
                f'a metric of them, as map11: "{task.name}" has "{task.metric}"; set '
                '`protocol` to "zero_shot".'
            )
        metric, templates = task.metric, templates or task.templates
        split = {"data_dir": config.get("data_dir") or None, "image_size": image_size}
        preprocess = dict(config.get("preprocess") or {"name": "center"})
        source = task.open("test", preprocess=preprocess, **split)
        if protocol in LEARNING:
            train = task.open("train", preprocess=preprocess, **split)
    else:
        kind = "image_text" if protocol == "retrieval" else "image_label"
        given = {**config, "kind": kind}
        source = data.make_source(name, given, image_size, train=False)
        if protocol in LEARNING:
            given = {**config["train"], "kind": kind}
            train = data.make_source(f"{name}.train", given, image_size, train=False)
            _check_same_classes(name, source, train)
    if protocol == "zero_shot":
        templates = data.load_templates(templates)
        return ZeroShotTask(name, source, templates, tokenize, encoders, metric)
    if metric != "accuracy" and protocol == "knn":
        metric = "mean_per_class" if metric == "mean_per_class" else "accuracy"
    return FeatureTask(name, protocol, source, train, tokenize, encoders, metric)


def _task(name: str, task: str) -> Task:
    suite, _, row = str(task).rpartition("/")
    if not suite:
        raise InputError(
            f'evaluations.{name}.task must be "suite/task", as "elevater20/cifar10": '
            f'got "{task}".'
        )
    try:
        return load_suite(suite).task(row)
    except InputError as error:
        raise InputError(f"evaluations.{name}.task: {error}") from error


def _check_same_classes(name, source, train):
    if source.class_names != train.class_names:
        raise InputError(
            f"evaluations.{name}: `train` must have the same classes in the same "
            f"order: it has {len(train.class_names)}, the set it is scored on "
            f"{len(source.class_names)}; give both the same `class_names`."
        )
