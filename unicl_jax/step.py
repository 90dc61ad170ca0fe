"""The training state and the one compiled step: pure functions, no files, no clock."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unicl_jax import sharding
from unicl_jax.encoders import TwoTower
from unicl_jax.losses import NO_LABEL
from unicl_jax.objectives import Forward, Objective, positives


class TrainState(NamedTuple):
    """All that training carries from step to step, and all that is saved of it."""

    step: jax.Array  # int32 scalar: steps done, skipped updates among them
    params: Any
    model_state: Any  # batch-norm statistics; empty dicts for other towers
    opt_state: Any
    nonfinite: Any  # int32 scalars: updates skipped, "total" and "in_a_row"
    ema: Any = {}  # averages over steps of what learns; empty: none are kept


def averaged(state: TrainState) -> Any:
    """The parameters to evaluate and to use: their averages where those are kept.

    ema(0) = p(0); ema(t) = d ema(t - 1) + (1 - d) p(t), d = min(decay, t / (9 + t))

    Args:
      state: of the training.

    Returns:
      A tree as `state.params`; what does not learn is as it is. Batch norm's running
      statistics, averages themselves, are `state.model_state`, those of the training.

    Source: Polyak averaging; its warm-up as in TensorFlow's ExponentialMovingAverage,
      (1 + n) / (10 + n) after n updates.
    """
    return {**state.params, **state.ema}


def start_ema(state: TrainState) -> TrainState:
    """Averages of the parameters as they are: of a state whose were replaced.

    Args:
      state: before its first step.

    Returns:
      The state; as it was, if no averages are kept.
    """
    own = {name: state.params[name] for name in state.ema}
    return state._replace(ema=jax.tree.map(jnp.copy, own))


def _moved(ema, params, decay, step):
    """The average after an update; `step` counts those before it."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    # Of float32 this form keeps more than d a + (1 - d) b.
    return jax.tree.map(
        lambda a, b: a + (1 - decay).astype(a.dtype) * (b - a), ema, params
    )


# What fields hold in a run whose checkpoint is older than they are, of the others.
ADDED = {"nonfinite": lambda state: _none_skipped(), "ema": lambda state: {}}


def _none_skipped():
    return dict(total=jnp.int32(0), in_a_row=jnp.int32(0))


def init_state(
    model: TwoTower,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
    frozen: tuple[str, ...] = (),
    ema_decay: float = 0.0,
) -> TrainState:
    """The state before the first step; pure, to be run under `jit`.

    Args:
      model: the two towers.
      objective: whose own parameters, if it has some, join the towers'.
      optimizer: whose state it holds.
      seed: of the initial parameters.
      frozen: as for `make_train_step`.
      ema_decay: as for `make_train_step`.

    Returns:
      The state, at step 0.
    """
    key = jax.random.key(seed)
    params, model_state = model.init(key)
    if objective.init is not None:
        own = objective.init(jax.random.fold_in(key, 1), params)
        params = {**params, "objective": own}
    learning = _without(params, (*frozen, *objective.unused))
    opt_state = optimizer.init(learning)
    nonfinite = _none_skipped()
    ema = jax.tree.map(jnp.copy, learning) if ema_decay else {}
    return TrainState(jnp.int32(0), params, model_state, opt_state, nonfinite, ema)


