"""Which captions are equal, told to the devices in numbers."""

import hashlib
from collections.abc import Sequence

import numpy as np

from unicl_jax.data.tokenizer import clean_text


def caption_lanes(texts: Sequence[str]) -> np.ndarray:
    """Captions as pairs of numbers, equal where the captions are.

    Captions are compared as the text tower sees them, but for its length: mended and
    unescaped, white space single, in lower case (`tokenizer.clean_text`). The first
    number is in [-2^31, -2], so that no caption is NO_LABEL or a concept. A pair is a
    hash of 63 bits, the same on every process and machine: that two different ones
    among B captions get the same has a probability of at most B^2 / 2^64, which is
    2^-32 at 65,536.

    Args:
      texts: n captions.

    Returns:
      [n, 2] int32.
    """
    hashes = b"".join(
        hashlib.blake2b(text.encode(), digest_size=8).digest()
        for text in map(clean_text, texts)
    )
    lanes = np.frombuffer(hashes, "<i4").reshape(-1, 2).astype(np.int32)
    lanes[:, 0] = np.minimum(lanes[:, 0] | np.int32(-(2**31)), -2)
    return lanes
