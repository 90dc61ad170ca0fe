"""Folders of weights, as hubs hold them: which file, and what is written beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicl_jax.encoders.weights import open_clip_config
from unicl_jax.errors import InputError

HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def read_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Finds a folder's weights, and what its config says that they don't.

    Args:
      folder: of open_clip's form, with an `open_clip_config.json`, or of Hugging
        Face's, with a `config.json`; of both, open_clip's is taken.

    Returns:
      The weights file, and changes for `from_arrays`.

    Raises:
      InputError: if there are no weights, or they are of a model that is none of ours.
    """
    for files, configs in (
        (OPEN_CLIP, ("open_clip_config.json",)),
        (HUGGING_FACE, ("config.json", "open_clip_config.json")),
    ):
        for file in files:
            if (folder / file).is_file():
                there = [name for name in configs if (folder / name).is_file()]
                told = {}
                if there:
                    told = CONFIGS[there[0]](_read_json(folder / there[0]))
                return folder / file, told
    if pieces := sorted(path.name for path in folder.glob("*.index.json")):
        raise InputError(
            f'a folder must hold its weights in one file: "{folder}" has them in '
            f"several, by {pieces[0]}; save the model anew, as by "
            'save_pretrained(folder, max_shard_size="100GB").'
        )
    raise InputError(
        f"a folder must be a workdir, or hold {', '.join(HUGGING_FACE + OPEN_CLIP)}: "
        f'"{folder}" holds none of these; name the weights file.'
    )


def _read_json(path):
    try:
        said = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f'{path.name} must be JSON: "{path}" is not ({error}); get it again.'
        ) from error
    return said if isinstance(said, dict) else {}


# --- Hugging Face's config.json.


# What shapes don't tell, with the defaults of CLIPVisionConfig and CLIPTextConfig: a
# config may leave them out.
_CLIP = {
    tower: {
        "hidden_act": ("activation", "quick_gelu"),
        "layer_norm_eps": ("eps", 1e-5),
        "num_attention_heads": ("num_heads", heads),
    }
    for tower, heads in (("image", 12), ("text", 8))
}


def _hugging_face(said: Mapping[str, Any]) -> dict[str, Any]:
    # Others with BERT's names have its settings, too, and may have other values.
    alone = "vision_config" not in said and "num_attention_heads" in said
    if said.get("model_type") == "bert" or alone:
        return {"text": _bert(said)}
    told = {}
    for tower, key in (("image", "vision_config"), ("text", "text_config")):
        if isinstance(said.get(key), dict):
            section = {k: v for k, v in said[key].items() if v is not None}
            told[tower] = {
                ours: section.get(theirs, default)
                for theirs, (ours, default) in _CLIP[tower].items()
            }
    return told


def _bert(said):
    for name, only in (
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
    ):
        if said.get(name, only) != only:
            raise InputError(
                f"config.json of a BERT must have {name} {json.dumps(only)}, as the "
                f'tower "bert": got {json.dumps(said[name])}; load another model.'
            )
    names = {
        "num_attention_heads": "num_heads",
        "layer_norm_eps": "eps",
        "pad_token_id": "pad_id",
    }
    return {
        ours: said[theirs]
        for theirs, ours in names.items()
        if said.get(theirs) is not None
    }


CONFIGS = {
    "open_clip_config.json": open_clip_config.options,
    "config.json": _hugging_face,
}
