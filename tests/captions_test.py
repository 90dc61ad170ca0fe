"""Captions as numbers: equal where the captions are, and never a label."""

import numpy as np
import pytest

from unicl_jax.data import captions
from unicl_jax.data.captions import caption_lanes


def same(a, b):
    first, second = caption_lanes([a, b])
    return (first == second).all()


def test_captions_are_compared_as_the_text_tower_sees_them():
    assert same("A dog", " a\tdog\n")
    assert same("caf\u00e9 &amp; bar", "cafe\u0301 & Bar")
    assert not same("a dog", "a dog.")
    assert not same("a dog", "a dogs")
    long = "word " * 500
    assert not same(long + "x", long + "y")  # beyond what a tower has slots for
    assert not same("\ud800 dog", "a dog")  # half a pair, which JSON lets in


def test_different_captions_differ_and_none_looks_like_a_label():
    lanes = caption_lanes([f"caption {i}" for i in range(100_000)])
    assert lanes.shape == (100_000, 2) and lanes.dtype == np.int32
    assert len(np.unique(lanes, axis=0)) == len(lanes)
    assert lanes[:, 0].max() <= -2
    # All bits are used: one lane alone collides as 31 bits do.
    assert 99_980 < len(np.unique(lanes[:, 0])) < 100_000
    assert lanes[:, 0].min() < -(2**31) + 2**17 and lanes[:, 1].max() > 2**31 - 2**17


def test_the_numbers_are_the_same_everywhere():
    """Processes of a run must agree, whatever machine and Python they have."""
    # BLAKE2b of "a dog" starts with fe02e666 5a225ac7; the lowest byte comes first.
    want = [[0x66E602FE - 2**31, 0xC75A225A - 2**32]]
    np.testing.assert_array_equal(caption_lanes(["A dog"]), want)


@pytest.mark.parametrize("byte", [b"\xff", b"\x00", b"\x7f"])
def test_no_hash_is_no_label(byte, monkeypatch):
    class Fixed:
        def __init__(self, *_, **__):
            pass

        def digest(self):
            return byte * 8

    monkeypatch.setattr(captions.hashlib, "blake2b", Fixed)
    assert -(2**31) <= caption_lanes(["any"])[0, 0] <= -2


def test_no_captions_are_no_rows():
    assert caption_lanes([]).shape == (0, 2)
