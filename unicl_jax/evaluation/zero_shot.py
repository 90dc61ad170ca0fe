"""Zero-shot classification: an image gets the class whose texts it is nearest to."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from unicl_jax import sharding
from unicl_jax.augment import normalize
from unicl_jax.data.records import Request, Source
from unicl_jax.data.synonyms import name_key
from unicl_jax.encoders import TwoTower, unit
from unicl_jax.errors import InputError
from unicl_jax.evaluation import classifier
from unicl_jax.objectives import Objective

TOP = 5
BATCH = 512  # rows at a time, over all devices


class Scores(NamedTuple):
    """How a model did on a task."""

    top1: float  # fraction of the records
    top5: float
    predictions: np.ndarray  # [records, min(5, classes)] int32, best first
    labels: np.ndarray  # [records] int32


class Encoders(NamedTuple):
    """A model's two sides, compiled once for all tasks.

    Each maps (params, state, rows divided over the devices) to unit embeddings [n, D],
    a copy on every device.
    """

    image: Callable
    text: Callable
    mesh: Mesh
    # Options of the text tower, which say what slots it need not be given; None: all.
    text_tower: Mapping[str, Any] | None = None
    # Where concepts are told apart without texts: params -> [concepts, D], and the
    # concept of each name, as `name_key` compares them.
    concepts: Callable | None = None
    index: Mapping[str, int] = MappingProxyType({})


def make_encoders(
    model: TwoTower,
    mesh: Mesh,
    objective: Objective | None = None,
    concepts: Mapping[str, int] = MappingProxyType({}),
    normalization: str = "imagenet",
    text_tower: Mapping[str, Any] | None = None,
) -> Encoders:
    """Compiles a model for evaluation.

    Args:
      model: the two towers.
      mesh: the devices.
      objective: what it was trained for, which may embed images, or stand for
        concepts, in a way of its own.
      concepts: the concept of each name: `index` of the run's concept table.
      normalization: of pixels; a key of `augment.NORMALIZATIONS`.
      text_tower: `encoders.options` of the text tower, by which its texts take no more
        slots than they need; None: it is given all slots.

    Returns:
      The encoders: of uint8 images [n, H, W, 3], and of tokens [n, L].
    """

    def image(params, state, images):
        params = sharding.gathered(mesh, params)
        images = normalize(images, normalization)
        if objective is not None and objective.encode_image is not None:
            return objective.encode_image(params, state, images)
        return model.encode_image(params, state, images)[0]

    def text(params, state, tokens):
        params = sharding.gathered(mesh, params)
        return model.encode_text(params, state, tokens)[0]

    whole, rows = sharding.replicated(mesh), sharding.over_batch(mesh)
    layout = dict(in_shardings=(None, None, rows), out_shardings=whole)
    image, text = (jax.jit(encode, **layout) for encode in (image, text))
    encoders = Encoders(image, text, mesh, text_tower)
    if objective is None or objective.concepts is None:
        return encoders
    of_concepts = jax.jit(objective.concepts, out_shardings=whole)
    return encoders._replace(concepts=of_concepts, index=concepts)


class ZeroShotTask:
    """A labelled set with class names and prompts; a call scores a model on it.

    Attributes:
      name: of the task; its metrics are `eval/<name>_top1` and `eval/<name>_top5`.
      source: the labelled set.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        templates: Sequence[str],
        tokenize: Callable[[Sequence[str]], np.ndarray],
        encoders: Encoders,
    ):
        """Tokenises the prompts; nothing of the set is read yet.

        Args:
          name: of the task.
          source: an image-label source, read in order.
          templates: prompts whose embeddings are averaged.
          tokenize: texts -> [n, L] int32.
          encoders: of the model that will be scored.
        """
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
    def by_prompts(self) -> bool:
        """Whether texts stand for the classes, not what an objective learnt of them."""
        return self._concepts is None

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
        predictions, labels = [], []
        batch, count = self._batch_size(len(self.source)), len(self.source)
        local = batch // jax.process_count()
        first = jax.process_index() * local
        starts = range(0, count, batch)
        requests = (
            Request(
                # Rows past the end are read as the last record, and dropped below.
                np.minimum(np.arange(start + first, start + first + local), count - 1),
                np.zeros(local, np.uint32),
            )
            for start in starts
        )
        for rows in self.source.stream(requests):
            put = sharding.global_batch(
                self._encoders.mesh, dict(image=rows.images, label=rows.labels)
            )
            embeddings = self._encoders.image(params, state, put["image"])
            ranked, given = self._rank(embeddings, classes, put["label"])
            predictions.append(np.asarray(ranked))
            labels.append(np.asarray(given))
            between()
        predictions = np.concatenate(predictions)[:count]
        labels = np.concatenate(labels)[:count]
        hits = predictions == labels[:, None]
        return Scores(
            float(hits[:, 0].mean()), float(hits.any(1).mean()), predictions, labels
        )

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

    def _batch_size(self, rows):
        """At most BATCH, no more than the rows need, a multiple of the devices."""
        devices = self._encoders.mesh.size
        return -(-min(BATCH, rows) // devices) * devices


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


def _rank(embeddings, classes, labels):
    """The best classes of each image, and the labels brought to every device."""
    similarity = jnp.matmul(embeddings, classes.T, precision=lax.Precision.HIGHEST)
    k = min(TOP, classes.shape[0])
    return lax.top_k(similarity, k)[1].astype(jnp.int32), labels
