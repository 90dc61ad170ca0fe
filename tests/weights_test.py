"""Weights in and out: other people's files give their models' numbers, and go back."""

import json
import pickle
import zipfile

import jax
import numpy as np
import pytest

from unicl_jax import encoders
from unicl_jax.encoders.weights import (
    MODEL,
    Weights,
    from_arrays,
    to_arrays,
    untold,
)
from unicl_jax.encoders.weights.files import read_arrays, write_arrays
from unicl_jax.encoders.weights.folders import read_folder
from unicl_jax.errors import InputError
from unicl_jax.model import load

HEADS = {"text": {"num_heads": 4}}  # the golden model's; released ones have 64 a head


@pytest.fixture(scope="module")
def release(golden):
    return golden("unicl_tiny/state_dict.npz")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch makes the files to read")


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- UniCL's names.


def test_shapes_tell_the_model(release):
    found = from_arrays(release)
    assert found.model["image"] == {
        "name": "swin",
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 24,
        "depths": (2, 2, 2, 1),
        "num_heads": (3, 6, 12, 24),
        "window_size": 4,
    }
    assert found.model["text"] == {
        "name": "transformer",
        "vocab_size": 512,
        "context_length": 16,
        "width": 64,
        "num_heads": 1,  # what shapes cannot tell
        "num_layers": 2,
    }
    assert found.model["embed_dim"] == 32
    assert from_arrays(release, **HEADS).model["text"]["num_heads"] == 4


OLDER = {
    "elevater": {
        "image_encoder.": "visual.",
        "text_encoder.": "text.",
        "image_projection": "vision_projection",
    },
    "klite": {"text_encoder.": "lang_encoder.", "text_projection": "lang_projection"},
    "ddp": {"": "module."},
}


@pytest.mark.parametrize("names", OLDER.values(), ids=OLDER)
def test_older_names_are_the_same_model(names, release):
    renamed = {}
    for name, array in release.items():
        for new, old in names.items():
            if name.startswith(new):
                name = old + name[len(new) :]
        renamed[name] = array
    assert set(renamed) != set(release)
    assert_same(from_arrays(renamed).params, from_arrays(release).params)


def test_what_is_written_is_what_was_read_tables_included(release):
    again = to_arrays(from_arrays(release, **HEADS), "unicl")
    assert set(again) == set(release)  # 137 weights and 9 tables
    for name, array in release.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
        assert again[name].dtype == array.dtype, name


def test_every_array_is_used_and_every_weight_filled(release):
    arrays = dict(release)
    del arrays["text_encoder.ln_final.bias"]
    arrays["text_encoder.head.weight"] = np.zeros(3)
    arrays["image_encoder.norm.bias"] = np.zeros(5)
    with pytest.raises(InputError) as caught:
        from_arrays(arrays)
    for words in (
        "1 missing (text_encoder.ln_final.bias)",
        "1 left over (text_encoder.head.weight)",
        "1 of another shape (image_encoder.norm.bias: (5,), not (192,))",
    ):
        assert words in str(caught.value)


def test_names_of_nobody_are_shown():
    with pytest.raises(InputError, match="known layout.*unicl.*got 1 arrays named foo"):
        from_arrays({"foo.bar": np.zeros(3)})


@pytest.mark.parametrize(
    "name, whose",
    [
        ("visual.attnpool.q_proj.weight", "a CLIP with a ResNet"),
        ("layers.0.blocks.0.attn.cpb_mlp.0.weight", "a Swin V2"),
        ("layer1.0.conv2.weight", "a ResNet of basic blocks"),
        ("_modules.fc._parameters.weight", r"save its state_dict\(\) instead"),
    ],
)
def test_models_that_people_try_are_named(name, whose):
    with pytest.raises(InputError, match=f"known layout.*, as of .*{whose}.*; load a"):
        from_arrays({name: np.zeros(3)})


