"""Weights in the layout of UniCL's release, as this package's parameters."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from unicl_jax.errors import InputError

# Buffers of the release that we compute: the same for every model of a size.
_BUFFERS = re.compile(r"(relative_position_index|attn_mask)$")

# Renames towards our parameter paths, applied in order.
_RENAMES = (
    (r"^image_encoder\.", "image/"),
    (r"^text_encoder\.", "text/"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.", r"layers_\1_blocks_\2/"),
    (r"layers\.(\d+)\.downsample\.", r"layers_\1_downsample/"),
    (r"resblocks\.(\d+)\.", r"resblocks_\1/"),
    (r"attn\.in_proj_(weight|bias)$", r"attn_in_proj.\1"),
    (r"attn\.out_proj\.", "attn_out_proj."),
    (r"token_embedding\.weight$", "token_embedding/embedding"),
    (r"(norm\d?|ln_\w+)\.weight$", r"\1/scale"),
    (r"\.weight$", "/kernel"),
    (r"\.", "/"),
)


def from_unicl(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turns a UniCL state dict (Swin and causal transformer) into parameters.

    Args:
      state_dict: arrays by the release's names, e.g.
        `image_encoder.layers.0.blocks.0.attn.qkv.weight`.

    Returns:
      The parameters of a `TwoTower`: nested dicts of arrays in the given dtype.
      Linear maps are transposed to [in, out], the patch convolution becomes the matmul
      it is, [4 4 3, out]; projections, embeddings and bias tables stay as they are.

    Raises:
      InputError: if a name does not belong to the layout.

    Source: microsoft/UniCL at 9983bf8, state dict of its released models.
    """
    params: dict[str, Any] = {}
    for name, value in state_dict.items():
        if _BUFFERS.search(name):
            continue
        path = name
        for pattern, replacement in _RENAMES:
            path = re.sub(pattern, replacement, path)
        value = np.asarray(value)
        if path == "image/patch_embed/proj/kernel":  # OIHW -> (H W I) O
            value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        elif path.endswith("/kernel"):
            value = value.T
        *parents, leaf = path.split("/")
        if parents and parents[0] not in ("image", "text"):
            raise InputError(
                "names must be of UniCL's layout (image_encoder.*, text_encoder.*, "
                f'image_projection, text_projection, logit_scale): got "{name}".'
            )
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return params
