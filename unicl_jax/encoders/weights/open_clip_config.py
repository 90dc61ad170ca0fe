"""What an `open_clip_config.json` says of a model, in our options.

Every setting is read, known to change nothing in use, or refused by its name.

Source: mlfoundations/open_clip, CLIPVisionCfg and CLIPTextCfg of model.py, whose
  defaults these are; PreprocessCfg of transform.py.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from unicl_jax.augment import NORMALIZATIONS
from unicl_jax.errors import InputError

_CROP_PCT = {"shortest": 1.0, "squash": 0.0}

# Settings that are read, by section, with open_clip's defaults.
_READ = {
    "model_cfg": {"quick_gelu": False, "embed_dim": None},
    "vision_cfg": {
        "image_size": 224,
        "patch_size": 16,
        "width": 768,
        "head_width": 64,
        "layers": 12,
        "mlp_ratio": 4.0,
        "norm_kwargs": None,
    },
    "text_cfg": {
        "vocab_size": 49408,
        "context_length": 77,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "mlp_ratio": 4.0,
        "norm_kwargs": None,
        "hf_tokenizer_name": None,
        "tokenizer_kwargs": None,
        "tokenizer_mode": None,
    },
    "preprocess_cfg": {"mean": None, "std": None, "resize_mode": "shortest"},
}
# Settings that say nothing of a model in use, or only beside one that is refused: of
# training, of what else a tower gives, and those whose effect is in the weights.
_ASIDE = {
    "model_cfg": {
        "vision_cfg",
        "text_cfg",
        "custom_text",
        "init_logit_scale",
        "nonscalar_logit_scale",
    },
    "vision_cfg": {
        "patch_dropout",
        "output_tokens",
        "pos_embed_type",
        "final_ln_after_pool",  # of one token it is the same
        "attn_pooler_queries",
        "attn_pooler_heads",
        "timm_model_pretrained",
        "timm_pool",
        "timm_proj",
        "timm_proj_bias",
        "timm_drop",
        "timm_drop_path",
    },
    "text_cfg": {
        "output_tokens",
        "final_ln_after_pool",
        "pad_id",
        "eos_id",
        "hf_model_pretrained",
        "hf_proj_type",
        "hf_pooler_type",
    },
    "preprocess_cfg": {"size", "fill_color"},
}
# The values of further settings that our towers have. All others must be off.
_ONLY = {
    "vision_cfg": {"pool_type": ("tok",), "block_type": ("default",)},
    "text_cfg": {
        "pool_type": ("argmax",),
        "proj_type": ("linear",),
        "block_type": ("default",),
    },
    "preprocess_cfg": {"mode": ("RGB",), "interpolation": ("bicubic", "random")},
}


def options(said: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options, by open_clip's.

    Args:
      said: what the file holds.

    Returns:
      Changes for `from_arrays`.

    Raises:
      InputError: naming the setting that no tower of ours has.
    """
    model = _section(said, "model_cfg")
    towers = ("vision_cfg", "text_cfg")
    image, text = (_section(said["model_cfg"], name) for name in towers)
    pictures = said.get("preprocess_cfg") or {}
    picture = _section({"preprocess_cfg": pictures}, "preprocess_cfg")
    size, layers = image["image_size"], image["layers"]
    if isinstance(size, list):
        _must(len(set(size)) == 1, "vision_cfg.image_size", size, "square")
        size = size[0]
    _must(isinstance(layers, int), "vision_cfg.layers", layers, "a ViT's one number")
    mode = picture["resize_mode"]
    _must(mode in _CROP_PCT, "preprocess_cfg.resize_mode", mode, " or ".join(_CROP_PCT))
    activation = "quick_gelu" if model["quick_gelu"] else "gelu"
    told = {
        "image": {
            "image_size": size,
            "patch_size": image["patch_size"],
            "width": image["width"],
            "num_heads": image["width"] // image["head_width"],
            "num_layers": layers,
            "activation": activation,
            **_norm("vision_cfg", image),
        },
        "text": {
            "vocab_size": text["vocab_size"],
            "context_length": text["context_length"],
            "width": text["width"],
            "num_heads": text["heads"],
            "num_layers": text["layers"],
            "activation": activation,
            **_norm("text_cfg", text),
        },
        "crop_pct": _CROP_PCT[mode],
    }
    pair = [picture["mean"], picture["std"]]
    if pair != [None, None]:  # else CLIP's, as of all such weights
        whole = [np.shape(x) for x in pair] == [(3,), (3,)]
        _must(whole, "preprocess_cfg.mean and .std", pair, "three numbers each")
        same = (k for k, v in NORMALIZATIONS.items() if np.allclose(v, pair, atol=1e-6))
        told["normalization"] = next(same, pair)
    if model["embed_dim"] is not None:
        told["embed_dim"] = model["embed_dim"]
    other = text["hf_tokenizer_name"] or text["tokenizer_mode"]
    if other or text["tokenizer_kwargs"]:
        told["tokenizer"] = other or f"CLIP's with {text['tokenizer_kwargs']}"
    return told


def _section(said, name):
    """A section's settings that are read, defaults included; all must be known."""
    section = said.get(name)
    if not isinstance(section, dict):
        raise InputError(
            f'open_clip_config.json must hold "{name}": it holds '
            f"{', '.join(said) or 'nothing'}; get it again."
        )
    for setting, value in section.items():
        if setting in _READ[name] or setting in _ASIDE[name] or not value:
            continue
        only = _ONLY.get(name, {}).get(setting, ())
        _must(value in only, f"{name}.{setting}", value, " or ".join(only) or "off")
    found = {k: v for k, v in section.items() if k in _READ[name] and v is not None}
    found = {**_READ[name], **found}
    if "mlp_ratio" in found:
        ratio, width = found["mlp_ratio"], found["width"]
        _must(int(width * ratio) == 4 * width, f"{name}.mlp_ratio", ratio, 4)
    return found


def _norm(name, section):
    """The norms' eps, where it is not the default."""
    changes = section["norm_kwargs"] or {}
    _must(changes.keys() <= {"eps"}, f"{name}.norm_kwargs", changes, "of eps alone")
    return changes


def _must(holds, setting, value, what):
    if not holds:
        raise InputError(
            f"{setting} of open_clip_config.json must be {what}, for the towers that "
            f"are here: got {json.dumps(value)}; load another model."
        )
