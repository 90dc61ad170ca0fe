"""A model as evaluations see it: pixels and texts in, embeddings out."""

import hashlib
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np

from unicl_jax import encoders, sharding
from unicl_jax.errors import InputError
from unicl_jax.evaluation.texts import text_features
from unicl_jax.model import Model

BATCH = 256  # rows at a time, over all devices


class Embedder:
    """Embeds for evaluations; the same few shapes again and again.

    Attributes:
      embed_dim: D.
      image_size: S, pixels.
      crop_pct: the centre crop's share of a picture's shorter side; 0: all of it is
        squashed to a square.
      has_texts: whether there is a text tower that was taught.
      mesh: the devices, those of this process.
      digest: of the weights and what they are: the same only for the same embeddings.
    """

    def __init__(self, model: Model, batch_size: int = BATCH):
        """Takes a model with an image tower.

        Args:
          model: to be judged.
          batch_size: rows at a time, over all devices.

        Raises:
          InputError: if it has no image tower.
        """
        if model.image_size is None:
            raise InputError(
                "an evaluation needs an image tower: this model is a text tower alone; "
                "name a model of both, or an image tower."
            )
        self.mesh = sharding.make_mesh(devices=jax.local_devices())
        devices = self.mesh.size
        self._model, self._batch = model, -(-batch_size // devices) * devices
        self.embed_dim, self.image_size = model.embed_dim, model.image_size
        self.crop_pct = model.crop_pct
        self.has_texts = model.has_texts
        self.logit_scale = model.logit_scale
        self.digest = _digest(model)

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Embeds images.

        Args:
          pixels: [n, S, S, 3] uint8.

        Returns:
          [n, D] float32, as the projection gives them: not of unit norm.
        """
        return self._in_batches(
            lambda rows: self._model.encode_image(rows, normalize=False), pixels
        )

    def texts(
        self, texts: Sequence[str], between: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Embeds texts, each distinct one once.

        Args:
          texts: n strings.
          between: called after every batch.

        Returns:
          [n, D] float32, of unit norm.
        """
        if not len(texts):
            return np.zeros((0, self.embed_dim), np.float32)
        distinct, back = np.unique(np.asarray(texts, object), return_inverse=True)
        model = self._model
        found = text_features(
            model.text_features,
            model.params,
            model.state,
            model.tokenize(distinct.tolist()),
            self.mesh,
            model.text_tower,
            between,
        )
        return np.asarray(encoders.unit(found))[back]

    def _in_batches(self, encode, rows):
        parts = []
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            # One shape: the last rows are filled up with copies of the last of them.
            batch = min(self._batch, -(-len(rows) // self.mesh.size) * self.mesh.size)
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), 0)])
            put = sharding.global_batch(self.mesh, dict(rows=padded))["rows"]
            parts.append(np.asarray(encode(put))[: len(part)])
        if not parts:
            return np.zeros((0, self.embed_dim), np.float32)
        return np.concatenate(parts)


def _digest(model):
    found = hashlib.blake2b(digest_size=12)
    found.update(json.dumps(model.config, sort_keys=True, default=str).encode())
    found.update(f"{model.has_own_head} {model.crop_pct}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path((model.params, model.state)):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)}{array.shape}".encode())
        found.update(array.view(np.uint8).reshape(-1).data)
    return found.hexdigest()
