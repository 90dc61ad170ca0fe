"""UniCL's sums from the whole [b, B] matrix of this device's logits."""

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.losses.pairs import (
    HEADROOM,
    PairSums,
    enough,
    gather,
    largest_logit,
    positive_mask,
    product,
)


def pair_sums(u, v, scale, labels, ids, keep, axis_name) -> PairSums:
    """The sums over all pairs; only texts, labels and masks are gathered.

    Each device holds its images against all texts. An image's softmax is then local; a
    text's is a sum over devices of column sums, scattered back to the text's owner.
    Arguments and result as for `blockwise.pair_sums`; plain operations throughout, so
    that forward-mode derivatives work, too.
    """

    def total_of_mine(columns):
        """Sums column values [B] over the devices; each keeps its own [b]."""
        if axis_name is None:
            return columns
        return lax.psum_scatter(columns, axis_name, tiled=True)

    all_v = gather(v, axis_name)
    all_labels, all_ids = gather((labels, ids), axis_name)
    positive = positive_mask(labels, all_labels, ids, all_ids)
    both_kept = None
    if keep is not None:
        both_kept = keep[:, None] & gather(keep, axis_name)[None]
        positive &= both_kept

    def logits_of(u, all_v, scale):
        # The barrier keeps the texts transposed in memory, and with them their
        # gradient, which XLA's CPU backend otherwise makes from a transposed [b, B]
        # matrix: five times slower than from the matrix as it lies.
        return scale * product(u, lax.optimization_barrier(all_v.T))

    logits = logits_of(u, all_v, scale)
    # One shift for all pairs, so that one exponential serves both directions. Any shift
    # gives the same result: no gradient goes through it.
    shift = largest_logit(u, v, scale, axis_name) - HEADROOM
    e = jnp.exp(logits - shift)
    if keep is not None:
        e = jnp.where(both_kept, e, 0)
    row_sums, column_sums = e.sum(1), total_of_mine(e.sum(0))

    def shared_shift(row_sums, column_sums, u, all_v, scale):
        del u, all_v, scale
        if keep is not None:
            row_sums, column_sums = (
                jnp.where(keep, x, 1) for x in (row_sums, column_sums)
            )
        return shift + _log(row_sums), shift + _log(column_sums)

    @jax.checkpoint  # keeps nothing: this branch is hardly ever taken
    def own_shifts(row_sums, column_sums, u, all_v, scale):
        del row_sums, column_sums
        logits = logits_of(u, all_v, scale)
        masked = logits if keep is None else jnp.where(both_kept, logits, -jnp.inf)
        top = lax.stop_gradient(masked).max(0)
        if axis_name is not None:
            top = lax.pmax(top, axis_name)
        top = jnp.where(top == -jnp.inf, 0, top)
        sums = total_of_mine(jnp.exp(masked - top[None]).sum(0))
        rlse = jax.nn.logsumexp(logits, axis=1, where=both_kept)
        if keep is not None:
            sums = jnp.where(keep, sums, 1)
        mine = lax.dynamic_slice_in_dim(top, ids[0], u.shape[0])
        return rlse, mine + jnp.log(sums)

    rlse, clse = lax.cond(
        enough(row_sums, column_sums, keep, axis_name),
        shared_shift,
        own_shifts,
        *(row_sums, column_sums, u, all_v, scale),
    )
    at_positives = jnp.where(positive, logits, 0)
    return PairSums(
        rlse,
        clse,
        at_positives.sum(1),
        total_of_mine(at_positives.sum(0)),
        positive.sum(1),
    )


def _log(x):
    """log x of large x: its second derivative, 1/x^2, is below the least float32.

    Of x over what x is, as a constant, all derivatives are of moderate size.
    """
    unit = lax.stop_gradient(1 / x)
    return jnp.log(x * unit) - jnp.log(unit)
