"""A model to use: loaded from a run or a file, it embeds as the trainer did."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import unicl_jax
from unicl_jax import encoders, export, model, objectives, train
from unicl_jax.augment import normalize
from unicl_jax.checkpoint import read_towers
from unicl_jax.data import Tokenizer
from unicl_jax.encoders import weights
from unicl_jax.encoders.weights import Weights
from unicl_jax.encoders.weights.files import read_arrays, write_arrays
from unicl_jax.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"


def shrunk(recipe):
    config = runpy.run_path(str(CONFIGS / recipe))["get_config"]()
    config.batch_size, config.total_steps = 32, 4  # objectives_test's programs
    config.optimizer.warmup_steps = 1
    config.model.image.update(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8)
    config.model.text.update(vocab_size=600, width=16, num_heads=2, num_layers=1)
    config.evaluations = {}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the quick start, its towers shrunk."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    train.run(shrunk("quickstart.py"), workdir)
    return workdir


@pytest.fixture(scope="module")
def loaded(run):
    return unicl_jax.load(run)


def pictures(count=3, size=32, seed=0):
    shape = (count, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_run_embeds_as_its_towers_do(run, loaded):
    config = json.loads((run / "config.json").read_text())["model"]
    two = encoders.from_config(config)
    params, state = read_towers(run)
    encode_image, encode_text = map(jax.jit, (two.encode_image, two.encode_text))
    want, _ = encode_image(params, state, normalize(pictures()))
    got = loaded.encode_image(pictures())
    # Two programs: float32 sums in another order.
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.dtype == np.float32 and got.shape == (3, 128)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    texts = ["a cat", "a very long text " * 20]
    want, _ = encode_text(params, state, Tokenizer(10, 600)(texts))
    np.testing.assert_allclose(loaded.encode_text(texts), want, atol=1e-5)
    assert loaded.logit_scale == pytest.approx(np.exp(params["logit_scale"]), rel=1e-6)
    assert (loaded.image_size, loaded.embed_dim) == (32, 128)


def test_pixels_and_what_is_normalised_and_tokens_and_texts_are_alike(loaded):
    images = pictures()
    np.testing.assert_allclose(
        loaded.encode_image(images), loaded.encode_image(normalize(images)), atol=1e-6
    )
    texts = ["a cat", "two dogs"]
    np.testing.assert_array_equal(
        loaded.encode_text(texts), loaded.encode_text(loaded.tokenize(texts))
    )
    np.testing.assert_array_equal(
        loaded.encode_text("a cat"), loaded.encode_text(["a cat"])
    )
    raw = loaded.encode_image(images, normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 1e-3
    np.testing.assert_allclose(encoders.unit(raw), loaded.encode_image(images), 1e-5)


def test_uniclips_images_are_embedded_by_its_head(tmp_path):
    config = shrunk("baselines/uniclip.py")
    train.run(config, tmp_path / "run")
    loaded = unicl_jax.load(tmp_path / "run")
    params, state = read_towers(tmp_path / "run")
    two = encoders.from_config(loaded.config)
    objective = objectives.make_objective("uniclip", two)
    encode = jax.jit(objective.encode_image)
    want = encode(params, state, normalize(pictures()))
    np.testing.assert_allclose(loaded.encode_image(pictures()), want, atol=1e-5)
    plain, _ = jax.jit(two.encode_image)(params, state, normalize(pictures()))
    assert np.abs(want - plain).max() > 1e-2
    scale = np.exp(params["objective"]["log_scales"][1])
    assert loaded.logit_scale == pytest.approx(scale, rel=1e-6)
    # No layout has a place for the head; the tower by itself goes out.
    with pytest.raises(InputError, match="no place for the head"):
        export.export(tmp_path / "run", tmp_path / "model.npz")
    tower = tmp_path / "tower.npz"
    assert export.export(tmp_path / "run", tower, "timm_swin")[0] == 0


@pytest.mark.parametrize("name", ["cross_entropy", "linear_text"])
def test_a_run_that_taught_no_texts_is_an_image_tower(name, tmp_path):
    config = shrunk(f"baselines/{name}.py")
    train.run(config, tmp_path / "run")
    loaded = unicl_jax.load(tmp_path / "run")
    params, state = read_towers(tmp_path / "run")
    two = encoders.from_config({**weights.MODEL, **config.model.to_dict()})
    features = jax.jit(two.image_features)
    want, _ = features(params, state, normalize(pictures()))
    got = loaded.encode_image(pictures(), normalize=False)
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(InputError, match="a text tower that was taught"):
        loaded.encode_text("a cat")


# --- Pictures.


@pytest.fixture(scope="module")
def cropping(run):
    """The same towers, evaluated as UniCL's: the centre of what is a little larger."""
    config = {**unicl_jax.load(run).config, "crop_pct": 224 / 256}
    return model.Model(Weights(config, *read_towers(run)))


