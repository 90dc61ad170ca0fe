"""Packed rows of texts: each text once and whole, and the padded rows' features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax.encoders import make_two_tower, pack, transformer
from unicl_jax.errors import InputError

TEXT = dict(vocab_size=32, context_length=8, width=16, num_heads=2, num_layers=2)
EOT = 31
LENGTHS = (3, 8, 2, 5, 3, 1, 4, 7)


def texts(pad=EOT):
    """One row a text, of LENGTHS ids with their end; the last place of each is EOT."""
    tokens = np.random.default_rng(0).integers(1, EOT, (len(LENGTHS), 8))
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[length - 1] = EOT
        row[length:] = pad
    return tokens.astype(np.int32)


def parameters(tower):
    """Larger than those of a new tower, so that all texts differ."""
    shapes, _ = jax.eval_shape(tower.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    draw = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape), shapes)
    draw["ln_final"]["scale"] += 1
    return draw


def run(tower, params, tokens):
    """Features, and the gradients of their weighted sum."""
    weights = np.random.default_rng(2).normal(size=(len(LENGTHS), tower.width))

    @jax.jit
    def both(params, tokens):
        def total(params):
            features, _ = tower.apply(params, {}, tokens)
            return (features * weights).sum(), features

        return jax.grad(total, has_aux=True)(params)

    grads, features = both(params, tokens)
    return features, grads


@pytest.mark.parametrize("pad", [0, EOT])
@pytest.mark.parametrize("slots", [8, 11, 40])
def test_each_text_is_packed_once_whole_and_from_position_0(slots, pad):
    tokens = texts(pad)
    packed = pack(tokens, slots)
    ends = zip(*divmod(packed.ends[0], slots), LENGTHS, tokens, strict=True)
    used = np.zeros(packed.tokens.shape, int)
    texts_of_row = [set() for _ in used]
    for row, end, length, text in ends:
        where = slice(end + 1 - length, end + 1)
        np.testing.assert_array_equal(packed.tokens[row, where], text[:length])
        np.testing.assert_array_equal(packed.positions[row, where], np.arange(length))
        (segment,) = set(packed.segments[row, where].tolist())
        assert segment > 0 and segment not in texts_of_row[row]
        texts_of_row[row].add(segment)
        used[row, where] += 1
    assert used.max() == 1 and used.sum() == sum(LENGTHS)
    assert not packed.segments[used == 0].any()
    # 33 ids; by hand: 8 | 7 1 | 5 3 | 4 3 | 2, then 8 3 | 7 4 | 5 3 2 1, then all.
    assert len(packed.tokens) == {8: 5, 11: 3, 40: 1}[slots]


@pytest.mark.parametrize(
    ("slots", "rows", "groups"),
    [(8, None, 1), (11, None, 2), (16, 4, 1), (40, 2, 1), (16, 3, 4), (8, None, 8)],
)
def test_packed_features_and_gradients_are_the_padded_ones(slots, rows, groups, x64):
    """Rows that stay free, free slots in rows, and neighbours change nothing."""
    tower = transformer(**TEXT, dtype=jnp.float64)
    params, tokens = parameters(tower), texts()
    want, want_grads = run(tower, params, tokens)
    # Texts differ: a wrong order would show.
    apart = np.abs(want[:, None] - want[None]).max(-1) + np.eye(len(want))
    assert apart.min() > 0.1
    packed = pack(tokens, slots, rows, groups)
    assert rows is None or packed.rows == rows
    got, grads = run(tower, params, packed)
    # Two float64 programs; numbers of size 1, gradients up to about 100.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    for a, b in zip(*map(jax.tree.leaves, (grads, want_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_what_lies_in_free_slots_changes_nothing():
    tower = transformer(**TEXT)
    params, packed = parameters(tower), pack(texts(), 12, 4)
    free = packed.segments == 0
    other = packed._replace(tokens=np.where(free, EOT, packed.tokens))
    assert free.sum() == 4 * 12 - sum(LENGTHS)
    apply = jax.jit(lambda x: tower.apply(params, {}, x)[0])
    np.testing.assert_array_equal(apply(packed), apply(other))


def test_a_two_tower_embeds_packed_texts_with_recomputation_and_in_bfloat16():
    for options in (dict(remat=True), dict(dtype=jnp.bfloat16)):
        tower = transformer(**TEXT, **options)
        model = make_two_tower(tower, tower, embed_dim=8)
        projection = np.random.default_rng(3).normal(size=(16, 8)).astype("f4")
        params = {"text": parameters(tower), "text_projection": projection}
        encode = jax.jit(lambda x, m=model, p=params: m.encode_text(p, {"text": {}}, x))
        got, want = encode(pack(texts(), 16))[0], encode(texts())[0]
        assert got.dtype == jnp.float32
        # Sums of as many numbers in another order: float32's or bfloat16's rounding.
        atol = 0.05 if "dtype" in options else 1e-5
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_a_text_longer_than_the_towers_context_gives_no_number():
    tower = transformer(**TEXT | dict(context_length=7))
    packed = pack(texts(), 16)
    features, _ = run(tower, parameters(tower), packed)
    # Nor do those that share its row: what is masked is multiplied by 0.
    row = packed.ends[0] // 16
    lost = row == row[LENGTHS.index(8)]
    assert 0 < lost.sum() < len(LENGTHS)
    np.testing.assert_array_equal(np.isnan(features).all(1), lost)
    assert np.isfinite(features[~lost]).all()


def test_texts_that_do_not_fit_are_told():
    with pytest.raises(InputError, match="slots must hold the longest text.*7.*8 ids"):
        pack(texts(), 7)
    with pytest.raises(InputError, match="rows must hold all texts.*2 rows.*3 are nee"):
        pack(texts(), 11, 2)
    with pytest.raises(InputError, match="groups must divide.*3 for 8"):
        pack(texts(), 11, groups=3)


def test_a_tower_that_sees_padding_refuses_packed_texts():
    tower = transformer(**TEXT, causal=False)
    with pytest.raises(ValueError, match="packed texts.*causal=False"):
        jax.eval_shape(tower.apply, parameters(tower), {}, pack(texts(), 11))