def test_a_file_without_a_tower_names_what_is_not_there(release):
    arrays = {k: v for k, v in release.items() if "positional" not in k}
    with pytest.raises(InputError, match="must hold.*text_encoder.positional_embed"):
        from_arrays(arrays)


@pytest.mark.parametrize("layout", ["hf_clip", "openai_clip", "timm_resnet"])
def test_a_layout_for_other_towers_is_refused_with_those_that_fit(layout, release):
    with pytest.raises(InputError, match='is "swin"; formats for that: unicl, timm_sw'):
        to_arrays(from_arrays(release), layout)


def test_what_arrays_do_not_say_is_listed(release):
    assert untold(from_arrays(release), "unicl") == {}
    found = from_arrays(release, text={"num_heads": 4, "eps": 1e-5})
    assert untold(found, "unicl") == {"text.num_heads": 4, "text.eps": 1e-5}


def test_a_layout_has_place_for_its_own_kind_of_text_tower(release):
    found = from_arrays(release)
    other = Weights({**found.model, "text": {"name": "bert"}}, *found[1:])
    with pytest.raises(
        InputError, match='for transformer: .*text tower is "bert".* that: hf_bert'
    ):
        to_arrays(other, "unicl")


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("logit_scale", (2,), r"logit_scale: \(2,\)"),
        ("image_encoder.patch_embed.proj.weight", (24, 48), "must have that model's"),
        ("image_projection", (192,), "must have that model's shapes"),
        ("text_encoder.ln_final.weight", (64, 1), r"ln_final.weight: \(64, 1\), not"),
    ],
)
def test_arrays_of_other_shapes_are_told(name, shape, words, release):
    with pytest.raises(InputError, match=words):
        from_arrays({**release, name: np.zeros(shape)})


def test_an_image_tower_of_nobody_is_told(release):
    arrays = {k: v for k, v in release.items() if "bias_table" not in k}
    with pytest.raises(InputError, match="K-LITE's Focal: the image tower's first"):
        from_arrays(arrays)


def test_options_of_a_tower_that_is_not_there_are_told(release):
    backbone = to_arrays(from_arrays(release), "timm_swin")
    with pytest.raises(InputError, match="for an image tower alone; leave them out"):
        from_arrays(backbone, text={"num_heads": 4})


def test_absolute_positions_are_found_by_their_name(release):
    positions = np.random.default_rng(0).normal(size=(1, 256, 24)).astype("f4")
    arrays = {**release, "image_encoder.absolute_pos_embed": positions}
    found = from_arrays(arrays)
    assert found.model["image"]["absolute_positions"]
    again = to_arrays(found, "unicl")["image_encoder.absolute_pos_embed"]
    np.testing.assert_array_equal(again, positions)


FOCALS = {
    "patches": {},
    "conv_embed": {"conv_embed": True, "modulation_norm": True, "layer_scale": 1e-6},
}


@pytest.mark.parametrize("options", FOCALS.values(), ids=FOCALS)
def test_a_focalnet_goes_out_and_comes_back(options):
    sizes = dict(embed_dim=16, depths=(1, 2), focal_levels=(2, 3), focal_windows=(3, 3))
    image = {"name": "focalnet", "image_size": 32, **sizes, **options}
    text = dict(vocab_size=600, width=64, num_heads=1, num_layers=1, context_length=9)
    model = {"image": image, "text": {"name": "transformer", **text}, "embed_dim": 8}
    two = encoders.from_config({**MODEL, **model})
    rng = np.random.default_rng(0)  # compiling `init` takes seconds
    params, state = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype),
        jax.eval_shape(two.init, jax.random.key(0)),
    )
    arrays = to_arrays(Weights(model, params, state), "unicl")
    stage = "image_encoder.layers.0."
    kernel = arrays[f"{stage}blocks.0.modulation.focal_layers.1.0.weight"]
    assert kernel.shape == (16, 1, 5, 5)
    side = 3 if options else 2
    assert arrays[f"{stage}downsample.proj.weight"].shape == (32, 16, side, side)
    found = from_arrays(arrays, image={"image_size": 32})
    assert_same(found.params, params)
    for name, value in {**sizes, **options}.items():
        assert found.model["image"].get(name, False) == value, name


