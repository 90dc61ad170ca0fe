"""Objectives that compare one view of each image with texts, or with vectors."""

import jax
import jax.numpy as jnp

from unicl_jax import losses
from unicl_jax.encoders import unit
from unicl_jax.losses import NO_LABEL
from unicl_jax.objectives.objective import Objective


def unicl(over, model, num_concepts, relabel=None, direction="both"):
    """UniCL's loss; CLIP's, if no row has a label; one of its directions alone."""
    del model, num_concepts
    loss_and_metrics = _pairs(over, direction)

    def loss(forward):
        labels = forward.identities
        if relabel is not None:
            labels = jnp.full_like(forward.labels, relabel)
        return loss_and_metrics(forward, forward.image(), forward.text(), labels)

    return Objective(loss)


def clip(*args):
    """Every row a class of its own, whatever its label."""
    return unicl(*args, relabel=NO_LABEL)


def one_way(*args):
    """UniCL's softmax of each image over the texts, without the other direction."""
    return unicl(*args, direction="per_image")


def siglip(over, model, num_concepts):
    """Sigmoid loss, rows of equal label positives; its bias starts at -10."""
    del model, num_concepts
    siglip_loss = over(losses.siglip_loss)

    def init(key, params):
        del key, params
        return {"logit_bias": jnp.float32(-10)}

    def loss(forward):
        bias = forward.own["logit_bias"]
        rows = siglip_loss(
            forward.image(),
            forward.text(),
            forward.logit_scale(),
            bias,
            labels=forward.identities,
        )
        return rows, {"logit_bias": bias}

    return Objective(loss, init)


def linear_text(over, model, num_concepts):
    """UniCL with a learnt vector for each concept in place of the text tower."""
    loss_and_metrics = _pairs(over)

    def init(key, params):
        width = params["text_projection"].shape[1]
        draw = jax.nn.initializers.truncated_normal(0.02)
        return {"label_embedding": draw(key, (num_concepts, width))}

    def loss(forward):
        v = unit(forward.own["label_embedding"][forward.labels])
        rows, metrics = loss_and_metrics(forward, forward.image(), v, forward.labels)
        return rows, {"excess": metrics["excess"]}

    def encode_image(params, state, images):
        return model.encode_image(params, state, images)[0]

    def concepts(params):
        return unit(params["objective"]["label_embedding"])

    return Objective(loss, init, encode_image, concepts)


def _pairs(over, direction="both"):
    """UniCL's loss of a batch and its metrics, whether images are mixed or whole."""
    loss_and_aux = over(losses.unicl_loss_and_aux)

    def whole(forward, u, v, labels):
        rows, aux = loss_and_aux(
            u, v, labels, forward.logit_scale(), direction=direction
        )
        return rows, {
            "excess": aux.excess.mean(),
            "per_image": aux.per_image.mean(),
            "per_text": aux.per_text.mean(),
            "positives_per_row": aux.num_positives.mean(),
        }

    def mixed(forward, u, v, labels):
        mixture = forward.mixture
        targets = losses.mixed_targets(labels, mixture.partner, mixture.share)
        logits = losses.pair_logits(u, v, forward.logit_scale())
        ways = {
            way: losses.soft_target_loss(logits, targets, direction=way)
            for way in ("per_image", "per_text")
        }
        rows = ways.get(direction, (ways["per_image"] + ways["per_text"]) / 2)
        floor = losses.soft_target_floor(targets, direction=direction)
        return rows, {
            "excess": (rows - floor).mean(),
            "per_image": ways["per_image"].mean(),
            "per_text": ways["per_text"].mean(),
            "positives_per_row": targets.sum(1).mean(),  # a share of one counts as that
        }

    def loss(forward, *rows):
        return (whole if forward.mixture is None else mixed)(forward, *rows)

    return loss
