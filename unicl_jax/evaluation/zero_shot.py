"""Zero-shot classification: an image gets the class whose texts it is nearest to."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unicl_jax import sharding
from unicl_jax.data.records import Source
from unicl_jax.data.synonyms import name_key
from unicl_jax.encoders import unit
from unicl_jax.errors import InputError
from unicl_jax.evaluation import classifier
from unicl_jax.evaluation.encoders import Encoders, embedded
from unicl_jax.evaluation.scores import METRICS

TOP = 5
OF_HITS = ("accuracy", "mean_per_class")  # metrics that the best class decides


class Scores(NamedTuple):
    """How a model did on a task."""

    metrics: Mapping[str, float]  # fractions by name; `top1` and `top5`, say
    # [records, min(5, classes)] int32, best first; None where there are no classes.
    predictions: np.ndarray | None = None
    labels: np.ndarray | None = None  # [records] int32, or [records, classes] 0 and 1


class ZeroShotTask:
    """A labelled set with class names and prompts; a call scores a model on it.

    Attributes:
      name: of the task; its metrics are `eval/<name>_top1`, say.
      source: the labelled set.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        templates: Sequence[str],
        tokenize: Callable[[Sequence[str]], np.ndarray],
        encoders: Encoders,
        metric: str = "accuracy",
    ):
        """Tokenises the prompts; nothing of the set is read yet.

        Args:
          name: of the task.
          source: an image-label source, read in order.
          templates: prompts whose embeddings are averaged.
          tokenize: texts -> [n, L] int32.
          encoders: of the model that will be scored.
          metric: beside top-1 and top-5; a key of `scores.METRICS`.
        """
        self._metric = metric
        self.name, self.source, self._encoders = name, source, encoders
        names = source.class_names
        self._concepts = None
        if encoders.concepts is None:
            self._prompts = classifier.make_prompts(names, templates, tokenize)
        else:
            self._concepts = _concepts_of(self.name, names, encoders.index)
        # On every device of every process, so that each can read all of it.
        whole = sharding.replicated(encoders.mesh)
        self._rank = jax.jit(_rank, out_shardings=whole)

    @property
    def by(self) -> str:
        """What tells the classes apart: texts, or what an objective learnt of them."""
        return "prompts" if self._concepts is None else "classifier"

    @property
    def ways(self) -> int:
        """The number of classes."""
        return len(self.source.class_names)

    def __call__(
        self, params, state, between: Callable[[], None] = lambda: None
    ) -> Scores:
        """Scores a model.

        Args:
          params: of the two towers.
          state: of the two towers.
          between: called after every batch; what it raises ends the evaluation.

        Returns:
          The scores, the same on every process.
        """
        classes = self.class_embeddings(params, state, between)
        predictions, labels, scores = [], [], []
        for embeddings, given in embedded(
            self._encoders, self.source, params, state, between
        ):
            ranked, similarity = self._rank(embeddings, classes)
            predictions.append(np.asarray(ranked))
            labels.append(given)
            if self._metric not in OF_HITS:
                scores.append(np.asarray(similarity))
        count = len(self.source)
        predictions, labels = (
            np.concatenate(parts)[:count] for parts in (predictions, labels)
        )
        similarity = np.concatenate(scores)[:count] if scores else None
        metrics = measured(self._metric, predictions, labels, self.ways, similarity)
        return Scores(metrics, predictions, labels)

    def class_embeddings(
        self, params, state, between: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """What stands for each class: `classifier.class_embeddings`, or concepts.

        Args:
          params: of the two towers.
          state: of the two towers.
          between: as for a call.

        Returns:
          [classes, D] float32.
        """
        encoders = self._encoders
        if self._concepts is not None:
            return np.asarray(encoders.concepts(params))[self._concepts]
        return classifier.class_embeddings(
            encoders.text,
            params,
            state,
            self._prompts,
            encoders.mesh,
            encoders.text_tower,
            between,
        )


def measured(
    metric: str,
    predictions: np.ndarray,
    labels: np.ndarray,
    ways: int,
    scores: np.ndarray | None,
) -> dict[str, float]:
    """What is reported of a set.

    Args:
      metric: a key of `scores.METRICS`.
      predictions: [n, k] integers, best first.
      labels: [n] integers, or [n, ways] of 0 and 1.
      ways: the number of classes.
      scores: [n, ways]; may be None if the metric is one of OF_HITS.

    Returns:
      By name, the metric first unless it is accuracy, which is top-1.
    """
    metrics = {}
    if metric not in OF_HITS:
        metrics[metric] = METRICS[metric](scores, labels)
    if labels.ndim == 1:
        hits = predictions == labels[:, None]
        if metric == "mean_per_class":
            records = np.bincount(labels, minlength=ways)
            right = np.bincount(labels[hits[:, 0]], minlength=ways)
            there = records > 0
            metrics[metric] = float((right[there] / records[there]).mean())
        metrics |= {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean())}
    elif metric in OF_HITS:  # ReaL: any of its classes; records of none don't count
        hits = np.take_along_axis(labels, predictions[:, :1], 1)[labels.any(1), 0]
        if not len(hits):
            raise InputError("a record must have a class: none of the set has one.")
        metrics[metric] = float((hits > 0).mean())
    return metrics


