"""Multi-positive NCE over several domains: each positive pair is judged on its own."""

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.losses.checks import (
    check_arrays,
    check_choice,
    check_float,
    check_labels,
    check_rows,
)
from unicl_jax.losses.pairs import gather, place, positive_mask, product

AVERAGES = ("anchor", "pair")


def mp_nce_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    domains: jax.Array,
    scales: jax.Array,
    offsets: jax.Array,
    *,
    pair_weights: jax.Array | None = None,
    average: str = "anchor",
    where: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Loss of each anchor, in nats: the other positives are in no denominator.

    l_ip = -log( e_ip / (e_ip + sum_{n in N(i)} e_in) )
    e_ij = exp(s_D (z_i.z_j - b_D)), D the domain pair of i and j
    loss_i = 1/|P(i)| sum_{p in P(i)} w_D l_ip
    P(i): the others of i's label; N(i): those of other labels.

    Args:
      embeddings: [n, dim] float, unit L2 norm: all views of all records, images and
        texts; with `axis_name`, this device's.
      labels: [n] or [n, k] integer: the record (or class) each belongs to. NO_LABEL
        rows have no positive and are negatives of all.
      domains: [n] integer: 0 image, 1 text.
      scales: [3] float > 0: 1 / temperature of image-image, image-text, text-text
        pairs.
      offsets: [3] float: their b. One offset common to all cancels.
      pair_weights: [3] float >= 0, their w; None for 1.
      average: "anchor": as above, the mean over anchors is the loss. "pair": every pair
        weighs the same, whatever its anchor's number of positives; scaled so that the
        mean over anchors is the mean over pairs.
      where: [n] bool; rows left out leave the batch and give 0.
      axis_name: as for `unicl_loss`.

    Returns:
      [n] float32 (float64 when given float64); an anchor without positives gives 0.

    Raises:
      TypeError, ValueError: at trace time, if shapes, dtypes or choices don't fit.

    Source: UniCLIP, Lee et al., NeurIPS 2022, arXiv 2209.13430. There is no public
      code;
    the form of l_ip is as published re-implementations have it, the domain pairs'
    scales and offsets, the weights and the average are reconstructed: our reading.
    """
    check_arrays(embeddings=embeddings)
    if embeddings.ndim != 2 or not embeddings.size:
        raise ValueError(f"embeddings must be [n, dim]: got {embeddings.shape}.")
    check_float(embeddings=embeddings, scales=scales, offsets=offsets)
    n = embeddings.shape[0]
    check_labels(labels, n)
    if domains.shape != (n,) or not jnp.issubdtype(domains.dtype, jnp.integer):
        raise ValueError(
            f"domains must be integers [{n}], 0 image and 1 text: got {domains.dtype} "
            f"{domains.shape}."
        )
    for name, x in (
        ("scales", scales),
        ("offsets", offsets),
        ("pair_weights", pair_weights),
    ):
        if x is not None and x.shape != (3,):
            raise ValueError(
                f"{name} must be [3], image-image, image-text, text-text: got "
                f"{x.shape}."
            )
    check_rows(n, where)
    check_choice("average", average, AVERAGES)
    dtype = jnp.promote_types(embeddings.dtype, jnp.float32)
    keep = jnp.ones(n, bool) if where is None else where
    z = jnp.where(keep[:, None], embeddings, 0)
    ids, labels = place(n, axis_name), labels.reshape(n, -1)
    columns = gather((z, labels, ids, domains, keep), axis_name)
    all_z, all_labels, all_ids, all_domains, all_keep = columns

    pair = domains[:, None] + all_domains[None]  # 0, 1, 2: image-image .. text-text

    def of_pair(x):  # a selection: looking x up, pair by pair, is slow to take back
        x = jnp.asarray(x, dtype)
        return jnp.where(pair == 0, x[0], jnp.where(pair == 1, x[1], x[2]))

    cosines = product(z, all_z.T)
    logits = of_pair(scales) * (cosines - of_pair(offsets))
    same = positive_mask(labels, all_labels, ids, all_ids)
    kept = keep[:, None] & all_keep[None]
    positive = same & kept & ~jnp.equal(ids[:, None], all_ids[None])
    negative = ~same & kept
    # No negatives: an empty sum, whose logarithm any great negative number stands for.
    log_negatives = jnp.where(
        negative.any(1), jax.nn.logsumexp(logits, axis=1, where=negative), -1e9
    )
    losses = jax.nn.softplus(log_negatives[:, None] - logits)
    if pair_weights is not None:
        losses *= of_pair(pair_weights)
    total, count = jnp.where(positive, losses, 0).sum(1), positive.sum(1)
    if average == "anchor":
        return total / jnp.maximum(count, 1)
    anchors, pairs = keep.sum(), count.sum()
    if axis_name is not None:
        anchors, pairs = lax.psum((anchors, pairs), axis_name)
    return total * anchors / jnp.maximum(pairs, 1)
