"""FocalNet (Yang et al., NeurIPS 2022, arXiv 2203.11926), UniCL's "Focal" tower.

Letters: B batch, H x W tokens of a stage, C channels, L focal levels, k kernel's side.
Details that port wrongly most often, and are held by tests: the stem's padding of 2,
kernels that grow by 2 a level, the global context as one more level with a gate of its
own, a norm behind every embedding, the final norm before the mean.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unicl_jax.encoders.depthwise import depthwise_convolution
from unicl_jax.encoders.encoder import Encoder, from_linen
from unicl_jax.encoders.layers import (
    DropPath,
    Dtype,
    Linear,
    Mlp,
    gelu,
    layer_norm,
    uniform_fan_in,
)
from unicl_jax.encoders.remat import Remat, recomputed
from unicl_jax.encoders.swin import PatchEmbed
from unicl_jax.errors import InputError

EPS = 1e-5
FOCAL_FACTOR = 2  # a level's kernel is so much larger than the one before
LINEAR_INIT = nn.initializers.truncated_normal(0.02)

_SRF = dict(focal_levels=(2,) * 4, focal_windows=(3,) * 4)  # small receptive field
_LRF = dict(focal_levels=(3,) * 4, focal_windows=(3,) * 4)  # large
_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2))
_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2))
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2))

# The FocalNet paper's models: channels, blocks and focal levels a stage.
VARIANTS = {
    "focalnet_tiny_srf": {**_TINY, **_SRF},
    "focalnet_tiny_lrf": {**_TINY, **_LRF},
    "focalnet_small_srf": {**_SMALL, **_SRF},
    "focalnet_small_lrf": {**_SMALL, **_LRF},
    "focalnet_base_srf": {**_BASE, **_SRF},
    "focalnet_base_lrf": {**_BASE, **_LRF},
}


def depthwise(
    width: int, side: int, use_bias: bool, dtype: Dtype, name: str
) -> nn.Conv:
    """A convolution a channel, side x side, that keeps the resolution."""
    return nn.Conv(
        width,
        (side, side),
        padding=side // 2,
        feature_group_count=width,
        use_bias=use_bias,
        kernel_init=uniform_fan_in,
        bias_init=_uniform(side**2),
        dtype=dtype,
        conv_general_dilated=_depthwise,
        name=name,
    )


def _depthwise(x, kernel, *settings, **more):
    """In the place of lax.conv_general_dilated, whose settings these layers share."""
    del settings, more
    return depthwise_convolution(x, kernel)


class FocalModulation(nn.Module):
    """Each token's query times what its surroundings, near to far, say through gates.

    z_0 = context; z_l = GELU(depthwise_l(z_{l-1})); z_{L+1} = GELU(mean of z_L)
    proj(query * h(sum_l gate_l z_l)), l from 1 to L + 1
    """

    level: int
    window: int
    norm: bool
    normalize: bool
    dtype: Dtype
    names: tuple[str, str, str] = ("f", "focal_layers", "h")

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> the same."""
        width = x.shape[-1]
        linear = functools.partial(Linear, dtype=self.dtype)
        split, convolve, combine = self.names
        x = linear(2 * width + self.level + 1, kernel_init=LINEAR_INIT, name=split)(x)
        query, context, gates = jnp.split(x, (width, 2 * width), axis=-1)
        total = 0
        for k in range(self.level):
            size = FOCAL_FACTOR * k + self.window
            name = f"{convolve}_{k}"
            context = gelu(depthwise(width, size, False, self.dtype, name)(context))
            total = total + context * gates[..., k : k + 1]
        everywhere = gelu(context.mean((1, 2), keepdims=True))
        total = total + everywhere * gates[..., self.level :]
        if self.normalize:
            total = total / (self.level + 1)
        # A 1 x 1 convolution in the original, and started as one.
        bias_init = _uniform(width)
        h = linear(width, kernel_init=uniform_fan_in, bias_init=bias_init, name=combine)
        x = query * h(total)
        if self.norm:
            x = layer_norm(EPS, self.dtype, "ln")(x)
        return linear(width, kernel_init=LINEAR_INIT, name="proj")(x)


