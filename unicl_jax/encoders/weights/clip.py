"""CLIP's weights: OpenAI's names, which open_clip has too, and Hugging Face's.

Both are a ViT and a causal transformer with eps 1e-5. OpenAI's activation is QuickGELU,
that of most of open_clip's own models is GELU: the weights don't say which.

Source: openai/CLIP model.py; transformers, modeling_clip.py.
"""

import functools

from unicl_jax.encoders.weights.layout import (
    Layout,
    linear,
    patches,
    rename,
    same,
    scalar,
    three_biases,
    three_linear,
)
from unicl_jax.encoders.weights.unicl import LEAVES, TEXT, count

EPS = 1e-5
VOCAB_SIZE = 49408
# Heads of released towers that are not 64 wide: open_clip's ViT-H, -g and -bigG.
HEADS = {1280: 16, 1408: 16, 1664: 16}
# Sizes that an archive of OpenAI's holds as arrays, too, and tables that are computed.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_POSITION_IDS = ("position_ids",)


def _model(arrays, token, position, patch, places, layers, projection):
    """The towers that fit the shapes of some arrays, by their names."""
    width, _, patch_size, _ = arrays[patch].shape
    side = round((arrays[places].shape[0] - 1) ** 0.5)
    vocab_size, text_width = arrays[token].shape
    image_layers, text_layers = (count(arrays, pattern) for pattern in layers)
    # Another vocabulary is another tokenizer's, whatever CLIP's would make of texts.
    other = {"tokenizer": f"unknown, of {vocab_size} ids"}
    return {
        **(other if vocab_size != VOCAB_SIZE else {}),
        "image": {
            "name": "vit",
            "patch_size": patch_size,
            "width": width,
            "num_layers": image_layers,
            "num_heads": HEADS.get(width, max(1, width // 64)),
            "image_size": side * patch_size,
        },
        "text": {
            "name": "transformer",
            "vocab_size": vocab_size,
            "width": text_width,
            "context_length": arrays[position].shape[0],
            "num_heads": max(1, text_width // 64),
            "num_layers": text_layers,
            "eps": EPS,
        },
        "embed_dim": projection(arrays),
        "normalization": "clip",
    }


# --- OpenAI's.

_OPENAI_IMAGE = (
    (r"patch_embed/kernel$", "conv1.weight"),
    (r"^resblocks_", "transformer/resblocks_"),
    *TEXT,
    *LEAVES,
)
_OPENAI_TEXT = ((r"^resblocks_", "transformer/resblocks_"), *TEXT, *LEAVES)
# What DDP puts before all names, and open_clip's CustomTextCLIP before its texts'.
_OPENAI_OTHERS = ((r"^module\.", ""), (r"^text\.", ""))


def _openai_canonical(arrays):
    return {
        rename(name, _OPENAI_OTHERS): array
        for name, array in arrays.items()
        if name.split(".")[-1] not in _NOT_WEIGHTS
    }


def _openai_part(path, axes):
    del axes
    kernel = path.endswith("/kernel")
    if path == "image_projection":
        return same("visual.proj")
    if path == "text_projection":
        return same(path)
    if path == "logit_scale":
        return scalar(path)
    if path.startswith("image/"):
        name = "visual." + rename(path[len("image/") :], _OPENAI_IMAGE)
        if name == "visual.conv1.weight":
            return patches(name)
        return linear(name) if kernel else same(name)
    if path.startswith("text/"):
        name = rename(path[len("text/") :], _OPENAI_TEXT)
        return linear(name) if kernel else same(name)
    return None


OPENAI = Layout(
    "openai_clip",
    lambda names: any(n.endswith("visual.class_embedding") for n in names),
    _openai_canonical,
    functools.partial(
        _model,
        token="token_embedding.weight",
        position="positional_embedding",
        patch="visual.conv1.weight",
        places="visual.positional_embedding",
        layers=(
            r"visual\.transformer\.resblocks\.(\d+)\.",
            r"^transformer\.resblocks\.(\d+)\.",
        ),
        projection=lambda arrays: arrays["visual.proj"].shape[1],
    ),
    _openai_part,
)


# --- Hugging Face's.

_HF_BLOCK = (
    (r"^resblocks_(\d+)/", r"encoder.layers.\1."),
    (r"ln_1/", "layer_norm1/"),
    (r"ln_2/", "layer_norm2/"),
    (r"mlp/c_fc/", "mlp/fc1/"),
    (r"mlp/c_proj/", "mlp/fc2/"),
    (r"attn_out_proj/", "self_attn.out_proj/"),
)
_HF_IMAGE = (
    (r"^patch_embed/kernel$", "embeddings.patch_embedding.weight"),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre/", "pre_layrnorm/"),  # so spelt
    (r"^ln_post/", "post_layernorm/"),
)
_HF_TEXT = (
    (r"^token_embedding/embedding$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final/", "final_layer_norm/"),
)


def _hf_canonical(arrays):
    return {
        name: array
        for name, array in arrays.items()
        if name.split(".")[-1] not in _POSITION_IDS
    }


def _hf_part(path, axes):
    del axes
    if path in ("image_projection", "text_projection"):
        there = {"image": "visual", "text": "text"}[path.split("_")[0]]
        return linear(f"{there}_projection.weight")
    if path == "logit_scale":
        return scalar(path)
    tower, _, rest = path.partition("/")
    if tower not in ("image", "text"):
        return None
    prefix = "vision_model." if tower == "image" else "text_model."
    own = _HF_IMAGE if tower == "image" else _HF_TEXT
    kernel = rest.endswith("/kernel")
    if "attn_in_proj" in rest:
        block = rename(rest.split("/")[0] + "/", _HF_BLOCK)
        leaf = "weight" if kernel else "bias"
        names = [f"{prefix}{block}self_attn.{x}_proj.{leaf}" for x in "qkv"]
        return three_linear(names) if kernel else three_biases(names)
    name = prefix + rename(rest, own + _HF_BLOCK + LEAVES)
    if name.endswith("patch_embedding.weight"):
        return patches(name)
    return linear(name) if kernel else same(name)


HF = Layout(
    "hf_clip",
    lambda names: "vision_model.embeddings.class_embedding" in names,
    _hf_canonical,
    functools.partial(
        _model,
        token="text_model.embeddings.token_embedding.weight",
        position="text_model.embeddings.position_embedding.weight",
        patch="vision_model.embeddings.patch_embedding.weight",
        places="vision_model.embeddings.position_embedding.weight",
        layers=(
            r"vision_model\.encoder\.layers\.(\d+)\.",
            r"text_model\.encoder\.layers\.(\d+)\.",
        ),
        projection=lambda arrays: arrays["visual_projection.weight"].shape[0],
    ),
    _hf_part,
)
