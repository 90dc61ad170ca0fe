"""FocalNet: two other implementations' numbers, sizes, and the laws of its options.

`transformers` and `timm` are PyTorch's FocalNets, written apart from each other; the
second takes the authors' own names. Where they are not installed, their tests skip.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax.encoders import IMAGE_TOWERS, focalnet, from_config
from unicl_jax.encoders.focalnet import VARIANTS
from unicl_jax.errors import InputError

# Levels and windows differ between the stages, so that none can stand for another.
SMALL = dict(
    embed_dim=8,
    depths=(2, 1),
    focal_levels=(2, 3),
    focal_windows=(5, 3),
    image_size=32,
)
OPTIONS = {
    "plain": {},
    "post_norms": dict(layer_scale=0.1, post_norm=True, modulation_norm=True),
    "normalized": dict(normalize_modulator=True, patch_size=8, mlp_ratio=2.0),
    "conv_embed": dict(conv_embed=True, layer_scale=1e-6, modulation_norm=True),
}


def small_images(batch=3, size=32):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3))


def shapes(tower):
    return jax.eval_shape(tower.init, jax.random.key(0))[0]


def start(tower):
    """Parameters as NumPy draws them, float64.

    Larger than a new tower's, scales of norms and branches too, so that each matters.
    """
    rng = np.random.default_rng(1)

    def draw(path, x):
        centre = path[-1].key in ("scale", "gamma_1", "gamma_2")
        return rng.normal(scale=0.2, size=x.shape) + centre

    return jax.tree_util.tree_map_with_path(draw, shapes(tower))


def to_float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# --- Other implementations' numbers.


def transformers_model(**options):
    """`transformers`' tower of our options, its arrays without values."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.FocalNetConfig(
        image_size=options.get("image_size", 224),
        patch_size=options.get("patch_size", 4),
        embed_dim=options["embed_dim"],
        depths=options["depths"],
        focal_levels=options["focal_levels"],
        focal_windows=options["focal_windows"],
        mlp_ratio=options.get("mlp_ratio", 4.0),
        drop_path_rate=0.0,
        use_conv_embed=options.get("conv_embed", False),
        use_layerscale="layer_scale" in options,
        use_post_layernorm=options.get("post_norm", False),
        use_post_layernorm_in_modulation=options.get("modulation_norm", False),
        normalize_modulator=options.get("normalize_modulator", False),
    )
    with torch.device("meta"):
        return transformers.FocalNetModel(config)


# Towards our paths, applied in order.
FROM_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed."),
    (r"^embeddings\.", "patch_embed."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"layers.\1.blocks."),
    (r"^encoder\.stages\.", "layers."),
    (r"\.modulation\.projection_in\.", ".modulation.f."),
    (r"\.modulation\.projection_context\.", ".modulation.h."),
    (r"\.modulation\.projection_out\.", ".modulation.proj."),
    (r"\.modulation\.layernorm\.", ".modulation.ln."),
    (r"\.projection\.", ".proj."),
    (r"^layernorm\.", "norm."),
)
FROM_OFFICIAL = (
    (r"layers\.(\d+)\.blocks\.(\d+)\.", r"layers_\1_blocks_\2."),
    (r"layers\.(\d+)\.downsample\.", r"layers_\1_downsample."),
    (r"focal_layers\.(\d+)\.0\.", r"focal_layers_\1."),
    (r"(norm\d?|ln)\.weight$", r"\1.scale"),
    (r"\.weight$", ".kernel"),
)


def renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def by_path(tree):
    """Dotted path -> leaf."""
    return {
        ".".join(part.key for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def to_torch(params, names):
    """Our parameters under their names, a dict of name -> (path, shape) there."""
    import torch

    ours = by_path(params)
    assert sorted(ours) == sorted(path for path, _ in names.values())
    state = {}
    for name, (path, shape) in names.items():
        value = ours[path]
        if len(shape) == 2:
            value = value.T
        elif len(shape) == 4:  # HWIO, or a matmul of patches (H W I) O
            out, into, height, width = shape
            value = value.reshape(height, width, into, out).transpose(3, 2, 0, 1)
        assert value.shape == tuple(shape)
        state[name] = torch.from_numpy(np.array(value))
    return state


def torch_features(model, state, dtype):
    """Features of the small images, as a function that keeps torch's graph."""
    import torch

    model.load_state_dict(state, strict=True, assign=True)
    model.to(dtype).eval()
    images = torch.from_numpy(small_images().transpose(0, 3, 1, 2).copy()).to(dtype)
    return model(images)


def transformers_names(model):
    """Their name -> (our path, their shape)."""
    return {
        name: (renamed(name, FROM_TRANSFORMERS + FROM_OFFICIAL), value.shape)
        for name, value in model.state_dict().items()
    }


@functools.cache
def in_transformers(case):
    """Float64 features and, by our paths, gradients of their sum by cosines."""
    import torch

    options = {**SMALL, **OPTIONS[case]}
    model = transformers_model(**options)
    names = transformers_names(model)
    state = to_torch(start(focalnet(**options)), names)
    features = torch_features(model, state, torch.float64).pooler_output
    (features * torch.cos(torch.arange(16.0, dtype=torch.float64))).sum().backward()
    grads = {names[k][0]: v.grad.numpy() for k, v in model.named_parameters()}
    return features.detach().numpy(), grads


@pytest.fixture(scope="module", params=OPTIONS)
def case(request):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return request.param


def test_float32_features_are_those_of_transformers(case):
    tower = focalnet(**{**SMALL, **OPTIONS[case]})
    params, images = to_float32((start(tower), small_images()))
    got, _ = jax.jit(tower.apply)(params, {}, images)
    want, _ = in_transformers(case)
    assert want.std() > 0.1
    # Float32 rounds at 6e-8; features are of size 1, a dozen layers deep.
    assert np.abs(got - want).max() < 2e-6


def test_float64_features_and_gradients_are_those_of_transformers(case, x64):
    tower = focalnet(**{**SMALL, **OPTIONS[case]}, dtype=jnp.float64)

    def weighted(params, images):
        features, _ = tower.apply(params, {}, images)
        return (features * jnp.cos(jnp.arange(16.0))).sum(), features

    run = jax.jit(jax.grad(weighted, has_aux=True))
    grads, features = run(start(tower), small_images())
    want, want_grads = in_transformers(case)
    assert features.dtype == jnp.float64
    assert np.abs(features - want).max() < 1e-10  # two float64 programs
    got = by_path(grads)
    assert got.keys() == want_grads.keys()
    for path, grad in got.items():
        theirs = want_grads[path]
        if theirs.ndim == 2:
            theirs = theirs.T
        elif theirs.ndim == 4:
            theirs = theirs.transpose(2, 3, 1, 0).reshape(grad.shape)
        # Where a gradient's terms cancel, round-off is absolute.
        np.testing.assert_allclose(grad, theirs, rtol=1e-8, atol=1e-12, err_msg=path)


@pytest.mark.parametrize("case", ["conv_embed", "post_norms"])
def test_the_authors_names_carry_weights_to_timm(case, x64):
    """timm reads the authors' state dict, so names that it reads are the authors'."""
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm.models.focalnet")
    options = {**SMALL, **OPTIONS[case]}
    tower = focalnet(**options, dtype=jnp.float64)
    params = start(tower)
    model = timm.FocalNet(
        num_classes=0,
        embed_dim=options["embed_dim"],
        depths=options["depths"],
        focal_levels=options["focal_levels"],
        focal_windows=options["focal_windows"],
        use_overlap_down=options.get("conv_embed", False),
        use_post_norm=options.get("post_norm", False),
        use_post_norm_in_modulation=options["modulation_norm"],
        layerscale_value=options["layer_scale"],
    )
    state = to_torch(params, transformers_names(transformers_model(**options)))
    official = {renamed(name, FROM_TRANSFORMERS): x for name, x in state.items()}
    with torch.no_grad():
        state = timm.checkpoint_filter_fn(official, model)
        want = torch_features(model, state, torch.float64).numpy()
    got, _ = jax.jit(tower.apply)(params, {}, small_images())
    assert np.abs(got - want).max() < 1e-10  # two float64 programs


# --- Sizes.


@pytest.mark.parametrize(
    ("name", "size", "published"),
    [
        ("focalnet_tiny_srf", 27_658_116, 28.4),
        ("focalnet_tiny_lrf", 27_878_928, 28.6),
        ("focalnet_small_srf", 49_122_216, 49.9),
        ("focalnet_small_lrf", 49_573_440, 50.3),
        ("focalnet_base_srf", 87_123_144, 88.1),
        ("focalnet_base_lrf", 87_724_768, 88.7),
    ],
)
def test_models_have_the_published_number_of_parameters(name, size, published):
    tower = IMAGE_TOWERS[name]()
    assert count(shapes(tower)) == size
    # The paper's are in millions, with a linear map to ImageNet's 1,000 classes.
    assert round((size + 1000 * (tower.width + 1)) / 1e6, 1) == published


@pytest.mark.parametrize("name", VARIANTS)
def test_models_have_the_arrays_of_transformers(name):
    names = transformers_names(transformers_model(**VARIANTS[name]))
    ours = by_path(shapes(IMAGE_TOWERS[name]()))
    theirs = {path: np.prod(shape) for path, shape in names.values()}
    assert {path: x.size for path, x in ours.items()} == theirs


# --- Laws.


def test_recomputing_blocks_changes_neither_features_nor_gradients():
    one_stage = dict(depths=(2,), focal_levels=(2,), focal_windows=(3,))
    make = functools.partial(focalnet, **{**SMALL, **one_stage}, drop_path=0.5)
    params, images = to_float32((start(make()), small_images()))

    def run(remat):
        tower = make(remat=remat)

        def total(params, key):
            out, _ = tower.apply(params, {}, images, train=True, key=key)
            return (out * jnp.cos(jnp.arange(tower.width))).sum(), out

        grad = jax.grad(total, has_aux=True)
        recomputes = "remat" in str(jax.make_jaxpr(grad)(params, jax.random.key(5)))
        assert recomputes == remat
        return jax.jit(grad)(params, jax.random.key(5))

    for a, b in zip(*map(jax.tree.leaves, (run(True), run(False))), strict=True):
        # The same sums in another order: float32 rounding of the largest.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("case", ["plain", "post_norms"])
def test_bfloat16_features_are_float32_and_near_the_float32_ones(case):
    make = functools.partial(focalnet, **{**SMALL, **OPTIONS[case]})
    own = shapes(make(dtype=jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    params, images = to_float32((start(make()), small_images()))
    low, full = (
        jax.jit(make(dtype=dtype).apply)(params, {}, images)[0]
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert low.dtype == jnp.float32
    # bfloat16 rounds at 1/256; features are of size 1 and a dozen layers add up.
    assert 1e-4 < np.abs(low - full).max() < 0.05


def program(tower, **options):
    """What a tower computes, as text; equal programs give equal bits."""
    apply = functools.partial(tower.apply, **options)
    images = jnp.zeros((2, 32, 32, 3))
    return str(jax.make_jaxpr(apply)(shapes(tower), {}, images))


def test_drop_path_is_for_training_and_never_for_the_first_block():
    key = jax.random.key(0)
    plain, dropping = focalnet(**SMALL), focalnet(**SMALL, drop_path=0.5)
    assert program(dropping) == program(plain)
    trained = program(dropping, train=True, key=key)
    # Two branches of each block but the first, one draw each.
    assert trained.count("name=_bernoulli ") == 2 * (sum(SMALL["depths"]) - 1)


def test_layer_scales_start_at_their_value_on_both_branches():
    tower = focalnet(
        embed_dim=2,
        depths=(1,),
        focal_levels=(1,),
        focal_windows=(1,),
        image_size=4,
        layer_scale=0.5,
    )
    params, _ = jax.jit(tower.init)(jax.random.key(0))
    block = params["layers_0_blocks_0"]
    np.testing.assert_array_equal(block["gamma_1"], [0.5, 0.5])
    np.testing.assert_array_equal(block["gamma_2"], [0.5, 0.5])


# --- Wrong options.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depths=(2, 1, 1)), r"depths, focal_levels.*\(2, 1, 1\), \(2, 3\)"),
        (dict(focal_windows=(3,)), r"focal_windows must name.*and \(3,\)"),
        (dict(image_size=34), "image_size must be divisible by patch_size.*34 and 4"),
        (dict(image_size=36), "stage 0's resolution must be even.*9 from image_size"),
        (dict(conv_embed=True, patch_size=8), "patch_size must be 4.*got 8"),
        (dict(focal_windows=(3, 4)), r"focal_windows\[1\] must be odd.*got 4"),
        (dict(focal_windows=(-1, 3)), r"focal_windows\[0\] must be odd.*got -1"),
        (dict(focal_levels=(0, 2)), r"focal_levels\[0\] must be at least 1: got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
    with pytest.raises(InputError, match=message):
        focalnet(**{**SMALL, **change})


def test_from_config_builds_the_tower_it_names():
    config = dict(
        image=dict(name="focalnet_tiny_srf", image_size=64, layer_scale=0.1),
        text=dict(
            name="transformer",
            vocab_size=32,
            context_length=6,
            width=16,
            num_heads=2,
            num_layers=1,
        ),
        embed_dim=8,
        logit_scale_init=1.0,
        logit_scale_max=None,
        dtype="float32",
    )
    params, _ = jax.eval_shape(from_config(config).init, jax.random.key(0))
    tower = focalnet(**VARIANTS["focalnet_tiny_srf"], image_size=64, layer_scale=0.1)
    assert params["image"] == shapes(tower)
    config["image"]["focal_level"] = 2
    with pytest.raises(InputError, match='did you mean "focal_levels"'):
        from_config(config)
