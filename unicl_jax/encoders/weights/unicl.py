"""UniCL's releases: Swin, FocalNet or K-LITE's Focal, and the method's transformer.

Source: microsoft/UniCL at 9983bf8, and the older layouts of ELEVATER and K-LITE.
"""

import re

import numpy as np

from unicl_jax.encoders.swin import relative_position_index, shift_mask
from unicl_jax.encoders.text import PADDING
from unicl_jax.encoders.weights.layout import (
    Layout,
    convolution,
    grid,
    linear,
    patches,
    rename,
    same,
    scalar,
)
from unicl_jax.errors import InputError

# What the release computes and saves all the same.
BUFFERS = re.compile(r"(relative_position_index|attn_mask)$")

# The release's two older namings, and what DDP puts before all names.
OLDER = (
    (r"^module\.", ""),
    (r"^visual\.", "image_encoder."),
    (r"^(text|lang_encoder)\.", "text_encoder."),
    (r"^vision_projection$", "image_projection"),
    (r"^lang_projection$", "text_projection"),
)

# From our paths to the release's names.
SWIN = (
    (r"layers_(\d+)_blocks_(\d+)/", r"layers.\1.blocks.\2."),
    (r"layers_(\d+)_downsample/", r"layers.\1.downsample."),
    (r"(focal|pool)_layers_(\d+)/", r"\1_layers.\2.0/"),
)
TEXT = (
    (r"resblocks_(\d+)/", r"resblocks.\1."),
    (r"attn_in_proj/kernel$", "attn.in_proj_weight"),
    (r"attn_in_proj/bias$", "attn.in_proj_bias"),
    (r"attn_out_proj/", "attn.out_proj/"),
)
_MATMULS = (
    ("patch_embed.proj.weight", None),
    ("downsample.proj.weight", 2),
    ("modulation.h.weight", 1),
    ("attn.v.weight", 1),
)
LEAVES = ((r"/(kernel|scale|embedding)$", ".weight"), (r"/", "."))


def canonical(arrays):
    """The release's own names; fixed tables left out."""
    return {
        rename(name, OLDER): array
        for name, array in arrays.items()
        if not BUFFERS.search(name)
    }


def _matches(names):
    names = {rename(name, OLDER) for name in names}
    return {"image_projection", "text_projection"} <= names and (
        "text_encoder.token_embedding.weight" in names
    )


def _part(path, axes):
    kernel = path.endswith("/kernel")
    if path.startswith("image/"):
        name = "image_encoder." + rename(path[len("image/") :], SWIN + LEAVES)
        if name.endswith("absolute_pos_embed"):
            return grid(name)
        if not kernel:
            return same(name)
        if axes == 4:
            return convolution(name)
        # Convolutions there that are matmuls here: patches, and the focal 1 x 1.
        for ending, side in _MATMULS:
            if name.endswith(ending):
                return patches(name, side)
        return linear(name)
    if path.startswith("text/"):
        name = "text_encoder." + rename(path[len("text/") :], TEXT + LEAVES)
        return linear(name) if kernel else same(name)
    if path == "logit_scale":
        return scalar(path)
    if path in ("image_projection", "text_projection"):
        return same(path)
    return None


def count(names, pattern):
    """How many numbers there are at the pattern's group, over all names."""
    found = [re.search(pattern, name) for name in names]
    return len({int(m[1]) for m in found if m})


