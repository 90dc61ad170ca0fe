"""CLIP's towers: the Vision Transformer, and the text transformer with CLIP's eps.

The peer is `transformers`' CLIPModel with random weights; laws that all towers share
are in `encoders_test.py`.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax.encoders import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    from_config,
    make_two_tower,
    transformer,
    vit,
)
from unicl_jax.errors import InputError

VIT = dict(patch_size=4, width=24, num_layers=2, num_heads=3, image_size=16)
TEXT = dict(vocab_size=32, context_length=8, width=16, num_heads=2, num_layers=2)
EMBED_DIM = 8
STATE = {"image": {}, "text": {}}


# --- Against transformers' CLIPModel.


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def peer(request):
    """A function from weights to CLIPModel's results, the weights, the activation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn about while being imported
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = transformers.CLIPConfig(
            text_config=dict(
                vocab_size=32,
                max_position_embeddings=8,
                hidden_size=16,
                intermediate_size=64,
                num_attention_heads=2,
                num_hidden_layers=2,
                hidden_act=request.param,
                bos_token_id=30,
                eos_token_id=31,
                pad_token_id=31,
            ),
            vision_config=dict(
                patch_size=4,
                image_size=16,
                hidden_size=24,
                intermediate_size=96,
                num_attention_heads=3,
                num_hidden_layers=2,
                hidden_act=request.param,
            ),
            projection_dim=EMBED_DIM,
            attn_implementation="sdpa",  # the "eager" one has its softmax in float32
        )
        model = transformers.CLIPModel(config).double().eval()
    rng = np.random.default_rng(0)
    weights = {}
    for name, value in model.named_parameters():
        # Larger than those of a new model, and no bias 0: a wrong place would show.
        draw = rng.normal(scale=0.3, size=tuple(value.shape))
        weights[name] = draw + (name.endswith("weight") and value.ndim == 1)
        value.data = torch.from_numpy(np.asarray(weights[name]))

    def run(images, tokens, by_image, by_text):
        """Embeddings, and the gradients of their sum weighted by the last two."""
        model.zero_grad()
        out = model(
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
            input_ids=torch.from_numpy(tokens.astype(np.int64)),
        )
        total = (out.image_embeds * torch.from_numpy(by_image)).sum()
        total = total + (out.text_embeds * torch.from_numpy(by_text)).sum()
        total.backward()
        grads = {
            name: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.numpy()
            for name, p in model.named_parameters()
        }
        return out.image_embeds.detach(), out.text_embeds.detach(), grads

    return run, weights, request.param


def blocks_from(arrays, prefix):
    """CLIPModel's blocks by our names; linear maps are stored [out, in] there."""
    blocks = {}
    for i in range(2):

        def get(name, i=i):
            return arrays[f"{prefix}.encoder.layers.{i}.{name}"]

        def linear(name, get=get):
            return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

        def norm(name, get=get):
            return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

        q, k, v = (linear(f"self_attn.{x}_proj") for x in "qkv")
        blocks[f"resblocks_{i}"] = {
            "ln_1": norm("layer_norm1"),
            "attn_in_proj": {
                x: np.concatenate([q[x], k[x], v[x]], -1) for x in ("kernel", "bias")
            },
            "attn_out_proj": linear("self_attn.out_proj"),
            "ln_2": norm("layer_norm2"),
            "mlp": {"c_fc": linear("mlp.fc1"), "c_proj": linear("mlp.fc2")},
        }
    return blocks


def from_clip_model(arrays):
    """CLIPModel's arrays (weights or gradients) as a two-tower's tree."""

    def norm(name):
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    vision, text = "vision_model.embeddings", "text_model.embeddings"
    patches = arrays[f"{vision}.patch_embedding.weight"]  # O I H W
    return {
        "image": {
            "patch_embed": {
                "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, len(patches))
            },
            "class_embedding": arrays[f"{vision}.class_embedding"],
            "positional_embedding": arrays[f"{vision}.position_embedding.weight"],
            "ln_pre": norm("vision_model.pre_layrnorm"),
            **blocks_from(arrays, "vision_model"),
            "ln_post": norm("vision_model.post_layernorm"),
        },
        "text": {
            "token_embedding": {"embedding": arrays[f"{text}.token_embedding.weight"]},
            "positional_embedding": arrays[f"{text}.position_embedding.weight"],
            **blocks_from(arrays, "text_model"),
            "ln_final": norm("text_model.final_layer_norm"),
        },
        "image_projection": arrays["visual_projection.weight"].T,
        "text_projection": arrays["text_projection.weight"].T,
        "logit_scale": np.asarray(arrays["logit_scale"]),
    }


