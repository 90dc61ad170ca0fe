"""Objectives with a linear classifier over the concepts."""

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax import losses
from unicl_jax.encoders import unit
from unicl_jax.objectives.objective import Objective


def cross_entropy(over, model, num_concepts):
    """Supervised training: a softmax over the concepts, from the image alone."""
    del over  # rows don't meet

    def init(key, params):
        return _classes(key, params, num_concepts)

    def loss(forward):
        labels, mixture = forward.labels, forward.mixture
        logits = _class_logits(forward.own, forward.image_features())
        heavier = labels
        if mixture is not None:
            other = labels[mixture.partner]
            heavier = jnp.where(mixture.share >= 0.5, labels, other)
        hits = logits.argmax(1) == heavier
        rows = losses.cross_entropy_loss(logits, labels)
        if mixture is not None:
            others = losses.cross_entropy_loss(logits, other)
            rows = mixture.share * rows + (1 - mixture.share) * others
        return rows, {"train_top1": hits.mean()}

    def encode_image(params, state, images):
        features = model.image_features(params, state, images)[0].astype(jnp.float32)
        return jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)

    def concepts(params):
        own = params["objective"]
        return jnp.concatenate([own["class_weights"].T, own["class_bias"][:, None]], 1)

    return Objective(loss, init, encode_image, concepts)


def cosine_cross_entropy(over, model, num_concepts):
    """Cross-entropy whose classifier is a unit vector for each concept, s their scale.

    Started at the concepts' prompts' embeddings it is the zero-shot classifier, from
    which it then learns (WiSE-FT, arXiv 2109.01903, section 3).
    """
    del over  # rows don't meet

    def init(key, params):
        width = params["image_projection"].shape[1]
        draw = jax.nn.initializers.truncated_normal(0.02)
        return {"label_embedding": draw(key, (num_concepts, width))}

    def loss(forward):
        v = unit(forward.own["label_embedding"])
        logits = losses.pair_logits(forward.image(), v, forward.logit_scale())
        labels, mixture = forward.labels, forward.mixture
        rows = losses.cross_entropy_loss(logits, labels)
        heavier = labels
        if mixture is not None:
            other = labels[mixture.partner]
            heavier = jnp.where(mixture.share >= 0.5, labels, other)
            others = losses.cross_entropy_loss(logits, other)
            rows = mixture.share * rows + (1 - mixture.share) * others
        return rows, {"train_top1": (logits.argmax(1) == heavier).mean()}

    def encode_image(params, state, images):
        return model.encode_image(params, state, images)[0]

    def concepts(params):
        return unit(params["objective"]["label_embedding"])

    return Objective(loss, init, encode_image, concepts)


def multitask(over, model, num_concepts):
    """Cross-entropy on the labelled rows, CLIP among the captions."""
    multitask_loss = over(losses.multitask_loss)
    del model

    def init(key, params):
        return _classes(key, params, num_concepts)

    def loss(forward):
        features = forward.image_features()
        rows = multitask_loss(
            forward.project(features),
            forward.text(),
            _class_logits(forward.own, features),
            forward.labels,
            forward.logit_scale(),
            pair_labels=forward.identities,
        )
        return rows, {}

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
