"""Features of real images for tests of probes: projections of Fashion-MNIST."""

import functools

import numpy as np

from unicl_jax.data import quickstart


@functools.cache
def fashion(records, test, dim):
    """Features and labels to learn from, features and labels to test on."""
    project = np.random.default_rng(0).normal(size=(32 * 32, dim)) / 32
    sets = []
    for part, count in (("train", records), ("test", test)):
        found = quickstart.fashion_mnist(part)
        pixels = found.images[:count, :, :, 0].reshape(count, -1) / 255
        sets += [(pixels @ project).astype(np.float32), found.labels[:count]]
    return sets


def several(labels):
    """Two labels a record: the class, and whether it is even."""
    return np.eye(12, dtype=int)[labels] + np.eye(12, dtype=int)[10 + labels % 2]