# --- CLIP's names.


@pytest.fixture(scope="module")
def clip(torch):
    """A small CLIP of open_clip's, with OpenAI's names."""
    open_clip = pytest.importorskip("open_clip", reason="it has OpenAI's names")
    torch.manual_seed(0)
    image = open_clip.CLIPVisionCfg(
        layers=2, width=128, head_width=64, patch_size=8, image_size=32
    )
    text = open_clip.CLIPTextCfg(
        context_length=12, vocab_size=600, width=64, heads=1, layers=2
    )
    model = open_clip.CLIP(32, image, text, quick_gelu=True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at 0, where their order would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def clip_inputs():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype("f4")
    tokens = rng.integers(1, 598, (3, 12), dtype=np.int32)
    tokens[:, 7:] = 599
    return images, tokens


def clip_features(found):
    two = encoders.from_config({**MODEL, **found.model})

    @jax.jit
    def run(params, state, images, tokens):
        u, _ = two.encode_image(params, state, images)
        v, _ = two.encode_text(params, state, tokens)
        return u, v

    return run(found.params, found.state, *clip_inputs())


def test_openais_names_give_open_clips_embeddings(clip, torch):
    images, tokens = clip_inputs()
    with torch.no_grad():
        want = (
            clip.encode_image(torch.tensor(images.transpose(0, 3, 1, 2)), True).numpy(),
            clip.encode_text(torch.tensor(tokens), True).numpy(),
        )
    arrays = {k: v.numpy() for k, v in clip.state_dict().items()}
    arrays["input_resolution"] = np.array(32)  # an archive of OpenAI's holds it, too
    found = from_arrays(arrays)
    assert found.model["image"]["image_size"] == 32
    # Two float32 implementations; unit embeddings.
    for got, there in zip(clip_features(found), want, strict=True):
        np.testing.assert_allclose(got, there, atol=2e-6)
    again = to_arrays(found, "openai_clip")
    for name, array in again.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert set(arrays) - set(again) <= {"attn_mask", "input_resolution"}


def test_hugging_faces_names_give_the_same_embeddings(clip, torch, tmp_path):
    transformers = pytest.importorskip("transformers", reason="it reads its own names")
    found = from_arrays({k: v.numpy() for k, v in clip.state_dict().items()})
    there = to_arrays(found, "hf_clip")
    sizes = dict(num_hidden_layers=2, projection_dim=32, hidden_act="quick_gelu")
    config = transformers.CLIPConfig(
        vision_config=dict(
            hidden_size=128,
            intermediate_size=512,
            num_attention_heads=2,
            patch_size=8,
            image_size=32,
            **sizes,
        ),
        text_config=dict(
            hidden_size=64,
            intermediate_size=256,
            num_attention_heads=1,
            vocab_size=600,
            max_position_embeddings=12,
            eos_token_id=599,
            **sizes,
        ),
        projection_dim=32,
    )
    model = transformers.CLIPModel(config).eval()
    lost = model.load_state_dict(
        {k: torch.tensor(v) for k, v in there.items()}, strict=False
    )
    assert not lost.unexpected_keys
    assert all(k.endswith("position_ids") for k in lost.missing_keys)
    images, tokens = clip_inputs()
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
        )
    want = out.image_embeds.numpy(), out.text_embeds.numpy()
    again = from_arrays({k: v.numpy() for k, v in model.state_dict().items()})
    assert_same(again.params, found.params)
    for got, theirs in zip(clip_features(again), want, strict=True):
        np.testing.assert_allclose(got, theirs, atol=2e-6)
    # A folder as the hub has it: config.json says what the weights don't.
    for part in (config.vision_config, config.text_config):
        part.hidden_act, part.num_attention_heads = "gelu", 4
        part.layer_norm_eps = 1e-2
    other = transformers.CLIPModel(config).eval()
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path)
    with torch.no_grad():
        out = other(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
        )
    loaded = load(tmp_path)
    assert loaded.config["normalization"] == "clip"
    for got, theirs, before in (
        (loaded.encode_image(images), out.image_embeds.numpy(), want[0]),
        (loaded.encode_text(tokens), out.text_embeds.numpy(), want[1]),
    ):
        np.testing.assert_allclose(got, theirs, atol=2e-6)
        assert np.abs(theirs - before).max() > 1e-3  # other activations, other heads
    # A folder of timm's has a config.json, too, that says nothing of towers.
    (tmp_path / "config.json").write_text('{"architecture": "swin"}')
    assert load(tmp_path).config["image"]["num_heads"] == 2
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json must be JSON"):
        load(tmp_path)


