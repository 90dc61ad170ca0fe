"""Linear heads on fixed features, one a setting, trained together.

All settings see the same batches, so that a step of all of them is one product with
their weights side by side, and the batch's normalisation is done once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

_HIGHEST = lax.Precision.HIGHEST
_EPSILON = 1e-5  # of the batch norm
_BATCH_NORM_MOMENTUM = 0.1  # the share of a new batch in its running statistics
_ROWS = 2048  # held-out records scored at a time
_OVERFLOW = 100.0  # exp(100) is past what float32 holds, from whatever start


class Heads(NamedTuple):
    """Linear heads behind a batch norm without scale and offset, which they share."""

    weights: jax.Array  # [settings, K, D]
    bias: jax.Array  # [settings, K]
    mean: jax.Array  # [D] running
    variance: jax.Array  # [D] running

    def __call__(self, features: jax.Array, scale: float = 1.0) -> jax.Array:
        """The logits [n, settings, K] of features [n, D]."""
        normal = (features - self.mean) * lax.rsqrt(self.variance + _EPSILON)
        return _logits(normal, self.weights, self.bias, scale)


class Trained(NamedTuple):
    """Heads after the last epoch, and what they did on held-out records after each."""

    heads: Heads
    hits: np.ndarray  # [epochs, settings, K] int32: records of each class, told right
    finite: np.ndarray  # [epochs, settings]: whether all logits were numbers
    logits: np.ndarray | None  # [epochs, settings, n, K], if wanted


def batches(
    records: int, epochs: int, batch_size: int, seed: int | np.random.Generator
) -> np.ndarray:
    """A new order of the records for each epoch, in batches.

    Args:
      records: at least 2.
      epochs: how many.
      batch_size: at least 2; the last batch of an epoch may have fewer, and is left out
        if it has one, which has no variance.
      seed: of the orders.

    Returns:
      [epochs, steps, min(batch_size, records)] int32 rows, -1 where a batch has fewer.
    """
    rng = np.random.default_rng(seed)
    batch_size = min(batch_size, records)
    kept = records - (records % batch_size == 1)
    steps = -(-kept // batch_size)
    order = np.full((epochs, steps * batch_size), -1, np.int32)
    for epoch in order:
        epoch[:kept] = rng.permutation(records)[:kept]
    return order.reshape(epochs, steps, batch_size)


def random_start(ways: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [ways, dim] and bias [ways], uniform within 1/sqrt(dim), as PyTorch's."""
    rng, bound = np.random.default_rng(seed), dim**-0.5
    weights, bias = (rng.uniform(-bound, bound, x) for x in ((ways, dim), ways))
    return weights.astype(np.float32), bias.astype(np.float32)


def overflows(
    learning_rate: float, weight_decay: float, momentum: float, steps: int
) -> bool:
    """Whether weight decay alone takes SGD past float32 within so many steps.

    Without a gradient w' = w - lr v', v' = momentum v + decay w: it grows by the larger
    root of z^2 - (1 + momentum - lr decay) z + momentum = 0 at each step. The gradient
    of a cross-entropy is bounded and cannot hold that back.

    Args:
      learning_rate: of SGD.
      weight_decay: coupled, as PyTorch's SGD has it.
      momentum: without Nesterov.
      steps: how many.

    Returns:
      Whether the weights surely end in NaN, so that nobody need train them.
    """
    middle = 1 + momentum - learning_rate * weight_decay
    growth = max(abs(np.roots([1, -middle, momentum])))
    return bool(steps * np.log(max(growth, 1.0)) > _OVERFLOW)


def train(
    features: jax.Array,
    labels: jax.Array,
    held_features: jax.Array,
    held_labels: jax.Array,
    start: tuple[np.ndarray, np.ndarray],
    learning_rates: np.ndarray,
    weight_decays: np.ndarray,
    order: np.ndarray,
    *,
    momentum: float = 0.9,
    scale: float = 1.0,
    want_logits: bool = False,
    group: int | None = None,
) -> Trained:
    """Trains one head a setting by SGD, and scores all of them after every epoch.

    logits = scale (W x^ + b), x^ the batch-normalised features; loss: the mean
    cross-entropy, or for labels [n, K] the mean binary cross-entropy over records and
    classes; v' = momentum v + gradient + decay w, w' = w - lr v', the bias, too.

    Args:
      features: [n, D] float32, to train on.
      labels: [n] integer in [0, K), or [n, K] of 0 and 1.
      held_features: [m, D] float32, to score on.
      held_labels: as `labels`, of m records.
      start: weights [K, D] and bias [K], of every setting.
      learning_rates: [settings] float32.
      weight_decays: [settings] float32.
      order: [epochs, steps, B] rows, as of `batches`.
      momentum: of SGD, without Nesterov.
      scale: of the logits.
      want_logits: whether the held-out logits after every epoch come back.
      group: how many settings train together at most; a last group of fewer is filled
        up, for another size would be another program to compile.

    Returns:
      The heads and their scores, in the order of the settings.
    """
    ways, dim = start[0].shape
    group = min(_at_once(ways, dim), group or len(learning_rates))
    parts = []
    for first in range(0, len(learning_rates), group):
        place = np.arange(first, first + group) % len(learning_rates)
        out = _train(
            features,
            labels,
            held_features,
            held_labels,
            tuple(jnp.asarray(x, jnp.float32) for x in start),
            jnp.asarray(np.asarray(learning_rates)[place], jnp.float32),
            jnp.asarray(np.asarray(weight_decays)[place], jnp.float32),
            jnp.asarray(order),
            momentum=momentum,
            scale=scale,
            want_logits=want_logits,
        )
        parts.append((out, len(learning_rates) - first))
    stacked = [
        np.concatenate([np.asarray(out[i])[:, :count] for out, count in parts], 1)
        for i in range(1, 4 if want_logits else 3)
    ]
    first = parts[0][0].heads
    weights, bias = (
        jnp.concatenate([out.heads[i][:count] for out, count in parts])
        for i in range(2)
    )
    heads = first._replace(weights=weights, bias=bias)
    return Trained(heads, *stacked, *([] if want_logits else [None]))