def test_a_runs_pictures_are_taken_as_the_run_took_them(loaded):
    """The quick start's are whole: nothing is cut off at the edges."""
    images = pictures()
    got = loaded.preprocess([Image.fromarray(image) for image in images])
    np.testing.assert_array_equal(got, images)


@pytest.mark.parametrize("sides", [(322, 644), (374, 400), (389, 392), (33, 900)])
def test_the_shorter_side_is_scaled_to_its_size_whatever_it_was(sides, cropping):
    """322 pixels by a float product come out one short."""
    picture = Image.fromarray(pictures(1, 8)[0]).resize(sides)
    got = cropping.preprocess(picture)[0]
    shorter = 36
    to = [shorter * side // min(sides) for side in sides]
    assert min(to) == shorter
    resized = picture.resize(to, Image.Resampling.BICUBIC)
    left, top = (round((side - 32) / 2) for side in to)
    want = np.asarray(resized)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(got, want)


def test_pictures_are_brought_to_the_towers_size(cropping, tmp_path):
    loaded = cropping
    wide = Image.fromarray(pictures(1, 64)[0]).resize((100, 50))
    wide.save(tmp_path / "wide.png")
    got = loaded.preprocess([wide, tmp_path / "wide.png", str(tmp_path / "wide.png")])
    assert got.shape == (3, 32, 32, 3) and got.dtype == np.uint8
    assert (got == got[0]).all()
    shorter = int(32 * 256 / 224)
    resized = wide.resize((2 * shorter, shorter), Image.Resampling.BICUBIC)
    left, top = round((2 * shorter - 32) / 2), round((shorter - 32) / 2)
    want = np.asarray(resized)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(got[0], want)
    assert loaded.preprocess(wide).shape == (1, 32, 32, 3)
    assert loaded.preprocess([]).shape == (0, 32, 32, 3)


MODES = {
    "RGB": (255, 0, 0),
    "RGBA": (255, 255, 255),  # transparent: laid on white, as in training
    "RGBa": (255, 255, 255),  # the same, its colours times alpha
    "L": (76, 76, 76),
    "P": (255, 0, 0),
    "CMYK": (255, 0, 0),
    "1": (0, 0, 0),
    "I;16": (128, 128, 128),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode, loaded):
    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    if mode == "I;16":
        picture = Image.fromarray(np.full((40, 40), 128 * 256, np.uint16))
    elif mode == "1":
        picture = picture.convert(mode, dither=Image.Dither.NONE)
    elif mode.upper() == "RGBA":
        picture.putalpha(0)
        picture = picture.convert(mode)
    else:
        picture = picture.convert(mode)
    got = loaded.preprocess(picture)[0]
    np.testing.assert_array_equal(got, np.full((32, 32, 3), MODES[mode]))


def test_what_is_no_picture_is_told(loaded, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "nothing.png"):
        with pytest.raises(InputError, match=f"readable image files.*{path.name}"):
            loaded.preprocess([path])
    with pytest.raises(InputError, match="paths or PIL images: got ndarray"):
        loaded.preprocess([pictures(1)[0]])
    Image.fromarray(pictures(1)[0]).save(tmp_path / "cut.png")
    cut = (tmp_path / "cut.png").read_bytes()[:200]
    (tmp_path / "cut.png").write_bytes(cut)
    with Image.open(tmp_path / "cut.png") as half:  # not read before it is used
        for given in (tmp_path / "cut.png", half, "nul\0.png"):
            with pytest.raises(InputError, match="must be readable image files"):
                loaded.preprocess(given)
    with pytest.raises(InputError, match="must have pixels: .*has 0 x 5"):
        loaded.preprocess(Image.new("RGB", (0, 5)))
    with pytest.raises(InputError, match="8 or 16 bits a channel: got one of floats"):
        loaded.preprocess(Image.new("F", (40, 40)))


# --- What does not fit.


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 16, 16, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((2, 32, 32, 3), np.int32),
        np.zeros((2, 3, 32, 32), np.float32),
    ],
)
def test_images_that_do_not_fit_are_told(images, loaded):
    with pytest.raises(InputError, match=r"must be \[B, 32, 32, 3\].*got"):
        loaded.encode_image(images)


