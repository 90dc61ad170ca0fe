"""What must hold of a loss's arguments, told at trace time."""

import jax.numpy as jnp

from unicl_jax.losses.pairs import NO_LABEL


def check_pairs(u, v, labels, logit_scale, where=None, weights=None) -> None:
    """Shapes and dtypes of a batch of pairs.

    Args:
      u: image embeddings, to be [batch, dim] float.
      v: text embeddings, the same.
      labels: to be [batch] or [batch, lanes] integer.
      logit_scale: to be a scalar.
      where: None, or to be [batch] bool.
      weights: None, or to be [batch].

    Raises:
      TypeError, ValueError: naming what doesn't fit.
    """
    check_arrays(image_embeddings=u, text_embeddings=v, labels=labels)
    if u.ndim != 2 or u.shape != v.shape:
        raise ValueError(
            "image_embeddings and text_embeddings must both be [batch, dim]: got "
            f"{u.shape} and {v.shape}."
        )
    if not u.size:
        raise ValueError(
            f"image_embeddings must hold a row and a column at least: got {u.shape}."
        )
    check_float(image_embeddings=u, text_embeddings=v)
    check_labels(labels, u.shape[0])
    if jnp.ndim(logit_scale) != 0:
        raise ValueError(
            f"logit_scale must be a scalar: got shape {jnp.shape(logit_scale)}."
        )
    check_rows(u.shape[0], where, weights)


def check_arrays(**arrays) -> None:
    """Each must be an array of jax or NumPy."""
    for name, x in arrays.items():
        if not hasattr(x, "dtype"):
            raise TypeError(
                f"{name} must be an array: got {type(x).__name__}; pass it through "
                "jnp.asarray."
            )


def check_float(**arrays) -> None:
    """Each must be an array of a floating-point dtype."""
    check_arrays(**arrays)
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point: got {x.dtype}.")


def check_labels(labels, batch: int) -> None:
    """Labels must be integers, [batch] or [batch, lanes]."""
    check_arrays(labels=labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, NO_LABEL = {NO_LABEL} for captions: got "
            f"{labels.dtype}."
        )
    if labels.ndim not in (1, 2) or labels.shape[0] != batch or 0 in labels.shape[1:]:
        raise ValueError(
            f"labels must be [batch] or [batch, lanes] with batch = {batch}: got "
            f"{labels.shape}."
        )


def check_rows(batch: int, where=None, weights=None) -> None:
    """`where` and `weights` must be None or [batch], the former bool."""
    for name, x in (("where", where), ("weights", weights)):
        if x is not None and x.shape != (batch,):
            raise ValueError(f"{name} must be [batch] = {(batch,)}: got {x.shape}.")
    if where is not None and where.dtype != jnp.bool_:
        raise TypeError(f"where must be bool: got {where.dtype}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """A string argument must be one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}: got {value!r}.")


def check_block_size(block_size) -> None:
    """The side of a tile must be a positive integer, known at trace time."""
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(
            f"block_size must be a positive Python integer: got {block_size!r}."
        )
