"""K-LITE's focal model: its structure written again in PyTorch, its names, its laws.

The table of names and shapes is here, as K-LITE's modules make them; NumPy draws the
values. So nothing of ours stands between a file and the numbers that it must give.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax import encoders
from unicl_jax.encoders.klite_focal import VARIANTS, klite_focal
from unicl_jax.encoders.weights import Weights, from_arrays, shapes, to_arrays, untold
from unicl_jax.errors import InputError
from unicl_jax.model import load, variants

OPTIONS = {
    # Levels and windows differ between the stages: none can stand for another.
    "stages": dict(
        embed_dim=8,
        depths=(2, 1),
        focal_levels=(2, 3),
        focal_windows=(5, 3),
        conv_embed=True,
        layer_scale=1e-6,
    ),
    # As K-LITE's other config, one stage of patches; and no factors on branches.
    "patches": dict(
        embed_dim=16, depths=(2,), focal_levels=(3,), focal_windows=(3,), patch_size=8
    ),
}
WIDTH, HEADS, LENGTH, VOCAB = 128, 2, 12, 600  # of the text tower, of two layers
SIZE = {"image": {"image_size": 32}}  # a file doesn't say


def image_shapes(case):
    """Name -> shape of the image tower's arrays."""
    found = {}

    def linear(name, into, out, *kernel):
        found.update({f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)})

    def norm(name, width):
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    width, conv_embed = case["embed_dim"], case.get("conv_embed")
    stem, halve = (7, 3) if conv_embed else (case.get("patch_size", 4), 2)
    linear("patch_embed.proj", 3, width, stem, stem)
    norm("patch_embed.norm", width)
    for s, depth in enumerate(case["depths"]):
        levels, window = case["focal_levels"][s], case["focal_windows"][s]
        for b in range(depth):
            block = f"layers.{s}.blocks.{b}."
            for i in (1, 2):
                if "layer_scale" in case:
                    found[f"{block}gamma_{i}"] = (width,)
                linear(f"{block}dw{i}", 1, width, 3, 3)
                norm(f"{block}norm{i}", width)
            linear(f"{block}attn.pre_conv", width, 2 * width + levels + 1)
            linear(f"{block}attn.v", width, width, 1, 1)
            linear(f"{block}attn.proj", width, width)
            for k, side in enumerate(range(window, window + 2 * levels, 2)):
                name = f"{block}attn.pool_layers.{k}.0.weight"
                found[name] = (width, 1, side, side)
            linear(f"{block}mlp.fc1", width, 4 * width)
            linear(f"{block}mlp.fc2", 4 * width, width)
        if s < len(case["depths"]) - 1:
            linear(f"layers.{s}.downsample.proj", width, 2 * width, halve, halve)
            norm(f"layers.{s}.downsample.norm", 2 * width)
            width *= 2
    norm("norm", width)
    return found


