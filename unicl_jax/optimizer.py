"""Schedules, the weight-decay mask, clipping, and the optimizers of the paper."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from unicl_jax import learning_rates
from unicl_jax.errors import choose

# Never decayed, besides vectors and scalars: what the release meant to exclude (its
# skip list misspells the names, so there they are decayed: unicl_spec, 6.2).
NO_DECAY = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "positional_embedding",
    "logit_scale",
)


# Muon's update has this root mean square, about AdamW's: one learning rate does for
# both (arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2
# Adafactor keeps rows' and columns' means of matrices this large on both sides.
FACTORED_FROM = 32


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


def _muon_dimensions(params: Any) -> Any:
    """Which parameters are linear maps [in, out] inside a tower; None for the others.

    Patch embedding and projections face the data, as embedding tables do: Adam's.
    """

    def dimensions(path, x):
        names = [part.key for part in path]
        inside = names[-1] == "kernel" and x.ndim == 2 and "patch_embed" not in names
        return contrib.MuonDimensionNumbers((0,), (1,)) if inside else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


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
      config: `name` ("adamw", "sgd", "muon", "lamb", "lion" or "adafactor"),
        `learning_rate`, `final_learning_rate`, `warmup_steps`, `weight_decay`,
        `clip_norm` (of the global gradient; 0: none), `b1`, `b2` (all but SGD), `eps`
        (AdamW, LAMB), `momentum` (SGD, Nesterov); for rates of parts' own, what
        `learning_rates.factors` takes.
      total_steps: of the run.

    Returns:
      The optax transformation, and the schedule by itself, for the metrics.

    Raises:
      InputError: if there is no such optimizer.

    Decay is decoupled, and times the learning rate, in all but SGD; it leaves out what
    `decay_mask` says.

    Source: the paper trains with AdamW where there is a Transformer, SGD for pure CNNs.
      SGD's decay is part of the gradient, as in PyTorch; AdamW's is decoupled. Muon
      (Jordan et al., 2024; its step's size as in Liu et al., 2025, arXiv 2502.16982,
      equation 4) is ours, for short runs: it orthogonalises the update of each linear
      map, and leaves the other parameters to AdamW. LAMB: You et al., 2020, arXiv
      1904.00962, algorithm 2; what is not decayed has no trust ratio either, as in the
      authors' code. Lion: Chen et al., 2023, arXiv 2302.06675, algorithm 2. Adafactor:
      Shazeer and Stern, 2018, arXiv 1804.04235, as Zhai et al., 2022, arXiv
      2106.04560, section 3.4, changed it: with momentum b1, without relative steps or
      clipped updates, the second moment's decay 1 - t^-0.8 at most b2.
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

    def muon():
        maps = contrib.muon(
            schedule,
            consistent_rms=MUON_RMS,
            weight_decay=decay,
            weight_decay_mask=decay_mask,
            muon_weight_dimension_numbers=_muon_dimensions,
        )

        def labels(params):
            return jax.tree.map(
                lambda numbers: "adamw" if numbers is None else "muon",
                _muon_dimensions(params),
                is_leaf=lambda x: not isinstance(x, dict),
            )

        # Not contrib.muon's own Adam: it is Nesterov's, and decays without a mask.
        return optax.partition({"muon": maps, "adamw": adamw()}, labels)

    def lamb():
        return optax.chain(
            optax.scale_by_adam(b1=config["b1"], b2=config["b2"], eps=config["eps"]),
            optax.add_decayed_weights(decay, decay_mask),
            optax.masked(optax.scale_by_trust_ratio(), decay_mask),
            optax.scale_by_learning_rate(schedule),
        )

    def lion():
        return optax.lion(
            schedule,
            b1=config["b1"],
            b2=config["b2"],
            weight_decay=decay,
            mask=decay_mask,
        )

    def adafactor():
        def decay_rate(step, power):
            return jnp.minimum(1 - (step + 1.0) ** -power, config["b2"])

        momentum = optax.ema(config["b1"], debias=False)
        return optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=0.8,
                min_dim_size_to_factor=FACTORED_FROM,
                decay_rate_fn=decay_rate,
            ),
            momentum if config["b1"] else optax.identity(),
            optax.add_decayed_weights(decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )

    menu = {"adamw": adamw, "sgd": sgd, "muon": muon}
    menu |= {"lamb": lamb, "lion": lion, "adafactor": adafactor}
    optimizer = choose(menu, config["name"], "optimizer.name")()
    if config["clip_norm"]:
        clip = optax.clip_by_global_norm(config["clip_norm"])
        optimizer = optax.chain(clip, optimizer)
    if learning_rates.is_on(config):
        optimizer = optax.chain(optimizer, learning_rates.scale_by_factors(config))
    return optimizer, schedule