def swin_options(arrays, prefix):
    """The options of `swin` that fit the shapes of its weights."""
    stages = count(arrays, re.escape(prefix) + r"layers\.(\d+)\.")
    depths = [
        count(arrays, re.escape(prefix) + rf"layers\.{s}\.blocks\.(\d+)\.")
        for s in range(stages)
    ]
    tables = [
        arrays[f"{prefix}layers.{s}.blocks.0.attn.relative_position_bias_table"]
        for s in range(stages)
    ]
    proj = arrays[f"{prefix}patch_embed.proj.weight"]
    windows = [(round(table.shape[0] ** 0.5) + 1) // 2 for table in tables]
    options = {
        "name": "swin",
        "embed_dim": proj.shape[0],
        "depths": tuple(depths),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": windows[0],
        "patch_size": proj.shape[2],
    }
    if f"{prefix}absolute_pos_embed" in arrays:
        options["absolute_positions"] = True
        places = arrays[f"{prefix}absolute_pos_embed"].shape[1]
        image_size = round(places**0.5) * proj.shape[2]
    else:
        # Where a late stage is smaller than the window, its window tells its size.
        # Otherwise the least that fits windows of 7 (8) on all stages: 224 (256).
        small = [s for s, window in enumerate(windows) if window < windows[0]]
        last = small[0] if small else stages - 1
        image_size = windows[last] * proj.shape[2] * 2**last
    return {**options, "image_size": image_size}


def _focal_sizes(arrays, prefix, convolutions):
    """The options that a FocalNet and K-LITE's tower share, by their shapes."""
    layers = re.escape(prefix) + r"layers\."
    depths = [
        count(arrays, rf"{layers}{s}\.blocks\.(\d+)\.")
        for s in range(count(arrays, layers + r"(\d+)\."))
    ]
    first = [f"{prefix}layers.{s}.blocks.0." for s in range(len(depths))]
    stem = arrays[f"{prefix}patch_embed.proj.weight"]
    options = {
        "embed_dim": stem.shape[0],
        "depths": tuple(depths),
        "focal_levels": tuple(
            count(arrays, re.escape(f"{block}{convolutions}.") + r"(\d+)\.")
            for block in first
        ),
        "focal_windows": tuple(
            arrays[f"{block}{convolutions}.0.0.weight"].shape[2] for block in first
        ),
        "conv_embed": stem.shape[2] == 7,
        "image_size": 224,
    }
    if any(name.endswith(".gamma_1") for name in arrays):
        options["layer_scale"] = 1e-6  # where it starts: its values are in the file
    if not options["conv_embed"]:
        options["patch_size"] = stem.shape[2]
    return options


def _image(arrays, prefix):
    block = f"{prefix}layers.0.blocks.0."
    if f"{block}modulation.f.weight" in arrays:
        return {
            "name": "focalnet",
            **_focal_sizes(arrays, prefix, "modulation.focal_layers"),
            "modulation_norm": f"{block}modulation.ln.weight" in arrays,
        }
    if f"{block}attn.pre_conv.weight" in arrays:
        sizes = _focal_sizes(arrays, prefix, "attn.pool_layers")
        return {"name": "klite_focal", **sizes}
    if f"{block}attn.relative_position_bias_table" in arrays:
        return swin_options(arrays, prefix)
    raise InputError(
        "weights in the unicl layout must be of a Swin, a FocalNet or K-LITE's Focal: "
        "the image tower's first block has "
        f"{', '.join(sorted(n for n in arrays if block in n)[:3])}, …; load a model of "
        "one of those."
    )


def _model(arrays):
    text = arrays["text_encoder.token_embedding.weight"].shape
    model = {
        "image": _image(arrays, "image_encoder."),
        "text": {
            "name": "transformer",
            "vocab_size": text[0],
            "width": text[1],
            "context_length": arrays["text_encoder.positional_embedding"].shape[0],
            "num_heads": max(1, text[1] // 64),  # as in every release
            "num_layers": count(arrays, r"text_encoder\.resblocks\.(\d+)\."),
        },
        "embed_dim": arrays["image_projection"].shape[1],
    }
    if model["image"]["name"] == "klite_focal":
        # No array says so. K-LITE's configs of this tower have AUTOGRESSIVE: false, and
        # its benchmark fills rows of tokens with the id that this mode masks.
        model["text"]["causal"] = False
        model["text_padding"] = PADDING
    return model


def _tables(image):
    """A Swin's index of relative positions, and its shifted windows' masks."""
    if "window_size" not in image:
        return {}
    tables = {}
    resolution = image["image_size"] // image["patch_size"]
    for s, depth in enumerate(image["depths"]):
        window = min(image["window_size"], resolution)
        for b in range(depth):
            prefix = f"image_encoder.layers.{s}.blocks.{b}."
            index = relative_position_index(window)
            tables[f"{prefix}attn.relative_position_index"] = np.int64(index)
            if b % 2 and resolution > window:
                mask = shift_mask(resolution, window, window // 2)
                tables[f"{prefix}attn_mask"] = mask
        resolution //= 2
    return tables


UNICL = Layout("unicl", _matches, canonical, _model, _part, _tables)