def make_train_step(
    model: TwoTower,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    make_views: Callable,
    *,
    seed: int = 0,
    frozen: tuple[str, ...] = (),
    caption_identity: str = "row",
    mix: Callable | None = None,
    mesh: Mesh | None = None,
    micro_batches: int = 1,
    ema_decay: float = 0.0,
    max_nonfinite: int = 0,
) -> Callable:
    """Builds the train step: augment, embed, compare, update.

    Args:
      model: the two towers.
      objective: what is minimised, over the mesh that the step runs on.
      optimizer: the update rule.
      schedule: its learning rate, to be reported.
      make_views: (key, uint8 images) -> Views, as `augment.make_views` builds it.
      seed: of the augmentation and drop path; the step number is folded in.
      frozen: parts of the parameters, by name, that stay as they are, beside those that
        the objective does not use; a tower among them runs as in evaluation.
      caption_identity: "row": each caption is a positive of its own image alone;
        "text": equal captions are positives of each other.
      mix: (key, normalised images) -> Mixture, as `mix.make_mix` builds it; None:
        images stay whole.
      mesh: the devices, over which parameters may be divided; None: they are not.
      micro_batches: parts in which the towers embed the batch; see
        `losses.in_micro_batches`.
      ema_decay: of the parameters' averages; see `averaged`. 0: none are kept.
      max_nonfinite: steps in a row whose loss or gradient may be NaN or infinite: each
        is skipped, counted, and nothing but the counts and the step changes.

    Returns:
      `train_step(state, batch, step) -> (state, metrics)`. `batch` holds `image`
      [B, H, W, 3] uint8, `label` [B] int32 and `tokens` [B, L] int32; or `tokens`
      [T, L] and `text_index` [B] int32, row i's text being `tokens[text_index[i]]`, so
      that equal texts are encoded once. `caption` [B, 2] int32, where it is there, says
      which captions are equal. `step` is the number of the step the batch was
      drawn for: where it is not the state's own, or one more than `max_nonfinite` is
      not finite, the state stays as it was, step and counts included, and the metric
      `halted` is 1. A run that met NaN therefore still holds its last good state,
      however many steps were dispatched before the host saw it. `metrics` are float32
      scalars; `nonfinite` counts the skipped updates of the run.
    """

    def train_step(state, batch, step):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)

        def loss_fn(learning):
            params = sharding.gathered(mesh, {**state.params, **learning})
            forward = Forward(
                model,
                params,
                state.model_state,
                batch,
                make_views,
                keys,
                frozen,
                caption_identity,
                mix,
                micro_batches,
            )
            losses, metrics = objective.loss(forward)
            if forward.mixture is not None:
                metrics["own_share"] = forward.mixture.share.mean()
            return losses.mean(), (metrics, forward.state)

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        learning = _without(state.params, (*frozen, *objective.unused))
        (loss, (metrics, model_state)), grads = value_and_grad(learning)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        total, in_a_row = state.nonfinite["total"], state.nonfinite["in_a_row"]
        good = is_finite & (state.step == step)
        skipped = ~is_finite & (state.step == step) & (in_a_row < max_nonfinite)
        counts = dict(
            total=total + skipped,
            in_a_row=jnp.where(good, 0, in_a_row + skipped),
        )

        def update(state):
            updates, opt_state = optimizer.update(grads, state.opt_state, learning)
            new = optax.apply_updates(learning, updates)
            params, ema = {**state.params, **new}, state.ema
            if ema_decay:
                ema = _moved(ema, new, ema_decay, state.step - total)
            norm = jnp.float32(optax.tree.norm(updates))
            return state._replace(
                params=params, model_state=model_state, opt_state=opt_state, ema=ema
            ), norm

        scale = objective.logit_scale or model.logit_scale
        # What an objective says of its positives itself comes before it.
        metrics = positives.figures(batch, caption_identity == "text") | metrics
        metrics |= {
            "loss": loss,
            "label_share": (batch["label"] != NO_LABEL).mean(),
            "logit_scale": scale(state.params),
            "learning_rate": schedule(state.step - total),  # optax counts updates
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(state.params),
            "nonfinite": counts["total"],
            "halted": ~(good | skipped),
        }
        state, metrics["update_norm"] = _only_if(good, update, state)
        # Outside of the branch: all that a skipped update changes.
        state = state._replace(step=state.step + (good | skipped), nonfinite=counts)
        return state, {k: jnp.float32(v) for k, v in metrics.items()}

    return train_step


def _without(params, frozen):
    return {name: part for name, part in params.items() if name not in frozen}


def _only_if(good, update, state):
    """`update(state)` where good is true, else the state as it was and a norm of 0.

    A branch on CPUs, where a selection copies all of the state, a tenth of Swin-T's
    step. A selection elsewhere: a branch would make a GPU's host wait for gradients.
    """

    def leave(state):
        return state, jnp.float32(0)

    def branch(good, state):
        return jax.lax.cond(good, update, leave, state)

    def select(good, state):
        return jax.tree.map(
            lambda new, old: jnp.where(good, new, old), update(state), leave(state)
        )

    return jax.lax.platform_dependent(good, state, cpu=branch, default=select)
