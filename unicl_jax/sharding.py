"""The mesh, and where each array lives: by rules that fit one screen.

Axes of the mesh:

  data    rows of the batch; a whole copy of the model along it
  fsdp    rows of the batch, too; parameters and optimizer state are divided along it
          and gathered where a step uses them (ZeRO, arXiv 1910.02054, stage 3)
  tensor  linear maps inside blocks: outputs of the first of a pair, inputs of the
          second, so that a pair needs one sum (Megatron, arXiv 1909.08053, section 3)
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unicl_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# What "tensor" divides: the end of a parameter's name, and the dimension.
TENSOR_RULES = (
    (r"/(qkv|attn_in_proj|query|key|value)/(kernel|bias)", -1),
    (r"/(fc1|c_fc|intermediate)/(kernel|bias)", -1),
    (r"/(attn/proj|attn_out_proj|attention_output)/kernel", 0),
    (r"/(fc2|c_proj|output)/kernel", 0),
)
# What "fsdp" divides: the largest dimension that is left and divisible, of arrays of
# this many numbers and more. Below, gathering costs more than keeping.
FSDP_LEAST = 2**12


def partition(name: str, shape: Sequence[int], sizes: Mapping[str, int]):
    """Where one array of the training state is cut.

    Args:
      name: its path, "params/image/blocks_0/mlp/fc1/kernel"; an optimizer's moments end
        as their parameters do, and are cut alike.
      shape: its.
      sizes: devices along each axis of the mesh.

    Returns:
      A PartitionSpec; empty where a whole copy lies on every device.
    """
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = sizes.get("tensor", 1), sizes.get("fsdp", 1)
    for rule, dimension in TENSOR_RULES if tensor > 1 and shape else ():
        if re.search(rule + "$", name) and shape[dimension] % tensor == 0:
            axes[dimension] = "tensor"
    if fsdp > 1 and math.prod(shape) >= FSDP_LEAST:
        fit = [i for i, n in enumerate(shape) if not axes[i] and n % fsdp == 0]
        if fit:
            axes[max(fit, key=lambda i: (shape[i], i))] = "fsdp"
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def over_state(mesh: Mesh, state: Any) -> Any:
    """Where a training state lives.

    Args:
      mesh: the devices.
      state: arrays, or their shapes, under names that end as parameters' do.

    Returns:
      The same tree of shardings.
    """
    sizes = dict(mesh.shape)

    def place(path, x):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(name, x.shape, sizes))

    return jax.tree_util.tree_map_with_path(place, state)


def gathered(mesh: Mesh | None, params: Any) -> Any:
    """Parameters as a step computes with them: whole along "fsdp", inside `jit`.

    Args:
      mesh: the devices; None: one.
      params: divided as `over_state` says.

    Returns:
      The same numbers. Their gradients come back summed and divided as `params` are, so
      that no device holds all of them.
    """
    if mesh is None or dict(mesh.shape).get("fsdp", 1) == 1:
        return params
    without = {**mesh.shape, "fsdp": 1}

    def one(path, x):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        cut = NamedSharding(mesh, partition(name, x.shape, dict(mesh.shape)))
        whole = NamedSharding(mesh, partition(name, x.shape, without))
        if cut.spec == whole.spec:
            return x
        return _moved(x, whole, cut)

    return jax.tree_util.tree_map_with_path(one, params)


def _moved(x, to, back):
    """`x` at another place; its gradient at the first one."""

    @jax.custom_vjp
    def move(x):
        return jax.lax.with_sharding_constraint(x, to)

    move.defvjp(
        lambda x: (move(x), None),
        lambda _, dx: (jax.lax.with_sharding_constraint(dx, back),),
    )
    return move(x)


def mesh_sizes(axes: Mapping[str, int | None], num_devices: int) -> dict[str, int]:
    """Devices along each axis.

    Args:
      axes: `config.mesh`: `data` (None: what the others leave), `fsdp`, `tensor`.
      num_devices: over all processes.

    Returns:
      By axis, in the order of AXES.

    Raises:
      InputError: if they don't multiply to the number of devices.
    """
    for name in AXES:
        if not (name == "data" and axes["data"] is None) and (
            type(axes[name]) is not int or axes[name] < 1
        ):
            raise InputError(
                f"mesh.{name} must be a whole number of at least 1: got {axes[name]!r}."
            )
    fsdp, tensor = axes["fsdp"], axes["tensor"]
    data = axes["data"] or max(1, num_devices // (fsdp * tensor))
    if data * fsdp * tensor != num_devices:
        raise InputError(
            "mesh.data x mesh.fsdp x mesh.tensor must be the number of devices, "
            f"{num_devices}: got {data} x {fsdp} x {tensor} = {data * fsdp * tensor}; "
            "leave mesh.data out, and set the others to divisors of it."
        )
    return dict(data=data, fsdp=fsdp, tensor=tensor)


def make_mesh(
    axes: Mapping[str, int | None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of all devices of all processes.

    Devices of one process are neighbours, along "tensor" first, so that what is heavy
    stays inside a host and each process feeds the rows that follow the one before it.

    Args:
      axes: `config.mesh`; None: all of them along "data".
      devices: default all.

    Returns:
      The mesh, with Auto axes: `jax.make_mesh`'s default, Explicit, refuses the window
      partition of Swin.

    Raises:
      InputError: as `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else devices
    axes = axes or dict(data=None, fsdp=1, tensor=1)
    shape = tuple(mesh_sizes(axes, len(devices)).values())
    ordered = sorted(devices, key=lambda device: device.process_index)  # stable
    array = np.empty(len(ordered), object)
    array[:] = ordered
    return Mesh(array.reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh over which a batch's rows are divided."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def over_batch(mesh: Mesh) -> NamedSharding:
    """Rows divided over the devices; along "tensor" all hold the same."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(mesh: Mesh, local: Mapping[str, Any]) -> dict[str, Any]:
    """This process's rows, as its part of global arrays.

    Args:
      mesh: the devices.
      local: host arrays, or trees of them, [local batch, ...] each.

    Returns:
      The same keys with `jax.Array`s of the global batch, divided over "data".
    """
    sharding = over_batch(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), dict(local)
    )
