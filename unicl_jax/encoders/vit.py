"""Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929), as CLIP uses it.

Letters: B batch, H x H pixels, p patch, n = (H / p)^2 patches, W width.
CLIP's differences from the original: a norm before the blocks, QuickGELU, no bias in
the patch embedding, and a projection (the two-tower's) instead of a head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from unicl_jax.encoders.blocks import Block, run_blocks
from unicl_jax.encoders.encoder import Encoder, from_linen
from unicl_jax.encoders.layers import (
    ACTIVATIONS,
    Dtype,
    Linear,
    layer_norm,
    uniform_fan_in,
)
from unicl_jax.encoders.remat import Remat
from unicl_jax.errors import InputError, choose

# Table 20 of the CLIP paper; its L/14@336px is vit_l14 with image_size=336.
VARIANTS = {
    "vit_b32": dict(patch_size=32, width=768, num_layers=12, num_heads=12),
    "vit_b16": dict(patch_size=16, width=768, num_layers=12, num_heads=12),
    "vit_l14": dict(patch_size=14, width=1024, num_layers=24, num_heads=16),
}


class VisionTransformer(nn.Module):
    """Patches and a class token, norm, blocks, and the norm of the class token."""

    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    image_size: int
    activation: Callable[[jax.Array], jax.Array]
    eps: float
    drop_path: float
    remat: Remat
    scan: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, images, train: bool):
        """[B, H, H, 3] float, normalised -> [B, W] float32."""
        p, size = self.patch_size, self.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images must be [B, {size}, {size}, 3], the tower's image_size: got "
                f"{list(images.shape)}; resize them, or build a tower of their size."
            )
        # A reshape and a matmul: the same map as a p x p convolution of stride p.
        x = rearrange(
            images.astype(self.dtype), "b (h a) (w c) d -> b (h w) (a c d)", a=p, c=p
        )
        x = Linear(
            self.width,
            use_bias=False,
            kernel_init=uniform_fan_in,
            dtype=self.dtype,
            name="patch_embed",
        )(x)
        init = nn.initializers.normal(self.width**-0.5)
        token = self.param("class_embedding", init, (self.width,)).astype(self.dtype)
        position = self.param(
            "positional_embedding",
            init,
            (1 + (self.image_size // p) ** 2, self.width),
        )
        token = jnp.broadcast_to(token, (len(x), 1, self.width))
        x = jnp.concatenate([token, x], axis=1) + position.astype(self.dtype)
        x = layer_norm(self.eps, self.dtype, "ln_pre")(x)
        block = functools.partial(
            Block,
            self.num_heads,
            self.activation,
            self.eps,
            uniform_fan_in,
            self.dtype,
        )
        rates = np.linspace(0, self.drop_path, self.num_layers).tolist()
        how = dict(remat=self.remat, scan=self.scan)
        x = run_blocks(self, block, rates, x, None, train, **how)
        x = layer_norm(self.eps, self.dtype, "ln_post")(x[:, 0])
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def vit(
    *,
    patch_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    image_size: int = 224,
    activation: str = "quick_gelu",
    eps: float = 1e-5,
    drop_path: float = 0.0,
    remat: Remat = False,
    scan: bool = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """A Vision Transformer of any size.

    Args:
      patch_size: pixels along a patch's side.
      width: of the tokens; must be divisible by num_heads.
      num_layers: blocks.
      num_heads: of each block; CLIP's have 64 channels each.
      image_size: pixels, square; must be divisible by patch_size.
      activation: of the MLPs, "quick_gelu" or "gelu" (the exact form).
      eps: of the norms.
      drop_path: rate of the last block; rises linearly from 0.
      remat: recompute each block in the backward pass instead of keeping it; "dots"
        keeps what its linear maps gave.
      scan: compile a loop over the blocks, not each of them; see `docs/models.md`.
      dtype: of the computation; parameters and norms' statistics are float32.

    Returns:
      The encoder; inputs [B, image_size, image_size, 3] float, normalised.

    Raises:
      InputError: if the sizes don't fit each other, or for an unknown activation.

    Source: Radford et al., 2021, arXiv 2103.00020, section 2.4 and table 20; init as
      in CLIP's release, but for the MLPs' and the output map's biases, which start
      at 0.
    """
    if image_size % patch_size:
        raise InputError(
            f"image_size must be divisible by patch_size: got {image_size} and "
            f"{patch_size}."
        )
    if width % num_heads:
        raise InputError(
            f"num_heads must divide the image tower's width {width}: got {num_heads}."
        )
    module = VisionTransformer(
        patch_size,
        width,
        num_layers,
        num_heads,
        image_size,
        choose(ACTIVATIONS, activation, "activation"),
        eps,
        drop_path,
        remat,
        scan,
        dtype,
    )
    return from_linen(module, jnp.zeros((1, image_size, image_size, 3)), width)
