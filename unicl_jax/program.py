"""What a config makes of a mesh: the compiled functions that training is."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unicl_jax import objectives, sharding
from unicl_jax.augment import make_views
from unicl_jax.encoders import TwoTower
from unicl_jax.mix import make_mix
from unicl_jax.objectives import Objective
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import TrainState, init_state, make_train_step


class Program(NamedTuple):
    """A run's functions on its devices; compiled when first called, or by `lower`.

    init() -> the first TrainState, made where it lives: whole on no device unless the
    layout says so
    train_step(state, batch, step) -> (state, metrics): as `step.make_train_step`'s; it
    takes the state and gives it back changed
    """

    objective: Objective
    schedule: optax.Schedule
    mesh: Mesh
    state: TrainState  # shapes and dtypes, each with its sharding
    init: Callable[[], TrainState]
    train_step: Callable


def make_program(
    config: ConfigDict, model: TwoTower, mesh: Mesh, num_concepts: int = 0
) -> Program:
    """Builds a run's functions; nothing is compiled, no device is touched.

    Args:
      config: the resolved config.
      model: of `config.model`.
      mesh: the devices, which need not be there: a topology's are as good.
      num_concepts: of the run's concept table, for objectives that hold a row for each.

    Returns:
      The functions.

    Raises:
      InputError: if there is no such objective or optimizer.
    """
    optimizer, schedule = make_optimizer(config.optimizer, config.total_steps)
    objective = objectives.make_objective(
        config.objective, model, mesh, num_concepts=num_concepts
    )
    whole, rows = sharding.replicated(mesh), sharding.over_batch(mesh)

    def first_state():
        return init_state(
            *(model, objective, optimizer, config.seed, config.frozen),
            ema_decay=config.ema_decay,
        )

    shapes = jax.eval_shape(first_state)
    layout = sharding.over_state(mesh, shapes)
    train_step = make_train_step(
        model,
        objective,
        optimizer,
        schedule,
        make_views(
            config.augment,
            config.strong_augment,
            views=config.views,
            image_size=config.model.image.image_size,
            normalization=config.model.normalization,
        ),
        seed=config.seed,
        frozen=config.frozen,
        caption_identity=config.data.caption_identity,
        mix=make_mix(config.mix),
        mesh=mesh,
        micro_batches=config.micro_batches,
        ema_decay=config.ema_decay,
        max_nonfinite=config.max_nonfinite,
    )
    return Program(
        objective,
        schedule,
        mesh,
        jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            shapes,
            layout,
        ),
        jax.jit(first_state, out_shardings=layout),
        jax.jit(
            train_step,
            in_shardings=(layout, rows, None),
            out_shardings=(layout, whole),
            donate_argnums=0,
        ),
    )
