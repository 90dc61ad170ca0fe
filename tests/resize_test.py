"""Weights at other sizes: learned positions are resized as others resize theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax import encoders
from unicl_jax.encoders.weights import from_arrays
from unicl_jax.encoders.weights.files import write_arrays
from unicl_jax.encoders.weights.resize import interpolation, resized
from unicl_jax.errors import InputError
from unicl_jax.model import load

HEADS = {"num_heads": 4}  # the golden model's


@pytest.fixture(scope="module")
def release(golden):
    """A Swin of windows of 4 at 64 px: stages of 16, 8, 4 and 2 tokens a side."""
    return golden("unicl_tiny/state_dict.npz")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch's interpolation is the peer")


# --- The interpolation.

SIDES = [(13, 23), (23, 13), (7, 8), (14, 27), (5, 1), (1, 4), (3, 20)]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("sides", SIDES)
def test_interpolation_is_pytorchs_bicubic(sides, antialias, torch):
    old, new = sides
    picture = np.random.default_rng(0).normal(size=(2, old, old))
    want = torch.nn.functional.interpolate(
        torch.tensor(picture)[None],
        (new, new),
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )[0].numpy()
    matrix = interpolation(old, new, antialias)
    # Two float64 programs; PyTorch's antialiased weights are rounded otherwise.
    np.testing.assert_allclose(matrix @ picture @ matrix.T, want, atol=1e-12)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("sides", SIDES)
def test_what_is_the_same_everywhere_stays_so(sides, antialias):
    np.testing.assert_allclose(interpolation(*sides, antialias).sum(1), 1, atol=1e-14)


@pytest.mark.parametrize("antialias", [False, True])
def test_as_many_points_are_the_same_points(antialias):
    np.testing.assert_allclose(interpolation(9, 9, antialias), np.eye(9), atol=1e-15)


# --- Trees.


def test_a_table_is_a_picture_with_a_head_a_channel(torch):
    """Swin's release and open_clip's resize_pos_embed, with PyTorch's function."""
    rng = np.random.default_rng(1)

    def there(table, side, antialias=False):
        n = round(len(table) ** 0.5)
        picture = torch.tensor(table).double().T.reshape(1, -1, n, n)
        picture = torch.nn.functional.interpolate(
            picture, (side, side), mode="bicubic", antialias=antialias
        )
        return picture.reshape(-1, side * side).T.numpy()

    table = rng.normal(size=(13 * 13, 3)).astype("f4")
    places = rng.normal(size=(6, 6, 5)).astype("f4")
    vit = rng.normal(size=(1 + 7 * 7, 4)).astype("f4")
    text = rng.normal(size=(9, 4)).astype("f4")

    def tree(table, places, vit, text):
        swin = {"block": {"attn": {"relative_position_bias_table": table}}}
        return [
            {"image": swin | {"absolute_pos_embed": places}},
            {"image": {"positional_embedding": vit}},
            {"text": {"positional_embedding": text}},
        ]

    wanted = (23 * 23, 3), (10, 10, 5), (1 + 12 * 12, 4), (6, 4)
    like = tree(*(jax.ShapeDtypeStruct(shape, "f4") for shape in wanted))
    got = resized(tree(table, places, vit, text), like)
    want = tree(
        there(table, 23),
        there(places.reshape(36, 5), 10).reshape(10, 10, 5),
        np.concatenate([vit[:1], there(vit[1:], 12, antialias=True)]),
        text[:6],
    )
    # Ours are float32 at the end.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(got))


def test_at_its_own_size_a_model_is_what_it_was(release):
    own = from_arrays(release, text=HEADS)
    sizes = {"image_size": 64, "window_size": 4}
    same = from_arrays(release, text=HEADS | {"context_length": 16}, image=sizes)
    assert same.model == own.model
    jax.tree.map(np.testing.assert_array_equal, same.params, own.params)
    # A stage that was smaller than the window is not at 128 px: its table grows alone.
    large = from_arrays(release, text=HEADS, image={"image_size": 128})
    before = dict(jax.tree_util.tree_leaves_with_path(own.params))
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(large.params)
        if not np.array_equal(leaf, before[path])
    ]
    assert changed == ["image/layers_3_blocks_0/attn/relative_position_bias_table"]


def test_sizes_that_do_not_fit_are_told(release):
    for image, words in (
        ({"image_size": 96}, "window_size must divide stage 2's resolution 6 "),
        ({"window_size": 3}, "window_size must divide stage 0's resolution 16"),
        ({"image_size": 66}, "image_size must be divisible by patch_size: got 66"),
        ({"image_sise": 96}, 'no option "image_sise"; did you mean "image_size"'),
    ):
        with pytest.raises(InputError, match=words):
            from_arrays(release, image=image)
    with pytest.raises(
        InputError, match="positions that the weights hold: got 17 for 16"
    ):
        from_arrays(release, text={"context_length": 17})