def scores(
    image_features: np.ndarray, class_embeddings: np.ndarray, rows: int = 4096
) -> np.ndarray:
    """Cosine similarities of images and classes, for metrics that need all of them.

    s_ik = <unit(f_i), unit(c_k)>

    Args:
      image_features: [n, D] float, unit or not.
      class_embeddings: [K, D] float, unit or not.
      rows: images at a time.

    Returns:
      [n, K] float32 in [-1, 1], but for rounding.

    Raises:
      InputError: if the arrays don't fit each other, are empty, or are not finite.
    """
    features, classes = map(np.asarray, (image_features, class_embeddings))
    if features.ndim != 2 or classes.ndim != 2 or features.shape[1] != classes.shape[1]:
        raise InputError(
            "image features [n, D] and class embeddings [K, D] must be of one width: "
            f"got {features.shape} and {classes.shape}."
        )
    if not features.size or not classes.size:
        raise InputError(
            "there must be an image and a class: got features "
            f"{features.shape} and class embeddings {classes.shape}."
        )
    for what, x in (("image features", features), ("class embeddings", classes)):
        bad = np.flatnonzero(~np.isfinite(x.astype(np.float32)).all(1))
        if len(bad):
            raise InputError(
                f"{what} must be finite: got NaN or infinity in {len(bad)} rows, as "
                f"{bad[0]}; look for what made them so."
            )
    found = np.empty((len(features), len(classes)), np.float32)
    rows = min(rows, len(features))
    for start in range(0, len(features), rows):
        start = min(start, len(features) - rows)  # some again, for one shape
        part = slice(start, start + rows)
        found[part] = _cosine(features[part], classes)
    return found


@jax.jit
def _cosine(features, classes):
    u, v = unit(features), unit(classes)
    return jnp.matmul(u, v.T, precision=lax.Precision.HIGHEST)


def _concepts_of(task, names, known):
    """Which of the concepts trained on each class of a task is."""
    keys = [name_key(name) for name in names]
    missing = [n for n, key in zip(names, keys, strict=True) if key not in known]
    if missing:
        raise InputError(
            f"evaluations.{task}: this objective tells apart only the classes it is "
            f"trained on; {len(missing)} of {len(names)} are not among them, as "
            f'"{missing[0]}". Leave the evaluation out.'
        )
    return np.array([known[key] for key in keys])


def _rank(embeddings, classes):
    """The best classes of each image, and its similarity to all."""
    similarity = jnp.matmul(embeddings, classes.T, precision=lax.Precision.HIGHEST)
    k = min(TOP, classes.shape[0])
    return lax.top_k(similarity, k)[1].astype(jnp.int32), similarity
