"""k nearest neighbours by cosine: what features tell with nothing trained."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from unicl_jax.errors import InputError, choose
from unicl_jax.evaluation.checks import checked, num_classes, same_size

TEMPERATURE = 0.07  # of the weighted vote
_VOTES = {"majority": False, "weighted": True}  # whether cosines count
_QUERIES, _BANK = 1024, 8192  # records of either side at a time


class Neighbours(NamedTuple):
    """The nearest training records of each record, nearest first."""

    rows: np.ndarray  # [n, k] int32
    similarity: np.ndarray  # [n, k] float32 cosine, in [-1, 1]


def nearest(bank: np.ndarray, queries: np.ndarray, k: int) -> Neighbours:
    """Finds the k records with the greatest cosine, exactly, in blocks.

    cos(a, b) = a . b / (|a| |b|); 0 where one of them is zero. Of equal cosines the
    earlier record is nearer.

    Args:
      bank: [m, D] finite float32, among which to look.
      queries: [n, D] finite float32.
      k: in [1, m].

    Returns:
      Rows of the bank and their cosines. No array of n m numbers is made.

    Raises:
      InputError: if k is not in [1, m].
    """
    if not 1 <= k <= len(bank):
        raise InputError(
            f"k of k-NN must be in [1, {len(bank)}], the training records: got {k}. "
            "Use a smaller one."
        )
    bank, queries = (jnp.asarray(x, jnp.float32) for x in (bank, queries))
    rows, similarity = _nearest(bank, queries, k=k)
    return Neighbours(np.asarray(rows), np.asarray(similarity))


def knn(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    *,
    k: int = 20,
    vote: str = "weighted",
    temperature: float = TEMPERATURE,
    classes: int | None = None,
) -> np.ndarray:
    """Lets the nearest training records vote for the class of each test record.

    score_c = sum_(j in the k nearest, y_j = c) w_j; majority: w_j = 1; weighted:
    w_j = exp(cos_j / temperature).

    Args:
      features: [m, D] finite, of the training set.
      labels: [m] integer in [0, K).
      test_features: [n, D] finite.
      k: how many vote; at most m.
      vote: "majority", as scikit-learn's `KNeighborsClassifier(metric="cosine")`; or
        "weighted".
      temperature: of the weighted vote, above 0.
      classes: K, if the labels do not tell.

    Returns:
      [n, K] float32 shares of the vote, which sum to 1; equal ones are best at the
      lowest class.

    Raises:
      InputError: where the arguments are not so.

    Source: Wu et al., Unsupervised feature learning via non-parametric instance
    discrimination, 2018, section 3.4; DINO (Caron et al., 2021) has k = 20 and
    temperature 0.07, too.
    """
    choose(_VOTES, vote, "a k-NN's vote")
    if not temperature > 0:
        raise InputError(f"temperature of k-NN must be above 0: got {temperature}.")
    ways = num_classes(classes, labels, np.zeros(0, int), False)
    features, labels = checked(features, labels, ways, False, "training")
    none = np.zeros(len(test_features), np.int32)
    test_features, _ = checked(test_features, none, ways, False, "test")
    same_size(test_features, features, "test")
    rows, similarity = nearest(features, test_features, k)
    if vote == "majority":
        weights = np.ones_like(similarity)
    else:  # of the nearest 1, so that nothing overflows
        weights = np.exp((similarity - similarity[:, :1]) / temperature)
    scores = np.zeros((len(rows), ways), np.float32)
    np.add.at(scores, (np.arange(len(rows))[:, None], labels[rows]), weights)
    return scores / scores.sum(1, keepdims=True)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(bank, queries, *, k):
    count, total = len(queries), len(bank)
    block, part = min(_QUERIES, count), min(_BANK, total)

    def unit(x):
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return x / jnp.where(norm == 0, 1, norm)

    def padded(x, size):
        return jnp.pad(x, ((0, -len(x) % size), (0, 0)))

    blocks = rearrange(padded(unit(queries), block), "(i b) d -> i b d", b=block)
    parts = rearrange(padded(unit(bank), part), "(i b) d -> i b d", b=part)

    def of_block(block):
        def look(best, part_and_first):
            part, first = part_and_first
            rows = first + jnp.arange(len(part), dtype=jnp.int32)
            found = jnp.matmul(block, part.T, precision=lax.Precision.HIGHEST)
            found = jnp.where(rows < total, found, -jnp.inf)
            # Earlier parts come first, and the first of equals wins.
            similarity = jnp.concatenate([best[0], found], 1)
            rows = jnp.concatenate(
                [best[1], jnp.broadcast_to(rows, found.shape)], axis=1
            )
            similarity, place = lax.top_k(similarity, k)
            return (similarity, jnp.take_along_axis(rows, place, 1)), None

        start = (
            jnp.full((len(block), k), -jnp.inf),
            jnp.zeros((len(block), k), jnp.int32),
        )
        firsts = jnp.arange(len(parts), dtype=jnp.int32) * part
        return lax.scan(look, start, (parts, firsts))[0]

    similarity, rows = lax.map(of_block, blocks)
    return (
        rearrange(rows, "i b k -> (i b) k")[:count],
        rearrange(similarity, "i b k -> (i b) k")[:count],
    )