class FocalBlock(nn.Module):
    """Focal modulation and an MLP, each with a norm, a scale and a residual."""

    level: int
    window: int
    mlp_ratio: float
    drop_path: float
    layer_scale: float | None
    post_norm: bool
    modulation_norm: bool
    normalize_modulator: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, H, W, C] -> the same."""
        modulation = FocalModulation(
            self.level,
            self.window,
            self.modulation_norm,
            self.normalize_modulator,
            self.dtype,
            name="modulation",
        )
        mlp = Mlp(self.mlp_ratio, gelu, LINEAR_INIT, self.dtype, name="mlp")
        drop_path = DropPath(self.drop_path)
        for i, branch in ((1, modulation), (2, mlp)):
            norm = layer_norm(EPS, self.dtype, f"norm{i}")
            y = norm(branch(x)) if self.post_norm else branch(norm(x))
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                y = y * self.param(f"gamma_{i}", init, x.shape[-1:]).astype(y.dtype)
            x = x + drop_path(y, train)
        return x


class ConvEmbed(nn.Module):
    """A convolution whose windows overlap, then a norm."""

    width: int
    kernel: int
    stride: int
    padding: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C'] -> [B, H/stride, W/stride, C]."""
        x = nn.Conv(
            self.width,
            (self.kernel, self.kernel),
            self.stride,
            padding=self.padding,
            kernel_init=uniform_fan_in,
            bias_init=_uniform(self.kernel**2 * x.shape[-1]),
            dtype=self.dtype,
            name="proj",
        )(x)
        return layer_norm(EPS, self.dtype, "norm")(x)


