"""Swin Transformer (Liu et al., ICCV 2021, arXiv 2103.14030), as UniCL uses it.

Letters: B batch, H x W tokens of a stage, C channels, w window, N = w^2, h heads.
Details that port wrongly most often, and are held by golden tests: exact GELU, layer
norm with eps 1e-5, the shift's mask, the order of the four merged tokens, the final
norm before the mean.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from unicl_jax.encoders.encoder import Encoder, from_linen
from unicl_jax.encoders.layers import (
    DropPath,
    Dtype,
    Linear,
    Mlp,
    attend,
    gelu,
    layer_norm,
    merge_heads,
    split_heads,
    uniform_fan_in,
)
from unicl_jax.encoders.remat import Remat, recomputed
from unicl_jax.errors import InputError

EPS = 1e-5
MASKED = -100.0  # additive, as in the original: not minus infinity

# Table 7 of the Swin paper: channels of stage 1, blocks a stage, heads a stage.
VARIANTS = {
    "swin_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def relative_position_index(window: int) -> np.ndarray:
    """[N, N] row of the bias table for (query i, key j) of a w x w window.

    (row_i - row_j + w - 1) (2 w - 1) + (col_i - col_j + w - 1), windows row-major.
    """
    grid = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"))
    rows, cols = grid.reshape(2, -1)
    return (rows[:, None] - rows[None, :] + window - 1) * (2 * window - 1) + (
        cols[:, None] - cols[None, :] + window - 1
    )


def shift_mask(resolution: int, window: int, shift: int) -> np.ndarray:
    """[windows, N, N] 0 within a region of the rolled image, MASKED between regions."""
    cuts = np.zeros(resolution, int)
    cuts[-window:] = 1
    cuts[-shift:] = 2
    regions = rearrange(
        cuts[:, None] * 3 + cuts[None, :],
        "(i a) (j b) -> (i j) (a b)",
        a=window,
        b=window,
    )
    return np.where(regions[:, :, None] == regions[:, None, :], 0, MASKED).astype("f4")


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias per relative position."""

    num_heads: int
    window: int
    init_std: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x, mask=None):
        """[B, windows, N, C] -> the same; mask [windows, N, N] or None."""
        init = nn.initializers.truncated_normal(self.init_std)
        dense = functools.partial(Linear, kernel_init=init, dtype=self.dtype)
        table = self.param(
            "relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.num_heads),
        )
        index = relative_position_index(self.window)
        bias = rearrange(table[index.reshape(-1)], "(n m) h -> h n m", n=len(index))
        if mask is not None:
            bias = bias + mask[:, None]
        q, k, v = split_heads(dense(3 * x.shape[-1], name="qkv")(x), self.num_heads)
        return dense(x.shape[-1], name="proj")(merge_heads(attend(q, k, v, bias)))


class SwinBlock(nn.Module):
    """(Shifted) window attention and an MLP, each behind a norm and a residual."""

    num_heads: int
    window: int
    shift: int
    mlp_ratio: float
    drop_path: float
    init_std: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, H, W, C] -> the same."""
        height, w, shift = x.shape[1], self.window, self.shift
        y = layer_norm(EPS, self.dtype, "norm1")(x)
        mask = None
        if shift:
            y = jnp.roll(y, (-shift, -shift), (1, 2))
            mask = shift_mask(height, w, shift)
        y = rearrange(y, "b (i a) (j c) d -> b (i j) (a c) d", a=w, c=w)
        y = WindowAttention(self.num_heads, w, self.init_std, self.dtype, name="attn")(
            y, mask
        )
        y = rearrange(y, "b (i j) (a c) d -> b (i a) (j c) d", i=height // w, a=w, c=w)
        if shift:
            y = jnp.roll(y, (shift, shift), (1, 2))
        drop_path = DropPath(self.drop_path)
        x = x + drop_path(y, train)
        init = nn.initializers.truncated_normal(self.init_std)
        mlp = Mlp(self.mlp_ratio, gelu, init, self.dtype, name="mlp")
        return x + drop_path(mlp(layer_norm(EPS, self.dtype, "norm2")(x)), train)


class PatchMerging(nn.Module):
    """Halves the resolution and doubles the channels."""

    init_std: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H/2, W/2, 2C]."""
        # Order of the four: (0,0), (1,0), (0,1), (1,1) as (row, column) offsets.
        x = rearrange(x, "b (h dh) (w dw) c -> b h w (dw dh c)", dh=2, dw=2)
        return Linear(
            x.shape[-1] // 2,
            use_bias=False,
            kernel_init=nn.initializers.truncated_normal(self.init_std),
            dtype=self.dtype,
            name="reduction",
        )(layer_norm(EPS, self.dtype, "norm")(x))


