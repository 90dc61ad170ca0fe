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
from unicl_jax.encoders.encoder import Encoder, PartKey
from unicl_jax.encoders.focalnet import focalnet
from unicl_jax.encoders.klite_focal import klite_focal
from unicl_jax.encoders.packing import Packed, pack
from unicl_jax.encoders.remat import check_remat
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
TOWERS = {"image": IMAGE_TOWERS, "text": TEXT_TOWERS}
# Image towers without a size of their own.
UNNAMED = ("swin", "focalnet", "klite_focal", "resnet", "vit")
# Image towers whose rows are not each for themselves while they learn.
BATCH_NORM = ("resnet", *_resnet.VARIANTS)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

__all__ = [
    "BATCH_NORM",
    "DTYPES",
    "IMAGE_TOWERS",
    "TEXT_TOWERS",
    "TOWERS",
    "Encoder",
    "Packed",
    "PartKey",
    "TwoTower",
    "bert",
    "focalnet",
    "from_config",
    "klite_focal",
    "make_two_tower",
    "one_tower",
    "options",
    "pack",
    "resnet",
    "swin",
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
        _tower("image", config["image"], dtype),
        _tower("text", config["text"], dtype),
        embed_dim=config["embed_dim"],
        logit_scale_init=config["logit_scale_init"],
        logit_scale_max=config["logit_scale_max"],
    )


def one_tower(which: str, config: Mapping, dtype: str = "float32") -> Encoder:
    """Builds one of the towers that a config's `model` section describes, alone.

    Args:
      which: a key of TOWERS.
      config: that tower's part of the section: a `name` from its menu, and options.
      dtype: a key of DTYPES.

    Returns:
      The encoder.

    Raises:
      InputError: as `from_config`.
    """
    return _tower(which, config, choose(DTYPES, dtype, "model.dtype"))


def options(which: str, config: Mapping) -> dict:
    """All options of a tower that a config describes, defaults included.

    Args:
      which: a key of TOWERS.
      config: as for `one_tower`.

    Returns:
      The options by name, without "name".

    Raises:
      InputError: for an unknown name.
    """
    factory = choose(TOWERS[which], config["name"], f"model.{which}.name")
    parameters = inspect.signature(factory).parameters.items()
    found = {k: p.default for k, p in parameters if p.default is not p.empty}
    return {**found, **{k: v for k, v in config.items() if k != "name"}}


def _tower(which, config, dtype):
    what, options = f"model.{which}", dict(config)
    name = options.pop("name")
    factory = choose(TOWERS[which], name, f"{what}.name")
    parameters = inspect.signature(factory).parameters
    known = set(parameters) - {"dtype"}
    for option, value in options.items():
        if option not in known:
            raise InputError(
                f'{what}: "{name}" has no option "{option}"; '
                f"{did_you_mean(option, known)}"
            )
        if option == "remat":
            check_remat(value, what)
        elif isinstance(parameters[option].default, bool) and type(value) is not bool:
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
