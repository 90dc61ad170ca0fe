"""What an objective is, and how it sees a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from unicl_jax import losses
from unicl_jax.augment import Views
from unicl_jax.encoders import Packed, PartKey, TwoTower
from unicl_jax.mix import Mixture
from unicl_jax.objectives.positives import identities


class Objective(NamedTuple):
    """What a step minimises, and how what it learnt is evaluated.

    loss(forward) -> (losses [B] in nats, whose mean is minimised; metrics, scalars)
    init(key, params of the towers) -> its own parameters; None: it has none
    encode_image(params, state, normalised images) -> [n, D'], where an evaluation's
    images are not embedded by the model's `encode_image`; None: they are
    concepts(params) -> [concepts, D']: what stands for a concept's name, where that is
    not its texts' embedding; None: it is
    logit_scale(params) -> the multiplier s, where it is not the model's; None: it is
    unused: parts of the model's parameters that it doesn't teach: they stay as they
    are, for weight decay alone would take them to 0
    """

    loss: Callable[["Forward"], tuple[jax.Array, dict[str, jax.Array]]]
    init: Callable[[jax.Array, Any], dict] | None = None
    encode_image: Callable[[Any, Any, jax.Array], jax.Array] | None = None
    concepts: Callable[[Any], jax.Array] | None = None
    logit_scale: Callable[[Any], jax.Array] | None = None
    unused: tuple[str, ...] = ()


class Forward:
    """The towers on one batch, inside a traced step.

    Attributes:
      labels: [B] int32, NO_LABEL for captions.
      identities: rows in which they are equal are positives: the labels, or, where
        equal captions are positives, too, [B, 2].
      own: the objective's own parameters.
      state: of the model, with what batch norm learnt so far.
    """

    def __init__(
        self,
        model: TwoTower,
        params: Any,
        state: Any,
        batch: Mapping[str, jax.Array],
        make_views: Callable[[jax.Array, jax.Array], Views],
        keys: jax.Array,
        frozen: tuple[str, ...] = (),
        caption_identity: str = "row",
        mix: Callable[[jax.Array, jax.Array], Mixture] | None = None,
        micro_batches: int = 1,
    ):
        """Holds what the calls below need; nothing is computed yet.

        Args:
          model: the two towers.
          params: theirs, and the objective's.
          state: theirs.
          batch: as for the train step.
          make_views: (key, uint8 images) -> Views of [B, views, ...].
          keys: [3]: for pixels, the image tower, the text tower.
          frozen: parts of the parameters that don't learn: such a tower runs as in
            evaluation, its drop path off, its batch statistics as they are.
          caption_identity: "text" if equal captions are positives.
          mix: (key, normalised images) -> Mixture; None: images stay whole.
          micro_batches: parts in which the towers embed the batch, one behind another.
        """
        self.identities = identities(batch, caption_identity == "text")
        self.labels, self.own, self.state = (
            batch["label"],
            params.get("objective", {}),
            state,
        )
        self._model, self._params, self._batch = model, params, batch
        self._make_views, self._keys, self._frozen = make_views, keys, frozen
        self._mix, self._micro_batches = mix, micro_batches

    @functools.cached_property
    def mixture(self) -> Mixture | None:
        """What `image` and `image_features` see, where images are mixed, else None."""
        if self._mix is None:
            return None
        # Far from the numbers by which `make_views` and `make_augment` split the key.
        key = jax.random.fold_in(self._keys[0], 2000)
        return self._mix(key, self._views().images[:, 0])

    def image(self) -> jax.Array:
        """Unit embeddings [B, D] of the first views."""
        return self._encode_image(self._model.encode_image, self._first_views())

    def image_features(self) -> jax.Array:
        """What the image tower says of the first views, [B, width]."""
        return self._encode_image(self._model.image_features, self._first_views())

    def all_image_features(self) -> tuple[jax.Array, jax.Array]:
        """Features of all views, [B, V, width], and their parameters [B, V, P]."""
        views = self._views()

        def encode(params, state, images, **mode):
            # One run of the tower: batch norm, where there is some, sees all views.
            flat = images.reshape(-1, *images.shape[2:])
            out, state = self._model.image_features(params, state, flat, **mode)
            return out.reshape(*images.shape[:2], -1), state

        views_of_one = views.images.shape[1]
        features = self._encode_image(encode, views.images, views_of_one)
        return features, views.parameters

    def text(self) -> jax.Array:
        """Unit text embeddings [B, D]: row i's is of image i's text."""
        tokens, encode, together = self._batch["tokens"], self._model.encode_text, 1
        mode = self._mode("text", self._keys[2])
        if isinstance(tokens, Packed) and self._micro_batches > 1:
            # A part holds whole groups of packed rows, and the texts that are in them.
            together, tokens = tokens.rows, tokens.by_groups()

            def encode(params, state, groups, **mode):
                out, state = self._model.encode_text(
                    params, state, groups.in_rows(), **mode
                )
                return out.reshape(*groups.ends.shape, -1), state

        v = self._encode(encode, tokens, mode, together)
        v = v.reshape(
            -1, v.shape[-1]
        )  # of packed texts, the groups' one behind another
        return v[self._batch["text_index"]] if "text_index" in self._batch else v

    def project(self, features: jax.Array) -> jax.Array:
        """Unit image embeddings [..., D] of features [..., width]."""
        return self._model.project_image(self._params, features)

    def logit_scale(self) -> jax.Array:
        """The multiplier s."""
        return self._model.logit_scale(self._params)

    def _views(self):
        return self._make_views(self._keys[0], self._batch["image"])

    def _first_views(self):
        if self.mixture is not None:
            return self.mixture.images
        return self._views().images[:, 0]

    def _encode_image(self, encode, images, together=1):
        mode = self._mode("image", self._keys[1])
        return self._encode(encode, images, mode, together)

    def _encode(self, encode, inputs, mode, together):
        """The embeddings of [n, ...], rows that stand for `together` of a tower's."""
        count = self._micro_batches
        if count == 1:
            out, self.state = encode(self._params, self.state, inputs, **mode)
            return out

        def part(params, inputs, k):
            of_part = dict(mode)
            if mode:
                of_part["key"] = PartKey(mode["key"], k, count, together)
            # Of a tower with batch norm there are no parts: `micro_batches.check`.
            return encode(params, self.state, inputs, **of_part)[0]

        encode_all = losses.in_micro_batches(part, count, numbered=True)
        return encode_all(self._params, inputs)

    def _mode(self, tower, key):
        return {} if tower in self._frozen else {"train": True, "key": key}