class PatchEmbed(nn.Module):
    """Cuts the image into patches, one linear map of each, then a norm."""

    patch_size: int
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        """[B, H, W, 3] -> [B, H/p, W/p, C]."""
        p = self.patch_size
        bound = (p * p * x.shape[-1]) ** -0.5
        # A reshape and a matmul: the same map as a p x p convolution of stride p, and
        # faster on CPU and TPU.
        x = rearrange(x, "b (h a) (w c) d -> b h w (a c d)", a=p, c=p)
        x = Linear(
            self.width,
            kernel_init=uniform_fan_in,
            bias_init=lambda key, shape, dtype=jnp.float32: jax.random.uniform(
                key, shape, dtype, -bound, bound
            ),
            dtype=self.dtype,
            name="proj",
        )(x)
        return layer_norm(EPS, self.dtype, "norm")(x)


class Swin(nn.Module):
    """The whole tower: patches, four stages (or fewer), norm, mean over tokens."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    patch_size: int
    mlp_ratio: float
    drop_path: float
    init_std: float
    absolute_positions: bool
    remat: Remat
    dtype: Dtype

    @nn.compact
    def __call__(self, images, train: bool):
        """[B, H, H, 3] float, normalised -> [B, embed_dim 2^(stages - 1)] float32."""
        block = recomputed(SwinBlock, self.remat, static_argnums=(2,))
        x = PatchEmbed(self.patch_size, self.embed_dim, self.dtype, name="patch_embed")(
            images.astype(self.dtype)
        )
        if self.absolute_positions:
            init = nn.initializers.truncated_normal(self.init_std)
            position = self.param("absolute_pos_embed", init, x.shape[1:])
            x = x + position.astype(self.dtype)
        rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
        for s, (depth, heads) in enumerate(
            zip(self.depths, self.num_heads, strict=True)
        ):
            resolution = x.shape[1]
            window = min(self.window_size, resolution)
            for b in range(depth):
                # A window that covers the whole stage has nothing to shift to.
                shift = window // 2 if b % 2 and resolution > window else 0
                x = block(
                    heads,
                    window,
                    shift,
                    self.mlp_ratio,
                    rates.pop(0),
                    self.init_std,
                    self.dtype,
                    name=f"layers_{s}_blocks_{b}",
                )(x, train)
            if s < len(self.depths) - 1:
                x = PatchMerging(
                    self.init_std, self.dtype, name=f"layers_{s}_downsample"
                )(x)
        x = layer_norm(EPS, self.dtype, "norm")(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x.mean((1, 2))


def swin(
    *,
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    image_size: int = 224,
    window_size: int = 7,
    patch_size: int = 4,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    init_std: float = 0.02,
    absolute_positions: bool = False,
    remat: Remat = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """A Swin tower of any size.

    Args:
      embed_dim: channels of the first stage; each later stage doubles them.
      depths: blocks of each stage.
      num_heads: heads of each stage; must divide its channels.
      image_size: pixels, square. Each stage's resolution must be even where it is
        halved, and divisible by the window where it is larger than it.
      window_size: tokens along a window's side.
      patch_size: pixels along a patch's side.
      mlp_ratio: hidden width of the MLPs over the channels.
      drop_path: rate of the last block; rises linearly from 0.
      init_std: of the linear maps; narrow towers learn faster from a larger one.
      absolute_positions: add a learned embedding of each patch's place, Swin's option
        "ape": for pictures whose subject is centred.
      remat: recompute each block in the backward pass instead of keeping it; "dots"
        keeps what its linear maps gave.
      dtype: of the computation; parameters, norms' statistics and pooling are float32.

    Returns:
      The encoder; inputs [B, image_size, image_size, 3] float, normalised.

    Raises:
      InputError: if the sizes don't fit each other.

    Source: arXiv 2103.14030, section 3; UniCL's release for eps, order and init.
    """
    if len(depths) != len(num_heads):
        raise InputError(
            "depths and num_heads must name the same stages: got "
            f"{tuple(depths)} and {tuple(num_heads)}."
        )
    resolution = image_size // patch_size
    if image_size % patch_size:
        raise InputError(
            f"image_size must be divisible by patch_size: got {image_size} and "
            f"{patch_size}."
        )
    for s, heads in enumerate(num_heads):
        channels = embed_dim * 2**s
        if channels % heads:
            raise InputError(
                f"num_heads[{s}] must divide the stage's {channels} channels: got "
                f"{heads}."
            )
        if resolution > window_size and resolution % window_size:
            raise InputError(
                f"window_size must divide stage {s}'s resolution {resolution} "
                f"({image_size} px): got {window_size}; change image_size, patch_size "
                "or window_size."
            )
        if s < len(depths) - 1 and resolution % 2:
            raise InputError(
                f"stage {s}'s resolution must be even to be halved: got {resolution} "
                f"from image_size {image_size} and patch_size {patch_size}; use fewer "
                "stages or a larger image."
            )
        resolution //= 2
    module = Swin(
        embed_dim,
        tuple(depths),
        tuple(num_heads),
        window_size,
        patch_size,
        mlp_ratio,
        drop_path,
        init_std,
        absolute_positions,
        remat,
        dtype,
    )
    example = jnp.zeros((1, image_size, image_size, 3))
    return from_linen(module, example, embed_dim * 2 ** (len(depths) - 1))
