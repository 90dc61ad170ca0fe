"""Which rows are positives: counted by sorting, and by hand."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax.data.captions import caption_lanes
from unicl_jax.losses import NO_LABEL, positive_mask
from unicl_jax.objectives.positives import figures, group_sizes, identities

BATCH = 32


def make_batch(seed=0, captions=20):
    """Labelled rows and captions, some of both equal, in any order."""
    rng = np.random.default_rng(seed)
    label = np.full(BATCH, NO_LABEL, np.int32)
    label[captions:] = rng.integers(0, 5, BATCH - captions)
    lanes = np.full((BATCH, 2), NO_LABEL, np.int32)
    lanes[:captions] = caption_lanes(
        [f"a caption {i}" for i in rng.integers(0, 12, captions)]
    )
    order = rng.permutation(BATCH)
    return dict(label=label[order], caption=lanes[order])


def by_hand(batch, by_text):
    """Each row's positives, as a mask."""
    label, caption = batch["label"], batch["caption"]
    same = (label[:, None] == label) & (label != NO_LABEL)
    if by_text:
        captions = (label[:, None] == NO_LABEL) & (label == NO_LABEL)
        same |= captions & (caption[:, None] == caption).all(-1)
    return same | np.eye(BATCH, dtype=bool)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_group_sizes_are_counts_of_equal_rows(seed, lanes):
    x = np.random.default_rng(seed).integers(-2, 3, (50, lanes), np.int32)
    want = (x[:, None] == x).all(-1).sum(1)
    np.testing.assert_array_equal(group_sizes(x), want)
    assert want.max() > 1


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("captions", [0, 20, BATCH])
def test_the_figures_are_of_the_global_batch(by_text, devices, captions, make_mesh):
    rows = NamedSharding(make_mesh(devices), PartitionSpec("data"))
    counted = jax.jit(figures, static_argnums=1)
    for seed in range(3):
        batch = make_batch(seed, captions)
        got = counted(jax.device_put(batch, rows), by_text)
        want = by_hand(batch, by_text).sum(1).mean()
        np.testing.assert_allclose(got["positives_per_row"], want, rtol=1e-6)
        is_caption = batch["label"] == NO_LABEL
        twice = by_hand(batch, True).sum(1)[is_caption] > 1
        want = twice.mean() if captions else 0
        np.testing.assert_allclose(got["duplicate_captions"], want, rtol=1e-6)
        assert (0 < want < 1) == (captions > 0)


def test_without_captions_labels_are_counted_and_nothing_else():
    label = np.array([3, NO_LABEL, 3, NO_LABEL, 0], np.int32)
    for by_text in (False, True):
        assert figures(dict(label=label), by_text).keys() == {"positives_per_row"}
        got = figures(dict(label=label), by_text)["positives_per_row"]
        np.testing.assert_allclose(got, (2 + 2 + 1 + 1 + 1) / 5, rtol=1e-6)


@pytest.mark.parametrize("by_text", [False, True])
def test_rows_of_equal_identities_are_the_losses_positives(by_text):
    batch = make_batch()
    lanes = identities(batch, by_text)
    assert lanes.shape == ((BATCH, 2) if by_text else (BATCH,))
    mask = positive_mask(lanes, lanes)
    np.testing.assert_array_equal(mask, by_hand(batch, by_text))
