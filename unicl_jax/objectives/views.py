"""Objectives that compare several views of each image."""

import jax.numpy as jnp

from unicl_jax import losses
from unicl_jax.augment import PARAMETERS
from unicl_jax.encoders import heads
from unicl_jax.objectives.objective import Objective
from unicl_jax.objectives.positives import row_labels

IMAGE, TEXT = 0, 1  # domains
PAIRS = ("image_image", "image_text", "text_text")


def supcon(over, model, num_concepts):
    """SupCon: views of equal label attract each other; texts are not looked at.

    The first of its two stages. 1 / temperature is the logit scale as it is set: it
    does not learn.
    """
    del model, num_concepts
    supcon_loss = over(losses.supcon_loss)

    def head(params):
        return heads.hidden_layer(params["image_projection"].shape[0])

    def init(key, params):
        return {"head": head(params).init(key)}

    def loss(forward):
        features, _ = forward.all_image_features()
        batch, views, width = features.shape
        x = heads.hidden_layer(width).apply(
            forward.own["head"], features.reshape(-1, width)
        )
        z = forward.project(x).reshape(batch, views, -1)
        temperature = 1 / forward.logit_scale()  # does not learn: `unused` holds it
        return supcon_loss(z, forward.identities, temperature), {}

    return Objective(loss, init)


def uniclip(over, model, num_concepts):
    """UniCLIP: all views of an image and its text in one space, each pair by itself.

    Records of equal label are positives, too, as in UniCL: with captions alone it is
    UniCLIP's own.
    """
    del num_concepts
    mp_nce_loss = over(losses.mp_nce_loss)

    def head(params):
        width = params["image_projection"].shape[0]
        return heads.augmentation_aware(width, len(PARAMETERS))

    def init(key, params):
        theta = params["logit_scale"]
        return {
            "head": head(params).init(key),
            "log_scales": jnp.full(3, theta, theta.dtype),
            "offsets": jnp.zeros(3, theta.dtype),
        }

    def loss(forward):
        features, parameters = forward.all_image_features()
        batch, views, width = features.shape
        x = heads.augmentation_aware(width, len(PARAMETERS)).apply(
            forward.own["head"],
            features.reshape(-1, width),
            parameters.reshape(-1, len(PARAMETERS)),
        )
        u = forward.project(x).reshape(batch, views, -1)
        z = jnp.concatenate([u, forward.text()[:, None]], 1)
        labels = row_labels(forward.identities)
        scales = all_scales({"objective": forward.own})
        offsets = forward.own["offsets"]
        rows = mp_nce_loss(
            z.reshape(-1, z.shape[-1]),
            jnp.repeat(labels, views + 1, axis=0),
            jnp.tile(jnp.array([IMAGE] * views + [TEXT]), batch),
            scales,
            offsets,
        )
        metrics = {f"scale/{pair}": scales[i] for i, pair in enumerate(PAIRS)}
        metrics |= {f"offset/{pair}": offsets[i] for i, pair in enumerate(PAIRS)}
        return rows.reshape(batch, views + 1).mean(1), metrics

    def encode_image(params, state, images):
        features = model.image_features(params, state, images)[0]
        untouched = jnp.zeros((len(features), len(PARAMETERS)))
        own = params["objective"]["head"]
        x = head(params).apply(own, features, untouched)
        return model.project_image(params, x)

    def all_scales(params):
        return model.logit_scale({"logit_scale": params["objective"]["log_scales"]})

    return Objective(
        loss, init, encode_image, logit_scale=lambda params: all_scales(params)[1]
    )
