"""Other people's names and axes for our parameters, one table for both ways."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unicl_jax.errors import InputError

Tree = dict[str, Any]


class Part(NamedTuple):
    """Where one of our arrays is in a file.

    Attributes:
      names: of the file's arrays that it is made of.
      join: those arrays -> ours.
      split: ours -> those arrays.
    """

    names: tuple[str, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


class Layout(NamedTuple):
    """How a family of files names and lays out a model's arrays.

    Attributes:
      name: what it is called on the command line.
      matches: names of a file's arrays -> whether they are of this family.
      canonical: arrays -> the same under the family's own names, buffers left out.
      model: canonical arrays -> the config's `model` section that fits their shapes.
      part: path (parts joined by "/", from "image" or "text" on) and number of axes of
        one of our arrays -> where it is; None for what the family has no place for.
      tables: options of the image tower -> arrays that the family's files hold beside
        the weights, though they follow from the sizes.
      finish: canonical arrays -> those of a file; the other way of `canonical`, where
        one array's name depends on what others there are.
    """

    name: str
    matches: Callable[[set[str]], bool]
    canonical: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    model: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
    part: Callable[[str, int], Part | None]
    tables: Callable[[Mapping[str, Any]], dict[str, np.ndarray]] = lambda image: {}
    finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda x: x


def same(name: str) -> Part:
    """As it is."""
    return Part((name,), lambda arrays: arrays[0], lambda array: [array])


def scalar(name: str) -> Part:
    """A number, whether or not the file gives it an axis."""
    return Part((name,), lambda x: np.reshape(x[0], ()), lambda x: [x])


def linear(name: str) -> Part:
    """A linear map: [out, in] there, [in, out] here."""
    return Part((name,), lambda arrays: arrays[0].T, lambda array: [array.T])


def convolution(name: str) -> Part:
    """A kernel: OIHW there, HWIO here."""
    return Part(
        (name,),
        lambda arrays: arrays[0].transpose(2, 3, 1, 0),
        lambda array: [array.transpose(3, 2, 0, 1)],
    )


def patches(name: str, side: int | None = None) -> Part:
    """A convolution whose stride is its size: OIHW there, the matmul (H W I) O here.

    `side` is H and W; None: of whatever size, over an image's three channels.
    """

    def join(arrays):
        return arrays[0].transpose(2, 3, 1, 0).reshape(-1, arrays[0].shape[0])

    def split(array):
        rows, out = array.shape
        pixels = side or round((rows / 3) ** 0.5)
        kernel = array.reshape(pixels, pixels, rows // pixels**2, out)
        return [kernel.transpose(3, 2, 0, 1)]

    return Part((name,), join, split)


def grid(name: str) -> Part:
    """What belongs to a square of places: [1, H W, C] there, [H, W, C] here."""

    def join(arrays):
        side = round(arrays[0].shape[1] ** 0.5)
        return arrays[0].reshape(side, -1, arrays[0].shape[-1])

    return Part((name,), join, lambda x: [x.reshape(1, -1, x.shape[-1])])


def three_linear(names: Sequence[str]) -> Part:
    """Query, key and value maps: three there, side by side in one here."""
    return Part(
        tuple(names),
        lambda arrays: np.concatenate(arrays).T,
        lambda array: [x.T for x in np.split(array, 3, axis=1)],
    )


def three_biases(names: Sequence[str]) -> Part:
    """Their biases."""
    return Part(tuple(names), np.concatenate, lambda array: np.split(array, 3))


def rename(path: str, rules: Sequence[tuple[str, str]]) -> str:
    """Applies regular expressions in order."""
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def join_tree(layout: Layout, arrays: Mapping[str, np.ndarray], like: Tree) -> Tree:
    """Makes a tree of ours from a file's arrays, each of which must be used.

    Args:
      layout: of the file.
      arrays: canonical, by name.
      like: the tree wanted, {"params": ..., "state": ...}, of arrays or their shapes.

    Returns:
      The tree, in the arrays' dtypes.

    Raises:
      InputError: listing what is missing, what is left over, and what has other shapes.
    """
    missing, wrong, used = [], [], set()

    def find(path, leaf):
        path = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        part = layout.part(path, len(leaf.shape))
        names = (path,) if part is None else part.names
        used.update(names)
        if absent := [name for name in names if name not in arrays]:
            missing.extend(absent)
            return None
        try:
            array = part.join([arrays[name] for name in names])
        except (ValueError, IndexError):  # another number of axes
            wrong.append(f"{names[0]}: {arrays[names[0]].shape}")
            return None
        if array.shape != leaf.shape:
            wrong.append(f"{names[0]}: {array.shape}, not {leaf.shape}")
        return array

    tree = jax.tree_util.tree_map_with_path(find, like)
    left = sorted(set(arrays) - used)
    if missing or left or wrong:
        problems = [
            f"{len(names)} {what} ({', '.join(names[:4])}{', …' * (len(names) > 4)})"
            for what, names in (
                ("missing", missing),
                ("left over", left),
                ("of another shape", wrong),
            )
            if names
        ]
        raise InputError(
            f"weights in the {layout.name} layout must fill the model, each array used "
            f"once: {'; '.join(problems)}. Rename them, or say what the model is by "
            "its options."
        )
    return tree


def split_tree(layout: Layout, tree: Tree) -> dict[str, np.ndarray]:
    """The arrays of a file, from a tree of ours.

    Args:
      layout: of the file.
      tree: {"params": ..., "state": ...}, of arrays.

    Returns:
      Arrays by the layout's names.

    Raises:
      InputError: if the layout has no place for one of them.
    """
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        part = layout.part(path, np.ndim(leaf))
        if part is None:
            raise InputError(
                f"the {layout.name} layout has no place for {path}; write another."
            )
        arrays |= zip(part.names, part.split(np.asarray(leaf)), strict=True)
    return arrays
