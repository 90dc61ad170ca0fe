"""The UniCL loss: bidirectional contrastive learning in image-text-label space.

Letters: B global batch, b this device's rows (B without an axis name), D width,
u_i unit image embedding, v_j unit text embedding, s logit scale, s_ij = s <u_i, v_j>,
P(i) = {k : label_k = label_i}, which always holds i; n_i = |P(i)|.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NO_LABEL = -1
"""The label of an image-text pair: a positive of itself alone."""

DIRECTIONS = ("both", "per_image", "per_text")
IMPLEMENTATIONS = ("auto", "dense")


class UniclAux(NamedTuple):
    """What `unicl_loss_and_aux` tells beside the loss; every field is `[batch]`.

    Rows left out by `where` hold 0 in every field. Values in nats, except counts.
    """

    per_image: jax.Array  # softmax of an image over the batch's texts
    per_text: jax.Array  # softmax of a text over the batch's images
    image_log_normalizer: jax.Array  # log sum_j exp s_ij, over texts
    text_log_normalizer: jax.Array  # log sum_i exp s_ij, over images
    num_positives: jax.Array  # n_i
    floor: jax.Array  # log n_i: the least the loss can be, the targets' entropy
    excess: jax.Array  # loss - floor, unweighted: >= 0, comparable between label mixes


def positive_mask(
    row_labels: jax.Array,
    column_labels: jax.Array,
    row_ids: jax.Array | None = None,
    column_ids: jax.Array | None = None,
) -> jax.Array:
    """Which pairs are positives: equal labels, or one and the same record.

    positive_ij = (label_i = label_j and label_i is a label) or (id_i = id_j).

    Args:
      row_labels: [b] or [b, k] integer; a row all of NO_LABEL matches only itself.
      column_labels: [B] or [B, k] integer; with k lanes all must be equal.
      row_ids: [b] integer, the records' places in the global batch; default 0..b-1.
      column_ids: [B] integer; default 0..B-1.

    Returns:
      [b, B] bool.

    Source: TargetM of Algorithm 1, arXiv 2204.03610. There captions are labelled 0 and
    get fresh ids; a sentinel plus the global row says the same, with no ids to collide
    when labels are gathered from several devices.
    """
    rows = row_labels.reshape(row_labels.shape[0], -1)
    columns = column_labels.reshape(column_labels.shape[0], -1)
    if row_ids is None:
        row_ids = jnp.arange(rows.shape[0])
    if column_ids is None:
        column_ids = jnp.arange(columns.shape[0])
    same_label = jnp.equal(rows[:, None, :], columns[None, :, :]).all(-1)
    is_label = (rows != NO_LABEL).any(-1)
    return (same_label & is_label[:, None]) | jnp.equal(
        row_ids[:, None], column_ids[None, :]
    )


def unicl_loss(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    labels: jax.Array,
    logit_scale: jax.Array | float,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    direction: str = "both",
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str = "auto",
    block_size: int | None = None,
) -> jax.Array:
    """Bidirectional image-text-label contrastive loss of each row, in nats.

    per_image_i = -1/n_i sum_{k in P(i)} log softmax_j(s_ij)[k]
    per_text_j  = -1/n_j sum_{k in P(j)} log softmax_i(s_ij)[k]
    loss_i = (per_image_i + per_text_i) / 2; the mean over the rows is the loss.

    Args:
      image_embeddings: [batch, dim], float, unit L2 norm. With `axis_name`, this
        device's rows of the global batch.
      text_embeddings: [batch, dim], float, unit L2 norm; row i is the text of image i.
      labels: [batch] integer, or [batch, k] lanes that must all be equal. Rows of
        equal label are positives; NO_LABEL (-1) rows match only themselves.
      logit_scale: scalar multiplier s > 0 (1 / temperature), not its logarithm.
      where: [batch] bool; rows left out leave numerators and denominators, as if they
        were not in the batch, and give 0. Divide the sum by `where.sum()`.
      weights: [batch] float >= 0, scaled inside to mean 1 over the rows kept, so that
        the mean of the result is the weighted mean.
      direction: "both", "per_image" or "per_text" (the one-way ablation, Table 3).
      axis_name: the mapped axis (or axes) of `shard_map` or `pmap` whose devices hold
        the other rows; texts and labels are gathered over it. Take gradients of a
        global scalar *outside* `shard_map`; inside, mind `check_vma` (docs/design.md).
      implementation: "dense" holds [batch, global batch] logits; "auto" picks.
      block_size: rows to a block, for implementations that work in blocks; None.

    Returns:
      [batch] float32 (float64 when given float64), in nats, >= log n_i unweighted.
      Float32 embeddings are multiplied in full float32; give bfloat16 ones to use the
      chip's fast products (sums, softmax and loss stay float32).

    Raises:
      TypeError, ValueError: at trace time, if shapes, dtypes or choices don't fit.

    Source: Yang et al., CVPR 2022, arXiv 2204.03610, eq. 1-3 and Algorithm 1, whose
    mean is the sum of eq. 1 over 2B. The paper's prose and code swap "i2t" and "t2i";
    the directions here are named by whose softmax it is.
    """
    return unicl_loss_and_aux(
        image_embeddings,
        text_embeddings,
        labels,
        logit_scale,
        where=where,
        weights=weights,
        direction=direction,
        axis_name=axis_name,
        implementation=implementation,
        block_size=block_size,
    )[0]


def contrastive_loss(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array | float,
    **options,
) -> jax.Array:
    """CLIP's loss of each row, in nats: `unicl_loss` with every row its own class.

    Args:
      image_embeddings: [batch, dim] float, unit L2 norm.
      text_embeddings: [batch, dim] float, unit L2 norm.
      logit_scale: scalar multiplier > 0.
      **options: as for `unicl_loss`.

    Returns:
      [batch] float32.

    Source: Radford et al., 2021, arXiv 2103.00020, figure 3.
    """
    labels = jnp.full(image_embeddings.shape[:1], NO_LABEL, jnp.int32)
    return unicl_loss(image_embeddings, text_embeddings, labels, logit_scale, **options)


def unicl_loss_and_aux(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    labels: jax.Array,
    logit_scale: jax.Array | float,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    direction: str = "both",
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str = "auto",
    block_size: int | None = None,
) -> tuple[jax.Array, UniclAux]:
    """`unicl_loss` and what it is made of.

    Args:
      image_embeddings: as for `unicl_loss`, and so all that follow.
      text_embeddings: as for `unicl_loss`.
      labels: as for `unicl_loss`.
      logit_scale: as for `unicl_loss`.
      where: as for `unicl_loss`.
      weights: as for `unicl_loss`.
      direction: as for `unicl_loss`; the aux always holds both.
      axis_name: as for `unicl_loss`.
      implementation: as for `unicl_loss`.
      block_size: as for `unicl_loss`.

    Returns:
      The loss [batch], and `UniclAux`, each field [batch].

    Raises:
      TypeError, ValueError: as for `unicl_loss`.
    """
    _check(image_embeddings, text_embeddings, labels, logit_scale, where, weights)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}: got {direction!r}.")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}: got {implementation!r}."
        )
    if block_size is not None:
        raise ValueError(
            "block_size must be None: the dense implementation has no blocks; got "
            f"{block_size}. Leave it out."
        )
    per_image, per_text, rlse, clse, n = _dense(
        image_embeddings, text_embeddings, labels, logit_scale, where, axis_name
    )
    both = {
        "both": (per_image + per_text) / 2,
        "per_image": per_image,
        "per_text": per_text,
    }[direction]
    floor = jnp.log(jnp.maximum(n, 1)).astype(both.dtype)
    aux = UniclAux(per_image, per_text, rlse, clse, n, floor, both - floor)
    keep = jnp.ones(both.shape, bool) if where is None else where.astype(bool)
    aux = jax.tree.map(lambda x: jnp.where(keep, x, 0), aux)
    loss = jnp.where(keep, both, 0)
    if weights is not None:
        weights = jnp.where(keep, weights.astype(loss.dtype), 0)
        total, count = weights.sum(), keep.sum()
        if axis_name is not None:
            total, count = lax.psum((total, count), axis_name)
        loss *= weights * count / jnp.where(total == 0, 1, total)
    return loss, aux


def _dense(image_embeddings, text_embeddings, labels, logit_scale, where, axis_name):
    """Both directions from one [b, B] block of logits; only texts are gathered.

    Each device holds its images against all texts. An image's softmax is then local;
    a text's is a sum over devices of column sums, scattered back to the text's owner.
    """
    b = image_embeddings.shape[0]
    low = jnp.promote_types(image_embeddings.dtype, text_embeddings.dtype)
    dtype = jnp.promote_types(low, jnp.float32)
    u, v = image_embeddings.astype(low), text_embeddings.astype(low)
    keep = jnp.ones(b, bool) if where is None else where.astype(bool)
    ids = jnp.arange(b)
    if axis_name is not None:
        ids += lax.axis_index(axis_name) * b

    def gather(x):
        if axis_name is None:
            return x
        return lax.all_gather(x, axis_name, tiled=True)

    def total_of_mine(columns):
        """Sums column values [B] over the devices; each keeps its own [b]."""
        if axis_name is None:
            return columns
        return lax.psum_scatter(columns, axis_name, tiled=True)

    all_v, all_keep = gather(v), gather(keep)
    # Full products for float32 input: by default it is bfloat16 on TPU, TF32 on GPU.
    logits = logit_scale * jnp.matmul(
        u, all_v.T, precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    )
    logits = logits.astype(dtype)
    both_kept = keep[:, None] & all_keep[None, :]
    positive = positive_mask(labels, gather(labels), ids, gather(ids)) & both_kept
    masked = jnp.where(both_kept, logits, -jnp.inf)
    n = jnp.maximum(positive.sum(1), 1)

    rlse = jax.nn.logsumexp(masked, axis=1, where=both_kept)
    row_positive = jnp.where(positive, logits, 0).sum(1)

    # The shift only guards against overflow: any value gives the same result, so no
    # gradient goes through it (pmax has none).
    shift = lax.stop_gradient(masked).max(0)
    if axis_name is not None:
        shift = lax.pmax(shift, axis_name)
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    exponentials = jnp.where(both_kept, jnp.exp(logits - shift[None]), 0).sum(0)
    my_shift = lax.dynamic_slice_in_dim(shift, ids[0], b)
    clse = my_shift + jnp.log(
        jnp.where(keep, total_of_mine(exponentials), 1)  # left-out rows: no log(0)
    )
    column_positive = total_of_mine(jnp.where(positive, logits, 0).sum(0))
    return rlse - row_positive / n, clse - column_positive / n, rlse, clse, n


def _check(image_embeddings, text_embeddings, labels, logit_scale, where, weights):
    u, v = image_embeddings, text_embeddings
    if u.ndim != 2 or u.shape != v.shape:
        raise ValueError(
            "image_embeddings and text_embeddings must both be [batch, dim]: got "
            f"{u.shape} and {v.shape}."
        )
    for name, x in (("image_embeddings", u), ("text_embeddings", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point: got {x.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, NO_LABEL = {NO_LABEL} for captions: got "
            f"{labels.dtype}."
        )
    if labels.ndim not in (1, 2) or labels.shape[0] != u.shape[0]:
        raise ValueError(
            f"labels must be [batch] or [batch, lanes] with batch = {u.shape[0]}: got "
            f"{labels.shape}."
        )
    if jnp.ndim(logit_scale) != 0:
        raise ValueError(
            f"logit_scale must be a scalar: got shape {jnp.shape(logit_scale)}."
        )
    for name, x in (("where", where), ("weights", weights)):
        if x is not None and x.shape != u.shape[:1]:
            raise ValueError(f"{name} must be [batch] = {u.shape[:1]}: got {x.shape}.")
    if where is not None and where.dtype != jnp.bool_:
        raise TypeError(f"where must be bool: got {where.dtype}.")
