"""What a step minimises: a loss, what it is given of a batch, and what it learns.

An objective sees the batch through `Forward`, asks it for the embeddings it needs, and
gives one loss a row. Parameters of its own (a bias, a classifier) lie under
`params["objective"]`, beside the towers'.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from unicl_jax import losses
from unicl_jax.encoders import TwoTower, unit
from unicl_jax.errors import InputError, choose
from unicl_jax.losses import NO_LABEL

LABELS, CAPTIONS = "image_label", "image_text"


class Forward:
    """The towers on one batch, inside a traced step.

    Attributes:
      labels: [B] int32, NO_LABEL for captions.
      own: the objective's own parameters.
      state: of the model, with what batch norm learnt so far.
    """

    def __init__(
        self,
        model: TwoTower,
        params: Any,
        state: Any,
        batch: Mapping[str, jax.Array],
        augment: Callable,
        keys: jax.Array,
    ):
        """Holds what the calls below need; nothing is computed yet.

        Args:
          model: the two towers.
          params: theirs, and the objective's.
          state: theirs.
          batch: as for the train step.
          augment: (key, uint8 images) -> normalised float images.
          keys: [3]: for pixels, the image tower, the text tower.
        """
        self.labels, self.own, self.state = (
            batch["label"],
            params.get("objective", {}),
            state,
        )
        self._model, self._params, self._batch = model, params, batch
        self._augment, self._keys = augment, keys

    def image(self) -> jax.Array:
        """Unit image embeddings [B, D]."""
        return self._image(self._model.encode_image)

    def image_features(self) -> jax.Array:
        """What the image tower says before the projection, [B, width]."""
        return self._image(self._model.image_features)

    def text(self) -> jax.Array:
        """Unit text embeddings [B, D]: row i's is of image i's text."""
        v, self.state = self._model.encode_text(
            self._params,
            self.state,
            self._batch["tokens"],
            train=True,
            key=self._keys[2],
        )
        return v[self._batch["text_index"]] if "text_index" in self._batch else v

    def project(self, features: jax.Array) -> jax.Array:
        """Unit image embeddings of `image_features`."""
        return self._model.project_image(self._params, features)

    def logit_scale(self) -> jax.Array:
        """The multiplier s."""
        return self._model.logit_scale(self._params)

    def _image(self, encode):
        images = self._augment(self._keys[0], self._batch["image"])
        out, self.state = encode(
            self._params, self.state, images, train=True, key=self._keys[1]
        )
        return out


class Classifier(NamedTuple):
    """How to tell concepts apart without texts: by products of these two."""

    image: Callable  # (params, state, normalised images) -> [n, D']
    concepts: Callable  # params -> [concepts, D']


class Objective(NamedTuple):
    """What a step minimises.

    loss(forward) -> (losses [B] in nats, whose mean is minimised; metrics, scalars)
    init(key, params of the towers) -> its own parameters; None: it has none
    classifier: how its models are evaluated; None: by their texts
    """

    loss: Callable[[Forward], tuple[jax.Array, dict[str, jax.Array]]]
    init: Callable[[jax.Array, Any], dict] | None = None
    classifier: Classifier | None = None


def make_objective(
    name: str, model: TwoTower, mesh: Mesh | None = None, num_concepts: int = 0
) -> Objective:
    """Builds an objective.

    Args:
      name: a key of OBJECTIVES.
      model: the two towers.
      mesh: the devices over which batches are divided; None for one device, no mesh.
      num_concepts: of the run's concept table, for those that hold a row for each.

    Returns:
      The objective.

    Raises:
      InputError: if there is none of that name.
    """

    def over(loss):
        return loss if mesh is None else losses.sharded(loss, mesh)

    make = choose(OBJECTIVES, name, "objective").make
    return make(over, model, num_concepts)


def check(name: str, kinds: Sequence[str]) -> None:
    """Refuses sources that an objective cannot learn from.

    Args:
      name: a key of OBJECTIVES.
      kinds: of the config's sources.

    Raises:
      InputError: if there is no such objective, or it needs labels and a source has
        captions.
    """
    labels_only = choose(OBJECTIVES, name, "objective").labels_only
    if labels_only and set(kinds) - {LABELS}:
        raise InputError(
            f'objective "{name}" needs a class for every image: data.sources must all '
            f"be {LABELS}, and some are {CAPTIONS}; leave those out."
        )


def _unicl(over, model, num_concepts, relabel=None, direction="both"):
    """UniCL's loss; CLIP's, if no row has a label; one of its directions alone."""
    del model, num_concepts
    loss_and_aux = over(losses.unicl_loss_and_aux)

    def loss(forward):
        labels = forward.labels
        if relabel is not None:
            labels = jnp.full_like(labels, relabel)
        rows, aux = loss_and_aux(
            forward.image(),
            forward.text(),
            labels,
            forward.logit_scale(),
            direction=direction,
        )
        return rows, {
            "excess": aux.excess.mean(),
            "per_image": aux.per_image.mean(),
            "per_text": aux.per_text.mean(),
            "positives_per_row": aux.num_positives.mean(),
        }

    return Objective(loss)


def _clip(*args):
    return _unicl(*args, relabel=NO_LABEL)


def _one_way(*args):
    return _unicl(*args, direction="per_image")


def _siglip(over, model, num_concepts):
    """Sigmoid loss, rows of equal label positives; its bias starts at -10."""
    del model, num_concepts
    siglip = over(losses.siglip_loss)

    def init(key, params):
        del key, params
        return {"logit_bias": jnp.float32(-10)}

    def loss(forward):
        bias = forward.own["logit_bias"]
        rows = siglip(
            forward.image(),
            forward.text(),
            forward.logit_scale(),
            bias,
            labels=forward.labels,
        )
        return rows, {"logit_bias": bias}

    return Objective(loss, init)


def _classes(key, params, num_concepts):
    """A linear classifier on the image tower's features."""
    width = params["image_projection"].shape[0]
    draw = jax.nn.initializers.truncated_normal(0.02)
    return {
        "class_weights": draw(key, (width, num_concepts)),
        "class_bias": jnp.zeros(num_concepts),
    }