def file_shapes(case):
    """Name -> shape of a whole file's arrays."""
    found = {f"image_encoder.{k}": v for k, v in image_shapes(case).items()}
    text = {
        "token_embedding.weight": (VOCAB, WIDTH),
        "positional_embedding": (LENGTH, WIDTH),
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
    }
    for i in (0, 1):
        block = f"resblocks.{i}."
        text[f"{block}attn.in_proj_weight"] = (3 * WIDTH, WIDTH)
        text[f"{block}attn.in_proj_bias"] = (3 * WIDTH,)
        for name, into, out in (
            ("attn.out_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, 4 * WIDTH),
            ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ):
            text[f"{block}{name}.weight"] = (out, into)
            text[f"{block}{name}.bias"] = (out,)
        for name in ("ln_1", "ln_2"):
            text[f"{block}{name}.weight"] = text[f"{block}{name}.bias"] = (WIDTH,)
    return {
        **found,
        **{f"lang_encoder.{k}": v for k, v in text.items()},
        "image_projection": (found["image_encoder.norm.weight"][0], 24),
        "lang_projection": (WIDTH, 24),
        "logit_scale": (),
    }


@functools.cache
def file_of(case):
    """A file's arrays, float64.

    Larger than a new model's, scales of norms and branches too, so that each matters.
    """
    rng = np.random.default_rng(1)

    def draw(name, shape):
        scaled = re.search(r"(norm\d?|ln_\w+)\.weight$|gamma_\d$", name)
        return rng.normal(scale=0.1, size=shape) + bool(scaled)

    return {k: draw(k, v) for k, v in file_shapes(OPTIONS[case]).items()}


def small_images():
    return np.random.default_rng(0).normal(size=(3, 32, 32, 3))


# --- K-LITE's equations in PyTorch, channels first as there, from the file's arrays.


def normed(w, name, x, eps=1e-5):
    import torch

    y = torch.nn.functional.layer_norm(
        x.movedim(1, -1), x.shape[1:2], w[f"{name}.weight"], w[f"{name}.bias"], eps
    )
    return y.movedim(-1, 1)


def convolved(w, name, x, **options):
    """A convolution; of a linear map's weight, 1 x 1."""
    import torch

    kernel, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    if kernel.ndim == 2:
        kernel = kernel[..., None, None]
    return torch.nn.functional.conv2d(x, kernel, bias, **options)


def modulated(w, name, x, levels):
    import torch

    gelu = torch.nn.functional.gelu
    width = x.shape[1]
    query, context, gates = convolved(w, f"{name}pre_conv", x).split(
        (width, width, levels + 1), 1
    )
    terms = []
    for k in range(levels):
        side = w[f"{name}pool_layers.{k}.0.weight"].shape[-1]
        context = gelu(
            convolved(
                w, f"{name}pool_layers.{k}.0", context, groups=width, padding=side // 2
            )
        )
        terms.append(context * gates[:, k, None])
    terms.append(gelu(context.mean((2, 3), keepdim=True)) * gates[:, levels, None])
    return convolved(
        w, f"{name}proj", query * convolved(w, f"{name}v", sum(terms) / len(terms))
    )


def image_features(w, images, case):
    import torch

    conv_embed = case.get("conv_embed")
    stem = dict(stride=4, padding=3) if conv_embed else dict(stride=case["patch_size"])
    x = convolved(w, "patch_embed.proj", images.movedim(-1, 1), **stem)
    x = normed(w, "patch_embed.norm", x)
    for s, depth in enumerate(case["depths"]):
        for b in range(depth):
            block, width = f"layers.{s}.blocks.{b}.", x.shape[1]
            near = dict(groups=width, padding=1)
            gammas = [w.get(f"{block}gamma_{i}", torch.ones(width)) for i in (1, 2)]
            x = x + convolved(w, f"{block}dw1", x, **near)
            y = modulated(w, f"{block}attn.", x, case["focal_levels"][s])
            x = normed(w, f"{block}norm1", x + gammas[0][:, None, None] * y)
            x = x + convolved(w, f"{block}dw2", x, **near)
            y = torch.nn.functional.gelu(convolved(w, f"{block}mlp.fc1", x))
            y = convolved(w, f"{block}mlp.fc2", y)
            x = normed(w, f"{block}norm2", x + gammas[1][:, None, None] * y)
        if s < len(case["depths"]) - 1:
            x = convolved(w, f"layers.{s}.downsample.proj", x, stride=2, padding=1)
            x = normed(w, f"layers.{s}.downsample.norm", x)
    return normed(w, "norm", x).mean((2, 3))


def text_features(w, tokens):
    """Every token sees all but id 0; the state at the largest id."""
    import torch

    def linear(name, x, joint="."):
        weight, bias = w[f"{name}{joint}weight"], w[f"{name}{joint}bias"]
        return torch.nn.functional.linear(x, weight, bias)

    def norm(name, x):
        return normed(w, name, x.movedim(-1, 1), 1e-12).movedim(1, -1)

    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    hidden = (tokens == 0)[:, None, None]
    for i in (0, 1):
        block = f"resblocks.{i}."
        y = linear(f"{block}attn.in_proj", norm(f"{block}ln_1", x), "_")
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).movedim(2, 1) for part in y.chunk(3, -1)
        )
        logits = q @ k.mT / math.sqrt(WIDTH / HEADS)
        y = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
        x = x + linear(f"{block}attn.out_proj", y.movedim(1, 2).flatten(2))
        y = linear(f"{block}mlp.c_fc", norm(f"{block}ln_2", x))
        x = x + linear(f"{block}mlp.c_proj", y * torch.sigmoid(1.702 * y))
    return norm("ln_final", x[torch.arange(len(x)), tokens.argmax(1)])


