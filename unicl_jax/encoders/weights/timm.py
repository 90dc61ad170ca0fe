"""Image towers alone, as timm and torchvision name them: Swin and ResNet backbones.

Detection frameworks take such files. A classifier's head is left aside.

Source: timm's swin_transformer.py and resnet.py; torchvision's resnet.py.
"""

import re

from unicl_jax.encoders.weights.layout import (
    Layout,
    convolution,
    grid,
    linear,
    patches,
    rename,
    same,
)
from unicl_jax.encoders.weights.unicl import (
    BUFFERS,
    LEAVES,
    SWIN,
    count,
    swin_options,
)

HEAD = re.compile(r"^(head|fc)\.|num_batches_tracked$")


# --- Swin. timm keeps a stage's downsampling at its start, Microsoft's code at the end
#     of the stage before.


def _swin_canonical(arrays):
    kept = {
        name: array
        for name, array in arrays.items()
        if not BUFFERS.search(name) and not HEAD.match(name)
    }
    if any(name.startswith("layers.0.downsample.") for name in kept):
        kept = {
            re.sub(
                r"^layers\.(\d+)\.downsample\.",
                lambda m: f"layers.{int(m[1]) + 1}.downsample.",
                name,
            ): array
            for name, array in kept.items()
        }
    return kept


def _swin_part(path, axes):
    del axes
    if not path.startswith("image/"):
        return None
    path = re.sub(
        r"layers_(\d+)_downsample",
        lambda m: f"layers_{int(m[1]) + 1}_downsample",
        path.removeprefix("image/"),
    )
    name = rename(path, SWIN + LEAVES)
    if name == "absolute_pos_embed":
        return grid(name)
    if name == "patch_embed.proj.weight":
        return patches(name)
    return linear(name) if path.endswith("/kernel") else same(name)


SWIN_BACKBONE = Layout(
    "timm_swin",
    lambda names: (
        "patch_embed.proj.weight" in names
        and "layers.0.blocks.0.attn.relative_position_bias_table" in names
    ),
    _swin_canonical,
    lambda arrays: {"image": swin_options(arrays, "")},
    _swin_part,
)


# --- ResNet.

_RESNET = (
    (r"^image/", ""),
    (r"layer(\d+)_(\d+)/", r"layer\1.\2."),
    (r"downsample_conv/kernel$", "downsample.0.weight"),
    (r"downsample_bn/", "downsample.1/"),
    (r"/(kernel|scale)$", ".weight"),
    (r"/mean$", ".running_mean"),
    (r"/var$", ".running_var"),
    (r"/", "."),
)


def _resnet_canonical(arrays):
    return {name: array for name, array in arrays.items() if not HEAD.search(name)}


def _resnet_part(path, axes):
    del axes
    path = path.replace("image/batch_stats/", "image/")
    if not path.startswith("image/"):
        return None
    name = rename(path, _RESNET)
    return convolution(name) if path.endswith("/kernel") else same(name)


def _resnet_model(arrays):
    stages = count(arrays, r"^layer(\d+)\.")
    stem = arrays["conv1.weight"]
    return {
        "image": {
            "name": "resnet",
            "depths": tuple(
                count(arrays, rf"^layer{s}\.(\d+)\.") for s in range(1, stages + 1)
            ),
            "width": stem.shape[0],
            "stem": "imagenet" if stem.shape[2] == 7 else "cifar",
            "image_size": 224 if stem.shape[2] == 7 else 32,
        }
    }


RESNET_BACKBONE = Layout(
    "timm_resnet",
    lambda names: "layer1.0.conv3.weight" in names and "bn1.running_mean" in names,
    _resnet_canonical,
    _resnet_model,
    _resnet_part,
)
