"""MixUp and CutMix: each image becomes part itself, part its neighbour in the batch."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from unicl_jax.errors import InputError, nearest_multiples

LEAST, MOST = (
    1e-3,
    1e3,
)  # of Beta's parameter; beyond, all of it lies at 0 and 1, or 1/2


class Mixture(NamedTuple):
    """Mixed images, and of what they are made.

    Attributes:
      images: [B, H, W, C] float32.
      partner: [B] int32: the row of the other image.
      share: [B] float32 in [0, 1]: of the row's own image in the mixed one.
    """

    images: jax.Array
    partner: jax.Array
    share: jax.Array


def is_on(config: Mapping) -> bool:
    """Whether a config's `mix` section ever mixes two images."""
    return (config["mixup"] > 0 or config["cutmix"] > 0) and config["probability"] > 0


def make_mix(config: Mapping) -> Callable[[jax.Array, jax.Array], Mixture] | None:
    """Builds what mixes a batch of images, from a config's `mix` section.

    mixed_i = w x_i + (1 - w) x_partner(i), with one w [H, W] for the whole batch:
    MixUp: w = share ~ Beta(mixup, mixup) in every pixel;
    CutMix: w = 0 in a box, 1 around it; share is what the box leaves of the area.

    Args:
      config: `mixup` and `cutmix` (parameters of Beta; 0: off), `probability` (of a
        batch to be mixed), `cutmix_share` (of the mixed batches, where both are on).

    Returns:
      `mix(key, images)`: [B, H, W, C] float32, B even -> Mixture. None: it is off. The
      draw is of the key alone: the same on any number of devices.

    Source: MixUp, arXiv 1710.09412; CutMix, arXiv 1905.04899, whose authors' codes draw
    once a batch, as timm's "batch" mode does, which Swin's and UniCL's releases set
    (with 0.8, 1.0, probability 1, cutmix_share 0.5). Partners differ: see `neighbours`.
    """
    if not is_on(config):
        return None

    def mix(key, images):
        weight, share = _draw(config, key, *images.shape[1:3])
        own = weight[None, :, :, None]
        mixed = own * images + (1 - own) * neighbours(images)
        batch = images.shape[0]
        partner = neighbours(jnp.arange(batch, dtype=jnp.int32))
        return Mixture(mixed, partner, jnp.full(batch, share))

    return mix


def neighbours(rows: jax.Array) -> jax.Array:
    """Rows 2i and 2i + 1 changed for each other.

    Args:
      rows: [B, ...], B even.

    Returns:
      [B, ...].
    """
    # timm turns the batch around: then almost every partner is on another device, and
    # all images would travel. Neighbours share a device, and they are the same two on
    # any number of devices. The sampler has shuffled the rows, sources among each
    # other: a neighbour is as random a partner as any.
    pairs = rearrange(rows, "(n two) ... -> n two ...", two=2)
    return rearrange(pairs[:, ::-1], "n two ... -> (n two) ...")


def _draw(config, key, height, width):
    """Weights [H, W] of the own image, and their mean, the share."""
    keys = jax.random.split(key, 5)

    def uniform():
        lam = jax.random.beta(keys[0], config["mixup"], config["mixup"])
        return jnp.broadcast_to(lam, (height, width)), lam

    def box():
        lam = jax.random.beta(keys[1], config["cutmix"], config["cutmix"])
        inside, area = cut(keys[2], lam, height, width)
        return 1 - inside.astype(jnp.float32), 1 - area / (height * width)

    if config["mixup"] > 0 and config["cutmix"] > 0:
        cuts = jax.random.bernoulli(keys[3], config["cutmix_share"])
        weight, share = jax.tree.map(
            lambda a, b: jnp.where(cuts, a, b), box(), uniform()
        )
    else:
        weight, share = box() if config["cutmix"] > 0 else uniform()
    mixes = jax.random.bernoulli(keys[4], config["probability"])
    return jnp.where(mixes, weight, 1), jnp.where(mixes, share, 1)


def cut(
    key: jax.Array, lam: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """CutMix's box.

    Sides floor(sqrt(1 - lam) H) and floor(sqrt(1 - lam) W) around a pixel drawn from
    all alike, cut off at the image's edges.

    Args:
      key: of the centre.
      lam: scalar in [0, 1].
      height: H, pixels.
      width: W, pixels.

    Returns:
      [H, W] bool, true inside the box; and its pixels, int32: at the edges fewer than
      1 - lam of all, so that the share must be taken from them.

    Source: arXiv 1905.04899, eq. 2, as timm has it.
    """
    edges = []
    for axis, size in enumerate((height, width)):
        side = jnp.int32(size * jnp.sqrt(1 - lam))
        centre = jax.random.randint(jax.random.fold_in(key, axis), (), 0, size)
        edges.append(jnp.clip(centre - side // 2, 0, size))
        edges.append(jnp.clip(centre + (side + 1) // 2, 0, size))
    top, bottom, left, right = edges
    row, column = jnp.arange(height)[:, None], jnp.arange(width)[None]
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return inside, (bottom - top) * (right - left)


def check_mix(config: Mapping, num_devices: int) -> None:
    """Refuses a `mix` section that says nothing sensible, or cannot be done.

    Args:
      config: the whole config: `mix`, `views`, `batch_size`.
      num_devices: over all processes.

    Raises:
      InputError: naming the field, what it must hold, what it holds.
    """
    beta = f"0, for off, or in [{LEAST}, {MOST:g}], the parameter of Beta"
    allowed = {
        "mixup": (lambda x: x == 0 or LEAST <= x <= MOST, beta),
        "cutmix": (lambda x: x == 0 or LEAST <= x <= MOST, beta),
        "probability": (lambda x: 0 <= x <= 1, "in [0, 1]"),
        "cutmix_share": (lambda x: 0 <= x <= 1, "in [0, 1], a probability"),
    }
    section = config["mix"]
    for field, (inside, must) in allowed.items():
        value = section[field]
        if type(value) not in (int, float) or not inside(value):
            raise InputError(f"mix.{field} must be {must}: got {value}.")
    if not is_on(section):
        return
    if config["views"] != 1:
        raise InputError(
            "views must be 1 where images are mixed: got "
            f"{config['views']}; set it to 1, or mix.mixup and mix.cutmix to 0."
        )
    batch, unit = config["batch_size"], 2 * num_devices
    if batch % unit:
        raise InputError(
            "batch_size must be divisible by twice the number of devices where images "
            f"are mixed, two of a device at a time: got {batch} for {num_devices} "
            f"devices; {nearest_multiples(batch, unit)}."
        )
