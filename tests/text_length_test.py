"""Fewer slots for the same embeddings: cut, packed, and equal on all processes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax import sharding
from unicl_jax.data import text_length
from unicl_jax.data.text_length import TEXT_LENGTHS, cut, few_sizes, make_text_length
from unicl_jax.encoders import transformer
from unicl_jax.errors import InputError

LENGTH, EOT = 40, 31
TEXT = dict(
    vocab_size=32, context_length=LENGTH, width=16, num_heads=2, num_layers=2, eps=1e-5
)


def texts(count=16, longest=21, seed=0):
    """[count, LENGTH] int32 of 2 to `longest` ids, the first one the longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    lengths[0] = longest
    tokens = rng.integers(1, EOT, (count, LENGTH))
    tokens[np.arange(LENGTH) >= lengths[:, None] - 1] = EOT
    return tokens.astype(np.int32)


def fitted(how, tokens, groups=1):
    how = TEXT_LENGTHS[how]
    prepared = how.prepare(tokens, groups)
    return how.fit(prepared, how.size(prepared))


@pytest.mark.parametrize("how", ["bucket", "pack"])
@pytest.mark.parametrize("groups", [1, 4])
def test_embeddings_and_gradients_are_those_of_all_slots(how, groups, x64):
    tower = transformer(**TEXT, dtype=jnp.float64)
    rng = np.random.default_rng(1)
    shapes, _ = jax.eval_shape(tower.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape), shapes)
    weights = rng.normal(size=(16, 16))

    @jax.jit
    def run(params, tokens):
        def total(params):
            features = tower.apply(params, {}, tokens)[0]
            return (features * weights).sum(), features

        return jax.grad(total, has_aux=True)(params)

    want = run(params, texts())
    short = fitted(how, texts(), groups)
    assert jax.tree.leaves(short)[0].size < texts().size
    # Another order of float64 sums; features of size 1, gradients up to 100.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10),
        run(params, short),
        want,
    )


@pytest.mark.parametrize("longest, slots", [(2, 16), (16, 16), (17, 32), (40, 40)])
def test_a_cut_leaves_the_longest_text_whole(longest, slots):
    tokens = texts(longest=longest)
    short = cut(tokens)
    np.testing.assert_array_equal(short, tokens[:, :slots])
    assert (short == EOT).any(1).all()
    np.testing.assert_array_equal(cut(tokens, 40), tokens)  # another process has more


def test_no_texts_are_cut_to_no_texts():
    assert cut(texts()[:0]).shape == (0, 16)


def test_sizes_are_few_and_not_much_larger():
    sizes = [few_sizes(n) for n in range(1, 1025)]
    for n, size in enumerate(sizes, 1):
        assert n <= size < n * 9 / 8 or n == size
    assert len(set(sizes)) == 16 + 6 * 8
    assert sizes == sorted(sizes) and few_sizes(0) == 0


def test_a_pack_has_a_group_a_device_and_a_size_of_few():
    tokens = texts(256, 40)
    prepared = TEXT_LENGTHS["pack"].prepare(tokens, 2)
    packed = fitted("pack", tokens, 2)
    assert packed.ends.shape == (2, 128)
    assert packed.rows == few_sizes(prepared.rows) > 16
    assert packed.tokens.shape == (2 * packed.rows, text_length.PACK_SLOTS)


def test_packed_texts_stay_on_their_devices(make_mesh):
    """Nothing travels between the devices that hold a group each."""
    mesh, tower = make_mesh(4), transformer(**TEXT)
    whole, rows = sharding.replicated(mesh), sharding.over_batch(mesh)
    params, _ = jax.jit(tower.init)(jax.random.key(0))
    packed = sharding.global_batch(mesh, dict(x=fitted("pack", texts(64), 4)))["x"]
    run = jax.jit(
        lambda p, x: tower.apply(p, {}, x)[0],
        in_shardings=(whole, rows),
        out_shardings=rows,
    )
    program = run.lower(params, packed).compile().as_text()
    for transfer in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert transfer not in program
    got = run(params, packed)
    want = jax.jit(lambda p, x: tower.apply(p, {}, x)[0])(params, texts(64))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how, theirs, sizes",
    [("bucket", (3, 40, 3, 3), (16, 40, 16)), ("pack", (3, 17, 1, 1), (3, 18, 1))],
)
def test_a_batch_has_the_shape_that_the_fullest_process_needs(
    how, theirs, sizes, make_mesh, monkeypatch
):
    """One process here, told that there are two; `theirs` are the other's sizes."""
    others = iter(theirs)

    def put(mesh, local):
        mine = sharding.global_batch(mesh, local)["size"]
        return dict(size=jnp.maximum(mine, next(others)))

    monkeypatch.setattr(text_length.jax, "process_count", lambda: 2)
    fake = types.SimpleNamespace(global_batch=put, replicated=sharding.replicated)
    monkeypatch.setattr(text_length, "sharding", fake)
    way, mesh = TEXT_LENGTHS[how], make_mesh(8)
    given = [
        dict(number=i, tokens=way.prepare(texts(64, longest), 8))
        for i, longest in enumerate((9, 30, 14, 2))
    ]
    if how == "pack":
        assert [batch["tokens"].rows for batch in given] == [1, 2, 1, 1]
    ready = text_length.in_equal_shapes(iter(given), way, mesh)
    for i, (batch, size) in enumerate(zip(ready, sizes, strict=False)):
        assert batch["number"] == i
        if how == "bucket":
            assert batch["tokens"].shape == (64, size)
        else:
            assert batch["tokens"].rows == size
        want = way.fit(given[i]["tokens"], size)
        for a, b in zip(*map(jax.tree.leaves, (batch["tokens"], want)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("how", ["bucket", "pack"])
@pytest.mark.parametrize("text", [dict(causal=False), dict(width=768)])
def test_a_tower_that_sees_padding_must_see_it(how, text):
    with pytest.raises(InputError, match=f'text_length="{how}" needs a causal.*"full"'):
        make_text_length(how, text)
    assert make_text_length("full", text) is TEXT_LENGTHS["full"]


def test_an_unknown_way_is_told():
    with pytest.raises(InputError, match="data.text_length.*bucket"):
        make_text_length("buckets", dict(causal=True))
