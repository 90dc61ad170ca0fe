"""What belongs to places, for other sizes: interpolated, or cut.

Letters: w window, h heads, n patches along a side, C channels.
"""

from typing import Any

import jax
import numpy as np

from unicl_jax.errors import InputError

# The options of towers that sizes of learned positions follow from.
SIZES = {"image": ("image_size", "window_size"), "text": ("context_length",)}


def resized(params: Any, like: Any) -> Any:
    """Fits learned positions to a model's other sizes; all else stays as it is.

    Swin's tables of relative positions are interpolated as (2 w - 1) x (2 w - 1)
    pictures with a head a channel, its absolute positions and a ViT's (but for the
    class token's) as n x n pictures. Of texts' positions the first are kept.

    Args:
      params: of a model, {"image": ..., "text": ..., ...}, or some of it.
      like: the same tree for the other sizes, of arrays or their shapes.

    Returns:
      The tree, in the arrays' dtypes; what has its shape already is what was given.

    Raises:
      InputError: if there are fewer positions of texts than wanted.

    Source: bicubic as PyTorch's. Without antialiasing for Swin, as its release does it
      (timm now spaces a table's points geometrically: we don't); with it for a ViT, as
      open_clip does.
    """

    def fit(path, leaf, wanted):
        if leaf.shape == wanted.shape:
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        change = next(f for ending, f in FITTED.items() if name.endswith(ending))
        return change(leaf, wanted.shape)

    return jax.tree_util.tree_map_with_path(fit, params, like)


def interpolation(size: int, to: int, antialias: bool = False) -> np.ndarray:
    """What new points along a line are of the old ones, bicubically.

    Args:
      size: old points.
      to: new points, over the same length.
      antialias: widen the kernel where there are fewer points.

    Returns:
      [to, size] float64; rows sum to 1.

    Source: Keys, 1981, with PyTorch's constants and edges: a = -0.75 and the edge
      repeated; with antialias a = -0.5, and points outside have no weight.
    """
    step = size / to
    centres = (np.arange(to)[:, None] + 0.5) * step - 0.5
    if antialias:
        weights = _cubic((np.arange(size) - centres) / max(step, 1), -0.5)
        return weights / weights.sum(1, keepdims=True)
    near = np.floor(centres).astype(int) + np.arange(-1, 3)
    matrix = np.zeros((to, size))
    np.add.at(
        matrix,
        (np.arange(to)[:, None], near.clip(0, size - 1)),
        _cubic(near - centres, -0.75),
    )
    return matrix


def _cubic(x, a):
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0))


def _square(array, side, antialias=False):
    """[n, n, C] -> [side, side, C]."""
    matrix = interpolation(len(array), side, antialias)
    new = np.einsum("ia,jb,abc->ijc", matrix, matrix, array, optimize=True)
    return new.astype(array.dtype)


def _side(places):
    return round(places**0.5)


def _table(table, shape):
    """[(2 w - 1)^2, h], for another window."""
    old = _side(len(table))
    return _square(table.reshape(old, old, -1), _side(shape[0])).reshape(shape)


def _with_class_token(table, shape):
    """[1 + n^2, C], for another n."""
    old = _side(len(table) - 1)
    grid = table[1:].reshape(old, old, -1)
    new = _square(grid, _side(shape[0] - 1), antialias=True)
    return np.concatenate([table[:1], new.reshape(-1, shape[1])])


def _first(table, shape):
    """[L, C], for fewer slots."""
    if len(table) < shape[0]:
        raise InputError(
            "context_length must be no more than the positions that the weights hold: "
            f"got {shape[0]} for {len(table)}; texts of more tokens must be cut."
        )
    return table[: shape[0]]


FITTED = {
    "relative_position_bias_table": _table,
    "image/absolute_pos_embed": lambda grid, shape: _square(grid, shape[0]),
    "image/positional_embedding": _with_class_token,
    "text/positional_embedding": _first,
    "text/embeddings/position_embeddings/embedding": _first,
}