@functools.cache
def in_torch(case):
    """Float64 features and, by the file's names, gradients of their sum by cosines."""
    import torch

    w = {
        name.removeprefix("image_encoder."): torch.tensor(array, requires_grad=True)
        for name, array in file_of(case).items()
        if name.startswith("image_encoder.")
    }
    features = image_features(w, torch.tensor(small_images()), OPTIONS[case])
    (features * torch.cos(torch.arange(16.0, dtype=torch.float64))).sum().backward()
    grads = {f"image_encoder.{name}": array.grad.numpy() for name, array in w.items()}
    return features.detach().numpy(), grads


@pytest.fixture(scope="module", params=OPTIONS)
def case(request):
    pytest.importorskip("torch", reason="PyTorch computes what to compare with")
    return request.param


def test_float64_features_and_gradients_are_those_of_the_equations(case, x64):
    found = from_arrays(file_of(case), **SIZE)
    options = {k: v for k, v in found.model["image"].items() if k != "name"}
    tower = klite_focal(**options, dtype=jnp.float64)

    def weighted(params, images):
        features, _ = tower.apply(params, {}, images)
        return (features * jnp.cos(jnp.arange(16.0))).sum(), features

    run = jax.jit(jax.grad(weighted, has_aux=True))
    grads, features = run(found.params["image"], small_images())
    want, want_grads = in_torch(case)
    assert features.dtype == jnp.float64 and want.std() > 0.1
    assert np.abs(features - want).max() < 1e-10  # two float64 programs
    params = {**found.params, "image": grads}
    got = to_arrays(Weights(found.model, params, found.state), "unicl")
    assert {k for k in got if k.startswith("image_encoder.")} == want_grads.keys()
    for name, grad in want_grads.items():
        # Where a gradient's terms cancel, round-off is absolute.
        np.testing.assert_allclose(got[name], grad, rtol=1e-8, atol=1e-12, err_msg=name)


def test_a_file_gives_k_lites_embeddings(case, tmp_path):
    import torch

    w = {k: torch.tensor(v, dtype=torch.float32) for k, v in file_of(case).items()}
    torch.save({"model": w}, tmp_path / "klite_focal.pth")
    model = load(tmp_path / "klite_focal.pth", **SIZE)
    images, texts = small_images().astype("f4"), ["a cat", "a dog", "2!"]
    tokens = model.tokenize(texts)
    for row in tokens:  # filled with what the tower does not see
        end = row.argmax()
        assert (
            row[end] == VOCAB - 1 and 0 < end < LENGTH - 1 and not row[end + 1 :].any()
        )
    parts = {
        prefix: {
            k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)
        }
        for prefix in ("image_encoder.", "lang_encoder.")
    }
    u = image_features(parts["image_encoder."], torch.tensor(images), OPTIONS[case])
    v = text_features(parts["lang_encoder."], torch.tensor(tokens, dtype=torch.int64))
    for got, features, projection in (
        (model.encode_image(images), u, w["image_projection"]),
        (model.encode_text(texts), v, w["lang_projection"]),
    ):
        want = torch.nn.functional.normalize(features @ projection, dim=-1).numpy()
        # Two float32 programs; unit embeddings.
        np.testing.assert_allclose(got, want, atol=2e-6)