def test_what_stands_before_all_names_is_left_out(clip):
    arrays = {k: v.numpy() for k, v in clip.state_dict().items()}
    want = from_arrays(arrays)
    wrapped = {"model": to_arrays(want, "hf_clip"), "module._orig_mod": arrays}
    for before, each in wrapped.items():
        each = {f"{before}.{name}": array for name, array in each.items()}
        assert_same(from_arrays(each).params, want.params)


def test_what_hugging_faces_config_leaves_out_is_its_default(tmp_path):
    """Each by itself: one that is there counts without the others."""
    default = {"activation": "quick_gelu", "eps": 1e-5}
    (tmp_path / "model.safetensors").touch()
    for vision, changes in (
        ({}, {}),
        ({"hidden_act": "gelu"}, {"activation": "gelu"}),
        ({"num_attention_heads": 16, "hidden_act": None}, {"num_heads": 16}),
        ({"layer_norm_eps": 1e-6}, {"eps": 1e-6}),
    ):
        said = json.dumps({"vision_config": vision, "text_config": {}})
        (tmp_path / "config.json").write_text(said)
        _, told = read_folder(tmp_path)
        assert told["image"] == {**default, "num_heads": 12, **changes}
        assert told["text"] == {**default, "num_heads": 8}


def test_strings_for_a_vocabulary_that_is_not_clips_are_refused(clip, tmp_path):
    """CLIP's tokenizer would give ids for 600, too, but not those it was taught."""
    arrays = {k: v.numpy() for k, v in clip.state_dict().items()}
    write_arrays(tmp_path / "a.npz", arrays, {})
    with pytest.raises(InputError, match=r"its own tokenizer \(unknown, of 600 ids\)"):
        load(tmp_path / "a.npz").encode_text("a cat")
    assert load(tmp_path / "a.npz", tokenizer="clip").encode_text("a cat").shape[0] == 1
    for vocab_size in (600, 49408):
        arrays["token_embedding.weight"] = np.zeros((vocab_size, 64), "f4")
        assert ("tokenizer" in from_arrays(arrays).model) == (vocab_size == 600)


def test_a_clip_without_places_is_told(clip):
    arrays = {k: v.numpy() for k, v in clip.state_dict().items()}
    arrays["visual.positional_embedding"] = np.zeros(0, "f4")
    with pytest.raises(InputError, match="must have that model's shapes"):
        from_arrays(arrays)


# --- Backbones.


def image_features(found, images):
    tower = encoders.one_tower("image", found.model["image"])
    run = jax.jit(lambda p, s, x: tower.apply(p["image"], s["image"], x)[0])
    return run(found.params, found.state, images.transpose(0, 2, 3, 1))


