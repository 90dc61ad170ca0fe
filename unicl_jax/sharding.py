"""The devices: starting the processes, the mesh, and where each array lives."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unicl_jax.errors import InputError

# Any of these says that a cluster will tell who we are, with no flags.
_CLUSTER_VARIABLES = ("SLURM_NTASKS", "TPU_WORKER_HOSTNAMES", "OMPI_COMM_WORLD_SIZE")


def start_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the run's processes; must come before any use of a device.

    Args:
      coordinator_address: "host:port" of process 0; None where a cluster (Cloud TPU,
        SLURM, Open MPI) tells it, or for a single process.
      num_processes: of the run; with `coordinator_address`.
      process_id: of this one; with `coordinator_address`.

    Raises:
      InputError: if only some of the three are given.
    """
    given = [coordinator_address, num_processes, process_id]
    if any(x is not None for x in given):
        if any(x is None for x in given):
            raise InputError(
                "--coordinator_address, --num_processes and --process_id must be given "
                f"together: got {given}."
            )
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    elif _in_cluster():
        jax.distributed.initialize()


def _in_cluster() -> bool:
    """Whether to let jax find the others: off-cluster it raises instead."""
    several = [v for v in map(os.environ.get, _CLUSTER_VARIABLES) if v]
    return any(value not in ("1", "localhost") for value in several)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One axis, "data", over all devices of all processes.

    Args:
      devices: default all.

    Returns:
      The mesh, with an Auto axis: `make_mesh`'s default, Explicit, refuses the window
      partition of Swin.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def over_batch(mesh: Mesh) -> NamedSharding:
    """Rows divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


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
