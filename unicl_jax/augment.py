"""What happens to pixels on the device: normalising, and the cheap augmentations.

uint8 images travel from the host, once a record however many views a step takes of it;
decoding, and the random crops that should see a file's every pixel, happen there
(`data/`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unicl_jax.errors import choose

# UniCL normalises with ImageNet's statistics, not CLIP's (its release, config.py).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Mean and standard deviation of pixels / 255, by `model.normalization`.
NORMALIZATIONS = {
    "imagenet": (MEAN, STD),
    "clip": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}

RATIO = 4 / 3  # most of a crop's longer over its shorter side, torchvision's default
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL turns to grey
LEAST_BLUR = 0.1  # pixels; SimCLR, arXiv 2002.05709, appendix A

# What was done to a picture, a number each; all of them 0 for a picture left as it is.
PARAMETERS = (
    "top",  # of the window: share of the picture's height
    "left",  # share of its width
    "log_height",  # of the window's share of the height
    "log_width",
    "flip",  # 1 if mirrored
    "log_brightness",
    "log_contrast",
    "log_red",
    "log_green",
    "log_blue",
    "grey",  # 1 if without colour
    "blur",  # standard deviation, pixels
)


class Views(NamedTuple):
    """Augmented pictures, and what was done to them.

    Attributes:
      images: [..., S, S, 3] float32, normalised.
      parameters: [..., 12] float32: PARAMETERS, in their order.
    """

    images: jax.Array
    parameters: jax.Array


def normalize(
    images: jax.Array, normalization: str | Sequence[Sequence[float]] = "imagenet"
) -> jax.Array:
    """(images / 255 - mean) / std, channel by channel.

    Args:
      images: [..., 3] uint8, or float in [0, 255].
      normalization: a key of NORMALIZATIONS, or a mean and a standard deviation of
        pixels / 255, three numbers each.

    Returns:
      [..., 3] float32.

    Raises:
      InputError: if there is no such normalization.
    """
    if isinstance(normalization, str):
        normalization = choose(NORMALIZATIONS, normalization, "model.normalization")
    mean, std = normalization
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def make_views(
    config: Mapping,
    others: Mapping | None = None,
    *,
    views: int = 1,
    image_size: int | None = None,
    normalization: str = "imagenet",
) -> Callable[[jax.Array, jax.Array], Views]:
    """Builds the function that makes all views that a step takes of its images.

    Args:
      config: of the first view; see `make_augment`.
      others: what differs from it for the views after the first.
      views: how many.
      image_size: see `make_augment`.
      normalization: see `normalize`.

    Returns:
      `make(key, images)`: [B, H, W, 3] uint8 -> Views of [B, views, ...]. The first
      view's draws are those of `make_augment` with the same key.
    """
    first = make_augment(config, image_size, normalization)
    other = make_augment({**config, **(others or {})}, image_size, normalization)

    def make(key, images):
        made = [first(key, images)]
        for k in range(1, views):
            # Far from the numbers by which `augment` itself splits its key.
            made.append(other(jax.random.fold_in(key, 1000 + k), images))
        return jax.tree.map(lambda *x: jnp.stack(x, 1), *made)

    return make


def make_augment(
    config: Mapping, image_size: int | None = None, normalization: str = "imagenet"
) -> Callable[[jax.Array, jax.Array], Views]:
    """Builds one view's augmentation from a config's `augment` section.

    Args:
      config: in the order in which they are done: `crop` (a window of at least this
        share of the area, one side at most RATIO times the other, is stretched to the
        whole; 1: no crop), `shift` (pixels, each way, edges repeated), `flip`
        (left-right, with probability 1/2), `color` (brightness, contrast and each
        channel's gain are drawn from 1 +- color), `grayscale` (probability), `blur`
        (half of the images get a Gaussian of LEAST_BLUR to this many pixels).
      image_size: S, pixels of a side of the result; None: that of the images.
      normalization: see `normalize`.

    Returns:
      `augment(key, images)`: [B, H, W, 3] uint8 -> Views of [B, ...]. Each row's draw
      depends on the key and the row alone, not on the sharding.
    """
    shift, color, flip = config["shift"], config["color"], config["flip"]
    crop, blur = config.get("crop", 1.0), config.get("blur", 0.0)
    grayscale = config.get("grayscale", 0.0)

    def augment(key, images):
        batch = images.shape[0]
        keys = jax.random.split(key, 3)
        done = dict.fromkeys(PARAMETERS, jnp.zeros(batch))
        size = image_size or images.shape[1]
        if crop < 1 or size != images.shape[1]:
            window = _window(jax.random.fold_in(key, 3), batch, crop)
            images = _stretch(images, window, size)
            done |= {"top": window[0], "left": window[1]}
            done |= {"log_height": jnp.log(window[2]), "log_width": jnp.log(window[3])}
        if shift:
            images, (down, right) = _shift(keys[0], images, shift)
            done["top"] += down / size * jnp.exp(done["log_height"])
            done["left"] += right / size * jnp.exp(done["log_width"])
        if flip:
            flipped = jax.random.bernoulli(keys[1], shape=(batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
            done["flip"] = flipped[:, 0, 0, 0]
        x = images.astype(jnp.float32)
        if color:
            gain = jax.random.uniform(
                keys[2], (5, batch, 1, 1, 1), minval=1 - color, maxval=1 + color
            )
            brightness, contrast, channels = gain[0], gain[1], gain[2:]
            x = x * brightness * jnp.concatenate(list(channels), -1)
            mean = x.mean((1, 2, 3), keepdims=True)
            x = jnp.clip((x - mean) * contrast + mean, 0, 255)
            names = ("brightness", "contrast", "red", "green", "blue")
            logs = jnp.log(gain.reshape(5, batch))
            done |= {f"log_{name}": logs[i] for i, name in enumerate(names)}
        if grayscale:
            grey = jax.random.bernoulli(
                jax.random.fold_in(key, 4), grayscale, (batch, 1, 1, 1)
            )
            luma = sum(share * x[..., i] for i, share in enumerate(LUMA))
            x = jnp.where(grey, luma[..., None], x)
            done["grey"] = grey[:, 0, 0, 0]
        if blur:
            sigma = _sigma(jax.random.fold_in(key, 5), batch, blur)
            x = _blur(x, sigma)
            done["blur"] = sigma
        parameters = [jnp.asarray(done[name], jnp.float32) for name in PARAMETERS]
        return Views(normalize(x, normalization), jnp.stack(parameters, -1))

    return augment


def _window(key, batch, crop):
    """Top, left, height and width of each image's window, as shares of its sides.

    area ~ U(crop, 1), log(width / height) ~ U(-r, r), r = min(log RATIO, -log area):
    a larger ratio would not fit.
    """
    uniform = jax.random.uniform(key, (4, batch))
    area = crop + (1 - crop) * uniform[0]
    most = jnp.minimum(math.log(RATIO), -jnp.log(area))
    aspect = jnp.exp(most * (2 * uniform[1] - 1))
    height = jnp.minimum(jnp.sqrt(area / aspect), 1)  # 1 + round-off at most
    width = jnp.minimum(jnp.sqrt(area * aspect), 1)
    return uniform[2] * (1 - height), uniform[3] * (1 - width), height, width


def _stretch(images, window, size):
    """Each image's window, resampled linearly (and antialiased) to size x size."""
    sides = jnp.array(images.shape[1:3], jnp.float32)

    def one(image, top, left, height, width):
        scale = size / (sides * jnp.stack([height, width]))
        translation = -jnp.stack([top, left]) * sides * scale
        return jax.image.scale_and_translate(
            image, (size, size, 3), (0, 1), scale, translation, "linear"
        )

    return jax.vmap(one)(images.astype(jnp.float32), *window)


def _shift(key, images, most):
    """Moves each image by up to `most` pixels each way, repeating its edges.

    Returns the images, and by how many pixels their window moved down and right.
    """
    batch, height, width, _ = images.shape
    pad = ((0, 0), (most, most), (most, most), (0, 0))
    padded = jnp.pad(images, pad, mode="edge")
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * most + 1)
    moved = jax.vmap(
        lambda image, o: lax.dynamic_slice(image, (o[0], o[1], 0), (height, width, 3))
    )(padded, offsets)
    return moved, tuple(offsets.T - most)


def _sigma(key, batch, blur):
    uniform = jax.random.uniform(key, (2, batch))
    sigma = LEAST_BLUR + (blur - LEAST_BLUR) * uniform[0]
    return jnp.where(uniform[1] < 0.5, sigma, 0)


def _blur(x, sigma):
    """A Gaussian of each image's sigma; its weights at an edge add up to 1, too."""
    size = x.shape[1]
    distance = jnp.arange(size)[:, None] - jnp.arange(size)[None]
    exponent = distance**2 / (2 * jnp.maximum(sigma, 1e-3) ** 2)[:, None, None]
    weights = jnp.exp(-exponent)
    weights /= weights.sum(-1, keepdims=True)
    options = dict(precision=lax.Precision.HIGHEST)
    x = jnp.einsum("bij,bjwc->biwc", weights, x, **options)
    return jnp.einsum("bij,bhjc->bhic", weights, x, **options)
