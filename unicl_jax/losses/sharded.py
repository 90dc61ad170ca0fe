"""The losses over global arrays that are sharded over a mesh."""

import inspect
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

WHOLE = frozenset({"scales", "offsets", "pair_weights"})
"""Arguments of losses that are arrays and yet the same for all rows."""


def sharded(
    loss_fn: Callable, mesh: Mesh, batch_axes: tuple[str, ...] = ("data",)
) -> Callable:
    """Makes a loss of global arrays from one that takes an `axis_name`.

    Inside `jax.shard_map` each device holds its rows of the batch and gathers, or
    passes around, what it lacks. Differentiate the mean of the result outside: that
    gradient is the single-device one, that of logit_scale included, whatever the mesh.

    Args:
      loss_fn: a loss of this package, or a function of the like: it takes arrays of
        [batch, ...], scalars, and `axis_name`.
      mesh: the devices.
      batch_axes: the mesh axes over which the batch is divided.

    Returns:
      A function of the same arguments, `axis_name` excepted. Scalars, and arrays named
      in WHOLE, are the same on all devices; other arrays are divided along their first
      axis, and so is the result. The batch must be divisible by the number of devices.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    missing = [axis for axis in batch_axes if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"batch_axes must be axes of the mesh: got {missing}; the mesh has "
            f"{mesh.axis_names}."
        )
    signature = inspect.signature(loss_fn)

    def fn(*args, **kwargs):
        arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        arrays = {k: x for k, x in arguments.items() if _is_array(x)}
        options = {k: x for k, x in arguments.items() if k not in arrays}
        specs = {
            k: PartitionSpec()
            if np.ndim(x) == 0 or k in WHOLE
            else PartitionSpec(batch_axes)
            for k, x in arrays.items()
        }

        if any(kind is AxisType.Explicit for kind in mesh.axis_types):
            # Under such axes nothing moves by itself: an array that lies whole on each
            # device is not taken for one that is divided.
            arrays = {
                k: jax.sharding.reshard(x, NamedSharding(mesh, specs[k]))
                for k, x in arrays.items()
            }

        def local(arrays):
            return loss_fn(**arrays, **options, axis_name=batch_axes)

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(batch_axes)
        )
        return mapped(arrays)

    return fn


def _is_array(x):
    return isinstance(x, jax.Array | np.ndarray | np.generic | float)
