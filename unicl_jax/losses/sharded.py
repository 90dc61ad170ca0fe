"""The losses over global arrays that are sharded over a mesh."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec


def sharded(
    loss_fn: Callable, mesh: Mesh, batch_axes: tuple[str, ...] = ("data",)
) -> Callable:
    """Makes a loss of global arrays from one that takes an `axis_name`.

    Inside `jax.shard_map` each device holds its rows of the batch and gathers what it
    lacks. Differentiate the mean of the result outside: that gradient is the
    single-device one, `logit_scale` included, whatever the mesh.

    Args:
      loss_fn: `unicl_loss`, `unicl_loss_and_aux`, or a function of the same signature.
      mesh: the devices.
      batch_axes: the mesh axes over which the batch is divided.

    Returns:
      `fn(image_embeddings, text_embeddings, labels, logit_scale, *, where=None,
      weights=None, **options)` of global arrays; its result is [global batch], divided
      like the input. The batch must be divisible by the number of devices.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    missing = [axis for axis in batch_axes if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"batch_axes must be axes of the mesh: got {missing}; the mesh has "
            f"{mesh.axis_names}."
        )
    rows, whole = PartitionSpec(batch_axes), PartitionSpec()

    def fn(images, texts, labels, logit_scale, *, where=None, weights=None, **options):
        optional = {"where": where, "weights": weights}
        optional = {k: v for k, v in optional.items() if v is not None}

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(rows, rows, rows, whole, rows),
            out_specs=rows,
        )
        def local(images, texts, labels, logit_scale, optional):
            return loss_fn(
                images,
                texts,
                labels,
                logit_scale,
                axis_name=batch_axes,
                **optional,
                **options,
            )

        return local(images, texts, labels, logit_scale, optional)

    return fn
