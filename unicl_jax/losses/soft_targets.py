"""The contrastive loss for arbitrary affinities between images and texts."""

import jax
import jax.numpy as jnp

from unicl_jax.losses.pairs import positive_mask, product


def soft_target_loss(
    logits: jax.Array,
    targets: jax.Array,
    *,
    where: jax.Array | None = None,
    direction: str = "both",
) -> jax.Array:
    """Cross-entropy of each row and each column against targets >= 0, in nats.

    per_image_i = -sum_j T_ij / (sum_k T_ik) log softmax_j(s_ij)[j]
    per_text_j  = -sum_i T_ij / (sum_k T_kj) log softmax_i(s_ij)[i]
    loss_i = (per_image_i + per_text_i) / 2; the mean over the rows is the loss.

    With the 0-1 targets of equal labels this is `unicl_loss`. Targets need not be
    symmetric, hence the two divisors: mixed images against unmixed texts, Jaccard
    overlap of label sets, teachers' similarities.

    Args:
      logits: [batch, batch] float: images by texts, scale included.
      targets: [batch, batch] float >= 0, in any unit; a row or column without any
        target has a loss of 0.
      where: [batch] bool; rows left out leave rows and columns, and give 0.
      direction: "both", "per_image" or "per_text".

    Returns:
      [batch] float32 (float64 when given float64), in nats.

    Raises:
      TypeError, ValueError: at trace time, if shapes, dtypes or choices don't fit.

    Source: SoftCE of Algorithm 1, arXiv 2204.03610, with a divisor for each direction.
    """
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits must be [batch, batch]: got {logits.shape}.")
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets must be shaped like logits, {logits.shape}: got {targets.shape}."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating point: got {logits.dtype}.")
    if where is not None and (where.shape != logits.shape[:1] or where.dtype != bool):
        raise ValueError(
            f"where must be bool {logits.shape[:1]}: got {where.dtype} {where.shape}."
        )
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits, targets = logits.astype(dtype), targets.astype(dtype)
    kept = None
    if where is not None:
        kept = where[:, None] & where[None]
        logits, targets = jnp.where(kept, logits, 0), jnp.where(kept, targets, 0)

    def along(axis):
        normalizer = jax.nn.logsumexp(logits, axis=axis, where=kept)
        total = targets.sum(axis)
        # -inf, a pair masked out, counts for nothing where it is no target.
        products = targets * jnp.where(targets == 0, 0, logits)
        at_targets = products.sum(axis) / jnp.where(total == 0, 1, total)
        return jnp.where(total == 0, 0, normalizer - at_targets)

    return _of_direction(along, direction)


def soft_target_floor(targets: jax.Array, *, direction: str = "both") -> jax.Array:
    """The least that `soft_target_loss` can be: the entropy of the targets, in nats.

    per_image_i = -sum_j q_ij log q_ij, q_ij = T_ij / (sum_k T_ik)
    per_text_j  = -sum_i q_ij log q_ij, q_ij = T_ij / (sum_k T_kj)
    floor_i = (per_image_i + per_text_i) / 2. With 0-1 targets, log n_i of `unicl_loss`.

    Args:
      targets: as for `soft_target_loss`.
      direction: as for `soft_target_loss`.

    Returns:
      [batch] float32 (float64 when given float64), in nats.

    Raises:
      ValueError: at trace time, if the choice doesn't fit.
    """
    targets = targets.astype(jnp.promote_types(targets.dtype, jnp.float32))
    logs = jnp.log(jnp.where(targets == 0, 1, targets))

    def along(axis):
        total = targets.sum(axis)
        total = jnp.where(total == 0, 1, total)
        return jnp.log(total) - (targets * logs).sum(axis) / total

    return _of_direction(along, direction)


def mixed_targets(labels: jax.Array, partner: jax.Array, share: jax.Array) -> jax.Array:
    """Targets of images mixed by MixUp or CutMix, against texts that stay unmixed.

    T_ij = share_i M_ij + (1 - share_i) M_{partner_i j}, M the positives of the batch.

    Args:
      labels: [batch] or [batch, k] integer, NO_LABEL for captions.
      partner: [batch] integer in [0, batch): which record was mixed into image i.
        Another number gives NaN.
      share: [batch] or scalar float in [0, 1]: what is left of image i itself.

    Returns:
      [batch, batch] float32, images by texts.
    """
    own = positive_mask(labels, labels).astype(jnp.float32)
    # Not rows of `own`: those may lie on other devices, and labels are few bytes.
    others = positive_mask(labels[partner], labels, partner).astype(jnp.float32)
    share = jnp.broadcast_to(jnp.asarray(share, jnp.float32), partner.shape)
    there = (partner >= 0) & (partner < labels.shape[0])
    share = jnp.where(there, share, jnp.nan)[:, None]
    return share * own + (1 - share) * others


def pair_logits(
    image_embeddings: jax.Array, text_embeddings: jax.Array, logit_scale: jax.Array
) -> jax.Array:
    """s_ij = s <u_i, v_j>, [batch, batch], in full float32 products.

    Args:
      image_embeddings: [batch, dim] float, unit L2 norm.
      text_embeddings: [batch, dim] float, unit L2 norm.
      logit_scale: scalar.

    Returns:
      [batch, batch] float32 (float64 when given float64).
    """
    return logit_scale * product(image_embeddings, text_embeddings.T)


def _of_direction(along, direction):
    """`along(axis)`, a sum over texts (1) or images (0), or the mean of both."""
    choices = {
        "both": lambda: (along(1) + along(0)) / 2,
        "per_image": lambda: along(1),
        "per_text": lambda: along(0),
    }
    if direction not in choices:
        raise ValueError(
            f"direction must be one of {tuple(choices)}: got {direction!r}."
        )
    return choices[direction]()
