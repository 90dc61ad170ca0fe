"""A few numbers that tell whether the arrays that were read are those that were saved.

The file system, tensorstore's files and the wires between flip a bit now and then, and
zstd stores what it cannot compress as it is, with no sum of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def digest(tree: Any) -> dict[str, int]:
    """One number an array, the same however the array is divided over devices.

    d(x) = sum_i (2 i + 1) bits(x_i) mod 2^32

    A sum of integers is exact in any order. An odd factor has an inverse mod 2^32, so
    that one changed element always changes the sum; more of them go unseen once in
    2^32 times.

    Args:
      tree: of `jax.Array`s on one mesh; each process of the run has to call this.

    Returns:
      By the array's path in the tree, in [0, 2^32).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Of each device its part, added here: hundreds of programs that talk to each other
    # would block CPU devices, which have threads for a few. A program for each shape:
    # all arrays in one would take longer to compile than to save.
    parts = [_parts(x) for _, x in leaves]
    mine = [
        sum(int(np.asarray(shard.data)[0]) for shard in part.addressable_shards) % 2**32
        for part in jax.block_until_ready(parts)
    ]
    sums = np.array([mine], np.uint32)
    if jax.process_count() > 1:
        sums = np.asarray(multihost_utils.process_allgather(sums[0]))
    sums = sums.sum(0, dtype=np.uint32)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(total)
        for (path, _), total in zip(leaves, sums, strict=True)
    }


def _parts(x: jax.Array) -> jax.Array:
    """[devices] uint32: each one's part of the sum; of copies one counts."""
    if isinstance(x.sharding, NamedSharding):
        spec = x.sharding.spec
        axes = (*spec, *[None] * (x.ndim - len(spec)))
        return _program(x.sharding.mesh, axes)(x)
    return _of_one(x)


@functools.cache
def _program(mesh: Mesh, axes: tuple):
    def part(x):
        place, copy = jnp.uint32(0), jnp.uint32(0)
        used = set()
        for axis, (names, size) in enumerate(zip(axes, x.shape, strict=True)):
            names = (names,) if isinstance(names, str) else names or ()
            used |= {*names}
            whole, first = size, jnp.uint32(0)
            if names:
                first = jnp.uint32(lax.axis_index(names)) * np.uint32(size)
                whole = size * np.prod([mesh.shape[name] for name in names])
            along = first + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            place = place * np.uint32(whole) + along
        for name in set(mesh.axis_names) - used:
            copy += jnp.uint32(lax.axis_index(name))
        total = lax.cond(copy == 0, _sum, lambda *_: jnp.uint32(0), x, place)
        return total[None]

    return jax.jit(
        jax.shard_map(
            part,
            mesh=mesh,
            in_specs=PartitionSpec(*axes),
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
    )


@jax.jit
def _of_one(x):
    place = lax.iota(jnp.uint32, x.size).reshape(x.shape)
    return _sum(x, place)[None]


def _sum(x, place):
    return jnp.sum(_bits(x) * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)


def _bits(x):
    """The elements' bits as uint32; of wider ones, both halves mixed."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
    if kind is None:
        halves = lax.bitcast_convert_type(x, jnp.uint32)
        return halves[..., 0] + np.uint32(0x9E3779B1) * halves[..., 1]
    return lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
