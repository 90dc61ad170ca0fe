"""Weights in and out: whose file it is, what model fits it, and both ways of naming."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unicl_jax import encoders
from unicl_jax.encoders.weights.bert import BERT
from unicl_jax.encoders.weights.clip import HF, OPENAI
from unicl_jax.encoders.weights.detection import (
    DETECTRON2_RESNET,
    HF_SWIN,
    MMDET_SWIN,
    TORCHVISION_SWIN,
)
from unicl_jax.encoders.weights.files import read_arrays
from unicl_jax.encoders.weights.folders import read_folder
from unicl_jax.encoders.weights.layout import Layout, join_tree, split_tree
from unicl_jax.encoders.weights.resize import SIZES, resized
from unicl_jax.encoders.weights.section import (
    MODEL,
    check_changes,
    different_options,
    merged,
    shapes,
)
from unicl_jax.encoders.weights.timm import RESNET_BACKBONE, SWIN_BACKBONE
from unicl_jax.encoders.weights.unicl import UNICL
from unicl_jax.errors import InputError, choose

LAYOUTS = {
    layout.name: layout
    for layout in (
        *(UNICL, OPENAI, HF, SWIN_BACKBONE, RESNET_BACKBONE, BERT),
        *(MMDET_SWIN, TORCHVISION_SWIN, HF_SWIN, DETECTRON2_RESNET),
    )
}
# What DDP, torch.compile and Lightning put before a model's names.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# Whose weights people try that are of no layout, by a part of a name.
STRANGERS = {
    "_parameters.": "a whole pickled module (save its state_dict() instead)",
    "visual.attnpool.": "a CLIP with a ResNet",
    "cpb_mlp.": "a Swin V2",
    "layer1.0.conv2.": "a ResNet of basic blocks, as ResNet-18 and -34",
    "vision_model.encoder.": "a model that is not CLIP's, as SigLIP",
    "text_model.encoder.": "CLIP's text tower alone",
    "cls_token": "a ViT that is not CLIP's",
}
ABOUT = "unicl_jax.model"  # where a file that we wrote says what its model is

__all__ = [
    "LAYOUTS",
    "MODEL",
    "Weights",
    "check_changes",
    "different_options",
    "from_arrays",
    "layout_of",
    "merged",
    "read",
    "read_and_told",
    "shapes",
    "to_arrays",
]


class Weights(NamedTuple):
    """A model's description and what it learnt.

    Attributes:
      model: a config's `model` section, as a dict; without "text" for an image tower
        alone, without "image" for a text tower.
      params: as the two-tower model's, or {"image": ...} or {"text": ...} alone.
      state: the same.
    """

    model: dict[str, Any]
    params: Any
    state: Any


def read(
    source: str | Path, layout: str | None = None, **changes: Mapping[str, Any]
) -> Weights:
    """Reads a model's weights from a file or a folder; every array is used once.

    `read("bert-base-uncased", text={"context_length": 77}).params["text"]` are those of
    the text tower "bert", its options `.model["text"]`.

    Args:
      source: a weights file, or a folder with one as hubs name it (`folders.py`) and
        the config that says what it doesn't.
      layout: a key of LAYOUTS; None: told from the names.
      **changes: as for `from_arrays`; they go before what the file says of itself.

    Returns:
      The weights, on the host, in float32 (float64 stays).

    Raises:
      InputError: if there is no such thing, or no layout or no model fits it.
    """
    return read_and_told(source, layout, **changes)[0]


def read_and_told(
    source: str | Path, layout: str | None = None, **changes: Mapping[str, Any]
) -> tuple[Weights, dict[str, Any]]:
    """Reads as `read` does; also gives what of the model is told, and not guessed.

    Args:
      source: as for `read`.
      layout: the same.
      **changes: the same.

    Returns:
      The weights; and options that the file, its folder's config or `changes` name, a
      `model` section that lacks what was read from the arrays.

    Raises:
      InputError: as `read`.
    """
    check_changes(changes)
    path, told = Path(source), {}
    if path.is_dir():
        path, told = read_folder(path)
    arrays, about = read_arrays(path)
    if ABOUT in about:
        told = _about(path, about[ABOUT])
    for section, options in changes.items():
        if section in ("image", "text"):
            options = {**told.get(section, {}), **options}
        told[section] = options
    return from_arrays(arrays, layout, **told), told


def _about(path, said):
    try:
        told = json.loads(said)
        check_changes(told)
    except ValueError as error:  # an InputError is one
        raise InputError(
            f'weights must say what their model is: what "{path}" says ({ABOUT}) is no '
            f"`model` section ({error}); export it again."
        ) from error
    return told


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
    whose = [what for part, what in STRANGERS.items() if any(part in n for n in names)]
    raise InputError(
        f"weights must be of a known layout ({', '.join(LAYOUTS)}): got {len(names)} "
        f"arrays named {some}, …{f', as of {whose[0]}' if whose else ''}; load a model "
        "of one of those, or rename what is one."
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
        `text={"num_heads": 4}`, or other sizes, as `image={"image_size": 384,
        "window_size": 12}`, to which learned positions are then resized; others of the
        `model` section.

    Returns:
      The weights, on the host, in the arrays' dtypes.

    Raises:
      InputError: if no layout or no model fits them.
    """
    arrays = _unwrapped(arrays)
    family = choose(LAYOUTS, layout, "layout") if layout else layout_of(arrays)
    arrays = family.canonical(arrays)
    try:
        own = family.model(arrays)
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"weights in the {family.name} layout must have that model's shapes: they "
            f"have others ({error}); get the file again."
        ) from error
    except KeyError as error:
        raise InputError(
            f"weights in the {family.name} layout must hold {error}: it is not "
            "there; load a whole model of that kind."
        ) from error
    model = merged(own, changes)
    wanted, state = shapes(model)
    sizes = {
        tower: {name: own[tower][name] for name in names if name in own[tower]}
        for tower, names in SIZES.items()
        if tower in own
    }
    native = merged(model, sizes)
    there = wanted if native == model else shapes(native)[0]
    tree = join_tree(family, arrays, {"params": there, "state": state})
    return Weights(model, resized(tree["params"], wanted), tree["state"])