# --- Names and sizes.


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_is_told_from_its_arrays(name):
    found = from_arrays(file_of(name), **SIZE)
    want = {"conv_embed": False, "image_size": 32, **OPTIONS[name]}
    assert found.model["image"] == {"name": "klite_focal", **want}
    assert found.model["text"]["num_heads"] == HEADS
    assert found.model["text"]["causal"] is False
    assert found.model["text_padding"] == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_written_is_what_was_read(name):
    found = from_arrays(file_of(name), **SIZE)
    again = to_arrays(found, "unicl")
    assert len(again) == len(file_of(name))
    for theirs, array in file_of(name).items():
        ours = theirs.replace("lang_", "text_")
        np.testing.assert_array_equal(again[ours], array, err_msg=ours)
    assert untold(found, "unicl") == {"image.image_size": 32}
    causal = from_arrays(file_of(name), **SIZE, text={"causal": True})
    assert untold(causal, "unicl")["text.causal"] is True


def test_k_lites_config_is_the_variant_of_its_name():
    base = VARIANTS["klite_focal_base"]
    theirs = image_shapes(base)
    # Both as K-LITE's own module says.
    assert len(theirs) == 570
    assert sum(map(math.prod, theirs.values())) == 91_442_784
    section = variants()["klite_focal_base"]
    params, _ = shapes(section)
    assert sum(x.size for x in jax.tree.leaves(params["image"])) == 91_442_784
    zero = np.float32(0)  # of all these shapes, without the memory
    file = {k: np.broadcast_to(zero, v) for k, v in file_shapes(base).items()}
    found = from_arrays(file)
    assert found.model["image"] == {"name": "klite_focal", "image_size": 224, **base}
    for key in ("causal", "name"):
        assert section["text"][key] == found.model["text"][key]
    assert section["text_padding"] == found.model["text_padding"]


# --- Laws.


def small(**options):
    sizes = dict(embed_dim=4, depths=(2,), focal_levels=(2,), focal_windows=(3,))
    return klite_focal(**{**sizes, "image_size": 16, **options})


def program(tower, **options):
    """What a tower computes, as text; equal programs give equal bits."""
    params, _ = jax.eval_shape(tower.init, jax.random.key(0))
    apply = functools.partial(tower.apply, **options)
    return str(jax.make_jaxpr(apply)(params, {}, jnp.zeros((2, 16, 16, 3))))


def test_drop_path_is_for_branches_in_training_and_never_for_the_first_block():
    assert program(small(drop_path=0.5)) == program(small())
    trained = program(small(drop_path=0.5), train=True, key=jax.random.key(0))
    assert trained.count("name=_bernoulli ") == 2  # the second block's


