"""Encoders as pairs of pure functions: image towers, text towers, the two together."""

import functools
import inspect
from collections.abc import Mapping

import jax.numpy as jnp

from unicl_jax.encoders import resnet as _resnet
from unicl_jax.encoders import swin as _swin
from unicl_jax.encoders.encoder import Encoder
from unicl_jax.encoders.resnet import resnet
from unicl_jax.encoders.swin import swin
from unicl_jax.encoders.text import transformer
from unicl_jax.encoders.two_tower import TwoTower, make_two_tower, unit
from unicl_jax.errors import InputError, choose, did_you_mean

IMAGE_TOWERS = {
    "swin": swin,
    **{k: functools.partial(swin, **v) for k, v in _swin.VARIANTS.items()},
    "resnet": resnet,
    **{k: functools.partial(resnet, **v) for k, v in _resnet.VARIANTS.items()},
}
TEXT_TOWERS = {"transformer": transformer}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

__all__ = [
    "DTYPES",
    "IMAGE_TOWERS",
    "TEXT_TOWERS",
    "Encoder",
    "TwoTower",
    "from_config",
    "make_two_tower",
    "resnet",
    "swin",
    "transformer",
    "unit",
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


def _tower(menu, config, what, dtype):
    options = dict(config)
    name = options.pop("name")
    factory = choose(menu, name, f"{what}.name")
    known = set(inspect.signature(factory).parameters) - {"dtype"}
    for option in options:
        if option not in known:
            raise InputError(
                f'{what}: "{name}" has no option "{option}"; '
                f"{did_you_mean(option, known)}"
            )
    needed = [
        key
        for key, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in options
    ]
    if needed:
        raise InputError(f'{what}: "{name}" needs {", ".join(needed)}.')
    return factory(**options, dtype=dtype)
