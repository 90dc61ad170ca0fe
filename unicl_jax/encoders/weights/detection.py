"""Backbones as detection frameworks name them: mmdetection, torchvision, Hugging Face,
detectron2. ResNets of the first two have the names of `timm_resnet`.

Letters: s stage, b block; dh, dw the place in a 2 x 2 patch; c channel, o output.

Source: mmdetection 3.3 (backbones/swin.py, whose patch merging unfolds), torchvision
  0.29 (swin_transformer.py), transformers 5 (modeling_swin.py, the names on the hub),
  detectron2 (resnet.py, fpn.py, tools/convert-torchvision-to-d2.py).
"""

import re

import numpy as np
from einops import rearrange

from unicl_jax.encoders.swin import relative_position_index
from unicl_jax.encoders.weights.layout import (
    Layout,
    Part,
    convolution,
    grid,
    linear,
    patches,
    rename,
    same,
    three_biases,
    three_linear,
)
from unicl_jax.encoders.weights.timm import HEAD, RESNET_BACKBONE
from unicl_jax.encoders.weights.unicl import BUFFERS, LEAVES, SWIN, swin_options
from unicl_jax.errors import InputError


def _check_windows(image):
    """Theirs are of one size; a stage that is smaller has a smaller one here."""
    side = image["image_size"] // image["patch_size"]
    last = side >> len(image["depths"]) - 1
    if last < image["window_size"]:
        raise InputError(
            "a detector's Swin has windows of one size: window_size is "
            f"{image['window_size']} and the last stage of {image['image_size']} pixels"
            f" has {last} places a side; train with a smaller window_size or larger "
            "images."
        )


def _name(path, rules):
    """A Swin's names: ours, Microsoft's, theirs."""
    return rename(path.removeprefix("image/"), (*SWIN, *LEAVES, *rules))


def _part_of(path, name):
    """Of one array, whose name there is known."""
    if path.endswith("patch_embed/proj/kernel"):
        return patches(name)
    return linear(name) if path.endswith("/kernel") else same(name)


def _sizes(rules):
    """Canonical arrays of a Swin -> its options, by Microsoft's names."""
    return lambda arrays: {
        "image": swin_options({rename(k, rules): x for k, x in arrays.items()}, "")
    }


# --- mmdetection's SwinTransformer. It reads arrays behind "backbone." and no others.
#     A norm behind each stage's output, of which ours is the last one's.

_BACKBONE = "backbone."
_TO_MMDET = (
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^layers\.", "stages."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^", _BACKBONE),
)
_FROM_MMDET = (
    (rf"^{_BACKBONE}", ""),
    (r"^stages\.", "layers."),
    (r"\.w_msa\.", "."),
    (r"\.projection\.", ".proj."),
)
_OUTPUT_NORM = re.compile(r"^backbone\.norm(\d+)\.")


def _mmdet_canonical(arrays):
    """With "backbone."; without the rest of a detector, and norms before the last."""
    if not any(name.startswith(_BACKBONE) for name in arrays):
        arrays = {_BACKBONE + name: array for name, array in arrays.items()}
    kept = {
        name: array
        for name, array in arrays.items()
        if name.startswith(_BACKBONE) and not BUFFERS.search(name)
    }
    norms = {int(m[1]) for m in map(_OUTPUT_NORM.match, kept) if m}
    last = f"{_BACKBONE}norm{max(norms, default=0)}."
    return {
        name.replace(last, f"{_BACKBONE}norm."): array
        for name, array in kept.items()
        if name.startswith(last) or not _OUTPUT_NORM.match(name)
    }


def _mmdet_part(path, axes):
    del axes
    if not path.startswith("image/") or "absolute_pos_embed" in path:
        return None
    name = _name(path, _TO_MMDET)
    if path.endswith("downsample/reduction/kernel"):
        return Part(
            (name,),
            lambda x: rearrange(x[0], "o (c dh dw) -> (dw dh c) o", dh=2, dw=2),
            lambda x: [rearrange(x, "(dw dh c) o -> o (c dh dw)", dh=2, dw=2)],
        )
    if "downsample/norm/" in path:
        return Part(
            (name,),
            lambda x: rearrange(x[0], "(c dh dw) -> (dw dh c)", dh=2, dw=2),
            lambda x: [rearrange(x, "(dw dh c) -> (c dh dw)", dh=2, dw=2)],
        )
    return _part_of(path, name)


def _mmdet_tables(image):
    _check_windows(image)
    index = np.int64(relative_position_index(image["window_size"]))
    tables = {
        f"{_BACKBONE}stages.{s}.blocks.{b}.attn.w_msa.relative_position_index": index
        for s, depth in enumerate(image["depths"])
        for b in range(depth)
    }
    for s in range(len(image["depths"]) - 1):  # as mmdetection starts them
        width = image["embed_dim"] * 2**s
        tables[f"{_BACKBONE}norm{s}.weight"] = np.ones(width, np.float32)
        tables[f"{_BACKBONE}norm{s}.bias"] = np.zeros(width, np.float32)
    return tables


def _mmdet_last_norm(arrays):
    """The norm of the tower's end by its number, which only all the stages tell."""
    stages = {
        int(m[1]) for m in (re.search(r"stages\.(\d+)\.", k) for k in arrays) if m
    }
    last = f"{_BACKBONE}norm{max(stages)}."
    return {k.replace(f"{_BACKBONE}norm.", last): x for k, x in arrays.items()}