@pytest.mark.parametrize(
    "images, kind",
    [
        ("cat.jpg", "str"),
        (["cat.jpg", "dog.jpg"], "list"),
        ([np.zeros((32, 32, 3)), np.zeros((4, 4, 3))], "list"),
        ({"pixel_values": np.zeros((1, 32, 32, 3))}, "dict"),
        (np.array([None]), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_array_of_images_is_told(images, kind, loaded):
    with pytest.raises(InputError, match=rf"an array .*got {kind}.*model.preprocess"):
        loaded.encode_image(images)


def test_floats_that_are_not_normalised_are_told(loaded):
    with pytest.raises(InputError, match="-2.6 to 2.6: got values of 2.*as uint8"):
        loaded.encode_image(pictures().astype(np.float32))
    loaded.encode_image(normalize(np.full((1, 32, 32, 3), 255, np.uint8)) * 2)


def test_nothing_gives_nothing(loaded):
    assert loaded.encode_text([]).shape == (0, 128)
    assert loaded.encode_image(pictures(0)).shape == (0, 128)


def test_texts_that_do_not_fit_are_told(loaded):
    for tokens, words in (
        (np.zeros((2, 11), np.int32), r"L up to 10: got int32 \(2, 11\)"),
        (np.zeros((2, 10), np.float32), "got float32"),
        (np.full((2, 10), 600), r"in \[0, 600\): got 600"),
        (["a cat", " "], "must not be empty: got ' ' at index 1"),
        (["a cat", "&nbsp;"], "must not be empty: got '&nbsp;' at index 1"),
        (["a cat", None], "must be strings: got NoneType at index 1"),
        ([None, "a cat"], "must be strings: got NoneType at index 0"),
        (["a cat", b"a dog"], "must be strings: got bytes at index 1"),
        ([["a cat"], ["a dog"]], r"strings or integer tokens .*got <U5 \(2, 1\)"),
        ([[1, 2], [3]], "array .*got list"),
        ({"input_ids": np.ones((1, 3), int)}, "array .*got dict; .*ids alone"),
        (b"a cat", "array .*got bytes"),
        (None, "array .*got NoneType"),
    ):
        with pytest.raises(InputError, match=words):
            loaded.encode_text(tokens)
    with pytest.raises(InputError, match="must be strings: got NoneType"):
        loaded.tokenize(None)


def test_texts_and_tokens_come_in_any_container(loaded):
    texts = ["a cat", "two dogs"]
    want = loaded.encode_text(texts)
    for given in (tuple(texts), np.array(texts), np.array(texts, object), iter(texts)):
        np.testing.assert_array_equal(loaded.encode_text(given), want)
    tokens = loaded.tokenize(texts)
    for given in (tokens.astype(np.int64), tokens.tolist(), jax.numpy.array(tokens)):
        np.testing.assert_array_equal(loaded.encode_text(given), want)


@pytest.mark.parametrize(
    "source, words",
    [
        ("swin_tny", 'did you mean "swin_tiny"'),
        ("nothing.safetensors", "is no file or folder"),
        ("x" * 300, "can be read, or a name: .*File name too long"),
        ({"x": 1}, "a path or a name: got dict; .*from_arrays"),
    ],
)
def test_a_source_that_is_not_there_is_told(source, words):
    with pytest.raises(InputError, match=words):
        unicl_jax.load(source)


def test_folders_that_hold_no_model_are_told(tmp_path, run):
    with pytest.raises(InputError, match="workdir, or hold model.safetensors, py"):
        unicl_jax.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="must hold the config.json of its run"):
        unicl_jax.load(tmp_path)
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint yet"):
        unicl_jax.load(tmp_path)


def test_options_go_to_their_tower_and_never_to_a_run(run):
    with pytest.raises(InputError, match="must be as it was trained: got text"):
        unicl_jax.load(run, text={"num_heads": 4})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": 384}, 'no option "image_size".*image={"image_size": 384}'),
        ({"normalisation": "clip"}, 'did you mean "normalization"'),
        ({"image": 384}, "image must be options of the image tower by name: got 384"),
    ],
)
def test_options_of_no_model_are_told(changes, words, run, tmp_path):
    """They would be passed over."""
    export.export(run, tmp_path / "model.npz")
    for source in ("swin_tiny", tmp_path / "model.npz"):
        with pytest.raises(InputError, match=words):
            unicl_jax.load(source, **changes)