def _class_logits(own, features):
    features = features.astype(own["class_weights"].dtype)
    logits = jnp.matmul(features, own["class_weights"], precision=lax.Precision.HIGHEST)
    return logits + own["class_bias"][None]


def _cross_entropy(over, model, num_concepts):
    """Supervised training: a softmax over the concepts, from the image alone."""
    del over  # rows don't meet

    def init(key, params):
        return _classes(key, params, num_concepts)

    def loss(forward):
        logits = _class_logits(forward.own, forward.image_features())
        hits = logits.argmax(1) == forward.labels
        rows = losses.cross_entropy_loss(logits, forward.labels)
        return rows, {"train_top1": hits.mean()}

    def image(params, state, images):
        features = model.image_features(params, state, images)[0].astype(jnp.float32)
        return jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)

    def concepts(params):
        own = params["objective"]
        return jnp.concatenate([own["class_weights"].T, own["class_bias"][:, None]], 1)

    return Objective(loss, init, Classifier(image, concepts))


def _multitask(over, model, num_concepts):
    """Cross-entropy on the labelled rows, CLIP among the captions."""
    multitask = over(losses.multitask_loss)
    del model

    def init(key, params):
        return _classes(key, params, num_concepts)

    def loss(forward):
        features = forward.image_features()
        rows = multitask(
            forward.project(features),
            forward.text(),
            _class_logits(forward.own, features),
            forward.labels,
            forward.logit_scale(),
        )
        return rows, {}

    return Objective(loss, init)


def _linear_text(over, model, num_concepts):
    """UniCL with a learnt vector for each concept in place of the text tower."""
    loss_and_aux = over(losses.unicl_loss_and_aux)

    def init(key, params):
        width = params["text_projection"].shape[1]
        draw = jax.nn.initializers.truncated_normal(0.02)
        return {"label_embedding": draw(key, (num_concepts, width))}

    def loss(forward):
        v = unit(forward.own["label_embedding"][forward.labels])
        rows, aux = loss_and_aux(
            forward.image(), v, forward.labels, forward.logit_scale()
        )
        return rows, {"excess": aux.excess.mean()}

    def image(params, state, images):
        return model.encode_image(params, state, images)[0]

    def concepts(params):
        return unit(params["objective"]["label_embedding"])

    return Objective(loss, init, Classifier(image, concepts))


class _Entry(NamedTuple):
    make: Callable
    labels_only: bool = False


OBJECTIVES = {
    "unicl": _Entry(_unicl),
    "clip": _Entry(_clip),
    "one_way": _Entry(_one_way),  # Table 3 of the paper
    "linear_text": _Entry(_linear_text, labels_only=True),  # Table 3
    "siglip": _Entry(_siglip),
    "cross_entropy": _Entry(_cross_entropy, labels_only=True),
    "multitask": _Entry(_multitask),  # Table 6
}
