"""open_clip's models from hubs' folders: weights, and what is said beside them.

The peers are open_clip's own models, tiny, with random weights.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unicl_jax import encoders
from unicl_jax.augment import NORMALIZATIONS
from unicl_jax.encoders import weights
from unicl_jax.encoders.weights import from_arrays
from unicl_jax.encoders.weights.files import write_arrays
from unicl_jax.encoders.weights.open_clip_config import options
from unicl_jax.errors import InputError
from unicl_jax.model import load

IMAGE = dict(layers=2, width=48, head_width=16, patch_size=8, image_size=32)
TEXT = dict(context_length=12, vocab_size=600, width=32, heads=4, layers=2)
MODEL = dict(embed_dim=24, vision_cfg=IMAGE, text_cfg=TEXT)
# CLIP's and others', by settings that open_clip's files say.
MODELS = {
    "quick_gelu": {"quick_gelu": True},
    "gelu": {},
    "custom text": {"custom_text": True, "quick_gelu": False},
    "eps": {
        "vision_cfg": IMAGE | {"norm_kwargs": {"eps": 1e-2}},
        "text_cfg": TEXT | {"norm_kwargs": {"eps": 1e-3}},
        "custom_text": True,
    },
    "of no consequence": {
        "vision_cfg": IMAGE
        | {"pool_type": "tok", "final_ln_after_pool": True, "patch_dropout": 0.5}
        | {"pos_embed_type": "sin_cos_2d", "image_size": [32, 32], "mlp_ratio": 4.0},
        "text_cfg": TEXT | {"pool_type": "argmax", "proj_type": "linear", "pad_id": 1},
        "init_logit_scale": 1.5,
        "nonscalar_logit_scale": True,
    },
}


@pytest.fixture(scope="module")
def open_clip():
    pytest.importorskip("torch", reason="PyTorch makes the files to read")
    return pytest.importorskip("open_clip", reason="its models are the peers")


def make(open_clip, settings):
    """A model of open_clip's in float64, no bias of it 0."""
    import torch

    torch.manual_seed(0)
    settings = {**MODEL, **settings}
    custom = settings.pop("custom_text", False)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at 0, where their order would not show
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 2:  # else activations are near 0, and all alike
            parameter.data *= 3
    return model.double().eval()


def write(folder, settings, model=None, **pictures):
    """A folder as open_clip's hub has it."""
    said = {"model_cfg": {**MODEL, **settings}, "preprocess_cfg": pictures}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    arrays = {"visual.class_embedding": np.zeros(48)}
    if model is not None:
        arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    write_arrays(folder / "open_clip_model.safetensors", arrays, {})


def inputs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 598, (3, 12), dtype=np.int32)
    tokens[:, 7:] = 599
    return rng.normal(size=(3, 32, 32, 3)), tokens


def theirs(model):
    import torch

    images, tokens = inputs()
    with torch.no_grad():
        return (
            model.encode_image(torch.tensor(images.transpose(0, 3, 1, 2))).numpy(),
            model.encode_text(torch.tensor(tokens)).numpy(),
        )


def ours(found):
    """Embeddings in float64, before they are made unit."""
    images, tokens = inputs()
    image, text = (
        {k: v for k, v in found.model[tower].items() if k != "name"}
        for tower in ("image", "text")
    )
    two = encoders.make_two_tower(
        encoders.vit(**image, dtype=jnp.float64),
        encoders.transformer(**text, dtype=jnp.float64),
        embed_dim=found.model["embed_dim"],
    )

    @jax.jit
    def run(params, state):
        u, _ = two.image_features(params, state, images)
        v, _ = two.text_features(params, state, tokens)
        return u @ params["image_projection"], v @ params["text_projection"]

    return run(found.params, found.state)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_open_clips_embeddings_in_float64(
    name, open_clip, tmp_path, x64
):
    model = make(open_clip, MODELS[name])
    write(tmp_path, MODELS[name], model)
    found = weights.read(tmp_path)
    # Two float64 programs; embeddings of size 1 and more.
    for got, want in zip(ours(found), theirs(model), strict=True):
        assert np.abs(want).max() > 0.3
        np.testing.assert_allclose(got, want, atol=1e-10)
    assert found.params["logit_scale"] == model.logit_scale.item()
    # By their shapes alone they are another model: a head here has not 64 channels.
    alone = weights.read(tmp_path / "open_clip_model.safetensors")
    for got, want in zip(ours(alone), theirs(model), strict=True):
        assert np.abs(got - want).max() > 1e-4


