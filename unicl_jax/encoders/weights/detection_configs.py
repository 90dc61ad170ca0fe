"""What a detection framework must be told of an exported backbone, to be pasted."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unicl_jax import encoders
from unicl_jax.augment import NORMALIZATIONS
from unicl_jax.errors import InputError

HF_FILE = "model.safetensors"  # what `from_pretrained` looks for, beside config.json


def how_to_load(layout: str, model: Mapping[str, Any], path: str | Path) -> str:
    """Lines of Python (or of detectron2's YAML) that load an exported backbone.

    Args:
      layout: a key of `LAYOUTS`.
      model: a config's `model` section with `image`.
      path: of the file.

    Returns:
      The lines; "" for a layout that no detection framework reads.
    """
    if layout not in _SNIPPETS:
        return ""
    options = encoders.options("image", model["image"])
    if options.get("stem") == "cifar":
        return ""
    scale = model.get("normalization", "imagenet")
    mean, std = NORMALIZATIONS[scale] if isinstance(scale, str) else scale
    pixels = {
        "mean": [round(255 * float(x), 3) for x in mean],
        "std": [round(255 * float(x), 3) for x in std],
    }
    return _SNIPPETS[layout](options, pixels, Path(path))


def files_beside(
    layout: str, model: Mapping[str, Any], path: str | Path
) -> dict[Path, str]:
    """What a layout's readers need beside the weights.

    Args:
      layout: a key of `LAYOUTS`.
      model: as for `how_to_load`.
      path: of the weights.

    Returns:
      Texts by path.

    Raises:
      InputError: if the weights are to be called what their reader won't find.
    """
    if layout != "hf_swin":
        return {}
    if Path(path).name != HF_FILE:
        raise InputError(
            f'format "hf_swin" is a folder with {HF_FILE} and config.json: --to must '
            f'end in /{HF_FILE}: got "{path}".'
        )
    image = encoders.options("image", model["image"])
    said = {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": image["image_size"],
        "use_absolute_embeddings": bool(image.get("absolute_positions", False)),
        "hidden_size": image["embed_dim"] * 2 ** (len(image["depths"]) - 1),
        "layer_norm_eps": 1e-5,
        **{k: image[k] for k in ("patch_size", "embed_dim", "window_size")},
        **{k: list(image[k]) for k in ("depths", "num_heads")},
        "mlp_ratio": image.get("mlp_ratio", 4.0),
    }
    return {Path(path).with_name("config.json"): json.dumps(said, indent=2) + "\n"}


def _channels(image):
    """Of each stage's output."""
    if "window_size" in image:
        return [image["embed_dim"] * 2**s for s in range(len(image["depths"]))]
    return [4 * image.get("width", 64) * 2**s for s in range(len(image["depths"]))]


def _mmdet(image, pixels, path, backbone):
    stages = tuple(range(len(image["depths"])))
    return f"""\
model = dict(
    data_preprocessor=dict(
        type="DetDataPreprocessor", pad_mask=True, pad_size_divisor=32,
        mean={pixels["mean"]}, std={pixels["std"]}, bgr_to_rgb=True),
    backbone=dict(
        _delete_=True, {backbone}
        out_indices={stages},
        init_cfg=dict(type="Pretrained", checkpoint="{path}")),
    neck=dict(in_channels={_channels(image)}))"""


def _mmdet_swin(image, pixels, path):
    return "# mmdetection 3, after _base_\n" + _mmdet(
        image,
        pixels,
        path,
        f"""type="SwinTransformer", convert_weights=False,
        embed_dims={image["embed_dim"]}, depths={list(image["depths"])},
        num_heads={list(image["num_heads"])}, window_size={image["window_size"]},
        patch_size={image["patch_size"]}, strides={_strides(image)},
        mlp_ratio={image.get("mlp_ratio", 4.0):g}, drop_path_rate=0.2,
        frozen_stages=-1,  # all of it learns, at AdamW's 1e-4""",
    )


def _strides(image):
    return (image["patch_size"], *[2] * (len(image["depths"]) - 1))


def _depth(image):
    """A ResNet's number of layers, by which frameworks know it."""
    return 2 + 3 * sum(image["depths"])


def _timm_resnet(image, pixels, path):
    mmdet = _mmdet(
        image,
        pixels,
        path,
        f"""type="ResNet", depth={_depth(image)}, style="pytorch",
        norm_cfg=dict(type="BN", requires_grad=True), norm_eval=True,
        frozen_stages=1,  # the stem and the first stage stay as they are""",
    )
    return f"""\
# mmdetection 3, after _base_
{mmdet}

# torchvision
backbone = resnet_fpn_backbone(
    backbone_name="resnet{_depth(image)}", weights=None, trainable_layers=3)
backbone.body.load_state_dict({_loaded(path)})
model = MaskRCNN(
    backbone, num_classes=91, image_mean={_fractions(pixels["mean"])},
    image_std={_fractions(pixels["std"])})"""


def _loaded(path):
    if path.suffix == ".pth":
        return f'torch.load("{path}")'
    return f'safetensors.torch.load_file("{path}")'


def _fractions(values):
    return [round(x / 255, 4) for x in values]


def _torchvision_swin(image, pixels, path):
    stages = range(len(image["depths"]))
    layers = {str(2 * s + 1): str(s) for s in stages}
    return f"""\
# torchvision
swin = torchvision.models.SwinTransformer(
    patch_size={[image["patch_size"]] * 2}, embed_dim={image["embed_dim"]},
    depths={list(image["depths"])}, num_heads={list(image["num_heads"])},
    window_size={[image["window_size"]] * 2}, stochastic_depth_prob=0.2)
swin.head = torch.nn.Identity()
swin.load_state_dict({_loaded(path)})
# Its stages' outputs, channels last: permute(0, 3, 1, 2) before a FeaturePyramidNetwork
# of {_channels(image)} channels.
body = torchvision.models._utils.IntermediateLayerGetter(swin.features, {layers})
# GeneralizedRCNNTransform: image_mean={_fractions(pixels["mean"])},
# image_std={_fractions(pixels["std"])}"""


def _hf_swin(image, pixels, path):
    stages = [f"stage{s + 1}" for s in range(len(image["depths"]))]
    return f"""\
# transformers: MaskFormer, Mask2Former, UperNet, DETR take such a backbone
backbone = SwinBackbone.from_pretrained("{path.parent}", out_features={stages})
# Their image processors: image_mean={_fractions(pixels["mean"])},
# image_std={_fractions(pixels["std"])}"""


def _detectron2(image, pixels, path):
    return f"""\
# detectron2, on configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
MODEL:
  WEIGHTS: "{path}"
  PIXEL_MEAN: {pixels["mean"]}
  PIXEL_STD: {pixels["std"]}
  RESNETS: {{DEPTH: {_depth(image)}, STRIDE_IN_1X1: False}}
  BACKBONE: {{FREEZE_AT: 2}}  # the stem and res2 stay as they are
INPUT:
  FORMAT: "RGB\""""


_SNIPPETS: dict[str, Callable[..., str]] = {
    "mmdet_swin": _mmdet_swin,
    "timm_resnet": _timm_resnet,
    "torchvision_swin": _torchvision_swin,
    "hf_swin": _hf_swin,
    "detectron2_resnet": _detectron2,
}
