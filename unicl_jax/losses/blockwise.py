"""UniCL's sums without the matrix of logits, in memory that grows with the batch.

One pass over tiles of logits gives both directions; the backward pass makes the tiles
anew. What a batch of B needs beside its embeddings and their gradients is a tile and a
few vectors of length B.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.losses.pairs import (
    HEADROOM,
    PairSums,
    enough,
    largest_logit,
    positive_mask,
    product,
    varying_zero,
)
from unicl_jax.losses.sweep import Plan, sweep


class _Side(NamedTuple):
    """A block of rows or columns: what its pairs are told by."""

    embeddings: jax.Array  # [n, dim]
    labels: jax.Array  # [n, lanes]
    ids: jax.Array  # [n], places in the global batch
    keep: jax.Array | None  # [n] bool; None: all, and no block has to be filled up


def pair_sums(u, v, scale, labels, ids, keep, plan: Plan) -> PairSums:
    """The sums over all pairs of the global batch, with a gradient for u, v and scale.

    Args:
      u: [b, dim] float, this device's images; 0 where `keep` is False.
      v: [b, dim], their texts; the same.
      scale: scalar.
      labels: [b, lanes] integer.
      ids: [b] integer, places in the global batch.
      keep: [b] bool, or None for all.
      plan: how the pairs are walked.

    Returns:
      PairSums, in float32 at least; rows left out hold 0.
    """
    b = u.shape[0]
    plan = plan._replace(block_size=min(plan.block_size, b))
    if keep is None and b % plan.block_size:
        keep = jnp.ones(b, bool)  # the last block is filled up with rows to leave out
    # What a ring passes on must vary over the mapped axes; a constant mask does not.
    zero = varying_zero(u, v)
    labels = labels + zero.astype(labels.dtype)
    keep = None if keep is None else keep & (zero == 0)
    # One scale a row, varying over devices as the rows do: its gradient is then summed
    # by whoever copied it here, which is right under check_vma as without it.
    scale = jnp.broadcast_to(scale, (b,)) + zero
    return PairSums(*_sums(plan, u, v, scale, labels, ids, keep))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(plan, u, v, scale, labels, ids, keep):
    return _forward(plan, u, v, scale, labels, ids, keep)[0]


def _forward(plan, u, v, scale, labels, ids, keep):
    images, texts = (_Side(x, labels, ids, keep) for x in (u, v))
    zero = varying_zero(u, v)
    zeros = jnp.zeros(u.shape[0], zero.dtype) + zero
    shift = largest_logit(u, v, scale[0], plan.axis_name) - HEADROOM

    def tile(image, text):
        (image, s), (text,) = image, text
        logits = _logits(image, text, s)
        positive = _positive(image, text)
        e = jnp.exp(logits - shift)
        if keep is not None:
            e = jnp.where(image.keep[:, None] & text.keep[None], e, 0)
        at_positives = jnp.where(positive, logits, 0)
        counts = positive.astype(zero.dtype).sum(1)
        return (
            (e.sum(1), at_positives.sum(1), counts),
            (e.sum(0), at_positives.sum(0)),
        )

    rows, columns = sweep(
        tile, (images, scale), (texts,), (zeros,) * 3, (zeros,) * 2, plan
    )
    (row_sums, row_positive, counts), (column_sums, column_positive) = rows, columns
    all_good = enough(row_sums, column_sums, keep, plan.axis_name)

    def shared_shift():
        return shift + jnp.log(row_sums), shift + jnp.log(column_sums)

    def own_shifts():
        return _normalizers_by_maxima(plan, images, texts, scale, zeros)

    rlse, clse = lax.cond(all_good, shared_shift, own_shifts)
    if keep is not None:
        rlse, clse = (jnp.where(keep, x, 0) for x in (rlse, clse))
    out = rlse, clse, row_positive, column_positive, counts
    return out, (u, v, scale, labels, ids, keep, rlse, clse, shift, all_good)


def _normalizers_by_maxima(plan, images, texts, scale, zeros):
    """Log normalizers, each shifted by its own maximum: for logits far apart.

    Two more passes and two exponentials a pair; for embeddings that are not unit,
    scales over 100, batches in which a row's best match points away, and for NaN.
    """

    def logits_of(image, text, s):
        logits = _logits(image, text, s)
        if image.keep is None:
            return logits
        return jnp.where(image.keep[:, None] & text.keep[None], logits, -jnp.inf)

    def maxima(image, text):
        (image, s), (text,) = image, text
        logits = logits_of(image, text, s)
        return logits.max(1), logits.max(0)

    least = zeros - jnp.inf
    row_max, column_max = sweep(
        maxima, (images, scale), (texts,), least, least, plan, jnp.maximum
    )
    # Rows left out have no maximum; their sums are not looked at.
    row_max, column_max = (
        jnp.where(x == -jnp.inf, 0, x) for x in (row_max, column_max)
    )

    def sums(image, text):
        (image, s, row_max), (text, column_max) = image, text
        logits = logits_of(image, text, s)
        return (
            jnp.exp(logits - row_max[:, None]).sum(1),
            jnp.exp(logits - column_max[None]).sum(0),
        )

    row_sums, column_sums = sweep(
        sums, (images, scale, row_max), (texts, column_max), zeros, zeros, plan
    )
    return row_max + jnp.log(row_sums), column_max + jnp.log(column_sums)


def _backward(plan, residuals, cotangents):
    u, v, scale, labels, ids, keep, rlse, clse, shift, all_good = residuals
    g_rlse, g_clse, g_row_positive, g_column_positive, _ = cotangents
    images, texts = (_Side(x, labels, ids, keep) for x in (u, v))
    dtype = rlse.dtype
    low = jnp.promote_types(u.dtype, v.dtype)
    zeros = jnp.zeros(u.shape, dtype) + varying_zero(u, v)

    def run(softmaxes):
        def tile(image, text):
            image, s = image
            cosines = product(image.side.embeddings, text.side.embeddings.T)
            d = softmaxes(s[:, None] * cosines, image, text)
            if keep is not None:
                d = jnp.where(image.side.keep[:, None] & text.side.keep[None], d, 0)
            # The positives leave the softmax before the cast: what remains of a matched
            # pair is smaller than bfloat16's spacing at 1.
            positive = _positive(image.side, text.side)
            d += jnp.where(positive, image.positive[:, None] + text.positive[None], 0)
            dscale = (d * cosines).sum(1)
            d = d.astype(low)
            # Transposed after the product: d as it lies is the faster operand.
            of_texts = lax.optimization_barrier(product(image.side.embeddings.T, d)).T
            return (product(d, text.side.embeddings), dscale), (of_texts,)

        return sweep(
            tile,
            (_Backward(images, rlse, g_rlse, g_row_positive), scale),
            _Backward(texts, clse, g_clse, g_column_positive),
            (zeros, zeros[:, 0]),
            (zeros,),
            plan,
        )

    def shared_shift():
        def softmaxes(logits, image, text):
            a, b = (
                jnp.where(x.cotangent == 0, 0, x.cotangent * jnp.exp(shift - x.lse))
                for x in (image, text)
            )
            return jnp.exp(logits - shift) * (a[:, None] + b[None])

        return run(softmaxes)

    def own_shifts():
        def softmaxes(logits, image, text):
            return (
                jnp.exp(logits - image.lse[:, None]) * image.cotangent[:, None]
                + jnp.exp(logits - text.lse[None]) * text.cotangent[None]
            )

        return run(softmaxes)

    (du, dscale), (dv,) = lax.cond(all_good, shared_shift, own_shifts)
    du, dv = scale[:, None] * du, scale[:, None] * dv  # one value in every row
    return du.astype(u.dtype), dv.astype(v.dtype), dscale, None, None, None


_sums.defvjp(_forward, _backward)


class _Backward(NamedTuple):
    side: _Side
    lse: jax.Array  # [n] log normalizer
    cotangent: jax.Array  # [n] of the log normalizer
    positive: jax.Array  # [n] cotangent of the sum over positives


def _logits(image, text, scale):
    return scale[:, None] * product(image.embeddings, text.embeddings.T)


def _positive(image, text):
    positive = positive_mask(image.labels, text.labels, image.ids, text.ids)
    if image.keep is None:
        return positive
    return positive & image.keep[:, None] & text.keep[None]
