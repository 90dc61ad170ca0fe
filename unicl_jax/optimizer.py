"""Schedules, the weight-decay mask, clipping, and the optimizers of the paper."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from unicl_jax.errors import choose

# Never decayed, besides vectors and scalars: what the release meant to exclude (its
# skip list misspells the names, so there they are decayed: unicl_spec, 6.2).
NO_DECAY = ("relative_position_bias_table", "positional_embedding", "logit_scale")


def decay_mask(params: Any) -> Any:
    """Which parameters weight decay applies to.

    Args:
      params: the parameters, nested dicts of arrays (or of their shapes).

    Returns:
      The same tree of bools: False for vectors, scalars, and the names in NO_DECAY.
    """

    def decayed(path, x):
        return x.ndim > 1 and path[-1].key not in NO_DECAY

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_schedule(config: Mapping, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then half a cosine down to `final_learning_rate`.

    lr(t) = end + (peak - end) (1 + cos(pi (t - warmup) / (total - warmup))) / 2

    Args:
      config: `learning_rate` (peak), `final_learning_rate`, `warmup_steps`.
      total_steps: of the run.

    Returns:
      step -> learning rate. The release's cosine counts from step 0, so it jumps down a
      little where its warm-up ends; this one is continuous.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config["learning_rate"],
        warmup_steps=config["warmup_steps"],
        decay_steps=total_steps,
        end_value=config["final_learning_rate"],
    )


def make_optimizer(
    config: Mapping, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer that a config's `optimizer` section describes.

    Args:
      config: `name` ("adamw" or "sgd"), `learning_rate`, `final_learning_rate`,
        `warmup_steps`, `weight_decay`, `clip_norm` (of the global gradient; 0: none),
        `b1`, `b2`, `eps` (AdamW), `momentum` (SGD, Nesterov).
      total_steps: of the run.

    Returns:
      The optax transformation, and the schedule by itself, for the metrics.

    Raises:
      InputError: if there is no such optimizer.

    Source: the paper trains with AdamW where there is a Transformer, SGD for pure CNNs.
      SGD's decay is part of the gradient, as in PyTorch; AdamW's is decoupled.
    """
    schedule = make_schedule(config, total_steps)
    decay = config["weight_decay"]

    def adamw():
        return optax.adamw(
            schedule,
            b1=config["b1"],
            b2=config["b2"],
            eps=config["eps"],
            weight_decay=decay,
            mask=decay_mask,
        )

    def sgd():
        return optax.chain(
            optax.add_decayed_weights(decay, decay_mask),
            optax.sgd(schedule, momentum=config["momentum"], nesterov=True),
        )

    menu = {"adamw": adamw, "sgd": sgd}
    optimizer = choose(menu, config["name"], "optimizer.name")()
    if config["clip_norm"]:
        clip = optax.clip_by_global_norm(config["clip_norm"])
        optimizer = optax.chain(clip, optimizer)
    return optimizer, schedule
