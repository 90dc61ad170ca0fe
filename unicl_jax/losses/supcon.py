"""Supervised contrastive learning: images against images, several views of each."""

import jax
import jax.numpy as jnp

from unicl_jax.losses.checks import (
    check_arrays,
    check_choice,
    check_float,
    check_labels,
    check_rows,
)
from unicl_jax.losses.pairs import gather, place, positive_mask, product

ANCHORS = ("all", "one")


def supcon_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    temperature: jax.Array | float = 0.07,
    *,
    base_temperature: float | None = None,
    anchors: str = "all",
    where: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Supervised contrastive loss of each image, in nats.

    loss of anchor a = -T/T0 1/|P(a)| sum_{p in P(a)} log( exp(z_a.z_p / T)
    / sum_{c != a} exp(z_a.z_c / T) ); P(a): all other views of a's label. The loss of
    an image is the mean over its anchors; an anchor without a positive gives 0 and
    counts.

    Args:
      embeddings: [batch, views, dim] float, unit L2 norm; with `axis_name`, this
        device's.
      labels: [batch] or [batch, k] integer. NO_LABEL images are positives of their own
        views alone: all of them give SimCLR's loss.
      temperature: T, scalar > 0; 0.07 and 0.1 in the paper's code and text.
      base_temperature: T0; None for T itself, a factor of 1.
      anchors: "all" views, or "one": the first of each image against all.
      where: [batch] bool; images left out leave the batch and give 0.
      axis_name: as for `unicl_loss`; all views of all devices are gathered.

    Returns:
      [batch] float32 (float64 when given float64), in nats.

    Raises:
      TypeError, ValueError: at trace time, if shapes, dtypes or choices don't fit.

    Source: Khosla et al., NeurIPS 2020, arXiv 2004.11362, eq. 2 (L_out), and its
      official
    code for T0 and anchors without positives.
    """
    check_arrays(embeddings=embeddings)
    if embeddings.ndim != 3 or not embeddings.size:
        raise ValueError(
            f"embeddings must be [batch, views, dim]: got {embeddings.shape}."
        )
    check_float(embeddings=embeddings)
    batch, views, dim = embeddings.shape
    check_labels(labels, batch)
    check_rows(batch, where)
    check_choice("anchors", anchors, ANCHORS)
    keep = jnp.ones(batch, bool) if where is None else where
    z = jnp.where(keep[:, None, None], embeddings, 0)
    ids, labels = place(batch, axis_name), labels.reshape(batch, -1)
    all_z, all_ids, all_labels, all_keep = gather((z, ids, labels, keep), axis_name)

    num_anchors = views if anchors == "all" else 1
    anchor_z = z[:, :num_anchors].reshape(-1, dim)
    logits = product(anchor_z, all_z.reshape(-1, dim).T) / temperature
    same = positive_mask(labels, all_labels, ids, all_ids)
    kept = keep[:, None] & all_keep[None]
    # Images to views: anchors are rows (image, view), contrasts columns (image, view).
    same, kept = (
        jnp.repeat(jnp.repeat(x, num_anchors, axis=0), views, axis=1)
        for x in (same, kept)
    )
    own = jnp.equal(
        (ids[:, None] * views + jnp.arange(num_anchors)[None]).reshape(-1, 1),
        (all_ids[:, None] * views + jnp.arange(views)[None]).reshape(1, -1),
    )
    others = kept & ~own
    positive = same & others
    count = positive.sum(1)
    normalizer = jax.nn.logsumexp(logits, axis=1, where=others)
    mean_positive = jnp.where(positive, logits, 0).sum(1) / jnp.maximum(count, 1)
    losses = jnp.where(count > 0, normalizer - mean_positive, 0)
    if base_temperature is not None:
        losses *= temperature / base_temperature
    return losses.reshape(batch, num_anchors).mean(1)