@pytest.mark.parametrize("said", ["{", "[1]", '{"imge": {}}'])
def test_a_file_that_does_not_say_its_model_is_told(said, run, tmp_path):
    export.export(run, tmp_path / "model.npz")
    arrays, _ = read_arrays(tmp_path / "model.npz")
    write_arrays(tmp_path / "model.npz", arrays, {weights.ABOUT: said})
    with pytest.raises(InputError, match="no `model` section.*export it again"):
        unicl_jax.load(tmp_path / "model.npz")


# --- Names.


def test_every_variant_is_a_model_of_its_name():
    found = model.variants()
    assert {"swin_tiny", "swin_small", "swin_base", "resnet50"} <= set(found)
    for name, section in found.items():
        params, _ = weights.shapes(section)
        width = params["image_projection"].shape
        assert width[1] == section["embed_dim"], name
        assert section["image"]["name"] == name


# --- Export.


def test_a_run_is_exported_and_read_again(run, loaded, tmp_path, capsys):
    to = tmp_path / "model.safetensors"
    assert export.main([f"--from={run}", f"--to={to}"]) == 0
    said = capsys.readouterr().out
    assert "unicl; read again, the largest difference is 0" in said
    # A reader that goes by shapes would take 64 channels for a head.
    assert "must be told: " in said and "text.num_heads=2" in said
    again = unicl_jax.load(to)
    np.testing.assert_array_equal(
        again.encode_image(pictures()), loaded.encode_image(pictures())
    )
    np.testing.assert_array_equal(again.encode_text("a"), loaded.encode_text("a"))
    assert again.config["text"] == dict(loaded.config["text"])
    # The image tower alone, from that file.
    backbone = tmp_path / "backbone.safetensors"
    options = [f"--from={to}", f"--to={backbone}", "--format=timm_swin"]
    assert export.main(options) == 0
    tower = unicl_jax.load(backbone)
    assert tower.encode_image(pictures()).shape == (3, tower.embed_dim)
    with pytest.raises(InputError, match="texts need a text tower that was"):
        tower.encode_text("a cat")


def test_an_export_says_how_far_what_it_wrote_is_off(run, tmp_path, monkeypatch):
    """As if the disk had changed one weight."""

    def read(path):
        arrays, about = read_arrays(path)
        arrays["image_encoder.norm.bias"] = arrays["image_encoder.norm.bias"] + 1
        return arrays, about

    monkeypatch.setattr(weights, "read_arrays", read)
    assert export.export(run, tmp_path / "model.npz")[0] > 1e-3


def test_an_export_of_a_bfloat16_run_is_compared_in_float32(run, loaded, tmp_path):
    bfloat16 = tmp_path / "run"
    shutil.copytree(run, bfloat16)
    said = json.loads((bfloat16 / "config.json").read_text())
    said["model"]["dtype"] = "bfloat16"
    (bfloat16 / "config.json").write_text(json.dumps(said))
    rounded = unicl_jax.load(bfloat16).encode_image(pictures())
    assert np.abs(rounded - loaded.encode_image(pictures())).max() > 1e-3
    assert export.export(bfloat16, tmp_path / "model.npz")[0] == 0


def test_an_npz_says_what_its_model_is_too(run, loaded, tmp_path):
    export.export(run, tmp_path / "model.npz")
    again = unicl_jax.load(tmp_path / "model.npz")
    assert again.config["text"]["num_heads"] == 2
    np.testing.assert_array_equal(again.encode_text("a"), loaded.encode_text("a"))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--format=hf_clip"], 'is "swin"; formats for that: unicl, timm_swin'),
        (["--to=model.h5"], 'got ".h5"'),
        (["--from=nowhere"], '"nowhere" is no file or folder'),
    ],
)
def test_a_wrong_export_is_one_line(options, words, run, tmp_path, capsys):
    defaults = [f"--from={run}", f"--to={tmp_path / 'model.npz'}"]
    assert export.main(defaults + options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_importing_the_package_loads_no_towers():
    import subprocess
    import sys

    code = "import unicl_jax, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"flax", "orbax", "PIL"} & set(done.stdout.split())
    assert jax.__name__ in done.stdout.split()
