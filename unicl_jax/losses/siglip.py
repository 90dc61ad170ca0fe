"""SigLIP: every pair of a batch is a yes-or-no question of its own."""

import jax
import jax.numpy as jnp

from unicl_jax.losses.checks import (
    check_block_size,
    check_choice,
    check_float,
    check_pairs,
)
from unicl_jax.losses.pairs import (
    NO_LABEL,
    gather,
    place,
    positive_mask,
    product,
    varying_zero,
)
from unicl_jax.losses.sweep import Plan, sweep

IMPLEMENTATIONS = ("dense", "blockwise")


def siglip_loss(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array | float,
    logit_bias: jax.Array | float,
    *,
    labels: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str = "dense",
    block_size: int = 1024,
) -> jax.Array:
    """Sigmoid loss of each image against all texts, in nats.

    loss_i = -sum_j log sigmoid(z_ij (s <u_i, v_j> + b)), z_ij = 1 for positives,
    else -1. The mean over rows is the loss: the sum over pairs, divided by the batch.

    Args:
      image_embeddings: [batch, dim] float, unit L2 norm; with `axis_name`, this
        device's.
      text_embeddings: [batch, dim] float, unit L2 norm.
      logit_scale: scalar multiplier s = exp(t'); 10 at first in the paper.
      logit_bias: scalar b; -10 at first in the paper, for most pairs are negatives.
      labels: [batch] or [batch, k] integer: rows of equal label are positives, too;
        None for the paper's loss, in which row i's only positive is text i.
      where: [batch] bool; rows left out leave the batch and give 0.
      axis_name: as for `unicl_loss`.
      implementation: "dense" or "blockwise", whose memory grows with the batch alone.
      block_size: rows and columns of a tile.

    Returns:
      [batch] float32 (float64 when given float64), in nats.

    Raises:
      TypeError, ValueError: at trace time, if shapes, dtypes or choices don't fit.

    Source: Zhai et al., ICCV 2023, arXiv 2303.15343, Algorithm 1. Several positives by
    label are ours.
    """
    u, v = image_embeddings, text_embeddings
    check_float(image_embeddings=u, text_embeddings=v)
    if labels is None:
        labels = jnp.full(u.shape[:1], NO_LABEL, jnp.int32)
    check_pairs(u, v, labels, logit_scale, where)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if jnp.ndim(logit_bias) != 0:
        raise ValueError(
            f"logit_bias must be a scalar: got shape {jnp.shape(logit_bias)}."
        )
    check_block_size(block_size)
    b, low = u.shape[0], jnp.promote_types(u.dtype, v.dtype)
    dtype = jnp.promote_types(low, jnp.float32)
    keep = jnp.ones(b, bool) if where is None else where
    u, v = (jnp.where(keep[:, None], x, 0).astype(low) for x in (u, v))
    sides = [(x, labels.reshape(b, -1), place(b, axis_name), keep) for x in (u, v)]

    def tile(row, column):
        (u, row_labels, row_ids, row_keep) = row
        (v, column_labels, column_ids, column_keep) = column
        logits = logit_scale * product(u, v.T) + logit_bias
        positive = positive_mask(row_labels, column_labels, row_ids, column_ids)
        losses = jax.nn.softplus(jnp.where(positive, -logits, logits))
        kept = row_keep[:, None] & column_keep[None]
        return jnp.where(kept, losses, 0).sum(1), ()

    if implementation == "dense":
        return tile(sides[0], gather(sides[1], axis_name))[0]
    zeros = jnp.zeros(b, dtype) + varying_zero(u, v)
    plan = Plan(min(block_size, b), axis_name)
    # Checkpointed, or each tile's logits would be kept for the gradient.
    return sweep(jax.checkpoint(tile), *sides, zeros, (), plan)[0]
