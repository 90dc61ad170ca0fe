"""What happens to pixels on the device: normalising, and the cheap augmentations.

uint8 images travel from the host; decoding and random crops happen there (`data/`).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

# UniCL normalises with ImageNet's statistics, not CLIP's (its release, config.py).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array) -> jax.Array:
    """(images / 255 - mean) / std, channel by channel.

    Args:
      images: [..., 3] uint8, or float in [0, 255].

    Returns:
      [..., 3] float32.
    """
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


def make_augment(config: Mapping) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Builds the training augmentation from a config's `augment` section.

    Args:
      config: `shift` (pixels, each way, edges repeated), `color` (brightness, contrast
        and each channel's gain are drawn from 1 +- color), `flip` (left-right, with
        probability 1/2).

    Returns:
      `augment(key, images)`: [B, H, W, 3] uint8 -> [B, H, W, 3] float32, normalised.
      Each row's draw depends on the key and the row alone, not on the sharding.
    """
    shift, color, flip = config["shift"], config["color"], config["flip"]

    def augment(key, images):
        batch = images.shape[0]
        keys = jax.random.split(key, 3)
        if shift:
            images = _shift(keys[0], images, shift)
        if flip:
            flipped = jax.random.bernoulli(keys[1], shape=(batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        x = images.astype(jnp.float32)
        if color:
            gain = jax.random.uniform(
                keys[2], (5, batch, 1, 1, 1), minval=1 - color, maxval=1 + color
            )
            brightness, contrast, channels = gain[0], gain[1], gain[2:]
            x = x * brightness * jnp.concatenate(list(channels), -1)
            mean = x.mean((1, 2, 3), keepdims=True)
            x = jnp.clip((x - mean) * contrast + mean, 0, 255)
        return normalize(x)

    return augment


def _shift(key, images, most):
    """Moves each image by up to `most` pixels each way, repeating its edges."""
    batch, height, width, _ = images.shape
    pad = ((0, 0), (most, most), (most, most), (0, 0))
    padded = jnp.pad(images, pad, mode="edge")
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * most + 1)
    return jax.vmap(
        lambda image, o: lax.dynamic_slice(image, (o[0], o[1], 0), (height, width, 3))
    )(padded, offsets)
