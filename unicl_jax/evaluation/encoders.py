"""A model's two sides, compiled once for all evaluations between training steps."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unicl_jax import sharding
from unicl_jax.augment import normalize
from unicl_jax.data.records import Request, Rows, Source
from unicl_jax.encoders import TwoTower
from unicl_jax.objectives import Objective

BATCH = 512  # rows at a time, over all devices


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


def embedded(
    encoders: Encoders,
    source: Source,
    params,
    state,
    between: Callable[[], None] = lambda: None,
    look: Callable[[Rows, np.ndarray], None] = lambda rows, indices: None,
) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """Embeds a set, each process reading its rows.

    Args:
      encoders: of the model.
      source: the set.
      params: of the two towers.
      state: of the two towers.
      between: called after every batch; what it raises ends the evaluation.
      look: called with this process's rows of each batch, and their places in the set.

    Yields:
      Of a batch unit embeddings [n, D], a copy on every device, and labels on the host,
      [n] or [n, classes]; the same on every process. The last rows of the last batch
      may be copies of the set's last.
    """
    mesh, count = encoders.mesh, len(source)
    # No more than the rows need, a multiple of the devices.
    batch = -(-min(BATCH, count) // mesh.size) * mesh.size
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
    everywhere = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    for start, rows in zip(starts, source.stream(requests), strict=True):
        put = sharding.global_batch(mesh, dict(image=rows.images, label=rows.labels))
        embeddings = encoders.image(params, state, put["image"])
        labels = np.asarray(everywhere(put["label"]))
        look(rows, np.arange(start + first, start + first + local))
        yield embeddings, labels
        between()
