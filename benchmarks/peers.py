"""The same towers by others: timm's, transformers' and open_clip's, at full size.

`towers.py` times them; `parity.py` gives them random weights and compares numbers.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

SIZE, LENGTH = 224, 77
VOCAB, BERT_VOCAB = 49408, 30522
UNICL_EPS, CLIP_EPS = 1e-12, 1e-5

# Our name of an image tower, and timm's of the same one.
TIMM = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "focalnet_tiny_srf": "focalnet_tiny_srf",
    "focalnet_tiny_lrf": "focalnet_tiny_lrf",
    "focalnet_small_srf": "focalnet_small_srf",
    "focalnet_small_lrf": "focalnet_small_lrf",
    "focalnet_base_srf": "focalnet_base_srf",
    "focalnet_base_lrf": "focalnet_base_lrf",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "vit_b32": "vit_base_patch32_clip_quickgelu_224",
    "vit_b16": "vit_base_patch16_clip_quickgelu_224",
    "vit_l14": "vit_large_patch14_clip_quickgelu_224",
}
# And open_clip's, whose names of weights are OpenAI's.
OPEN_CLIP = {
    "vit_b32": "ViT-B-32-quickgelu",
    "vit_b16": "ViT-B-16-quickgelu",
    "vit_l14": "ViT-L-14-quickgelu",
}
TEXTS = ("transformer", "clip_text", "bert")


def section(tower: str) -> dict[str, Any]:
    """A tower of ours as a config describes it; "clip_text" has CLIP's eps."""
    if tower == "clip_text":
        return {"name": "transformer", "eps": CLIP_EPS}
    return {"name": tower}


def ours(tower: str) -> Callable:
    """The factory of a tower of ours."""
    from unicl_jax import encoders

    options = section(tower)
    menu = {**encoders.IMAGE_TOWERS, **encoders.TEXT_TOWERS}
    return functools.partial(menu[options.pop("name")], **options)


def inputs(tower: str, batch_size: int) -> np.ndarray:
    """Pictures, channels last, or token ids that fill their rows."""
    rng = np.random.default_rng(0)
    if tower in TEXTS:
        vocab = BERT_VOCAB if tower == "bert" else VOCAB
        tokens = rng.integers(1, vocab - 2, (batch_size, LENGTH))
        tokens[:, -1] = vocab - 1
        return tokens
    return rng.normal(size=(batch_size, SIZE, SIZE, 3)).astype(np.float32)


def forward_flops(compiled, batch_size: int) -> float:
    """FLOP of one row of a compiled forward pass, by XLA's count; a multiply-add is 2.

    Elementwise operations count, too; a convolution's padding does not, and a loop's
    body counts once: a tower with scan=True would get too few.
    """
    return (compiled.cost_analysis() or {}).get("flops", math.nan) / batch_size


def timm_model(tower: str):
    """timm's model that gives an image tower's features."""
    import timm

    # Ours drops no paths either; timm's Swin would, a tenth of them.
    return timm.create_model(TIMM[tower], num_classes=0, drop_path_rate=0.0)


def clip_text_model():
    """transformers' text tower of CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(eos_token_id=VOCAB - 1))


def bert_model():
    """transformers' BERT-Base with our 77 positions, without pooler and dropout."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


# --- With random weights, which ours takes over.


class Peer(NamedTuple):
    """Another's tower, and how its weights come to ours.

    Attributes:
      of: whose it is.
      model: the PyTorch module, every weight random.
      features: channels-first images or token ids -> [B, width], keeping the graph.
      file: arrays by the module's names -> a weights file's.
    """

    of: str
    model: Any
    features: Callable
    file: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict


def make(tower: str) -> Peer:
    """The peer of a tower of ours, on the CPU."""
    if tower in OPEN_CLIP:
        return _open_clip_vit(tower)
    if tower in TEXTS:
        return {"transformer": _unicl_text, "clip_text": _clip_text, "bert": _bert}[
            tower
        ]()
    image = timm_model(tower)
    of = f"timm's {TIMM[tower]}"
    if not tower.startswith("focalnet"):
        return Peer(of, randomized(image), image)
    model = _two(image_encoder=image, text_encoder=_open_clip())
    return Peer(of, randomized(model), image, unicl_release)


