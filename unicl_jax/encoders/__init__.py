"""Encoders as pairs of pure functions: image towers, text towers, the two together."""

import functools
import inspect
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from unicl_jax.encoders import focalnet as _focalnet
from unicl_jax.encoders import klite_focal as _klite_focal
from unicl_jax.encoders import resnet as _resnet
from unicl_jax.encoders import swin as _swin
from unicl_jax.encoders import vit as _vit
from unicl_jax.encoders.bert import bert
from unicl_jax.encoders.encoder import Encoder
from unicl_jax.encoders.focalnet import focalnet
from unicl_jax.encoders.klite_focal import klite_focal
from unicl_jax.encoders.packing import Packed, pack
from unicl_jax.encoders.resnet import resnet
from unicl_jax.encoders.swin import swin
from unicl_jax.encoders.text import transformer
from unicl_jax.encoders.two_tower import TwoTower, make_two_tower, unit
from unicl_jax.encoders.vit import vit
from unicl_jax.errors import InputError, choose, did_you_mean

IMAGE_TOWERS = {
    "swin": swin,
    **{k: functools.partial(swin, **v) for k, v in _swin.VARIANTS.items()},
    "focalnet": focalnet,
    **{k: functools.partial(focalnet, **v) for k, v in _focalnet.VARIANTS.items()},
    "klite_focal": klite_focal,
    **{
        k: functools.partial(klite_focal, **v) for k, v in _klite_focal.VARIANTS.items()
    },
    "resnet": resnet,
    **{k: functools.partial(resnet, **v) for k, v in _resnet.VARIANTS.items()},
    "vit": vit,
    **{k: functools.partial(vit, **v) for k, v in _vit.VARIANTS.items()},
}
TEXT_TOWERS = {"transformer": transformer, "bert": bert}
# Image towers without a size of their own.
UNNAMED = ("swin", "focalnet", "klite_focal", "resnet", "vit")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

__all__ = [
    "DTYPES",
    "IMAGE_TOWERS",
    "TEXT_TOWERS",
    "Encoder",
    "Packed",
    "TwoTower",
    "bert",
    "focalnet",
    "from_config",
    "image_tower",
    "klite_focal",
    "make_two_tower",
    "pack",
    "resnet",
    "swin",
    "text_tower",
    "transformer",
    "unit",
    "vit",
]


def from_config(config: Mapping) -> TwoTower:
    """Builds the model that a config's `model` section describes.

    Args:
      config: `image` and `text` (each a `name` from the menu and its options),
        `embed_dim`, `logit_scale_init`, `logit_scale_max`, `dtype`.

    Returns:
      The model.

    Raises:
      InputError: for an unknown name or option (the message lists what exists), or
        sizes that don't fit.
    """
    dtype = choose(DTYPES, config["dtype"], "model.dtype")
    return make_two_tower(
        _tower(IMAGE_TOWERS, config["image"], "model.image", dtype),
        _tower(TEXT_TOWERS, config["text"], "model.text", dtype),
        embed_dim=config["embed_dim"],
        logit_scale_init=config["logit_scale_init"],
        logit_scale_max=config["logit_scale_max"],
    )


def image_tower(config: Mapping, dtype: str = "float32") -> Encoder:
    """Builds the image tower alone that `model.image` describes.

    Args:
      config: a `name` from the menu and its options.
      dtype: a key of DTYPES.

    Returns:
      The encoder.

    Raises:
      InputError: as `from_config`.
    """
    return _tower(
        IMAGE_TOWERS, config, "model.image", choose(DTYPES, dtype, "model.dtype")
    )


def text_tower(config: Mapping, dtype: str = "float32") -> Encoder:
    """Builds the text tower alone that `model.text` describes.

    Args:
      config: a `name` from the menu and its options.
      dtype: a key of DTYPES.

    Returns:
      The encoder.

    Raises:
      InputError: as `from_config`.
    """
    return _tower(
        TEXT_TOWERS, config, "model.text", choose(DTYPES, dtype, "model.dtype")
    )


def image_options(config: Mapping) -> dict:
    """All options of the image tower that `model.image` describes, defaults included.

    Args:
      config: a `name` from the menu and its options.

    Returns:
      The options by name, without "name".
    """
    return _options(IMAGE_TOWERS, config, "model.image")


def text_options(config: Mapping) -> dict:
    """All options of the text tower that `model.text` describes, defaults included.

    Args:
      config: a `name` from the menu and its options.

    Returns:
      The options by name, without "name".
    """
    return _options(TEXT_TOWERS, config, "model.text")


def _options(menu, config, what):
    factory = choose(menu, config["name"], f"{what}.name")
    parameters = inspect.signature(factory).parameters.items()
    options = {k: p.default for k, p in parameters if p.default is not p.empty}
    return {**options, **{k: v for k, v in config.items() if k != "name"}}


def _tower(menu, config, what, dtype):
    options = dict(config)
    name = options.pop("name")
    factory = choose(menu, name, f"{what}.name")
    parameters = inspect.signature(factory).parameters
    known = set(parameters) - {"dtype"}
    for option, value in options.items():
        if option not in known:
            raise InputError(
                f'{what}: "{name}" has no option "{option}"; '
                f"{did_you_mean(option, known)}"
            )
        if isinstance(parameters[option].default, bool) and type(value) is not bool:
            raise InputError(  # any name would be taken for True
                f"{what}.{option} must be True or False: got {value!r}."
            )
        _check_numbers(f"{what}.{option}", value, parameters[option].annotation)
    needed = [
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in options
    ]
    if needed:
        raise InputError(f'{what}: "{name}" needs {", ".join(needed)}.')
    return factory(**options, dtype=dtype)


def _check_numbers(what, value, kind):
    """Of what is annotated as a whole number or several: they are, and count things."""
    several = kind == tuple[int, ...]
    if several and not isinstance(value, list | tuple):
        raise InputError(f"{what} must be a number a stage: got {value!r}.")
    least = 0 if what.split(".")[-1] in ("pad_id", "focal_levels") else 1
    for x in value if several else [value] * (kind is int):
        whole = isinstance(x, int | np.integer) and not isinstance(x, bool)
        if not whole or x < least:
            raise InputError(
                f"{what} must be a whole number of at least {least}: got {value!r}."
            )
