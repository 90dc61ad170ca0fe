"""The UniCL loss: bidirectional contrastive learning in image-text-label space.

Letters: B global batch, b this device's rows (B without an axis name), D width,
u_i unit image embedding, v_j unit text embedding, s logit scale, s_ij = s <u_i, v_j>,
P(i) = {k : label_k = label_i}, which always holds i; n_i = |P(i)|.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.losses import blockwise, dense
from unicl_jax.losses.checks import check_block_size, check_choice, check_pairs
from unicl_jax.losses.pairs import NO_LABEL, place
from unicl_jax.losses.sweep import Plan

DIRECTIONS = ("both", "per_image", "per_text")
IMPLEMENTATIONS = ("auto", "dense", "blockwise", "ring")

DENSE_UNTIL = 2**26
"""Logits on a device up to which "auto" is "dense": 256 MiB of float32."""

BLOCK_SIZE = 1024
"""Rows and columns of a tile unless asked otherwise."""


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
      implementation: "dense" holds [batch, global batch] logits. "blockwise" makes them
        in tiles, again for the gradient, and holds what grows with the batch, not its
        square. "ring" does so too, and passes the texts from device to device instead
        of gathering them. The same numbers to round-off. "auto": dense up to
        DENSE_UNTIL logits a device, then blockwise. Forward-mode
        derivatives: dense only.
      block_size: rows and columns of a tile, for blockwise and ring; BLOCK_SIZE if
        None.

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
    u, v = image_embeddings, text_embeddings
    check_pairs(u, v, labels, logit_scale, where, weights)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    _check_block_size(block_size, implementation)
    if where is not None:
        # Whatever stands in rows left out, NaN too, must not reach a product.
        u, v = (jnp.where(where[:, None], x, 0) for x in (u, v))
    rlse, clse, row_positive, column_positive, n = _pair_sums(
        u, v, logit_scale, labels, where, axis_name, implementation, block_size
    )
    divisor = jnp.maximum(n, 1).astype(rlse.dtype)
    per_image, per_text = (
        rlse - row_positive / divisor,
        clse - column_positive / divisor,
    )
    both = {
        "both": (per_image + per_text) / 2,
        "per_image": per_image,
        "per_text": per_text,
    }[direction]
    floor = jnp.log(divisor)
    aux = UniclAux(per_image, per_text, rlse, clse, n, floor, both - floor)
    keep = jnp.ones(both.shape, bool) if where is None else where
    aux = jax.tree.map(lambda x: jnp.where(keep, x, 0), aux)
    loss = jnp.where(keep, both, 0)
    if weights is not None:
        weights = jnp.where(keep, weights.astype(loss.dtype), 0)
        total, count = weights.sum(), keep.sum()
        if axis_name is not None:
            total, count = lax.psum((total, count), axis_name)
        loss *= weights * count / jnp.where(total == 0, 1, total)
    return loss, aux


def _pair_sums(u, v, logit_scale, labels, keep, axis_name, implementation, block_size):
    """The sums over pairs, by one of the implementations; counts as integers."""
    b = u.shape[0]
    low = jnp.promote_types(u.dtype, v.dtype)
    scale = jnp.asarray(logit_scale, jnp.promote_types(low, jnp.float32))
    u, v = u.astype(low), v.astype(low)
    labels = jnp.asarray(labels).reshape(b, -1)
    ids = place(b, axis_name)
    if implementation == "auto":
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        implementation = "dense" if b * b * devices <= DENSE_UNTIL else "blockwise"
    if implementation == "dense":
        return dense.pair_sums(u, v, scale, labels, ids, keep, axis_name)
    plan = Plan(block_size or BLOCK_SIZE, axis_name, implementation == "ring")
    sums = blockwise.pair_sums(u, v, scale, labels, ids, keep, plan)
    return sums._replace(num_positives=sums.num_positives.astype(jnp.int32))


def _check_block_size(block_size, implementation):
    if block_size is None:
        return
    if implementation in ("auto", "dense"):
        raise ValueError(
            'block_size must be None unless implementation is "blockwise" or "ring": '
            f"got {block_size} for {implementation!r}."
        )
    check_block_size(block_size)