def randomized(model):
    """The same module, no array of which is left at 0 or 1 or alike for all channels.

    Matrices and kernels keep the size of what they map; scales of norms lie around 1.
    """
    import torch

    rng = np.random.default_rng(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        shape, leaf = tuple(value.shape), name.split(".")[-1]
        draw = rng.standard_normal(shape, np.float32)
        if leaf == "running_var":
            draw = rng.uniform(0.5, 1.5, shape)
        elif len(shape) < 2:
            draw = 0.2 * draw + (leaf in ("weight", "gamma"))
        elif re.search("embedding|table", name):
            draw *= 0.5
        else:
            draw /= math.prod(shape[1:]) ** 0.5
        value.copy_(torch.from_numpy(np.asarray(draw, np.float32)))
    return model


# A tower that is in a file for the other's sake: layouts of two towers need both.
_SMALL_TEXT = dict(context_length=8, vocab_size=64, width=64, heads=1, layers=1)
_SMALL_VIT = dict(layers=1, width=64, patch_size=16, image_size=32)


def _open_clip(vision=None, text=None):
    import open_clip

    return open_clip.CLIP(
        512,
        open_clip.CLIPVisionCfg(**(vision or _SMALL_VIT)),
        open_clip.CLIPTextCfg(**(text or _SMALL_TEXT)),
        quick_gelu=True,
    )


def _open_clip_sizes(name):
    import open_clip

    return open_clip.get_model_config(name)


def _open_clip_vit(tower):
    model = _open_clip(vision=_open_clip_sizes(OPEN_CLIP[tower])["vision_cfg"])
    randomized(model)

    def features(images):
        model.visual.proj = None  # ours is no part of the tower
        return model.visual(images)

    return Peer(f"open_clip's {OPEN_CLIP[tower]}", model, features)


def _unicl_text():
    """open_clip's text transformer with UniCL's eps; the names are the release's."""
    import torch
    from timm.models.focalnet import FocalNet

    clip = _open_clip(text=_open_clip_sizes("ViT-B-32-quickgelu")["text_cfg"])
    for module in clip.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = UNICL_EPS
    image = FocalNet(embed_dim=8, depths=(1,), focal_levels=(1,), focal_windows=(3,))
    model = randomized(_two(image_encoder=image, text_encoder=clip))

    def features(tokens):
        clip.text_projection = None
        return clip.encode_text(tokens)

    of = f"open_clip's text transformer, eps {UNICL_EPS}"
    return Peer(of, model, features, unicl_release)


def _clip_text():
    from transformers import CLIPConfig, CLIPModel

    ends = dict(bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 1)
    small = dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
        patch_size=16,
        image_size=32,
    )
    config = CLIPConfig(
        text_config=ends, vision_config=small, attn_implementation="sdpa"
    )
    model = randomized(CLIPModel(config))

    def features(tokens):
        return model.text_model(input_ids=tokens).pooler_output

    return Peer("transformers' CLIPModel", model, features)


def _bert():
    model = randomized(bert_model())

    def features(tokens):
        mask = (tokens != 0).long()
        return model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0]

    return Peer("transformers' BertModel", model, features)


def _two(**modules):
    import torch

    return torch.nn.ModuleDict(modules)


# --- Their names as those of files that we read.

# timm's FocalNet as its authors' release has it: `checkpoint_filter_fn` turned round.
_FOCALNET = (
    (r"^stem\.", "patch_embed."),
    (r"norm(\d)_post\.", r"norm\1."),
    (r"modulation\.norm\.", "modulation.ln."),
    (r"ls(\d)\.gamma$", r"gamma_\1"),
)
_FOCALNET_LINEAR = re.compile(r"(modulation\.(f|proj)|mlp\.fc\d)\.weight$")


def focalnet_release(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's FocalNet's arrays by the names of the authors' release."""
    found = {}
    for name, array in arrays.items():
        if name.startswith("head."):
            continue
        if _FOCALNET_LINEAR.search(name):  # convolutions of 1 x 1 there
            array = array[:, :, 0, 0]
        name = re.sub(
            r"^layers\.(\d+)\.downsample\.",
            lambda m: f"layers.{int(m[1]) - 1}.downsample.",
            name,
        )
        for pattern, replacement in _FOCALNET:
            name = re.sub(pattern, replacement, name)
        found[name] = array
    return found


def unicl_release(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A timm FocalNet's and an open_clip text tower's arrays as a file of UniCL's."""
    towers = {"image_encoder": {}, "text_encoder": {}}
    for name, array in arrays.items():
        tower, _, rest = name.partition(".")
        towers[tower][rest] = array
    image = focalnet_release(towers["image_encoder"])
    text = {
        name.removeprefix("transformer."): array
        for name, array in towers["text_encoder"].items()
        if not name.startswith("visual.")
    }
    projection = text.pop("text_projection")
    return {
        "logit_scale": text.pop("logit_scale"),
        "text_projection": projection,
        "image_projection": np.zeros((len(image["norm.weight"]), projection.shape[1])),
        **{f"image_encoder.{name}": array for name, array in image.items()},
        **{f"text_encoder.{name}": array for name, array in text.items()},
    }
