"""Logistic regression by L-BFGS, with many penalties at once.

Logits are linear in the weights, so that a line search needs no product with the
features: after the one along the direction it is a search in one dimension over known
logits. A step of all penalties is one product forwards and one backwards.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

_HIGHEST = lax.Precision.HIGHEST
_MEMORY = 10  # pairs of steps and gradients kept, as SciPy does
_SLOPE = 0.5  # of the first, at which a line search is content
_TRIALS = 30  # of a line search


class Logistic(NamedTuple):
    """Fitted models, one a penalty."""

    weights: jax.Array  # [settings, K, D]
    bias: jax.Array  # [settings, K]
    iterations: np.ndarray  # [settings] int32
    gradient: np.ndarray  # [settings] greatest entry, at the end

    def __call__(self, features: jax.Array) -> jax.Array:
        """The logits [n, settings, K] of features [n, D]."""
        flat = rearrange(self.weights, "s k d -> (s k) d")
        logits = jnp.matmul(features, flat.T, precision=_HIGHEST)
        return rearrange(logits, "n (s k) -> n s k", s=len(self.weights)) + self.bias


def fit(
    features: np.ndarray,
    targets: np.ndarray,
    costs: np.ndarray,
    *,
    binary: bool = False,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Logistic:
    """Minimises the cross-entropy with an L2 penalty, for several penalties at once.

    C sum_i loss(W x_i + b, y_i) + |W|^2 / 2; the bias is free, as scikit-learn has it.

    Args:
      features: [n, D] finite. They are centred and brought to a mean variance of 1 on
        the way, which the bias and the penalty make up for: the minimum is the same.
      targets: [n, K], 0 or 1: one 1 a row, unless binary.
      costs: C of each setting, above 0.
      binary: whether each column is a question of its own, with a logistic loss.
      max_iterations: at most so many.
      tolerance: of the greatest entry of the gradient of the whole over C n.

    Returns:
      The models, as of the features given.

    Source: Liu and Nocedal, On the limited memory BFGS method, 1989; the penalty as
    scikit-learn's `LogisticRegression`.
    """
    features = jnp.asarray(features, jnp.float32)
    mean = features.mean(0)
    spread = jnp.sqrt(jnp.mean((features - mean) ** 2))
    spread = jnp.where(spread > 0, spread, 1.0)
    penalty = 1 / (np.asarray(costs, np.float64) * len(features))
    # What becomes NaN or 0 in float32 is no penalty that it could tell from the next.
    penalty = jnp.asarray(np.clip(penalty, 1e-30, 1e30), jnp.float32)
    weights, bias, iterations, gradient = _fit(
        (features - mean) / spread,
        jnp.asarray(targets, jnp.float32),
        penalty / spread**2,
        jnp.zeros((len(penalty), np.shape(targets)[1], features.shape[1] + 1)),
        binary=binary,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    weights = weights / spread
    bias = bias - jnp.einsum("skd,d->sk", weights, mean, precision=_HIGHEST)
    return Logistic(weights, bias, np.asarray(iterations), np.asarray(gradient))


@functools.partial(jax.jit, static_argnames=("binary", "max_iterations", "tolerance"))
def _fit(x, y, penalty, weights, *, binary, max_iterations, tolerance):
    (n, dim), settings = x.shape, len(penalty)
    penalty = penalty[:, None, None]
    # Weights and bias are one array [settings, K, D + 1].
    free = jnp.arange(dim + 1) == dim
    x = jnp.concatenate([x, jnp.ones((n, 1))], 1)

    def along(direction):
        """The change of the logits [n, settings, K] for a step of 1."""
        flat = rearrange(direction, "s k d -> (s k) d")
        change = jnp.matmul(x, flat.T, precision=_HIGHEST)
        return rearrange(change, "n (s k) -> n s k", s=settings)

    def chances(logits):
        return jax.nn.sigmoid(logits) if binary else jax.nn.softmax(logits)

    def gradient_of(weights, logits):
        excess = rearrange((chances(logits) - y[:, None]) / n, "n s k -> (s k) n")
        product = jnp.matmul(excess, x, precision=_HIGHEST)
        product = rearrange(product, "(s k) d -> s k d", s=settings)
        return product + penalty * jnp.where(free, 0.0, weights)

    def slope(step, logits, change, quadratic):
        """First and second derivative along the direction, [settings]."""
        p = chances(logits + step[:, None] * change)
        first = ((p - y[:, None]) * change).sum((0, 2)) / n
        if binary:
            second = (p * (1 - p) * change**2).sum((0, 2)) / n
        else:
            mean = (p * change).sum(-1, keepdims=True)
            second = (p * (change - mean) ** 2).sum((0, 2)) / n
        return first + quadratic[0] + step * quadratic[1], second + quadratic[1]

    def line_search(logits, change, weights, direction, steep):
        """A step at which the slope, `steep` at 0, is nearly gone: [settings]."""
        inner = penalty * jnp.where(free, 0.0, direction)
        quadratic = (inner * weights).sum((1, 2)), (inner * direction).sum((1, 2))

        def going(search):
            return (search[0] < _TRIALS) & ~search[-1].all()

        def trial(search):
            count, step, low, high, done = search
            first, second = slope(step, logits, change, quadratic)
            content = jnp.abs(first) <= _SLOPE * jnp.abs(steep)
            low = jnp.where(first < 0, step, low)
            high = jnp.where(first < 0, high, step)
            # Newton's, unless it leaves what is known to hold the minimum.
            newton = step - first / jnp.maximum(second, 1e-30)
            wide = jnp.where(jnp.isinf(high), 2 * step, (low + high) / 2)
            limit = jnp.where(jnp.isinf(high), 10 * step, high)
            inside = (newton > low) & (newton < limit)
            further = jnp.where(inside, newton, wide)
            done = done | content
            return count + 1, jnp.where(done, step, further), low, high, done

        ones = jnp.ones(settings)
        start = 0, ones, 0 * ones, jnp.inf * ones, steep >= 0
        return lax.while_loop(going, trial, start)[1]

    def dot(a, b):
        return (a * b).sum((-2, -1))

    def direction_of(gradient, steps, changes, inverse, newest):
        """Minus the inverse Hessian times the gradient, by the two loops."""
        order = (newest - jnp.arange(_MEMORY)) % _MEMORY

        def back(q, i):
            a = inverse[i] * dot(steps[i], q)
            return q - a[:, None, None] * changes[i], a

        q, a = lax.scan(back, gradient, order)
        curvature = dot(changes[newest], changes[newest]) * inverse[newest]
        q = q / jnp.where(curvature > 0, curvature, 1.0)[:, None, None]

        def forth(q, i_and_a):
            i, a = i_and_a
            b = inverse[i] * dot(changes[i], q)
            return q + (a - b)[:, None, None] * steps[i], None

        q, _ = lax.scan(forth, q, (order[::-1], a[::-1]))
        return -q

    def going(state):
        count, _, _, gradient, *_ = state
        return (count < max_iterations) & (size(gradient) > tolerance).any()

    def size(gradient):
        return jnp.abs(gradient).max((1, 2))

    def iteration(state):
        count, weights, logits, gradient, history, iterations, alive = state
        newest = (count - 1) % _MEMORY
        alive = alive & (size(gradient) > tolerance)
        direction = direction_of(gradient, *history, newest)
        steep = dot(direction, gradient)
        # Where round-off has spoilt it, downhill.
        bad = ~(steep < 0)[:, None, None]
        direction = jnp.where(bad, -gradient, direction)
        direction = jnp.where(alive[:, None, None], direction, 0.0)
        steep = dot(direction, gradient)
        change = along(direction)
        step = line_search(logits, change, weights, direction, steep)[:, None, None]
        moved = weights + step * direction
        logits = logits + step[:, :, 0] * change
        new = gradient_of(moved, logits)
        s, y_ = step * direction, new - gradient
        product = dot(s, y_)
        useful = product > 1e-10 * dot(y_, y_)
        inverse = jnp.where(useful, 1 / jnp.where(useful, product, 1.0), 0.0)
        place = count % _MEMORY
        history = tuple(
            old.at[place].set(new)
            for old, new in zip(history, (s, y_, inverse), strict=True)
        )
        return count + 1, moved, logits, new, history, iterations + alive, alive

    logits = along(weights)
    past = jnp.zeros((_MEMORY, *weights.shape))
    state = (
        0,
        weights,
        logits,
        gradient_of(weights, logits),
        (past, past, jnp.zeros((_MEMORY, settings))),
        jnp.zeros(settings, jnp.int32),
        jnp.ones(settings, bool),
    )
    _, weights, _, gradient, _, iterations, _ = lax.while_loop(going, iteration, state)
    return weights[..., :-1], weights[..., -1], iterations, size(gradient)