def timms(torch, name):
    timm = pytest.importorskip("timm", reason="timm makes the models to compare with")
    torch.manual_seed(0)
    if name == "swin":
        from timm.models.swin_transformer import SwinTransformer as Swin

        options = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4)
        return Swin(img_size=32, num_classes=5, **options).eval(), 32
    from timm.models.resnet import Bottleneck, ResNet

    del timm
    model = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5).eval()
    for module in model.modules():  # else all of a block's branch is multiplied by 0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model, 64


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_timms_backbones_give_timms_features(name, torch):
    model, size = timms(torch, name)
    images = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype("f4")
    with torch.no_grad():
        want = model.forward_head(
            model.forward_features(torch.tensor(images)), pre_logits=True
        ).numpy()
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    change = {"image": {"image_size": size}}  # a ResNet's is not in its weights
    found = from_arrays(arrays, **change)
    assert np.abs(want).max() > 0.5
    # Two float32 implementations, sums in another order.
    np.testing.assert_allclose(image_features(found, images), want, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_timm_takes_our_backbones(name, torch):
    model, size = timms(torch, name)
    arrays = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    found = from_arrays(arrays, image={"image_size": size})
    again = to_arrays(found, f"timm_{name}")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    lost = model.load_state_dict(
        {k: torch.tensor(v) for k, v in again.items()}, strict=False
    )
    assert not lost.unexpected_keys
    missing = [k for k in lost.missing_keys if not k.startswith(("fc.", "head."))]
    assert {k.split(".")[-1] for k in missing} <= {"num_batches_tracked"}
    for key, value in model.state_dict().items():
        if not key.startswith(("fc.", "head.")):
            np.testing.assert_array_equal(value.numpy(), arrays[key], err_msg=key)


# --- Files.


def test_files_keep_every_bit(tmp_path, release):
    for suffix in ("safetensors", "npz"):
        path = tmp_path / f"weights.{suffix}"
        write_arrays(path, release, {"said": "so"})
        arrays, about = read_arrays(path)
        assert_same(arrays, dict(release))
        assert about == {"said": "so"}
        assert arrays["logit_scale"].shape == ()
    assert len(list(tmp_path.iterdir())) == 2  # no partial files are left


def test_half_precision_becomes_float32(tmp_path, torch):
    values = torch.randn(3, 5)
    from safetensors.torch import save_file

    for dtype in (torch.float16, torch.bfloat16):
        there = {"x": values.to(dtype), "n": torch.arange(4)}
        save_file(there, tmp_path / "half.safetensors")
        torch.save(there, tmp_path / "half.pth")
        for file in ("half.safetensors", "half.pth"):
            arrays, _ = read_arrays(tmp_path / file)
            assert arrays["x"].dtype == np.float32
            np.testing.assert_array_equal(arrays["x"], there["x"].float().numpy())
            assert arrays["n"].tolist() == [0, 1, 2, 3]


def test_a_pytorch_file_is_read_as_pytorch_reads_it(tmp_path, torch):
    shared = torch.randn(6, 4)
    there = {
        "whole": shared,
        "transposed": shared.T,
        "part": shared[1:4, ::2],
        "one": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    parameter = torch.nn.Parameter(torch.randn(3))
    torch.save({"model": {**there, "p": parameter}, "epoch": 3}, tmp_path / "a.pth")
    arrays, _ = read_arrays(tmp_path / "a.pth")
    assert set(arrays) == {*there, "p"}
    for name, tensor in {**there, "p": parameter.detach()}.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), err_msg=name)
        assert arrays[name].dtype == tensor.numpy().dtype


CHECKPOINTS = {
    "another name": lambda x: {"model_state_dict": x, "optimizer_state_dict": {"m": x}},
    "one in another": lambda x: {"state_dict": {"model": x}, "epoch": 3},
    "a config": lambda x: {"model": {"name": "swin"}, "state_dict": x},
    "an average": lambda x: {"model": x, "model_ema": {"x": 2 * x["x"]}},
    "an average alone": lambda x: {"state_dict_ema": x, "epoch": 3},
}


