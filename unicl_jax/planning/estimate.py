"""A step without compiling it: work, memory and collectives by tracing and by rules."""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from unicl_jax import encoders, sharding
from unicl_jax.planning import jaxpr
from unicl_jax.planning.batch import make_batch
from unicl_jax.planning.network import Collective
from unicl_jax.program import make_program

# Towers of no size: what is left of a step is its loss.
_SMALL = dict(
    image=dict(
        name="swin",
        image_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=8,
        depths=(1,),
        num_heads=(1,),
    ),
    text=dict(name="transformer", width=8, num_heads=1, num_layers=1),
)
# What a compiled step holds, over what must live in it: layouts have padding, and not
# all that could be fused is. The middle of what was compiled for v5e over counted:
# whole steps at 16 rows, Swin-T 2.77 (96 channels and 49 tokens fill no tile of 128),
# ViT-L/14 with remat 1.00; towers of benchmarks/blocks.py, ViT-L/14 1.38, with remat
# 1.31.
HELD = 1.35
LEAST, MOST = 0.7, 2.1  # compiled over estimated, of those
# By primitive.
_EXCHANGES = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "ppermute": "collective-permute",
    "all_to_all": "all-to-all",
}


class Estimate(NamedTuple):
    """What tracing tells of one device's step.

    counted: its work, and the peak of intermediate values
    parameters, optimizer, other, batch: bytes of what it is given
    whole: bytes of the parameters, undivided
    trained: of those that learn, undivided
    collectives: that it must make
    assumed: what the config does not say, a line each
    """

    counted: jaxpr.Counted
    parameters: float
    optimizer: float
    other: float
    batch: float
    whole: float
    trained: float
    collectives: list[Collective]
    assumed: list[str]

    @property
    def temporary(self) -> float:
        """Bytes of activations, gradients and what else lives inside a step."""
        return HELD * self.counted.peak


def estimate_step(
    config: Any, devices: int, concepts: int, text_slots: float | None
) -> Estimate:
    """Traces a device's step, and adds up.

    Args:
      config: the resolved config.
      devices: of all hosts.
      concepts: of the concept table.
      text_slots: as for `batch.make_batch`.

    Returns:
      The estimate.

    Raises:
      InputError: what building the model or the step refuses.
    """
    sizes = sharding.mesh_sizes(config.mesh, devices)
    whole = _mesh(sizes)
    rows = sizes["data"] * sizes["fsdp"]
    batch = make_batch(config, whole, text_slots)

    # One device's rows, with the loss of all: its own is that of the small batch.
    own = copy.deepcopy(config)
    with own.unlocked():
        own.batch_size = config.batch_size // rows
        own.mesh.data, own.mesh.fsdp, own.mesh.tensor = 1, 1, 1
    program = make_program(
        own, encoders.from_config(own.model), _mesh(dict.fromkeys(sizes, 1)), concepts
    )
    traced = _trace(program, make_batch(own, program.mesh, text_slots))
    losses = [
        eqn.params["jaxpr"]
        for eqn in jaxpr.find(_loss_alone(config, whole, concepts), "shard_map")
    ]
    counted = jaxpr.count(traced, losses)

    held = {
        name: _bytes_by_rule(part, whole)
        for name, part in program.state._asdict().items()
        if name != "step"
    }
    given = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(batch.arrays)
    )
    unused = (*config.frozen, *program.objective.unused)
    learning = {k: v for k, v in program.state.params.items() if k not in unused}
    trained = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(learning))
    collectives = _of_gradients(learning, whole, jnp.dtype(config.model.dtype))
    for body in losses:
        collectives += _of_loss(body, dict(whole.shape))
    return Estimate(
        counted,
        held["params"],
        held["opt_state"],
        held["model_state"] + held["ema"],
        given,
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state.params)),
        trained,
        collectives,
        batch.assumed,
    )


def _mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def _trace(program, batch):
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return program.train_step.trace(program.state, batch.arrays, step).jaxpr


def _loss_alone(config, mesh, concepts):
    small = copy.deepcopy(config)
    with small.unlocked():
        length = encoders.options("text", config.model.text)["context_length"]
        small.model.image = _SMALL["image"]
        small.model.text = {
            **_SMALL["text"],
            "vocab_size": 64,
            "context_length": length,
            "causal": True,
        }
        small.data.image_size = None
    model = encoders.from_config(small.model)
    program = make_program(small, model, mesh, concepts)
    return _trace(program, make_batch(small, mesh))


def _bytes_by_rule(tree, mesh):
    """Bytes of a part of the state on one device, as `sharding.partition` cuts it."""
    places = jax.tree.leaves(sharding.over_state(mesh, tree))
    return sum(
        math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(jax.tree.leaves(tree), places, strict=True)
    )


def _of_gradients(learning, mesh, dtype):
    """Sums of gradients over "data", and what "fsdp" gathers and scatters.

    The gradient of a weight is a product in the towers' dtype, and XLA sums what the
    product gives, before it becomes float32; those of vectors are float32 sums.
    """
    sizes = dict(mesh.shape)
    data, fsdp, tensor = sizes["data"], sizes["fsdp"], sizes["tensor"]
    low = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype),
        learning,
    )
    found = []
    if fsdp > 1:
        for kind, tree, what in (
            ("all-gather", learning, "weights, fsdp"),
            ("reduce-scatter", low, "gradients, fsdp"),
        ):
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
            found.append(Collective(kind, size / tensor, fsdp, what=what))
    if data > 1:
        size = _bytes_by_rule(low, mesh)
        found.append(Collective("all-reduce", size, data, what="gradients"))
    return found


def _of_loss(body, sizes, times=1):
    """The exchanges that a `shard_map` makes itself."""
    found = []
    for eqn in getattr(body, "jaxpr", body).eqns:
        kind = _EXCHANGES.get(eqn.primitive.name)
        if kind:
            names = eqn.params.get("axis_name", eqn.params.get("axes"))
            names = names if isinstance(names, tuple | list) else (names,)
            n = math.prod(sizes[name] for name in names)
            side = eqn.outvars if kind == "all-gather" else eqn.invars
            size = sum(
                math.prod(v.aval.shape) * np.dtype(v.aval.dtype).itemsize for v in side
            )
            found.append(Collective(kind, size, n, times, what="loss"))
            continue
        inner = times * eqn.params.get("length", 1)
        bodies = list(jaxpr.bodies(eqn))
        if eqn.primitive.name == "cond":
            ways = [_of_loss(body, sizes, inner) for body in bodies]
            found += max(ways, key=lambda way: sum(c.bytes * c.count for c in way))
        else:
            for body in bodies:
                found += _of_loss(body, sizes, inner)
    return found