def _at_once(ways, dim):
    """How many settings train together: on a CPU as many as its caches hold."""
    budget = 2**21 if jax.default_backend() == "cpu" else 2**29
    return max(1, budget // (4 * ways * dim))


def _logits(normal, weights, bias, scale):
    """[n, D], [settings, K, D] and [settings, K] to [n, settings, K]."""
    flat = rearrange(weights, "s k d -> (s k) d")
    product = jnp.matmul(normal, flat.T, precision=_HIGHEST)
    product = rearrange(product, "n (s k) -> n s k", s=len(weights))
    return scale * (product + bias[None])


@functools.partial(jax.jit, static_argnames=("momentum", "scale", "want_logits"))
def _train(
    features,
    labels,
    held_features,
    held_labels,
    start,
    rate,
    decay,
    order,
    *,
    momentum,
    scale,
    want_logits,
):
    settings, (ways, dim) = len(rate), start[0].shape
    several = labels.ndim == 2
    rate, decay = rate[:, None], decay[:, None]

    def step(state, rows):
        weights, bias, weights_v, bias_v, mean, variance = state
        there = (rows >= 0).astype(jnp.float32)[:, None]
        count = there.sum()
        rows = jnp.maximum(rows, 0)
        x, y = features[rows], labels[rows]
        batch_mean = (there * x).sum(0) / count
        centred = there * (x - batch_mean)
        batch_variance = (centred**2).sum(0) / count
        normal = centred * lax.rsqrt(batch_variance + _EPSILON)

        logits = _logits(normal, weights, bias, scale)
        if several:
            excess = (jax.nn.sigmoid(logits) - y[:, None]) / ways
        else:
            right = jax.nn.one_hot(y, ways, dtype=jnp.float32)
            excess = jax.nn.softmax(logits) - right[:, None]
        excess *= scale * there[..., None] / count
        flat = rearrange(excess, "b s k -> (s k) b")
        gradient = jnp.matmul(flat, normal, precision=_HIGHEST)
        gradient = rearrange(gradient, "(s k) d -> s k d", s=settings)

        weights_v = momentum * weights_v + gradient + decay[..., None] * weights
        bias_v = momentum * bias_v + excess.sum(0) + decay * bias
        share, unbiased = _BATCH_NORM_MOMENTUM, count / (count - 1)
        return (
            weights - rate[..., None] * weights_v,
            bias - rate * bias_v,
            weights_v,
            bias_v,
            (1 - share) * mean + share * batch_mean,
            (1 - share) * variance + share * unbiased * batch_variance,
        ), None

    def epoch(state, rows):
        state, _ = lax.scan(step, state, rows)
        weights, bias, _, _, mean, variance = state
        heads = Heads(weights, bias, mean, variance)
        scored = _score(heads, held_features, held_labels, scale, want_logits)
        return state, scored

    weights, bias = (jnp.repeat(x[None], settings, 0) for x in start)
    zeros = jnp.zeros_like
    state = weights, bias, zeros(weights), zeros(bias), jnp.zeros(dim), jnp.ones(dim)
    state, scored = lax.scan(epoch, state, order)
    weights, bias, _, _, mean, variance = state
    return Trained(Heads(weights, bias, mean, variance), *scored)


def _score(heads, features, labels, scale, want_logits):
    """Hits [settings, K], finite [settings], and if wanted logits [settings, n, K]."""
    records, block = len(features), min(_ROWS, len(features))
    blocks = -(-records // block)
    places = jnp.arange(blocks * block).reshape(blocks, block)

    def score(rows):
        there = rows < records
        rows = jnp.minimum(rows, records - 1)
        logits = heads(features[rows], scale)
        finite = jnp.isfinite(logits).all((0, 2))
        if labels.ndim == 2:
            hits = jnp.zeros(logits.shape[1:], jnp.int32)
        else:
            label = labels[rows]
            hit = (jnp.argmax(logits, -1) == label[:, None]) & there[:, None]
            class_of = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)
            # Whole numbers below 2^24: exact.
            hits = jnp.matmul(hit.T.astype(jnp.float32), class_of, precision=_HIGHEST)
            hits = hits.astype(jnp.int32)
        return hits, finite, logits if want_logits else None

    hits, finite, logits = lax.map(score, places)
    if want_logits:
        logits = rearrange(logits, "i b s k -> s (i b) k")[:, :records]
    return hits.sum(0), finite.all(0), logits