@pytest.mark.parametrize("saved", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_the_weights_of_a_training_checkpoint_are_taken(saved, tmp_path, torch):
    torch.save(saved({"x": torch.ones(2)}), tmp_path / "a.pth")
    arrays, _ = read_arrays(tmp_path / "a.pth")
    assert {name: x.tolist() for name, x in arrays.items()} == {"x": [1, 1]}


def test_a_torchscript_archive_is_read_by_its_modules_names(tmp_path, torch):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    import warnings

    with warnings.catch_warnings():  # TorchScript is deprecated; OpenAI's files are not
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, torch.zeros(1, 3)), tmp_path / "jit.pt")
    arrays, _ = read_arrays(tmp_path / "jit.pt")
    want = {k: v.detach().numpy() for k, v in module.named_parameters()}
    assert {k: v for k, v in arrays.items() if k in want}.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(arrays[name], value)


class Evil:
    """Unpickled freely, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_pytorch_file_is_run(tmp_path, torch):
    told = tmp_path / "written_by_evil"
    weights = {"x": torch.ones(2), "config": Evil(told)}
    torch.save(weights, tmp_path / "evil.pth")
    arrays, _ = read_arrays(tmp_path / "evil.pth")
    assert not told.exists() and list(arrays) == ["x"]
    with zipfile.ZipFile(tmp_path / "evil.pth") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        assert b"written_by_evil" in archive.read(name)  # it was there to be run


class Config(dict):
    """As yacs' node in UniCL's own checkpoints: filled before its state is set."""


class Empty:
    """Nothing in it, and no __init__ to call."""


def test_objects_beside_the_weights_are_passed_over(tmp_path, torch):
    config = Config(lr=1e-3)
    config.frozen = True
    saved = {"model": {"x": torch.ones(2)}, "config": config, "nothing": Empty()}
    torch.save(saved, tmp_path / "a.pth")
    assert list(read_arrays(tmp_path / "a.pth")[0]) == ["x"]
    torch.save(
        {"x": torch.ones(2), **saved["config"], "e": Empty()}, tmp_path / "b.pth"
    )
    assert list(read_arrays(tmp_path / "b.pth")[0]) == ["x"]


def hostile(tmp_path, top):
    """A file of torch.save's form around hand-made pickle code: 16 floats in "0"."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    )
    path = tmp_path / "hostile.pth"
    with zipfile.ZipFile(path, "w") as archive:
        code = b"\x80\x02}X\x01\x00\x00\x00x" + top(storage) + b"s."
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/data/0", np.ones(16, "f4").tobytes())
    return path


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(storage, offset, size, stride):
    """Pickle code of a tensor; numbers below 256."""

    def numbers(values):
        return b"(" + b"".join(b"K" + bytes([v]) for v in values) + b"t"

    last = b"\x89N"  # requires_grad, hooks
    inside = b"(" + storage + b"K" + bytes([offset]) + numbers(size) + numbers(stride)
    return REBUILD + inside + last + b"tR"


