"""What a run starts from: weights files of its model, held to it option by option."""

import json

import jax
import numpy as np
import pytest

from unicl_jax import config as config_lib
from unicl_jax import encoders, init_from, sharding
from unicl_jax.encoders import weights
from unicl_jax.encoders.weights.files import write_arrays
from unicl_jax.encoders.weights.resize import resized
from unicl_jax.errors import InputError
from unicl_jax.objectives import make_objective
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import init_state

SWIN = dict(
    name="swin",
    image_size=32,
    patch_size=4,
    window_size=4,
    embed_dim=16,
    depths=(2, 1),
    num_heads=(2, 2),
)
VIT = dict(name="vit", image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2)
TEXT = dict(
    name="transformer",
    vocab_size=600,
    context_length=12,
    width=32,
    num_heads=2,
    num_layers=1,
)


def make_config(image=SWIN, text=TEXT, objective="unicl", **model):
    config = config_lib.default()
    config.objective, config.model.embed_dim = objective, 16
    config.model.image.update(image)
    config.model.text.update(text)
    config.model.update(model)
    return config


def random_weights(config, seed=7):
    """A model's, every array different from that of a new one."""
    two = encoders.from_config(config.model)
    params, state = jax.eval_shape(two.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(x):
        return rng.uniform(0.5, 1, x.shape).astype(x.dtype)

    params, state = jax.tree.map(draw, params), jax.tree.map(draw, state)
    return weights.Weights(config.model.to_dict(), params, state)


@pytest.fixture
def write(tmp_path):
    """Writes a model's weights in a layout, as others would: arrays and no more."""

    def to_file(found, layout="unicl", name="weights.safetensors"):
        about = {}
        if layout == "openai_clip":  # as `export` says it: ids for 600 could be others
            about = {weights.ABOUT: '{"tokenizer": "clip"}'}
        write_arrays(tmp_path / name, weights.to_arrays(found, layout), about)
        return str(tmp_path / name)

    return to_file


def started(config, source, mesh):
    """The first state without and with `init_from`, and what is said."""
    two = encoders.from_config(config.model)
    objective = make_objective(config.objective, two, mesh, num_concepts=3)
    optimizer, _ = make_optimizer(config.optimizer, 10)
    shapes = jax.eval_shape(lambda: init_state(two, objective, optimizer, 0))
    rng = np.random.default_rng(1)  # compiling `init_state` takes seconds
    state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    state = state._replace(step=np.int32(0))
    before = jax.device_put(state, sharding.replicated(mesh))
    config.init_from = source
    after, said = before, []
    for start in init_from.read(config, two):
        after, line = init_from.apply(start, after)
        said.append(line)
    return before, after, said


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("image", [SWIN, VIT])
def test_a_file_of_both_towers_gives_all_of_the_model(image, write, make_mesh):
    clip = image is VIT
    config = make_config(
        image,
        TEXT | (dict(eps=1e-5) if clip else {}),
        normalization="clip" if clip else "imagenet",
    )
    found = random_weights(config)
    source = write(found, "openai_clip" if clip else "unicl")
    before, after, said = started(config, source, make_mesh(8))
    assert_equal(after.params, found.params)
    # Nothing else moves, nor where it lies, nor what one of the two is compiled for.
    assert_equal(after.opt_state, before.opt_state)
    assert after.step == 0
    for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
    parts = "image, text, image_projection, text_projection, logit_scale"
    assert said == [f"{parts} from {source}"]


def test_batch_statistics_come_along(write, make_mesh):
    image = dict(name="resnet", depths=(1, 1), width=8, image_size=32)
    config = make_config(image)
    found = random_weights(config)
    source = write(found, "timm_resnet")
    before, after, said = started(config, source, make_mesh(1))
    assert_equal(after.params["image"], found.params["image"])
    assert_equal(after.model_state["image"], found.state["image"])
    assert_equal(after.params["text"], before.params["text"])
    assert said == [f"image from {source}"]


def test_of_several_files_the_last_one_that_has_a_part_counts(write, make_mesh):
    config = make_config()
    both, other = random_weights(config), random_weights(config, seed=8)
    sources = [write(both), write(other, "timm_swin", "swin.npz")]
    _, after, said = started(config, ", ".join(sources), make_mesh(1))
    assert_equal(after.params["image"], other.params["image"])
    assert_equal(after.params["text"], both.params["text"])
    assert [line.split(" from ")[1] for line in said] == sources


def test_positions_are_resized_to_the_config(write, make_mesh):
    found = random_weights(make_config())
    config = make_config(
        SWIN | dict(image_size=48, window_size=6), TEXT | dict(context_length=9)
    )
    before, after, _ = started(config, write(found), make_mesh(1))
    assert_equal(after.params, resized(found.params, before.params))
    assert_equal(
        after.params["text"]["positional_embedding"],
        found.params["text"]["positional_embedding"][:9],
    )


def test_an_objective_takes_what_it_teaches(write, make_mesh):
    """SupCon looks at no text, and its temperature is set."""
    config = make_config(objective="supcon")
    found = random_weights(config)
    before, after, said = started(config, write(found), make_mesh(1))
    assert said[0].startswith("image, image_projection from")
    assert_equal(after.params["image"], found.params["image"])
    for part in ("text", "logit_scale", "objective"):
        assert_equal(after.params[part], before.params[part])


@pytest.mark.parametrize(
    "layout, there, here, said",
    [
        ("unicl", {}, dict(text=TEXT | dict(eps=1e-5)), "text.eps 1e-12, here it is"),
        ("unicl", {}, dict(text=TEXT | dict(causal=False)), "text.causal True, here"),
        ("unicl", {}, dict(normalization="clip"), "normalization imagenet, here it"),
        ("unicl", {}, dict(image=SWIN | dict(depths=(2, 2))), r"depths \(2, 1\), here"),
        ("timm_swin", {}, dict(image=SWIN | dict(patch_size=2)), "image.patch_size 4"),
        ("openai_clip", dict(image=VIT), dict(image=VIT), "normalization clip, here"),
        ("unicl", {}, dict(text=TEXT | dict(width=16)), "text.width 32, here it is 16"),
    ],
)
def test_weights_of_another_model_are_told_by_option(
    layout, there, here, said, write, make_mesh
):
    source = write(random_weights(make_config(**there)), layout)
    with pytest.raises(InputError, match=f"init_from must be of this model.*{said}"):
        started(make_config(**here), source, make_mesh(1))


def test_another_embedding_width_is_told_by_its_arrays(write, make_mesh):
    config = make_config()
    config.model.embed_dim = 8
    source = write(random_weights(make_config()))
    with pytest.raises(InputError, match="2 arrays.*image_projection.*here"):
        started(config, source, make_mesh(1))


def test_heads_that_arrays_do_not_tell_are_the_configs(write, make_mesh):
    """A file of 32 channels reads as one head of them; the config says that it is 2."""
    found = random_weights(make_config())
    _, after, _ = started(make_config(), write(found), make_mesh(1))
    assert_equal(after.params["text"], found.params["text"])
    silent = {k: v for k, v in TEXT.items() if k != "num_heads"}
    with pytest.raises(InputError, match="text.num_heads 1, here it is 8"):
        started(make_config(text=silent), write(found), make_mesh(1))


def test_heads_that_a_file_tells_count(tmp_path, make_mesh):
    """It was asked, and did not guess: other heads would be another model."""
    file, found = tmp_path / "told.safetensors", random_weights(make_config())
    about = {weights.ABOUT: json.dumps(found.model)}
    write_arrays(file, weights.to_arrays(found, "unicl"), about)
    started(make_config(), str(file), make_mesh(1))
    other = make_config(text=TEXT | dict(num_heads=4))
    with pytest.raises(InputError, match="text.num_heads 2, here it is 4"):
        started(other, str(file), make_mesh(1))


def test_a_tower_that_is_not_taken_may_be_another_one(write, make_mesh):
    there = make_config(text=TEXT | dict(width=16, eps=1e-5))
    found = random_weights(there)
    here = make_config(objective="supcon")
    _, after, said = started(here, write(found), make_mesh(1))
    assert_equal(after.params["image"], found.params["image"])
    assert said[0].startswith("image, image_projection from")


def test_a_frozen_tower_that_no_source_has_is_refused(write, make_mesh):
    config = make_config()
    config.frozen = ("text",)
    found = random_weights(config)
    image = write(found, "timm_swin", "swin.npz")
    with pytest.raises(InputError, match="must hold what is frozen.*no text tower"):
        started(config, image, make_mesh(1))
    started(config, f"{image}, {write(found)}, ", make_mesh(1))
    config.objective = "supcon"  # which looks at no text
    started(config, image, make_mesh(1))


def test_text_weights_with_a_tokenizer_of_their_own_are_refused(write, make_mesh):
    text = dict(name="bert", vocab_size=600, context_length=12, width=64)
    text |= dict(num_heads=1, num_layers=1)
    config = make_config(text=text)
    source = write(random_weights(config), "hf_bert")
    with pytest.raises(InputError, match=r"its own tokenizer \(WordPiece\)"):
        started(config, source, make_mesh(1))


@pytest.mark.parametrize(
    "source, said",
    [
        ("s3://bucket/run", "must be a directory or in Cloud Storage.*s3://bucket/run"),
        ("nowhere.safetensors", 'or a weights file: ".*nowhere.safetensors" holds no'),
        ("{}", "must be a workdir, or hold model.safetensors"),
    ],
)
def test_what_is_not_there_is_told(source, said, tmp_path, make_mesh):
    with pytest.raises(InputError, match=said):
        started(make_config(), source.format(tmp_path), make_mesh(1))