def test_custom_texts_names_are_the_same_model(open_clip):
    """Whose prefix is all that differs."""
    arrays = {k: v.numpy() for k, v in make(open_clip, {}).state_dict().items()}
    custom = open_clip.model.convert_to_custom_text_state_dict(arrays)
    assert {k.split(".")[0] for k in custom} == {"visual", "text", "logit_scale"}
    got, want = (from_arrays(x, text={"num_heads": 4}) for x in (custom, arrays))
    assert got.model == want.model
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


PICTURES = {
    "CLIP's": {},
    "of its own": dict(mean=[0.5, 0.4, 0.3], std=[0.5, 0.6, 0.7]),
    "whole": dict(resize_mode="squash", interpolation="bicubic", mean=[0.5] * 3)
    | dict(std=[0.5] * 3, size=32, mode="RGB"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_taken_as_open_clip_takes_them(name, open_clip, tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = make(open_clip, {}).float()
    write(tmp_path, {}, model, **PICTURES[name])
    loaded = load(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    picture = Image.fromarray(pixels)
    transform = image_transform_v2(
        PreprocessCfg(**{"size": 32, **PICTURES[name]}), is_train=False
    )
    want = model.encode_image(transform(picture)[None], normalize=True)
    got = loaded.encode_image(loaded.preprocess(picture))
    # Two float32 implementations; unit embeddings.
    np.testing.assert_allclose(got, want.detach().numpy(), atol=5e-6)


def test_pytorchs_file_will_do_and_hugging_faces_stays_aside(open_clip, tmp_path):
    import torch

    model = make(open_clip, {})
    write(tmp_path, {}, model)
    want = weights.read(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{")
    got = weights.read(tmp_path)
    assert got.model == want.model
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_a_folder_at_another_size_is_resized(open_clip, tmp_path):
    write(tmp_path, {}, make(open_clip, {}))
    loaded = load(tmp_path, image={"image_size": 48})
    assert loaded.config["image"]["num_heads"] == 3
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    got = loaded.encode_image(pixels)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


# --- What the config says; no peer is needed.


def test_the_settings_left_out_are_open_clips_defaults():
    said = {"model_cfg": {"vision_cfg": {}, "text_cfg": {}, "quick_gelu": True}}
    told = options(said)
    assert told["image"] == {
        "image_size": 224,
        "patch_size": 16,
        "width": 768,
        "num_heads": 12,
        "num_layers": 12,
        "activation": "quick_gelu",
    }
    assert told["text"]["num_heads"] == 8 and told["text"]["vocab_size"] == 49408
    assert told["crop_pct"] == 1.0
    assert not told.keys() & {"normalization", "tokenizer", "embed_dim"}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_a_known_normalization_is_told_by_its_name(name):
    """As the trainer's config names it, which `init_from` compares."""
    mean, std = map(list, NORMALIZATIONS[name])
    told = options({"model_cfg": MODEL, "preprocess_cfg": {"mean": mean, "std": std}})
    assert told["normalization"] == name
    mean[0] += 0.01
    told = options({"model_cfg": MODEL, "preprocess_cfg": {"mean": mean, "std": std}})
    assert told["normalization"] == [mean, std]


@pytest.mark.parametrize("mean", [None, [0.5], 0.5])
def test_a_normalization_that_is_not_whole_is_refused(mean):
    pictures = {"mean": mean, "std": [0.5] * 3}
    with pytest.raises(InputError, match="must be three numbers each"):
        options({"model_cfg": MODEL, "preprocess_cfg": pictures})


REFUSED = {
    "model_cfg": {
        "multimodal_cfg": {"layers": 12},
        "init_logit_bias": -10,
        "something_new": 1,
    },
    "vision_cfg": {
        "timm_model_name": "vit_base_patch16_siglip_224",
        "layers": [3, 4, 6, 3],
        "no_ln_pre": True,
        "attentional_pool": True,
        "pool_type": "avg",
        "ls_init_value": 1e-4,
        "mlp_ratio": 4.9231,
        "image_size": [32, 64],
        "norm_kwargs": {"elementwise_affine": False},
        "act_kwargs": {"approximate": "tanh"},
        "qk_norm": True,
        "block_type": "custom",
    },
    "text_cfg": {
        "hf_model_name": "roberta-base",
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_type": "none",
        "proj_bias": True,
        "embed_cls": True,
        "act_kwargs": {"approximate": "tanh"},
    },
    "preprocess_cfg": {
        "resize_mode": "longest",
        "interpolation": "bilinear",
        "mode": "L",
    },
}


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [(s, name, value) for s, each in REFUSED.items() for name, value in each.items()],
)
def test_what_no_tower_here_has_is_refused_by_name(section, setting, value, tmp_path):
    changed = {setting: value}
    if section in MODEL:
        changed = {section: {**MODEL[section], **changed}}
    pictures = changed if section == "preprocess_cfg" else {}
    write(tmp_path, {} if pictures else changed, **pictures)
    with pytest.raises(InputError, match=f"^{section}.{setting} of open_clip_config"):
        load(tmp_path)


def test_settings_that_are_off_are_no_matter():
    """As a config that lists all of them has it."""
    off = {"ls_init_value": None, "qk_norm": False, "no_ln_pre": False}
    off |= {"act_kwargs": None, "timm_model_name": None, "something_new": None}
    more = {"vision_cfg": IMAGE | off, "text_cfg": TEXT | {"hf_model_name": None}}
    told = options({"model_cfg": {**MODEL, **more, "init_logit_bias": None}})
    assert told == options({"model_cfg": MODEL})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"hf_tokenizer_name": "bert-base-uncased"}, "bert-base-uncased"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "CLIP's with .*canonicalize"),
    ],
)
def test_strings_for_another_tokenizer_are_refused(text, words, open_clip, tmp_path):
    write(tmp_path, {"text_cfg": TEXT | text}, make(open_clip, {}))
    with pytest.raises(InputError, match=rf"its own tokenizer \({words}"):
        load(tmp_path).encode_text("a cat")
    assert load(tmp_path).encode_text(inputs()[1]).shape == (3, 24)
    # Who knows better may say so.
    assert load(tmp_path, tokenizer="clip").encode_text("a cat").shape == (1, 24)


def test_a_config_that_says_another_model_is_told(open_clip, tmp_path):
    write(tmp_path, {"text_cfg": TEXT | {"layers": 3}}, make(open_clip, {}))
    with pytest.raises(InputError, match="12 missing .*resblocks.2"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{", "open_clip_config.json must be JSON"),
        ('{"embed_dim": 512}', 'must hold "model_cfg": it holds embed_dim'),
        ('{"model_cfg": {"vision_cfg": {}}}', 'must hold "text_cfg": it holds vision'),
        ("[]", 'must hold "model_cfg": it holds nothing'),
    ],
)
def test_a_config_that_is_not_whole_is_told(said, words, tmp_path):
    write(tmp_path, {})
    (tmp_path / "open_clip_config.json").write_text(said)
    with pytest.raises(InputError, match=words):
        load(tmp_path)