def _unwrapped(arrays):
    """Without what stands before all names."""
    while arrays and any(all(n.startswith(w) for n in arrays) for w in WRAPPERS):
        arrays = {name.partition(".")[2]: array for name, array in arrays.items()}
    return arrays


def to_arrays(weights: Weights, layout: str) -> dict[str, np.ndarray]:
    """The arrays of a file in a layout; one tower's layout takes that tower alone.

    Args:
      weights: of a model.
      layout: a key of LAYOUTS.

    Returns:
      Arrays by name.

    Raises:
      InputError: if the layout has no place for the model.
    """
    family = choose(LAYOUTS, layout, "format")
    towers, model = FITS[layout].towers, weights.model
    for tower, kinds in towers.items():
        kind = model.get(tower, {"name": "none"})["name"]
        if not kind.startswith(kinds):
            others = [
                name
                for name, fits in FITS.items()
                if kind.startswith(fits.towers.get(tower, ()))
            ]
            raise InputError(
                f'format "{layout}" is for {" and ".join(kinds)}: the model\'s {tower} '
                f'tower is "{kind}"; formats for that: {", ".join(others) or "none"}.'
            )
    parts = PARTS if len(towers) > 1 else tuple(towers)
    params, state = (
        {name: tree[name] for name in parts if name in tree}
        for tree in (weights.params, weights.state)
    )
    arrays = family.finish(split_tree(family, {"params": params, "state": state}))
    if "image" in towers:
        arrays |= family.tables(encoders.options("image", model["image"]))
    return arrays


def untold(weights: Weights, layout: str) -> dict[str, Any]:
    """What a model has that readers of a layout cannot tell from its arrays.

    Args:
      weights: of the model.
      layout: a key of LAYOUTS.

    Returns:
      Options by name, as {"text.num_heads": 2}; {} if the arrays say it all.
    """
    family = LAYOUTS[layout]
    told = family.model(family.canonical(to_arrays(weights, layout)))
    return {name: ours for name, _, ours in different_options(told, weights.model)}


PARTS = ("image", "text", "image_projection", "text_projection", "logit_scale")


class _Fits(NamedTuple):
    """Which models a layout's readers make of it."""

    image: tuple[str, ...]  # names of towers start with one of these; (): no such tower
    text: tuple[str, ...]

    @property
    def towers(self) -> dict[str, tuple[str, ...]]:
        """Kinds of the towers that there are."""
        return {name: kinds for name, kinds in self._asdict().items() if kinds}


FITS = {
    "unicl": _Fits(("swin", "focalnet", "klite_focal"), ("transformer",)),
    "openai_clip": _Fits(("vit",), ("transformer",)),
    "hf_clip": _Fits(("vit",), ("transformer",)),
    "timm_swin": _Fits(("swin",), ()),
    "timm_resnet": _Fits(("resnet",), ()),
    "hf_bert": _Fits((), ("bert",)),
    "mmdet_swin": _Fits(("swin",), ()),
    "torchvision_swin": _Fits(("swin",), ()),
    "hf_swin": _Fits(("swin",), ()),
    "detectron2_resnet": _Fits(("resnet",), ()),
}
