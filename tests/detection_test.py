"""Exported backbones in detection frameworks: all arrays taken, the same features."""

import ast
import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax import encoders, export
from unicl_jax.encoders.resnet import ResNet
from unicl_jax.encoders.swin import Swin
from unicl_jax.encoders.weights import Weights, from_arrays, read, to_arrays
from unicl_jax.encoders.weights.detection_configs import how_to_load
from unicl_jax.encoders.weights.files import read_arrays, write_arrays
from unicl_jax.errors import InputError

SWIN = dict(
    *({"name": "swin", "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)},),
    **dict(window_size=4, patch_size=2, image_size=32),
)
RESNET = dict(name="resnet", depths=(1, 2, 1, 1), width=8, image_size=64)


def tower(options, seed=0):
    """A tower whose every array is random: Weights."""
    made = encoders.one_tower("image", options)
    params, state = jax.jit(made.init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def noisy(x):
        return np.asarray(x) + rng.uniform(0, 0.2, x.shape).astype("f4")

    params, state = jax.tree.map(noisy, (params, state))
    return Weights({"image": options}, {"image": params}, {"image": state})


def stages(found, images):
    """What each stage of our tower gives, [B, H, W, C]; of a Swin its norm's, too."""
    image = encoders.options("image", found.model["image"])
    names = ("depths", "num_heads", "window_size", "patch_size", "embed_dim")
    common = dict(remat=False, dtype=jnp.float32)
    if "window_size" in image:
        module = Swin(
            **{k: image[k] for k in names},
            **dict(mlp_ratio=4.0, drop_path=0.0, init_std=0.02),
            **dict(absolute_positions=False, **common),
        )
        last = [f"layers_{s}_blocks_{d - 1}" for s, d in enumerate(image["depths"])]
        last.append("norm")
    else:
        module = ResNet(image["depths"], image["width"], "imagenet", **common)
        last = [f"layer{s + 1}_{d - 1}" for s, d in enumerate(image["depths"])]
    variables = {"params": found.params["image"], **found.state["image"]}
    with jax.default_matmul_precision("highest"):
        run = jax.jit(
            lambda v, x: module.apply(v, x, False, capture_intermediates=True)
        )
        inside = run(variables, images)[1]["intermediates"]
    return [np.asarray(inside[name]["__call__"][0]) for name in last]


def normed(x):
    """A layer norm as it starts."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def pixels(size, seed=1):
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype("f4")


def channels_first(x):
    return x.transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch runs the detectors' backbones")


def run(how, **names):
    """Runs the lines that an export prints."""
    exec(how, names)
    return names


# --- mmdetection: weights and features of its own SwinTransformer, in golden/.


def test_mmdetections_swin_gives_its_features(golden):
    arrays = dict(golden("mmdet_swin.npz"))
    images, *wanted = (arrays.pop(name) for name in ("images", "stage0", "stage1"))
    found = from_arrays(arrays, image={"image_size": 32})
    first, _, last = stages(found, images.transpose(0, 2, 3, 1))
    # Two float32 implementations, sums in another order.
    np.testing.assert_allclose(channels_first(normed(first)), wanted[0], atol=1e-5)
    np.testing.assert_allclose(channels_first(last), wanted[1], atol=1e-5)
    again = to_arrays(found, "mmdet_swin")
    assert again.keys() == arrays.keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
        assert array.dtype == arrays[name].dtype


def test_a_whole_detector_gives_its_backbone(golden):
    arrays = {
        k: x for k, x in golden("mmdet_swin.npz").items() if k.startswith("backbone.")
    }
    want = from_arrays(arrays)
    got = from_arrays(arrays | {"neck.fpn_convs.0.conv.bias": np.zeros(3, "f4")})
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- torchvision.


def test_torchvisions_swin_takes_all_and_gives_our_stages(torch, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("safetensors.torch")
    found, path = tower(SWIN), tmp_path / "swin.safetensors"
    write_arrays(path, to_arrays(found, "torchvision_swin"), {})
    how = how_to_load("torchvision_swin", found.model, path)
    import safetensors.torch

    made = run(how, torch=torch, torchvision=torchvision, safetensors=safetensors)
    images = pixels(32)
    *want, norm = stages(found, images)
    with torch.no_grad():
        x = torch.tensor(channels_first(images))
        got = made["body"].eval()(x)
        pooled = made["swin"].eval()(x).numpy()
    for s, features in enumerate(want):
        np.testing.assert_allclose(got[str(s)].numpy(), features, atol=1e-4)
    np.testing.assert_allclose(pooled, norm.mean((1, 2)), atol=1e-5)
    back = read(path, image={"image_size": 32})
    jax.tree.map(np.testing.assert_array_equal, back.params, found.params)


def test_mask_rcnn_takes_our_resnet50_and_gives_our_stages(torch, tmp_path):
    pytest.importorskip("torchvision")
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    found = tower(dict(name="resnet50", image_size=64))
    path = tmp_path / "resnet.pth"
    write_arrays(path, to_arrays(found, "timm_resnet"), {})
    how = how_to_load("timm_resnet", found.model, path).split("# torchvision\n")[1]
    made = run(
        how, torch=torch, MaskRCNN=MaskRCNN, resnet_fpn_backbone=resnet_fpn_backbone
    )
    images = pixels(64)
    want = stages(found, images)
    with torch.no_grad():
        got = made["model"].eval().backbone.body(torch.tensor(channels_first(images)))
    for s, features in enumerate(want):
        scale = np.abs(features).max()
        np.testing.assert_allclose(
            got[str(s)].numpy() / scale, channels_first(features) / scale, atol=1e-5
        )


# --- Hugging Face.


def test_hugging_faces_backbone_gives_our_stages(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    found, path = tower(SWIN), tmp_path / "swin" / "model.safetensors"
    said = export_as(found, "hf_swin", path, tmp_path)
    made = run(said.how, SwinBackbone=transformers.SwinBackbone)
    images = pixels(32)
    *want, norm = stages(found, images)
    x = torch.tensor(channels_first(images))
    with torch.no_grad():
        got = made["backbone"].eval()(x).feature_maps
        last = transformers.SwinModel.from_pretrained(path.parent).eval()(x)
    assert len(got) == len(want)
    for ours, theirs in zip(want, got, strict=True):
        np.testing.assert_allclose(
            theirs.numpy(), channels_first(normed(ours)), atol=2e-5
        )
    np.testing.assert_allclose(last.pooler_output.numpy(), norm.mean((1, 2)), atol=1e-5)


def test_what_hugging_face_saves_is_read(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    found = tower(SWIN)
    export_as(found, "hf_swin", tmp_path / "a" / "model.safetensors", tmp_path)
    theirs = transformers.SwinModel.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    back = read(tmp_path / "b", image={"image_size": 32})
    jax.tree.map(np.testing.assert_array_equal, back.params, found.params)


def export_as(found, layout, path, folder):
    """Exports a tower through a file of the layout of timm."""
    kind = "timm_resnet" if "width" in found.model["image"] else "timm_swin"
    source = folder / "source.npz"
    write_arrays(source, to_arrays(found, kind), {})
    with pytest.MonkeyPatch.context() as patch:
        load = export.model.load
        image = {k: found.model["image"][k] for k in ("image_size",)}

        def loaded(where, **options):
            return load(where, **options or {"image": image})

        patch.setattr(export.model, "load", loaded)
        said = export.export(source, path, layout)
    assert said.difference == 0
    return said


# --- detectron2.


def detectron2s_name(name):
    """By the rules of its tools/convert-torchvision-to-d2.py."""
    if "layer" not in name:
        name = "stem." + name
    for i in (1, 2, 3, 4):
        name = name.replace(f"layer{i}", f"res{i + 1}")
    for i in (1, 2, 3):
        name = name.replace(f"bn{i}", f"conv{i}.norm")
    name = name.replace("downsample.0", "shortcut")
    return "backbone.bottom_up." + name.replace("downsample.1", "shortcut.norm")


def test_detectron2s_names_are_those_of_its_converter(tmp_path):
    found = tower(RESNET)
    want = {detectron2s_name(k): x for k, x in to_arrays(found, "timm_resnet").items()}
    got = to_arrays(found, "detectron2_resnet")
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert "backbone.bottom_up.res3.0.shortcut.norm.running_var" in got
    back = from_arrays(got, image={"image_size": 64})
    jax.tree.map(np.testing.assert_array_equal, back.params, found.params)
    said = export_as(found, "detectron2_resnet", tmp_path / "r.pth", tmp_path).how
    assert "PIXEL_MEAN: [123.675, 116.28, 103.53]" in said
    assert "DEPTH: 17, STRIDE_IN_1X1: False" in said  # no model of theirs, but ours


# --- The command, its files, what it refuses.


def test_the_command_says_what_mmdetection_is_told(tmp_path):
    found, to = tower(SWIN), tmp_path / "swin.pth"
    source = tmp_path / "swin.npz"
    write_arrays(source, to_arrays(found, "timm_swin"), {})
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        options = [f"--from={source}", f"--to={to}", "--format=mmdet_swin"]
        assert export.main(options) == 0
    how = said.getvalue().split("To load it:\n\n")[1]
    ast.parse(how)
    model = run(how)["model"]
    backbone = model["backbone"]
    assert backbone["init_cfg"] == {"type": "Pretrained", "checkpoint": str(to)}
    assert backbone["depths"] == [2, 1] and backbone["strides"] == (2, 2)
    assert model["neck"]["in_channels"] == [16, 32]
    assert all(name.startswith("backbone.") for name in read_arrays(to)[0])


def test_other_pixels_are_told():
    model = {"image": SWIN, "normalization": "clip"}
    assert "mean=[122.771," in how_to_load("mmdet_swin", model, "x.pth")
    model["normalization"] = ((0.5,) * 3, (0.25,) * 3)
    assert "std=[63.75, 63.75" in how_to_load("mmdet_swin", model, "x.pth")
    assert how_to_load("unicl", model, "x.pth") == ""


@pytest.mark.parametrize("layout", ["mmdet_swin", "torchvision_swin", "hf_swin"])
def test_a_stage_smaller_than_its_windows_is_refused(layout):
    found = tower(SWIN | {"image_size": 16, "window_size": 8})
    with pytest.raises(InputError, match="windows of one size: window_size is 8"):
        to_arrays(found, layout)


def test_places_are_refused_where_pictures_are_of_any_size():
    found = tower(SWIN | {"absolute_positions": True})
    for layout in ("mmdet_swin", "torchvision_swin"):
        with pytest.raises(InputError, match="has no place for .*absolute_pos"):
            to_arrays(found, layout)
    again = from_arrays(to_arrays(found, "hf_swin"))
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_a_small_stem_is_refused():
    with pytest.raises(InputError, match='stem of ImageNet.*is "cifar"'):
        to_arrays(tower(RESNET | {"stem": "cifar"}), "detectron2_resnet")
    model = {"image": RESNET | {"stem": "cifar"}}
    assert how_to_load("timm_resnet", model, "x.pth") == ""


def test_a_folder_of_hugging_face_has_its_files_names(tmp_path):
    with pytest.raises(InputError, match=r"must end in /model.safetensors: got"):
        export.export("swin_tiny", tmp_path / "swin.safetensors", "hf_swin")


# --- PyTorch's files, written without it.


def test_pytorch_reads_what_is_written(torch, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.normal(size=(3, 4, 5)).astype("f4"),
        "scalar": np.float32(2.5).reshape(()),
        "counts": np.arange(6).reshape(2, 3),
        "empty": np.zeros((0, 3), "f4"),
        "wide": rng.normal(size=70_000),
        "naïve": rng.normal(size=(2, 3)).astype("f4").T,
    }
    path = tmp_path / "x.pth"
    write_arrays(path, arrays, {"lost": "text"})
    got = torch.load(path, weights_only=True)
    assert list(got) == list(arrays)
    for name, array in arrays.items():
        assert got[name].numpy().dtype == array.dtype and got[name].is_contiguous()
        np.testing.assert_array_equal(got[name].numpy(), array)
    for name, array in read_arrays(path)[0].items():
        np.testing.assert_array_equal(array, arrays[name])
    again = tmp_path / "again.pth"
    write_arrays(again, arrays, {})
    assert again.read_bytes() == path.read_bytes()
