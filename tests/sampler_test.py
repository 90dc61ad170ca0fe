"""The order of records: exact shares, every record once an epoch, no state."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from unicl_jax.data.permutation import hash_bits, permute, permute_each
from unicl_jax.data.sampler import MIXTURES, Sampler, SourceInfo
from unicl_jax.errors import InputError

LABEL, TEXT = "image_label", "image_text"
# Lengths and weights that divide neither each other nor the batch.
SOURCES = (
    SourceInfo("animals", LABEL, 101, 2.0),
    SourceInfo("things", LABEL, 37, 0.7),
    SourceInfo("captions", TEXT, 53, 1.0),
    SourceInfo("alt texts", TEXT, 211, 0.5),
)


def sampler(mixture="balanced", batch_size=32, seed=0, sources=SOURCES):
    return Sampler(sources, batch_size, mixture, seed)


def rows_of(plan, source):
    return plan.index[plan.source == source]


# --- Permutations.


@pytest.mark.parametrize(
    "length", [*range(1, 34), 100, 255, 256, 257, 1000, 4096, 5127]
)
def test_permute_is_a_bijection(length):
    image = permute(np.arange(length), length, 7, 1)
    assert image.dtype == np.int64
    np.testing.assert_array_equal(np.sort(image), np.arange(length))


def test_permute_moves_a_position_of_a_huge_source_without_a_table():
    length = 10**12
    image = permute(np.arange(1000), length, 3)
    assert len(np.unique(image)) == 1000
    # Uniform in [0, length): the mean of 1,000 has a spread of 0.009 of the length.
    assert abs(image.mean() / length - 0.5) < 0.05


def test_permute_depends_on_every_key_and_their_order():
    images = [
        permute(np.arange(50), 50, *keys).tolist()
        for keys in [(0, 1), (1, 0), (0, 2), (2, 1), (0,), (0, 1, 0)]
    ]
    assert len({tuple(image) for image in images}) == len(images)


def test_permute_has_no_bias_by_position():
    """Over many keys each position goes everywhere equally often."""
    images = np.array([permute(np.arange(8), 8, key) for key in range(4000)])
    counts = np.array([np.bincount(column, minlength=8) for column in images.T])
    # 64 counts of mean 500, spread 21: 5 spreads is one in a million.
    assert np.abs(counts - 500).max() < 5 * 21


def test_rows_may_have_lengths_and_keys_of_their_own():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([np.arange(1, 301), rng.integers(1, 2**40, 100)])
    positions, keys = rng.integers(0, lengths), rng.integers(-9, 2**40, 400)
    images = permute_each(positions, lengths, 7, keys, 3)
    assert images.dtype == np.int64
    rows = zip(positions.tolist(), lengths.tolist(), keys.tolist(), strict=True)
    assert images.tolist() == [
        int(permute(np.array([at]), length, 7, key, 3)[0]) for at, length, key in rows
    ]


def test_hash_bits_are_the_numbers_they_were():
    """A new version of this code must not change the order of a run in progress."""

    # By another program: SplitMix64's finaliser over Python's integers.
    def by_hand(*keys):
        state, mask = 0x243F6A8885A308D3, (1 << 64) - 1
        for key in keys:
            state = (state + 0x9E3779B97F4A7C15 + (key & mask)) & mask
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
            state ^= state >> 31
        return state

    for keys in [(0,), (1, 2, 3), (-1, 2**40)]:
        assert int(hash_bits(*keys)) == by_hand(*keys)


# --- Epochs.


def test_each_record_comes_once_an_epoch():
    """After n rows of a source of length L, each came n // L times or once more."""
    one = sampler(batch_size=24)
    seen = [np.zeros(source.length, int) for source in SOURCES]
    for step in range(60):
        plan = one.plan(step)
        for s, counts in enumerate(seen):
            np.add.at(counts, rows_of(plan, s), 1)
            drawn = counts.sum()
            assert drawn == one.drawn(step + 1)[s]
            assert counts.min() == drawn // SOURCES[s].length
            assert counts.max() == -(-drawn // SOURCES[s].length)
    assert all(counts.min() >= 1 for counts in seen)  # epochs ended
    epochs = one.epochs(60)
    assert epochs["things"] == pytest.approx(seen[1].sum() / 37)


def test_epochs_and_seeds_have_orders_of_their_own():
    def first_batch(epoch, seed):
        one = sampler("weights", 16, seed, [SourceInfo("only", TEXT, 64)])
        return frozenset(one.plan(4 * epoch).index.tolist())

    batches = [first_batch(epoch, seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len(set(batches)) == 4
    assert set(range(16)) not in batches


def test_sources_have_orders_of_their_own_whatever_their_names():
    sources = [SourceInfo(f"imagenet_{part}", LABEL, 40) for part in "ab"]
    plan = sampler("weights", 20, 0, sources).plan(0)
    assert set(rows_of(plan, 0)) != set(rows_of(plan, 1))


# --- Mixtures.


@pytest.mark.parametrize(
    "order",
    [
        (0, 1, 2, 3),
        (2, 0, 3, 1),
        (0, 2, 1, 3),
    ],
)
def test_balanced_is_half_and_half_in_every_batch(order):
    sources = [SOURCES[s] for s in order]
    one = sampler(sources=sources)
    labelled = np.array([source.kind == LABEL for source in sources])
    for step in range(100):
        assert labelled[one.plan(step).source].sum() == 16


def test_balanced_divides_a_kind_by_length_times_weight():
    shares = sampler().shares
    total = 101 * 2 + Fraction(37 * 7, 10)
    assert shares[0] == Fraction(101 * 2) / total / 2
    assert shares[1] == Fraction(37 * 7, 10) / total / 2
    assert shares[2] + shares[3] == Fraction(1, 2)


def test_proportional_is_by_length_times_weight():
    shares = sampler("proportional").shares
    assert shares[0] / shares[2] == Fraction(101 * 2, 53)
    assert sum(shares) == 1


def test_weights_are_the_shares_whatever_the_lengths():
    assert sampler("weights").shares == (
        Fraction(20, 42),
        Fraction(7, 42),
        Fraction(10, 42),
        Fraction(5, 42),
    )


@pytest.mark.parametrize("mixture", MIXTURES)
def test_totals_stay_within_a_row_of_the_share(mixture):
    one = sampler(mixture, batch_size=30)
    totals, most = np.zeros(4, int), one.most_rows()
    for step in range(200):
        counts = np.bincount(one.plan(step).source, minlength=4)
        assert counts.sum() == 30
        assert (counts <= most).all()
        totals += counts
        for total, share in zip(totals.tolist(), one.shares, strict=True):
            assert abs(total - share * 30 * (step + 1)) <= 1


# --- A pure function of (seed, step).


def test_a_plan_depends_on_seed_and_step_alone():
    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    first = sampler()
    later = first.plan(17)
    for step in (3, 0, 99):
        first.plan(step)
    assert same(later, first.plan(17))
    assert same(later, sampler().plan(17))
    assert not same(later, sampler().plan(18))
    assert not same(later, sampler(seed=1).plan(17))


def digest(one):
    """Of the plans of a few steps."""
    plans = hashlib.sha256()
    for step in (0, 1, 2, 17, 99, 1000, 123456):
        for part, dtype in zip(one.plan(step), ("<i8", "<i8", "<u4"), strict=True):
            plans.update(part.astype(dtype).tobytes())
    return plans.hexdigest()[:16]


def test_plans_are_those_of_runs_before_there_were_lanes():
    """Computed then: a run in progress must go on as it began."""
    found = [
        digest(sampler(m, size, seed))
        for m in MIXTURES
        for size, seed in [(32, 0), (30, 7)]
    ]
    assert found == [
        *("d75a8ad86b24368d", "9c35f88d756da7fd"),  # balanced
        *("33a4fa6119947311", "aeda9a6d31d214fc"),  # proportional
        *("313574490eab417d", "8f6d862e688ecd7a"),  # weights
    ]
    large = [SourceInfo("a", LABEL, 1281167), SourceInfo("b", TEXT, 10**9 + 7)]
    assert digest(sampler("balanced", 256, 3, large)) == "aa4c45da43eeb392"


def test_a_plan_shuffles_the_sources_and_seeds_every_row():
    plan = sampler().plan(5)
    assert (np.diff(plan.source) != 0).sum() > 8  # sorted, there would be 3 changes
    assert (plan.source != sampler().plan(6).source).any()
    seeds = np.concatenate([sampler().plan(step).seed for step in range(20)])
    assert seeds.dtype == np.uint32
    # Of 640 draws from 2^32 even one pair alike has a chance of 5e-5.
    assert len(np.unique(seeds)) == len(seeds)


# --- Wrong input.


def test_balanced_needs_both_kinds():
    with pytest.raises(InputError, match='balanced.*image_label; use "proportional"'):
        sampler(sources=SOURCES[:2])


def test_an_unknown_mixture_lists_the_choices():
    with pytest.raises(InputError, match='data.mixture.*"balanced"?.*proportional'):
        sampler("balance")


def test_a_source_with_less_than_a_row_a_batch_is_told():
    tiny = SourceInfo("tiny", LABEL, 1)
    with pytest.raises(InputError, match='"tiny".*batch_size 32; raise its weight'):
        sampler(sources=(*SOURCES, tiny))