MMDET_SWIN = Layout(
    "mmdet_swin",
    lambda names: (
        any(n.endswith("patch_embed.projection.weight") for n in names)
        and any(".attn.w_msa." in n for n in names)
    ),
    _mmdet_canonical,
    _sizes(_FROM_MMDET),
    _mmdet_part,
    _mmdet_tables,
    _mmdet_last_norm,
)


# --- torchvision's SwinTransformer: stages and merging take turns in one list.


def _from_torchvision(name):
    name = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", name)
    return re.sub(
        r"^features\.(\d*[13579])\.(\d+)\.",
        lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.",
        name,
    )


def _torchvision_part(path, axes):
    del axes
    if not path.startswith("image/") or "absolute_pos_embed" in path:
        return None
    name = _name(path, ((r"\.fc1\.", ".0."), (r"\.fc2\.", ".3.")))
    name = re.sub(
        r"^layers\.(\d+)\.(blocks|downsample)",
        lambda m: f"features.{2 * int(m[1]) + 1 + (m[2] == 'downsample')}",
        rename(
            name,
            (
                (r"^patch_embed\.proj\.", "features.0.0."),
                (r"^patch_embed\.norm\.", "features.0.2."),
            ),
        ),
    )
    return _part_of(path, name)


def _torchvision_tables(image):
    _check_windows(image)
    index = np.int64(relative_position_index(image["window_size"])).reshape(-1)
    return {
        f"features.{2 * s + 1}.{b}.attn.relative_position_index": index
        for s, depth in enumerate(image["depths"])
        for b in range(depth)
    }


TORCHVISION_SWIN = Layout(
    "torchvision_swin",
    lambda names: (
        {
            "features.0.0.weight",
            "features.1.0.attn.relative_position_bias_table",
        }
        <= names
    ),
    lambda arrays: {
        name: array
        for name, array in arrays.items()
        if not BUFFERS.search(name) and not HEAD.match(name)
    },
    lambda arrays: {
        "image": swin_options({_from_torchvision(k): x for k, x in arrays.items()}, "")
    },
    _torchvision_part,
    _torchvision_tables,
)


# --- Hugging Face's Swin, of SwinModel, SwinForImageClassification, SwinBackbone.

_TO_HF = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^absolute_pos_embed$", "embeddings.position_embeddings"),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
    (r"^", "swin."),
)
_FROM_HF = (
    (r"^swin\.", ""),
    (r"^encoder\.", ""),
    (r"\.attention\.self\.", ".attn."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
)
_HF_LEFT = re.compile(
    r"^(swin\.)?(classifier|pooler|decoder|hidden_states_norms)\.|mask_token$"
)


def _hf_canonical(arrays):
    return {
        "swin." + name.removeprefix("swin."): array
        for name, array in arrays.items()
        if not BUFFERS.search(name) and not _HF_LEFT.search(name)
    }


def _hf_part(path, axes):
    del axes
    if not path.startswith("image/"):
        return None
    name = _name(path, _TO_HF)
    if "attn/qkv/" in path:
        names = [name.replace(".qkv.", f".{x}.") for x in ("query", "key", "value")]
        return (three_linear if path.endswith("/kernel") else three_biases)(names)
    return grid(name) if "position_emb" in name else _part_of(path, name)


def _hf_tables(image):
    _check_windows(image)
    return {}


HF_SWIN = Layout(
    "hf_swin",
    lambda names: any(
        n.endswith("layers.0.blocks.0.attention.self.relative_position_bias_table")
        for n in names
    ),
    _hf_canonical,
    _sizes(_FROM_HF),
    _hf_part,
    _hf_tables,
)


# --- detectron2's ResNet below a feature pyramid.

_BOTTOM_UP = "backbone.bottom_up."
_TO_DETECTRON2 = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d+)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^", _BOTTOM_UP),
)
_FROM_DETECTRON2 = (
    (r"^backbone\.bottom_up\.", ""),
    (r"^stem\.", ""),
    (r"^res(\d+)\.", lambda m: f"layer{int(m[1]) - 1}."),
)


def _detectron2_canonical(arrays):
    if not any(name.startswith(_BOTTOM_UP) for name in arrays):
        arrays = {_BOTTOM_UP + name: array for name, array in arrays.items()}
    return {
        name: array
        for name, array in arrays.items()
        if name.startswith((f"{_BOTTOM_UP}stem.", f"{_BOTTOM_UP}res"))
        and not name.endswith("num_batches_tracked")
    }


def _detectron2_part(path, axes):
    part = RESNET_BACKBONE.part(path, axes)
    if part is None:
        return None
    name = rename(part.names[0], _TO_DETECTRON2)
    return convolution(name) if path.endswith("/kernel") else same(name)


def _detectron2_tables(image):
    if image["stem"] != "imagenet":
        raise InputError(
            "a detector's ResNet has the stem of ImageNet's, 7 x 7 and a pooling: the "
            f'model\'s is "{image["stem"]}"; train with config.model.image.stem='
            '"imagenet".'
        )
    return {}


DETECTRON2_RESNET = Layout(
    "detectron2_resnet",
    lambda names: (
        any(n.endswith("stem.conv1.norm.running_mean") for n in names)
        and any(n.endswith("res2.0.conv3.weight") for n in names)
    ),
    _detectron2_canonical,
    lambda arrays: RESNET_BACKBONE.model(
        {rename(name, _FROM_DETECTRON2): array for name, array in arrays.items()}
    ),
    _detectron2_part,
    _detectron2_tables,
)