def test_a_block_that_drops_its_branches_still_convolves_and_norms():
    whole, dropping = small(), small(drop_path=1 - 2**-30)
    params, _ = jax.jit(whole.init)(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("f4")
    run = jax.jit(functools.partial(dropping.apply, train=True))
    got, _ = run(params, {}, images, key=jax.random.key(0))
    last = params["layers_0_blocks_1"]
    for branch, name in (("attn", "proj"), ("mlp", "fc2")):  # the branches say nothing
        last[branch][name] = jax.tree.map(jnp.zeros_like, last[branch][name])
    want, _ = jax.jit(whole.apply)(params, {}, images)
    np.testing.assert_allclose(got, want, atol=1e-6)  # float32, features of size 1


def test_recomputing_blocks_changes_nothing():
    params, _ = jax.jit(small().init)(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("f4")

    def run(remat):
        def total(params):
            out, _ = small(remat=remat).apply(params, {}, images)
            return (out * jnp.cos(jnp.arange(4))).sum()

        assert ("remat" in str(jax.make_jaxpr(jax.grad(total))(params))) == remat
        return jax.jit(jax.grad(total))(params)

    for a, b in zip(*map(jax.tree.leaves, (run(True), run(False))), strict=True):
        # The same sums in another order: float32 rounding of the largest.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


def test_bfloat16_features_are_float32_and_near_the_float32_ones():
    params, _ = jax.jit(small(dtype=jnp.bfloat16).init)(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("f4")
    low, full = (
        jax.jit(small(dtype=dtype).apply)(params, {}, images)[0]
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert low.dtype == jnp.float32
    # bfloat16 rounds at 1/256; features are of size 1.
    assert 1e-5 < np.abs(low - full).max() < 0.05


def test_parameters_start_as_k_lites_do():
    params, _ = jax.jit(small(embed_dim=32, layer_scale=1e-6).init)(jax.random.key(0))
    block = params["layers_0_blocks_0"]
    for i in (1, 2):
        np.testing.assert_array_equal(block[f"gamma_{i}"], np.full(32, 1e-6, "f4"))
        for leaf in ("kernel", "bias"):  # PyTorch's for a fan-in of 3 x 3
            assert 0.25 < np.abs(block[f"dw{i}"][leaf]).max() < 1 / 3
    assert not block["attn"]["pre_conv"]["bias"].any()
    assert 0.015 < block["attn"]["pre_conv"]["kernel"].std() < 0.025


# --- Wrong input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depths=(2, 1)), r"must name the same stages: got \(2, 1\)"),
        (dict(image_size=18), "image_size must be divisible by patch_size.*18 and 4"),
        (dict(conv_embed=True, patch_size=8), "patch_size must be 4.*got 8"),
        (dict(focal_windows=(4,)), r"focal_windows\[0\] must be odd.*got 4"),
    ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
    with pytest.raises(InputError, match=message):
        small(**change)


def without(pattern):
    return {k: v for k, v in file_of("stages").items() if not re.search(pattern, k)}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"0\.blocks\.1\.dw2\.bias", r"1 missing \(image_encoder.*1\.dw2\.bias\)\."),
        (r"0\.blocks\.1\.gamma_2", r"1 missing \(image_encoder.*1\.gamma_2\)\."),
        (r"0\.blocks\.0\.gamma_1", r"1 missing \(image_encoder.*0\.gamma_1\)\."),
        (r"blocks\.1\.attn\.pool_layers\.1", r"1 missing \(.*pool_layers\.1\.0\.wei"),
        (
            r"1\.blocks\.0\.attn\.pool",
            r"must hold '.*1\.blocks\.0\.attn\.pool.*load a whole",
        ),
        (r"layers\.0\.blocks\.0\.attn\.pre", "K-LITE's Focal: the image tower's first"),
        (r"patch_embed\.proj\.weight", "must hold 'image_encoder.patch_embed.proj"),
        (r"lang_projection", "known layout"),
    ],
)
def test_a_file_that_lacks_something_is_told(pattern, message):
    arrays = without(pattern)
    assert len(arrays) < len(file_of("stages"))
    with pytest.raises(InputError, match=message):
        from_arrays(arrays, **SIZE)


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ((3, 1), "22 missing .*blocks.2"),
        ((1, 1), "22 left over .*blocks.1"),
        ((2,), "missing|left over"),
    ],
)
def test_another_depth_than_the_files_is_told(depths, message):
    with pytest.raises(InputError, match=message):
        from_arrays(
            file_of("stages"),
            image={
                "image_size": 32,
                "depths": depths,
                "focal_levels": (2, 3)[: len(depths)],
                "focal_windows": (5, 3)[: len(depths)],
            },
        )


def test_k_lites_tower_has_a_place_in_the_unicl_layout_alone():
    found = from_arrays(file_of("patches"), **SIZE)
    for layout in ("timm_swin", "hf_clip"):
        with pytest.raises(InputError, match="formats for that: unicl"):
            to_arrays(found, layout)


def test_from_config_builds_the_tower_it_names():
    text = dict(name="transformer", vocab_size=32, width=16, num_heads=2, num_layers=1)
    config = {
        "image": {"name": "klite_focal_base", "image_size": 64, "depths": (1, 1, 1, 1)},
        "text": {**text, "context_length": 6, "causal": False},
        "embed_dim": 8,
        "logit_scale_init": 1.0,
        "logit_scale_max": None,
        "dtype": "float32",
    }
    params, _ = jax.eval_shape(encoders.from_config(config).init, jax.random.key(0))
    assert params["image"]["layers_3_blocks_0"]["dw2"]["kernel"].shape == (
        3,
        3,
        1,
        1024,
    )
