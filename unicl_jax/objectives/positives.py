"""Which rows of a batch are positives of each other, and how many."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.losses import NO_LABEL


def identities(batch: Mapping[str, jax.Array], by_text: bool) -> jax.Array:
    """What rows of a batch are positives of each other by, where it is equal.

    Args:
      batch: `label` [B] int32, NO_LABEL for captions; `caption` [B, 2] int32, what
        `data.captions.caption_lanes` makes of those: it may be missing.
      by_text: whether equal captions are positives; else each is its own alone.

    Returns:
      [B] int32, the labels; or, by text, [B, 2]: (label, 0), or a caption's two.
    """
    labels = batch["label"]
    if not by_text or "caption" not in batch:
        return labels
    of_labels = jnp.stack([labels, jnp.zeros_like(labels)], 1)
    return jnp.where((labels == NO_LABEL)[:, None], batch["caption"], of_labels)


def row_labels(labels: jax.Array) -> jax.Array:
    """Labels in two lanes, in which a caption has one of its own, too: its row.

    Args:
      labels: [B] int32, NO_LABEL for captions; or what `identities` gives by text.

    Returns:
      [B, 2] int32: (label, 0), or (0, 1 + row); identities by text as they are.
    """
    if labels.ndim == 2:
        return labels
    rows = 1 + jnp.arange(len(labels), dtype=labels.dtype)
    captions = labels == NO_LABEL
    return jnp.stack([jnp.where(captions, 0, labels), jnp.where(captions, rows, 0)], 1)


def group_sizes(lanes: jax.Array) -> jax.Array:
    """How many rows are equal to each, itself among them.

    Args:
      lanes: [B, k] integer.

    Returns:
      [B] int32, >= 1.
    """
    count, k = lanes.shape
    columns = [lanes[:, lane] for lane in range(k)]
    # Sorted, equal rows are neighbours: B log B, where comparing all pairs is B^2.
    *columns, order = lax.sort([*columns, jnp.arange(count)], num_keys=k)
    starts = jnp.zeros(count, bool).at[0].set(True)
    for x in columns:
        starts |= jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])
    group = jnp.cumsum(starts) - 1
    sizes = jnp.zeros(count, jnp.int32).at[group].add(1)
    return jnp.zeros(count, jnp.int32).at[order].set(sizes[group])


def figures(batch: Mapping[str, jax.Array], by_text: bool) -> dict[str, jax.Array]:
    """What the global batch holds of rows that say the same.

    Args:
      batch: as for `identities`.
      by_text: as for `identities`.

    Returns:
      positives_per_row: rows with a row's label, or text, itself among them; the mean.
      duplicate_captions: share of captions whose text the batch has more than once;
        missing if `caption` is.
    """
    is_caption = batch["label"] == NO_LABEL
    sizes = group_sizes(row_labels(identities(batch, by_text=True)))
    positives = sizes if by_text else jnp.where(is_caption, 1, sizes)
    found = {"positives_per_row": positives.mean()}
    if "caption" in batch:
        duplicate = (is_caption & (sizes > 1)).sum()
        found["duplicate_captions"] = duplicate / jnp.maximum(is_caption.sum(), 1)
    return found
