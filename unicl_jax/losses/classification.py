"""Cross-entropy over classes, alone and beside CLIP on what has no class."""

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.losses.checks import check_float, check_labels, check_rows
from unicl_jax.losses.pairs import NO_LABEL
from unicl_jax.losses.unicl import unicl_loss


def cross_entropy_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Softmax cross-entropy of each labelled row, in nats; 0 for the others.

    loss_i = -sum_c q_ic log softmax(logits_i)[c];
    q_ic = (1 - a) [c = label_i] + a / classes.

    Args:
      logits: [batch, classes] float.
      labels: [batch] integer in [0, classes), or NO_LABEL: no class, and a loss of 0.
        Another number gives NaN.
      where: [batch] bool; rows left out give 0.
      label_smoothing: a, in [0, 1].

    Returns:
      [batch] float32 (float64 when given float64). For the mean over labelled rows
      divide the sum by their number.

    Raises:
      TypeError, ValueError: at trace time, if shapes or dtypes don't fit.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [batch, classes]: got {logits.shape}.")
    check_float(logits=logits)
    check_labels(labels, logits.shape[0])
    if labels.ndim != 1:
        raise ValueError(f"labels must be [batch]: got {labels.shape}.")
    check_rows(logits.shape[0], where)
    counted = labels != NO_LABEL
    if where is not None:
        counted &= where
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits = jnp.where(counted[:, None], logits, 0)
    classes = logits.shape[1]
    known = (labels >= 0) & (labels < classes)
    own = jnp.take_along_axis(
        logits, jnp.where(known, labels, 0)[:, None], axis=1, mode="clip"
    )[:, 0]
    # -inf, a class masked out, has no share in a mean of weight 0.
    rest = jnp.where(label_smoothing == 0, 0, label_smoothing * logits.mean(1))
    at_target = (1 - label_smoothing) * own + rest
    losses = jax.nn.logsumexp(logits, axis=1) - at_target
    return jnp.where(counted, jnp.where(known, losses, jnp.nan), 0)


def multitask_loss(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    class_logits: jax.Array,
    labels: jax.Array,
    logit_scale: jax.Array | float,
    *,
    class_weight: float = 1.0,
    pair_weight: float = 1.0,
    pair_labels: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    **options,
) -> jax.Array:
    """Cross-entropy on labelled rows plus CLIP's loss among the others, in nats.

    loss = a mean_{labelled} CE + b mean_{captions} CLIP; a batch without one kind has
    only the other's term.

    Args:
      image_embeddings: [batch, dim] float, unit L2 norm; with `axis_name`, this
        device's.
      text_embeddings: [batch, dim] float, unit L2 norm.
      class_logits: [batch, classes] float, of a linear head on the image tower.
      labels: [batch] integer in [0, classes), or NO_LABEL for captions.
      logit_scale: scalar multiplier, of the pairs.
      class_weight: a.
      pair_weight: b.
      pair_labels: [batch] or [batch, k] integer: captions of equal ones are positives
        of each other; default: each is its own alone.
      where: [batch] bool; rows left out leave the batch and give 0.
      axis_name: as for `unicl_loss`.
      **options: of `unicl_loss`: implementation, block_size, direction.

    Returns:
      [batch] float32; its mean over the rows kept, of all devices, is the loss.

    Raises:
      TypeError, ValueError: at trace time, if shapes, dtypes or choices don't fit.

    Source: the multi-task baseline of arXiv 2204.03610, Table 6. The paper gives no
    weights; 1 and 1 are our reading.
    """
    keep = jnp.ones(labels.shape, bool) if where is None else where
    is_class, is_pair = keep & (labels != NO_LABEL), keep & (labels == NO_LABEL)
    classes = cross_entropy_loss(class_logits, labels, where=keep)
    if pair_labels is None:
        pair_labels = jnp.full_like(labels, NO_LABEL)
    pairs = unicl_loss(
        image_embeddings,
        text_embeddings,
        pair_labels,
        logit_scale,
        where=is_pair,
        axis_name=axis_name,
        **options,
    )
    counts = keep.sum(), is_class.sum(), is_pair.sum()
    if axis_name is not None:
        counts = lax.psum(counts, axis_name)
    kept, of_classes, of_pairs = (x.astype(classes.dtype) for x in counts)
    return class_weight * classes * kept / jnp.maximum(
        of_classes, 1
    ) + pair_weight * pairs * kept / jnp.maximum(of_pairs, 1)
