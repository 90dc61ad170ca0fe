"""The two-tower model: an image and a text encoder in one embedding space."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.encoders.encoder import Encoder


class TwoTower(NamedTuple):
    """Pure functions of (params, state); see `make_two_tower`.

    init(key) -> (params, state)
    encode_image(params, state, images, *, train=False, key=None) -> (emb, state)
    encode_text(params, state, tokens, *, train=False, key=None) -> (emb, state)
    logit_scale(params) -> scalar multiplier s
    image_features(params, state, images, *, train=False, key=None) -> (feats, state)
    project_image(params, feats) -> emb: encode_image is image_features, then this
    text_features(params, state, tokens, *, train=False, key=None) -> (feats, state)

    Embeddings are [batch, embed_dim] float32 of unit L2 norm; features [batch, width]
    are the image tower's own, before the projection.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    encode_image: Callable[..., tuple[jax.Array, Any]]
    encode_text: Callable[..., tuple[jax.Array, Any]]
    logit_scale: Callable[[Mapping], jax.Array]
    image_features: Callable[..., tuple[jax.Array, Any]] | None = None
    project_image: Callable[..., jax.Array] | None = None
    text_features: Callable[..., tuple[jax.Array, Any]] | None = None


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, in float32 at least; 0 stays 0 with zero gradient.

    Args:
      x: [..., dim].

    Returns:
      [..., dim] of unit L2 norm. The method's release divides by 0 there.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = (x * x).sum(-1, keepdims=True)
    return x * jnp.where(squares > 1e-24, lax.rsqrt(jnp.maximum(squares, 1e-24)), 0)


def make_two_tower(
    image: Encoder,
    text: Encoder,
    *,
    embed_dim: int = 512,
    logit_scale_init: float = 1.0,
    logit_scale_max: float | None = None,
) -> TwoTower:
    """Joins two encoders by linear projections without bias, to unit embeddings.

    u = unit(f_image(x) P_image), v = unit(f_text(t) P_text), s = exp(theta)

    Args:
      image: the image encoder.
      text: the text encoder.
      embed_dim: width of the joint space.
      logit_scale_init: theta at the start; the multiplier is its exponential. 1.0 is
        the paper's (s = 2.718); CLIP starts at log(1 / 0.07) = 2.659 (s = 14.3).
      logit_scale_max: cap of theta (CLIP: log 100 = 4.605), or None as in the paper.

    Returns:
      The model. Its parameters are {"image", "text", "image_projection",
      "text_projection", "logit_scale"}.

    Source: arXiv 2204.03610, section 3.2; init as in the release.
    """

    def init(key):
        keys = jax.random.split(key, 4)
        image_params, image_state = image.init(keys[0])
        text_params, text_state = text.init(keys[1])
        project = jax.nn.initializers.truncated_normal(0.02)
        params = {
            "image": image_params,
            "text": text_params,
            "image_projection": project(keys[2], (image.width, embed_dim)),
            "text_projection": project(keys[3], (text.width, embed_dim)),
            "logit_scale": jnp.float32(logit_scale_init),
        }
        return params, {"image": image_state, "text": text_state}

    def run(which, tower):
        def features(params, state, inputs, *, train=False, key=None):
            out, new = tower.apply(
                params[which], state[which], inputs, train=train, key=key
            )
            return out, {**state, which: new}

        return features

    def project(which):
        def projected(params, features):
            # The projection and what follows are a sliver of the work: in float32.
            embeddings = jnp.matmul(
                features,
                params[f"{which}_projection"],
                precision=lax.Precision.HIGHEST,
            )
            return unit(embeddings)

        return projected

    def encode(features, project):
        def encode_one(params, state, inputs, *, train=False, key=None):
            out, state = features(params, state, inputs, train=train, key=key)
            return project(params, out), state

        return encode_one

    def logit_scale(params):
        theta = params["logit_scale"]
        if logit_scale_max is not None:
            theta = jnp.minimum(theta, logit_scale_max)
        return jnp.exp(theta)

    image_features, project_image = run("image", image), project("image")
    text_features = run("text", text)
    return TwoTower(
        init,
        encode(image_features, project_image),
        encode(text_features, project("text")),
        logit_scale,
        image_features,
        project_image,
        text_features,
    )