class FocalNet(nn.Module):
    """The whole tower: patches, four stages (or fewer), norm, mean over tokens."""

    block: Callable[..., nn.Module]  # of level, window, drop_path and name
    embed_dim: int
    depths: tuple[int, ...]
    focal_levels: tuple[int, ...]
    focal_windows: tuple[int, ...]
    patch_size: int
    drop_path: float
    conv_embed: bool
    stem_padding: int
    dtype: Dtype

    @nn.compact
    def __call__(self, images, train: bool):
        """[B, H, H, 3] float, normalised -> [B, embed_dim 2^(stages - 1)] float32."""
        if self.conv_embed:
            stem = functools.partial(
                ConvEmbed, kernel=7, stride=4, padding=self.stem_padding
            )
            halve = functools.partial(ConvEmbed, kernel=3, stride=2, padding=1)
        else:
            stem = functools.partial(PatchEmbed, self.patch_size)
            halve = functools.partial(PatchEmbed, 2)
        x = stem(width=self.embed_dim, dtype=self.dtype, name="patch_embed")(
            images.astype(self.dtype)
        )
        rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
        for s, depth in enumerate(self.depths):
            for b in range(depth):
                x = self.block(
                    self.focal_levels[s],
                    self.focal_windows[s],
                    drop_path=rates.pop(0),
                    name=f"layers_{s}_blocks_{b}",
                )(x, train)
            if s < len(self.depths) - 1:
                x = halve(
                    width=2 * x.shape[-1],
                    dtype=self.dtype,
                    name=f"layers_{s}_downsample",
                )(x)
        x = layer_norm(EPS, self.dtype, "norm")(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x.mean((1, 2))


def focalnet(
    *,
    embed_dim: int,
    depths: tuple[int, ...],
    focal_levels: tuple[int, ...],
    focal_windows: tuple[int, ...],
    image_size: int = 224,
    patch_size: int = 4,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    conv_embed: bool = False,
    layer_scale: float | None = None,
    post_norm: bool = False,
    modulation_norm: bool = False,
    normalize_modulator: bool = False,
    remat: Remat = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """A FocalNet tower of any size.

    Args:
      embed_dim: channels of the first stage; each later stage doubles them.
      depths: blocks of each stage.
      focal_levels: depthwise convolutions of each stage's modulation, one behind the
        other; the mean over the image is one level more.
      focal_windows: side of the first level's kernel, odd; each next one is 2 larger.
      image_size: pixels, square. Each stage's resolution must be even where it is
        halved.
      patch_size: pixels along a patch's side.
      mlp_ratio: hidden width of the MLPs over the channels.
      drop_path: rate of the last block; rises linearly from 0.
      conv_embed: overlapping convolutions instead of patches: 7 x 7 of stride 4 for the
        stem, which takes a patch_size of 4, and 3 x 3 of stride 2 between stages.
      layer_scale: first value of a learned factor a channel on each branch, or None.
      post_norm: norms behind modulation and MLP, inside the residual branch, not before
        them.
      modulation_norm: a norm inside the modulation, before its last linear map.
      normalize_modulator: divide the gated sum by the number of its terms.
      remat: recompute each block in the backward pass instead of keeping it; "dots"
        keeps what its linear maps gave.
      dtype: of the computation; parameters, norms' statistics and pooling are float32.

    Returns:
      The encoder; inputs [B, image_size, image_size, 3] float, normalised.

    Raises:
      InputError: if the sizes don't fit each other.

    Source: arXiv 2203.11926, section 3; the authors' release for names, eps and init.
    """
    block = functools.partial(
        recomputed(FocalBlock, remat, static_argnums=(2,)),
        mlp_ratio=mlp_ratio,
        layer_scale=layer_scale,
        post_norm=post_norm,
        modulation_norm=modulation_norm,
        normalize_modulator=normalize_modulator,
        dtype=dtype,
    )
    return tower(
        block,
        embed_dim=embed_dim,
        depths=depths,
        focal_levels=focal_levels,
        focal_windows=focal_windows,
        image_size=image_size,
        patch_size=patch_size,
        drop_path=drop_path,
        conv_embed=conv_embed,
        stem_padding=2,
        dtype=dtype,
    )


def tower(
    block: Callable[..., nn.Module],
    *,
    embed_dim: int,
    depths: tuple[int, ...],
    focal_levels: tuple[int, ...],
    focal_windows: tuple[int, ...],
    image_size: int,
    patch_size: int,
    drop_path: float,
    conv_embed: bool,
    stem_padding: int,
    dtype: Dtype,
) -> Encoder:
    """A tower of any focal block.

    Args:
      block: (level, window, drop_path=, name=) -> a module of (x, train).
      embed_dim, ..., dtype: as `focalnet`'s.
      stem_padding: pixels on each side before the stem's convolution.

    Returns:
      As `focalnet`.

    Raises:
      InputError: as `focalnet`.
    """
    if not len(depths) == len(focal_levels) == len(focal_windows):
        raise InputError(
            "depths, focal_levels and focal_windows must name the same stages: got "
            f"{tuple(depths)}, {tuple(focal_levels)} and {tuple(focal_windows)}."
        )
    if conv_embed and patch_size != 4:
        raise InputError(
            f"patch_size must be 4 with conv_embed: got {patch_size}; the stem's "
            "convolution has stride 4."
        )
    resolution = image_size // patch_size
    if image_size % patch_size:
        raise InputError(
            f"image_size must be divisible by patch_size: got {image_size} and "
            f"{patch_size}."
        )
    for s, (level, window) in enumerate(zip(focal_levels, focal_windows, strict=True)):
        if level < 1:
            raise InputError(
                f"focal_levels[{s}] must be at least 1: got {level}; use 2 or 3 as "
                "the paper does."
            )
        if window < 1 or window % 2 == 0:
            raise InputError(
                f"focal_windows[{s}] must be odd, for a kernel to have a centre: got "
                f"{window}; use 3 as the paper does."
            )
        if s < len(depths) - 1 and resolution % 2:
            raise InputError(
                f"stage {s}'s resolution must be even to be halved: got {resolution} "
                f"from image_size {image_size} and patch_size {patch_size}; use fewer "
                "stages or a larger image."
            )
        resolution //= 2
    module = FocalNet(
        block,
        embed_dim,
        tuple(depths),
        tuple(focal_levels),
        tuple(focal_windows),
        patch_size,
        drop_path,
        conv_embed,
        stem_padding,
        dtype,
    )
    example = jnp.zeros((1, image_size, image_size, 3))
    return from_linen(module, example, embed_dim * 2 ** (len(depths) - 1))


def _uniform(fan_in):
    """PyTorch's start of a convolution's bias, by its kernel's fan-in."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
