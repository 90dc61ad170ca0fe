"""ResNet (He et al., CVPR 2016, arXiv 1512.03385), for the paper's CNN experiments.

Bottleneck blocks with the stride on the 3 x 3 convolution, as everybody trains them
now. Batch norm under `jit` over a sharded batch takes its statistics over the *global*
batch, so the result does not depend on the number of devices.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from unicl_jax.encoders.encoder import Encoder, from_linen
from unicl_jax.encoders.layers import Dtype
from unicl_jax.encoders.remat import Remat, recomputed
from unicl_jax.errors import choose

# Table 1 of the ResNet paper: bottleneck blocks a stage.
VARIANTS = {
    "resnet50": dict(depths=(3, 4, 6, 3)),
    "resnet101": dict(depths=(3, 4, 23, 3)),
}
EXPANSION = 4
HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Pointwise(nn.Module):
    """A 1 x 1 convolution without bias, as the matmul that it is.

    XLA's CPU backend takes two to four times as long for the gradients of the other.
    """

    width: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H/stride, W/stride, width]."""
        shape = (1, 1, x.shape[-1], self.width)
        kernel = self.param("kernel", HE_NORMAL, shape)[0, 0].astype(self.dtype)
        x = x[:, :: self.stride, :: self.stride].astype(self.dtype)
        y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel)
        return y.reshape(*x.shape[:-1], self.width)


class Bottleneck(nn.Module):
    """1 x 1 down, 3 x 3, 1 x 1 up, and a shortcut."""

    width: int
    stride: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, H, W, C] -> [B, H/stride, W/stride, 4 width]."""
        pointwise = functools.partial(Pointwise, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        y = nn.relu(norm(name="bn1")(pointwise(self.width, name="conv1")(x)))
        y = nn.Conv(
            self.width,
            (3, 3),
            self.stride,
            padding=1,
            use_bias=False,
            kernel_init=HE_NORMAL,
            dtype=self.dtype,
            name="conv2",
        )(y)
        y = nn.relu(norm(name="bn2")(y))
        y = pointwise(EXPANSION * self.width, name="conv3")(y)
        # Starts at zero: every block begins as the identity (Goyal et al., 2017).
        y = norm(scale_init=nn.initializers.zeros, name="bn3")(y)
        if x.shape != y.shape:
            x = pointwise(y.shape[-1], self.stride, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem, four stages (or fewer), mean over positions."""

    depths: tuple[int, ...]
    width: int
    stem: str
    remat: Remat
    dtype: Dtype

    @nn.compact
    def __call__(self, images, train: bool):
        """[B, H, W, 3] float, normalised -> [B, 4 width 2^(stages - 1)] float32."""
        conv = functools.partial(
            nn.Conv, use_bias=False, kernel_init=HE_NORMAL, dtype=self.dtype
        )
        norm = nn.BatchNorm(
            not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="bn1"
        )
        x = images.astype(self.dtype)
        if self.stem == "cifar":
            x = nn.relu(norm(conv(self.width, (3, 3), padding=1, name="conv1")(x)))
        else:
            x = conv(self.width, (7, 7), 2, padding=3, name="conv1")(x)
            x = nn.relu(norm(x))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        block = recomputed(Bottleneck, self.remat, static_argnums=(2,))
        for s, depth in enumerate(self.depths):
            for b in range(depth):
                x = block(
                    self.width * 2**s,
                    2 if s > 0 and b == 0 else 1,
                    self.dtype,
                    name=f"layer{s + 1}_{b}",
                )(x, train)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x.mean((1, 2))


def resnet(
    *,
    depths: tuple[int, ...],
    width: int = 64,
    stem: str = "imagenet",
    image_size: int = 224,
    remat: Remat = False,
    dtype: Dtype = jnp.float32,
) -> Encoder:
    """A bottleneck ResNet.

    Args:
      depths: blocks of each stage.
      width: channels of the stem; stage s ends with 4 width 2^s.
      stem: "imagenet" (7 x 7 of stride 2 and a max pool) or "cifar" (one 3 x 3, no
        pooling, for 32-pixel images).
      image_size: pixels, square.
      remat: recompute each block in the backward pass instead of keeping it; "dots"
        keeps what its 1 x 1 convolutions gave.
      dtype: of the computation; parameters and statistics are float32.

    Returns:
      The encoder; its state holds the running statistics of batch norm.

    Raises:
      InputError: if there is no such stem.

    Source: arXiv 1512.03385, table 1.
    """
    choose({"imagenet": None, "cifar": None}, stem, "stem")
    module = ResNet(tuple(depths), width, stem, remat, dtype)
    example = jnp.zeros((1, image_size, image_size, 3))
    return from_linen(module, example, EXPANSION * width * 2 ** (len(depths) - 1))