def inputs():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 30, (3, 8), dtype=np.int32)
    for row, end in zip(tokens, (2, 5, 7), strict=True):
        row[end:] = 31
    weights = rng.normal(size=(2, 3, EMBED_DIM))
    return rng.normal(size=(3, 16, 16, 3)), tokens, *weights


def our_run(weights, activation, dtype):
    """The peer's results, by our towers."""
    model = make_two_tower(
        vit(**VIT, activation=activation, dtype=dtype),
        transformer(**TEXT, eps=1e-5, activation=activation, dtype=dtype),
        embed_dim=EMBED_DIM,
    )
    params = jax.tree.map(lambda x: x.astype(dtype), from_clip_model(weights))
    own, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    images, tokens, by_image, by_text = inputs()

    @jax.jit
    def run(params):
        def total(params):
            u, _ = model.encode_image(params, STATE, images.astype(dtype))
            v, _ = model.encode_text(params, STATE, tokens)
            return (u * by_image).sum() + (v * by_text).sum(), (u, v)

        grads, (u, v) = jax.grad(total, has_aux=True)(params)
        return u, v, grads

    return run(params)


def test_float64_embeddings_and_all_gradients_are_transformers(peer, x64):
    theirs, weights, activation = peer
    *want, want_grads = theirs(*inputs())
    *got, grads = our_run(weights, activation, jnp.float64)
    for ours, other in zip(got, want, strict=True):
        # Two float64 programs; unit rows.
        assert np.abs(ours - other.numpy()).max() < 1e-10
    want_grads = dict(jax.tree_util.tree_leaves_with_path(from_clip_model(want_grads)))
    got_grads = jax.tree_util.tree_leaves_with_path(grads)
    assert len(got_grads) == len(want_grads) == 7 + 2 * 12 + 4 + 2 * 12 + 3
    for path, grad in got_grads:
        np.testing.assert_allclose(
            grad, want_grads[path], rtol=0, atol=1e-10, err_msg=str(path)
        )


def test_float32_embeddings_are_transformers_float64_ones(peer):
    theirs, weights, activation = peer
    *want, _ = theirs(*inputs())
    *got, _ = our_run(weights, activation, jnp.float32)
    for ours, other in zip(got, want, strict=True):
        # Two layers of float32's rounding on unit rows.
        assert np.abs(ours - other.numpy()).max() < 2e-6


# --- Sizes.


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "image_size", "embed_dim", "visual", "total"),
    [
        ("vit_b32", 224, 512, 87_849_216, 151_277_313),
        ("vit_b16", 224, 512, 86_192_640, 149_620_737),
        ("vit_l14", 224, 768, 303_966_208, 427_616_513),
        ("vit_l14", 336, 768, 304_293_888, 427_944_193),
    ],
)
def test_clips_models_have_the_released_number_of_parameters(
    name, image_size, embed_dim, visual, total
):
    """The released models count the projection as part of `visual`."""
    text = dict(width=768, num_heads=12) if name == "vit_l14" else {}
    model = make_two_tower(
        IMAGE_TOWERS[name](image_size=image_size),
        TEXT_TOWERS["transformer"](eps=1e-5, **text),
        embed_dim=embed_dim,
    )
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert count(params["image"]) + params["image_projection"].size == visual
    assert count(params) == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=18), "image_size must be divisible by patch_size.*18 and 4"),
        (dict(num_heads=5), "num_heads must divide the image tower's width 24.*5"),
        (dict(activation="relu"), 'activation: got "relu".*gelu, quick_gelu'),
    ],
)
def test_options_that_do_not_fit_are_told(change, message):
    with pytest.raises(InputError, match=message):
        vit(**VIT | change)


def test_an_image_of_another_size_is_refused():
    tower = vit(**VIT)
    params, _ = jax.eval_shape(tower.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"images must be \[B, 16, 16, 3\].*20, 20"):
        jax.eval_shape(tower.apply, params, {}, jnp.zeros((1, 20, 20, 3)))


def test_a_config_names_the_tower():
    config = dict(
        image=dict(name="vit_b32", width=24, num_layers=1, num_heads=2, image_size=64),
        text=dict(name="transformer", **TEXT, eps=1e-5),
        embed_dim=EMBED_DIM,
        logit_scale_init=2.659,
        logit_scale_max=4.605,
        dtype="float32",
    )
    params, _ = jax.eval_shape(from_config(config).init, jax.random.key(0))
    assert params["image"]["patch_embed"]["kernel"].shape == (32 * 32 * 3, 24)
    assert params["image"]["positional_embedding"].shape == (1 + 4, 24)
