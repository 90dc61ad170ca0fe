"""The training state and the one compiled step: pure functions, no files, no clock."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unicl_jax.encoders import TwoTower
from unicl_jax.errors import choose
from unicl_jax.losses import NO_LABEL

# What a step minimises, as what becomes of the labels: CLIP is UniCL on captions alone.
OBJECTIVES = {
    "unicl": lambda labels: labels,
    "clip": lambda labels: jnp.full_like(labels, NO_LABEL),
}


class TrainState(NamedTuple):
    """All that training carries from step to step, and all that is saved of it."""

    step: jax.Array  # int32 scalar: how many updates were made
    params: Any
    model_state: Any  # batch-norm statistics; empty dicts for other towers
    opt_state: Any


def init_state(
    model: TwoTower, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step; pure, to be run under `jit`.

    Args:
      model: the two towers.
      optimizer: whose state it holds.
      seed: of the initial parameters.

    Returns:
      The state, at step 0.
    """
    params, model_state = model.init(jax.random.key(seed))
    return TrainState(jnp.int32(0), params, model_state, optimizer.init(params))


def make_train_step(
    model: TwoTower,
    loss_and_aux: Callable,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: Callable,
    *,
    objective: str = "unicl",
    seed: int = 0,
) -> Callable:
    """Builds the train step: augment, embed, compare, update.

    Args:
      model: the two towers.
      loss_and_aux: `unicl_loss_and_aux`, or `losses.sharded` of it over a mesh.
      optimizer: the update rule.
      schedule: its learning rate, to be reported.
      augment: (key, uint8 images) -> float images, normalised.
      objective: a name in OBJECTIVES.
      seed: of the augmentation and drop path; the step number is folded in.

    Returns:
      `train_step(state, batch, step) -> (state, metrics)`. `batch` holds `image`
      [B, H, W, 3] uint8, `label` [B] int32 and `tokens` [B, L] int32; or `tokens`
      [T, L] and `text_index` [B] int32, row i's text being `tokens[text_index[i]]`, so
      that equal texts are encoded once. `step` is the number of the step the batch was
      drawn for: where it is not the state's own, or a loss or gradient is not finite,
      the state stays as it was. A run that met NaN therefore still holds its last good
      state, however many steps were dispatched before the host saw it. `metrics` are
      float32 scalars.

    Raises:
      InputError: if there is no such objective.
    """
    relabel = choose(OBJECTIVES, objective, "objective")

    def train_step(state, batch, step):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
        labels = relabel(batch["label"])

        def loss_fn(params):
            images = augment(keys[0], batch["image"])
            u, model_state = model.encode_image(
                params, state.model_state, images, train=True, key=keys[1]
            )
            v, model_state = model.encode_text(
                params, model_state, batch["tokens"], train=True, key=keys[2]
            )
            if "text_index" in batch:
                v = v[batch["text_index"]]
            loss, aux = loss_and_aux(u, v, labels, model.logit_scale(params))
            return loss.mean(), (aux, model_state)

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (aux, model_state)), grads = value_and_grad(state.params)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (state.step == step)

        def update(state):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(updates)
            return TrainState(state.step + 1, params, model_state, opt_state), norm

        metrics = {
            "loss": loss,
            "excess": aux.excess.mean(),
            "per_image": aux.per_image.mean(),
            "per_text": aux.per_text.mean(),
            "positives_per_row": aux.num_positives.mean(),
            "label_share": (batch["label"] != NO_LABEL).mean(),
            "logit_scale": model.logit_scale(state.params),
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(state.params),
        }
        state, metrics["update_norm"] = _only_if(good, update, state)
        return state, {k: jnp.float32(v) for k, v in metrics.items()}

    return train_step


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
