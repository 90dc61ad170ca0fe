"""K-LITE's Focal-B, the one in UniCL's table (microsoft/klite, arXiv 2204.09222).

Another focal network than FocalNet's paper describes (arXiv 2203.11926). Its
modulation is the same: gates for L + 1 levels, the sum always divided by L + 1, no norm
inside. What differs, and is held by tests: a 3 x 3 depthwise convolution with a
residual before each of a block's branches; norms behind the sums, not inside the
branches; the stem's padding of 3, where FocalNet's is 2; names in files.

Letters: B batch, H x W tokens of a stage, C channels, L focal levels.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from unicl_jax.encoders.encoder import Encoder
from unicl_jax.encoders.focalnet import (
    EPS,
    LINEAR_INIT,
    FocalModulation,
    depthwise,
    tower,
)
from unicl_jax.encoders.layers import DropPath, Dtype, Mlp, gelu, layer_norm
from unicl_jax.encoders.remat import Remat, recomputed

# K-LITE's unicl_focal_base.yaml, which also has a drop_path of 0.1.
VARIANTS = {
    "klite_focal_base": dict(
        embed_dim=128,
        depths=(2, 2, 18, 2),
        focal_levels=(3,) * 4,
        focal_windows=(3,) * 4,
        conv_embed=True,
        layer_scale=1e-6,
    )
}


class KliteFocalBlock(nn.Module):
    """Focal modulation and an MLP, each between a convolution and a norm.

    x <- x + depthwise(x); x <- norm(x + gamma branch(x)), for both branches in turn
    """

    level: int
    window: int
    mlp_ratio: float
    drop_path: float
    layer_scale: float | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, H, W, C] -> the same."""
        width = x.shape[-1]
        modulation = FocalModulation(
            self.level,
            self.window,
            norm=False,
            normalize=True,
            dtype=self.dtype,
            names=("pre_conv", "pool_layers", "v"),
            name="attn",
        )
        mlp = Mlp(self.mlp_ratio, gelu, LINEAR_INIT, self.dtype, name="mlp")
        drop_path = DropPath(self.drop_path)
        for i, branch in ((1, modulation), (2, mlp)):
            x = x + depthwise(width, 3, True, self.dtype, f"dw{i}")(x)
            y = branch(x)
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                y = y * self.param(f"gamma_{i}", init, (width,)).astype(y.dtype)
            x = layer_norm(EPS, self.dtype, f"norm{i}")(x + drop_path(y, train))
        return x


def klite_focal(
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
    remat: Remat = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """K-LITE's focal tower, of any size.

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
      drop_path: rate of the last block; rises linearly from 0. The convolutions before
        the branches are never dropped.
      conv_embed: overlapping convolutions instead of patches: 7 x 7 of stride 4 for the
        stem, which takes a patch_size of 4, and 3 x 3 of stride 2 between stages.
      layer_scale: first value of a learned factor a channel on each branch, or None.
      remat: recompute each block in the backward pass instead of keeping it; "dots"
        keeps what its linear maps gave.
      dtype: of the computation; parameters, norms' statistics and pooling are float32.

    Returns:
      The encoder; inputs [B, image_size, image_size, 3] float, normalised.

    Raises:
      InputError: if the sizes don't fit each other.

    Source: microsoft/klite at 9b3987e, `FocalTransformer` with USE_POSTLN, as both of
      its configs have it. Its gates' sigmoid and its norms before branches, which no
      config turns on, are left out.
    """
    block = functools.partial(
        recomputed(KliteFocalBlock, remat, static_argnums=(2,)),
        mlp_ratio=mlp_ratio,
        layer_scale=layer_scale,
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
        stem_padding=3,
        dtype=dtype,
    )
