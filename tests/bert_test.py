"""The BERT tower; the peer is `transformers`' BertModel with random weights.

Laws that all towers share are in `encoders_test.py`.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax.encoders import TEXT_TOWERS, bert
from unicl_jax.errors import InputError

BERT = dict(
    vocab_size=32, context_length=8, width=16, num_heads=2, num_layers=2, hidden=40
)
RENAMES = (
    (r"encoder\.layer\.(\d+)\.", r"encoder_layer_\1/"),
    (r"attention\.self\.", ""),
    (r"attention\.output\.dense", "attention_output"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"(intermediate|/output)\.dense", r"\1"),
    (r"/output\.LayerNorm", "/output_norm"),
    (r"(norm|LayerNorm)\.weight$", r"\1/scale"),
    (r"embeddings\.weight$", "embeddings/embedding"),
    (r"\.weight$", "/kernel"),
    (r"\.", "/"),
)


def from_bert_model(arrays):
    """BertModel's arrays (weights or gradients) by our names."""
    tree = {}
    for name, value in arrays.items():
        path = name
        for pattern, replacement in RENAMES:
            path = re.sub(pattern, replacement, path)
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value.T if leaf == "kernel" else value
    return tree


def tokens():
    """Rows of 2, 5 and 8 real tokens, then id 0."""
    rows = np.random.default_rng(1).integers(1, 32, (3, 8), dtype=np.int32)
    for row, end in zip(rows, (2, 5, 8), strict=True):
        row[end:] = 0
    return rows


WEIGHTS = np.random.default_rng(2).normal(size=(3, 16))  # of the features, in a sum


@pytest.fixture(scope="module")
def peer():
    """BertModel's weights, features of `tokens()`, and gradients of their sum."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn about while being imported
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=32,
            max_position_embeddings=8,
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            intermediate_size=40,
            attn_implementation="sdpa",  # the "eager" one has its softmax in float32
        )
        model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    rng = np.random.default_rng(0)
    weights = {}
    for name, value in model.named_parameters():
        # Larger than those of a new model, and no bias 0: a wrong place would show.
        draw = rng.normal(scale=0.3, size=tuple(value.shape))
        weights[name] = draw + (name.endswith("weight") and value.ndim == 1)
        value.data = torch.from_numpy(weights[name])
    ids = torch.from_numpy(tokens().astype(np.int64))
    hidden = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    (hidden[:, 0] * torch.from_numpy(WEIGHTS)).sum().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return weights, hidden[:, 0].detach().numpy(), grads


def run(tower, params, ids):
    """Features, and the gradients of their weighted sum."""

    def total(params, ids):
        features, _ = tower.apply(params, {}, ids)
        return (features * WEIGHTS[: len(ids)]).sum(), features

    grads, features = jax.jit(jax.grad(total, has_aux=True))(params, ids)
    return features, grads


def test_float64_features_and_all_gradients_are_transformers(peer, x64):
    weights, want, want_grads = peer
    params, tower = from_bert_model(weights), bert(**BERT, dtype=jnp.float64)
    own, _ = jax.eval_shape(tower.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    features, grads = run(tower, params, tokens())
    # Two float64 programs, numbers of size 1.
    assert np.abs(features - want).max() < 1e-10
    want_grads = dict(jax.tree_util.tree_leaves_with_path(from_bert_model(want_grads)))
    got_grads = jax.tree_util.tree_leaves_with_path(grads)
    assert len(got_grads) == len(want_grads) == 5 + 2 * 16
    for path, grad in got_grads:
        np.testing.assert_allclose(
            grad, want_grads[path], rtol=0, atol=1e-10, err_msg=str(path)
        )


def test_float32_features_are_transformers_float64_ones(peer):
    weights, want, _ = peer
    params = jax.tree.map(lambda x: x.astype("f4"), from_bert_model(weights))
    features, _ = run(bert(**BERT), params, tokens())
    # Two layers of float32's rounding on features of size 3.
    assert np.abs(features - want).max() < 5e-6


def fresh_params(tower):
    shapes, _ = jax.eval_shape(tower.init, jax.random.key(0))
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape), shapes)


@pytest.mark.parametrize("pad_id", [0, 31])
def test_padding_changes_neither_features_nor_gradients(pad_id, x64):
    tower = bert(**BERT, pad_id=pad_id, dtype=jnp.float64)
    params = fresh_params(tower)
    rows = np.where(tokens() == 31, 30, tokens())[:2]
    rows = np.where(rows == 0, pad_id, rows)
    features, grads = run(tower, params, rows)
    cut_features, cut_grads = run(tower, params, rows[:, :5])
    # The same sums with and without exact zeros, in float64.
    np.testing.assert_allclose(cut_features, features, rtol=0, atol=1e-12)
    for got, want in zip(*map(jax.tree.leaves, (cut_grads, grads)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    # Padding is seen where its id is not the tower's.
    seen, _ = run(bert(**BERT, pad_id=7, dtype=jnp.float64), params, rows)
    assert np.abs(seen - features).max() > 0.01


def test_a_row_of_padding_alone_is_finite():
    tower = bert(**BERT)
    features, grads = run(tower, fresh_params(tower), np.zeros((1, 8), np.int32))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((features, grads)))


def test_bert_base_has_the_released_number_of_parameters():
    tower = TEXT_TOWERS["bert"](context_length=512)
    params, _ = jax.eval_shape(tower.init, jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(params))
    assert total == 109_482_240 - (768 * 768 + 768)  # all but the pooler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=3), "num_heads must divide the text tower's width 16.*3"),
        (dict(pad_id=32), r"pad_id must be in \[0, 32\).*32"),
    ],
)
def test_options_that_do_not_fit_are_told(change, message):
    with pytest.raises(InputError, match=message):
        bert(**BERT | change)