HOSTILE = {
    "past its end": lambda s: tensor(s, 8, (9,), (1,)),
    "expanded": lambda s: tensor(s, 0, (200, 200), (0, 0)),
    "a tensor for a storage": lambda s: tensor(
        tensor(s, 0, (200, 0), (0, 1)), 0, (200,), (1,)
    ),
    "sizes without strides": lambda s: tensor(s, 0, (2, 2), (1,)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tensor_reads_nothing_but_its_storage(name, tmp_path):
    whole = hostile(tmp_path, lambda s: tensor(s, 4, (3, 4), (4, 1)))
    np.testing.assert_array_equal(read_arrays(whole)[0]["x"], np.ones((3, 4)))
    with pytest.raises(InputError, match="must be readable"):
        read_arrays(hostile(tmp_path, HOSTILE[name]))


def test_a_compressed_archive_is_refused(tmp_path, torch):
    """A few bytes could hold gigabytes; torch.save never compresses."""
    torch.save({"x": torch.ones(1000)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as plain,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(InputError, match="is compressed, as torch.save never does"):
        read_arrays(tmp_path / "b.pth")


def test_a_ring_of_dicts_ends(tmp_path, torch):
    ring = {"x": torch.ones(2)}
    ring["again"] = ring
    torch.save(ring, tmp_path / "ring.pth")
    assert list(read_arrays(tmp_path / "ring.pth")[0]) == ["x"]


def test_arrays_of_strings_are_no_weights(tmp_path):
    np.savez(tmp_path / "data.npz", class_names=np.array(["cat"]))
    with pytest.raises(
        InputError, match="must be numbers.*class_names.*name a weights"
    ):
        read_arrays(tmp_path / "data.npz")


def damaged(tmp_path, kind):
    path = tmp_path / f"damaged.{kind}"
    if kind == "npz":
        np.savez(path, x=np.array([{"an": "object"}]))
    elif kind == "pth":
        path.write_bytes(pickle.dumps({"x": 1}))  # as torch.save before 1.6 began
    else:
        write_arrays(path, {"x": np.ones(100)}, {})
        path.write_bytes(path.read_bytes()[:-50])
    return path


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pth"])
def test_a_damaged_file_is_told_by_name(kind, tmp_path):
    path = damaged(tmp_path, kind)
    with pytest.raises(InputError, match=rf'must be readable: ".*damaged.{kind}"'):
        read_arrays(path)


def test_a_pytorch_file_cut_in_half_is_told(tmp_path, torch):
    torch.save({"x": torch.randn(100)}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="must be readable"):
        read_arrays(tmp_path / "a.pth")


OTHERS = {
    "a web page": ("a.safetensors", b"\n<!DOCTYPE html><html>", "is a web page"),
    "a pointer": ("a.pth", b"version https://git-lfs.github.com/spec/v1\n", "lfs pull"),
    "nothing": ("a.npz", b"", "is empty; get it again"),
    "a zip": ("a.safetensors", b"PK\x03\x04" + bytes(60), "is a zip file"),
}


@pytest.mark.parametrize("name, held, words", OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_kind_says_what_it_is(name, held, words, tmp_path):
    (tmp_path / name).write_bytes(held)
    with pytest.raises(InputError, match=f"must be readable: .*{name}.*{words}"):
        read_arrays(tmp_path / name)


def test_a_file_of_another_name_says_what_it_is(tmp_path):
    write_arrays(tmp_path / "a.safetensors", {"x": np.ones(3)}, {})
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    with pytest.raises(InputError, match="is of the .safetensors kind; rename it"):
        read_arrays(tmp_path / "a.pth")
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(InputError, match="is one array, as .npy files are; put it in"):
        read_arrays(tmp_path / "a.npz")


def test_a_file_without_arrays_is_told(tmp_path):
    for name in ("a.npz", "a.safetensors"):
        write_arrays(tmp_path / name, {}, {"said": "so"})
        with pytest.raises(
            InputError, match=f"must hold arrays: .*{name}.* none; name"
        ):
            read_arrays(tmp_path / name)


def test_a_compressed_npz_with_a_wrong_byte_is_told(tmp_path):
    array = np.random.default_rng(0).integers(0, 9, 1000)
    np.savez_compressed(tmp_path / "a.npz", x=array)
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[100:120] = bytes(range(236, 256))
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(InputError, match="is no whole .npz file"):
        read_arrays(tmp_path / "a.npz")


def test_a_type_that_is_not_read_is_told(tmp_path, torch):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match='type of x: got "F8_E4M3"; .*Choices: BF16'):
        read_arrays(tmp_path / "a.safetensors")


def test_weights_in_pieces_are_told(tmp_path):
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(InputError, match="in one file: .* by model.safetensors.index"):
        load(tmp_path)


def test_a_missing_file_and_an_unknown_kind_are_told(tmp_path):
    with pytest.raises(InputError, match='there is no ".*nothing.npz"'):
        read_arrays(tmp_path / "nothing.npz")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(InputError, match=r'got ".h5"; .*Choices: .bin, .npz'):
        read_arrays(tmp_path / "weights.h5")
    for name in ("no/where.npz", "no/where.safetensors", f"{'x' * 300}.npz"):
        with pytest.raises(InputError, match="directory that can be written"):
            write_arrays(tmp_path / name, {"x": np.ones(1)}, {})
