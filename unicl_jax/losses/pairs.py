"""What all ways to compute UniCL's loss share: positives, sums over pairs, a shift."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NO_LABEL = -1
"""The label of an image-text pair: a positive of itself alone."""

HEADROOM = 60.0
"""Nats from the shift of all exponentials up to the largest logit.

exp(s_ij - shift) with one shift for all pairs serves rows and columns alike. Float32
ends at exp(88), which leaves room for a sum of exp(28) = 1e12 terms at the top, and the
least it holds, exp(-87), is then 147 nats below the largest logit.
"""


class PairSums(NamedTuple):
    """What UniCL's two directions are made of, for each of this device's rows."""

    row_log_normalizer: jax.Array  # [b] log sum_j exp s_ij
    column_log_normalizer: jax.Array  # [b] log sum_j exp s_ji
    row_positive: jax.Array  # [b] sum of s_ik over the positives k
    column_positive: jax.Array  # [b] sum of s_ki over the positives k
    num_positives: jax.Array  # [b]


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b, accumulated and returned in float32 at least.

    In full products for float32 input: by default bfloat16 on TPU, TF32 on GPU.
    """
    return jnp.matmul(
        a,
        b,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def gather(tree, axis_name):
    """[b, ...] of each device -> [B, ...] of all; as it is without an axis name."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), tree)


def place(b: int, axis_name) -> jax.Array:
    """The places [b] of this device's rows in the global batch."""
    if axis_name is None:
        return jnp.arange(b)
    return lax.axis_index(axis_name) * b + jnp.arange(b)


def varying_zero(*arrays) -> jax.Array:
    """0 in the arrays' common dtype, float32 at least, varying as they do.

    What starts a loop under `shard_map` must vary over the mapped axes as what comes
    out of it does.
    """
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return sum(jnp.where(True, 0, x.reshape(-1)[0]) for x in arrays).astype(dtype)


def largest_logit(u, v, scale, axis_name) -> jax.Array:
    """What no logit exceeds: |s| max|u_i| max|v_j| over all devices; a scalar."""
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    longest = [
        jnp.sqrt(jnp.square(lax.stop_gradient(x).astype(dtype)).sum(1).max())
        for x in (u, v)
    ]
    if axis_name is not None:
        longest = lax.pmax(longest, axis_name)
    return jnp.abs(lax.stop_gradient(scale)).astype(dtype) * longest[0] * longest[1]


def enough(row_sums, column_sums, keep, axis_name) -> jax.Array:
    """Whether no sum of a row kept, on any device, is near the least float; a bool.

    Near it, terms are lost; NaN is not enough either.
    """
    least = jnp.finfo(row_sums.dtype).tiny * 1e12  # at most B * 1e-12 of a sum is lost
    good = (row_sums >= least) & (column_sums >= least)
    all_good = (good if keep is None else good | ~keep).all()
    if axis_name is not None:
        all_good = lax.pmin(all_good.astype(jnp.int32), axis_name) > 0
    return all_good


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
    lanes = range(rows.shape[1])
    same_label = functools.reduce(
        jnp.logical_and,
        [jnp.equal(rows[:, None, lane], columns[None, :, lane]) for lane in lanes],
    )
    is_label = (rows != NO_LABEL).any(-1)
    return (same_label & is_label[:, None]) | jnp.equal(
        row_ids[:, None], column_ids[None, :]
    )
