"""Weights in and out: whose file it is, what model fits it, and both ways of naming."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from unicl_jax import encoders
from unicl_jax.encoders.weights.clip import HF, OPENAI
from unicl_jax.encoders.weights.layout import Layout, join_tree, split_tree
from unicl_jax.encoders.weights.timm import RESNET_BACKBONE, SWIN_BACKBONE
from unicl_jax.encoders.weights.unicl import UNICL
from unicl_jax.errors import InputError, choose

LAYOUTS = {
    layout.name: layout
    for layout in (UNICL, OPENAI, HF, SWIN_BACKBONE, RESNET_BACKBONE)
}

__all__ = ["LAYOUTS", "Weights", "from_arrays", "layout_of", "to_arrays"]


class Weights(NamedTuple):
    """A model's description and what it learnt.

    Attributes:
      model: a config's `model` section, as a dict; without "text" for an image tower
        alone.
      params: as the two-tower model's, or {"image": ...} alone.
      state: the same.
    """

    model: dict[str, Any]
    params: Any
    state: Any


def layout_of(arrays: Mapping[str, np.ndarray]) -> Layout:
    """Whose names a file's arrays have.

    Args:
      arrays: by name.

    Returns:
      The first layout that knows them.

    Raises:
      InputError: if none does; the message shows some names.
    """
    names = set(arrays)
    for layout in LAYOUTS.values():
        if layout.matches(names):
            return layout
    some = ", ".join(sorted(names)[:4])
    raise InputError(
        f"weights must be of a known layout ({', '.join(LAYOUTS)}): got {len(names)} "
        f"arrays named {some}, …; rename them to one of those."
    )


def from_arrays(
    arrays: Mapping[str, np.ndarray],
    layout: str | None = None,
    **changes: Mapping[str, Any],
) -> Weights:
    """Makes a model's weights from the arrays of a file; every array is used once.

    Args:
      arrays: by name.
      layout: a key of LAYOUTS; None: told from the names.
      **changes: `image` and `text`: options of the towers that shapes don't tell, as
        `text={"num_heads": 4}`; others of the `model` section.

    Returns:
      The weights, on the host, in the arrays' dtypes.

    Raises:
      InputError: if no layout or no model fits them.
    """
    family = choose(LAYOUTS, layout, "layout") if layout else layout_of(arrays)
    arrays = family.canonical(arrays)
    try:
        model = family.model(arrays)
    except KeyError as error:
        raise InputError(
            f"weights in the {family.name} layout must hold {error}: it is not "
            "there; get the file again."
        ) from error
    for section, options in changes.items():
        own = model.get(section)
        model[section] = {**own, **options} if isinstance(own, dict) else options
    params, state = shapes(model)
    tree = join_tree(family, arrays, {"params": params, "state": state})
    return Weights(model, tree["params"], tree["state"])


def to_arrays(weights: Weights, layout: str) -> dict[str, np.ndarray]:
    """The arrays of a file in a layout; an image tower's layout takes that alone.

    Args:
      weights: of a model.
      layout: a key of LAYOUTS.

    Returns:
      Arrays by name.

    Raises:
      InputError: if the layout has no place for the model.
    """
    family = choose(LAYOUTS, layout, "format")
    fits, model = FITS[layout], weights.model
    kind = model["image"]["name"]
    if not kind.startswith(fits.image):
        others = [name for name, each in FITS.items() if kind.startswith(each.image)]
        raise InputError(
            f'format "{layout}" is for {" and ".join(fits.image)}: the model\'s image '
            f'tower is "{kind}"; formats for that: {", ".join(others) or "none"}.'
        )
    parts = ("image",) if fits.text is None else PARTS
    params, state = (
        {name: tree[name] for name in parts if name in tree}
        for tree in (weights.params, weights.state)
    )
    own = {**TEXT_DEFAULTS, **model.get("text", {"name": "none"})}
    needed = fits.text or {}
    if wrong := {k: own.get(k) for k, v in needed.items() if own.get(k) != v}:
        raise InputError(
            f'format "{layout}" is for text towers with {needed}: the model has '
            f"{wrong}, and would be taken for another."
        )
    tables = family.tables(encoders.image_options(model["image"]))
    return split_tree(family, {"params": params, "state": state}) | tables


def shapes(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """The parameters and the state that a model has, as shapes.

    Args:
      model: a config's `model` section, with or without "text".

    Returns:
      (params, state), trees of ShapeDtypeStruct.
    """
    key = jax.random.key(0)
    if "text" in model:
        return jax.eval_shape(encoders.from_config({**MODEL, **model}).init, key)
    tower = encoders.image_tower(model["image"])
    params, state = jax.eval_shape(tower.init, key)
    return {"image": params}, {"image": state}


PARTS = ("image", "text", "image_projection", "text_projection", "logit_scale")

# What a `model` section says where a file says nothing.
MODEL = {"logit_scale_init": 1.0, "logit_scale_max": None, "dtype": "float32"}
TEXT_DEFAULTS = {"eps": 1e-12, "activation": "quick_gelu", "causal": True}


class _Fits(NamedTuple):
    """Which models a layout's readers make of it."""

    image: tuple[str, ...]  # names of towers start with one of these
    text: dict[str, Any] | None  # options that they take for granted; None: no text


_CLIP = {"name": "transformer", "eps": 1e-5, "activation": "quick_gelu", "causal": True}
FITS = {
    "unicl": _Fits(("swin", "focalnet"), {**_CLIP, "eps": 1e-12}),
    "openai_clip": _Fits(("vit",), _CLIP),
    "hf_clip": _Fits(("vit",), _CLIP),
    "timm_swin": _Fits(("swin",), None),
    "timm_resnet": _Fits(("resnet",), None),
}