def test_another_size_excuses_no_other_shape(release):
    arrays = {**release, "image_encoder.norm.bias": np.zeros(5)}
    with pytest.raises(InputError, match=r"norm.bias: \(5,\), not \(192,\)"):
        from_arrays(arrays, image={"image_size": 128})


# --- Models.


def test_a_model_embeds_at_another_size(release, tmp_path):
    write_arrays(tmp_path / "model.npz", release, {})
    sizes = {"image_size": 96, "window_size": 6}
    model = load(tmp_path / "model.npz", image=sizes, text=HEADS)
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    got = model.encode_image(images)
    assert model.image_size == 96 and np.isfinite(got).all()
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert np.abs(got[0] - got[1]).max() > 1e-3


def test_a_shorter_context_embeds_what_fits_as_before(release):
    """What follows a text's end changes nothing in a causal tower."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 500, (3, 9), dtype=np.int32)
    tokens[:, -1] = 511
    features = []
    for length in (16, 9):
        found = from_arrays(release, text=HEADS | {"context_length": length})
        tower = encoders.from_config(
            {"logit_scale_init": 1.0, "logit_scale_max": None, "dtype": "float32"}
            | found.model
        )
        features.append(tower.text_features(found.params, found.state, tokens)[0])
    np.testing.assert_array_equal(*features)


def test_swin_at_another_window_gives_timms_features(torch, x64):
    """timm's own resizing by interpolation alone, which it now offers as "simple"."""
    pytest.importorskip("timm", reason="timm makes the model to compare with")
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
    from timm.models.swin_transformer import SwinTransformer as Swin

    def make(size, window):
        options = dict(embed_dim=24, depths=(2, 2, 1), num_heads=(2, 4, 8))
        torch.manual_seed(0)
        model = Swin(img_size=size, window_size=window, num_classes=5, **options)
        return model.double().eval()

    small, large = make(32, 4), make(48, 6)  # stages of 8, 4, 2 and of 12, 6, 3
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "bias_table" in name:
                torch.nn.init.normal_(parameter)
    weights = small.state_dict()
    for name, wanted in large.state_dict().items():
        if "bias_table" in name:
            assert weights[name].shape != wanted.shape
            side = (round(len(wanted) ** 0.5) + 1) // 2
            weights[name] = resize_rel_pos_bias_table_simple(
                weights[name], (side, side), wanted.shape
            )
    large.load_state_dict(weights)
    images = np.random.default_rng(0).normal(size=(2, 3, 48, 48))
    with torch.no_grad():
        want = large.forward_head(
            large.forward_features(torch.tensor(images)), pre_logits=True
        ).numpy()
    arrays = {k: v.numpy() for k, v in small.state_dict().items()}
    found = from_arrays(arrays, image={"image_size": 48, "window_size": 6})
    tower = encoders.swin(
        **{k: v for k, v in found.model["image"].items() if k != "name"},
        dtype=jnp.float64,
    )
    run = jax.jit(lambda p, x: tower.apply(p, {}, x)[0])
    got = run(found.params["image"], images.transpose(0, 2, 3, 1))
    # Two float64 programs.
    np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("size", [48, 16])
def test_a_vit_at_another_size_gives_open_clips_embeddings(size, torch, x64):
    open_clip = pytest.importorskip("open_clip", reason="it resizes what it loads")
    from open_clip.model import resize_pos_embed

    def make(size):
        image = open_clip.CLIPVisionCfg(
            layers=2, width=128, patch_size=8, image_size=size
        )
        text = open_clip.CLIPTextCfg(
            context_length=12, vocab_size=600, width=64, heads=1, layers=1
        )
        torch.manual_seed(0)
        return open_clip.CLIP(32, image, text, quick_gelu=True).double().eval()

    native, other = make(32), make(size)
    torch.nn.init.normal_(native.visual.positional_embedding)
    weights = native.state_dict()
    resize_pos_embed(weights, other)
    other.load_state_dict(weights)
    images = np.random.default_rng(0).normal(size=(2, 3, size, size))
    with torch.no_grad():
        want = other.encode_image(torch.tensor(images)).numpy()
    arrays = {k: v.numpy() for k, v in native.state_dict().items()}
    found = from_arrays(arrays, image={"image_size": size})
    tower = encoders.vit(
        **{k: v for k, v in found.model["image"].items() if k != "name"},
        dtype=jnp.float64,
    )
    features, _ = jax.jit(lambda p, x: tower.apply(p, {}, x))(
        found.params["image"], images.transpose(0, 2, 3, 1)
    )
    got = features @ found.params["image_projection"]
    # Two float64 programs.
    np.testing.assert_allclose(got, want, atol=1e-10)
