"""How long collectives take on a torus, and between GPUs: bandwidth and hops.

Letters: S bytes of the whole array (what an all-gather gives, what a reduce-scatter or
an all-reduce takes), n devices of a group, W bytes/s of a link one way.
"""

import dataclasses
import math
from collections.abc import Sequence

from unicl_jax.planning.topology import Topology

HOP = 1e-6
"""Seconds from a chip to its neighbour: the scaling book's rule of thumb."""

LAUNCH = 10e-6
"""Seconds to start a collective between GPUs and to meet: NCCL's order of size."""

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange among devices, as often as a step makes it.

    Attributes:
      kind: one of KINDS.
      bytes: S; of an all-to-all or a permute what a device sends.
      devices: of a group.
      count: times a step.
      hidden: seconds of other work that the compiler put beside each, at most what it
        takes; None: it waits.
      what: where it comes from.
      spans: chips of the group along each axis of the torus; None: as many axes as it
        takes, whole ones.
    """

    kind: str
    bytes: float
    devices: int
    count: float = 1
    hidden: float | None = None
    what: str = ""
    spans: tuple[int, ...] | None = None


def seconds(collective: Collective, topology: Topology) -> float:
    """How long one collective takes if nothing else uses the links.

    All-gather and reduce-scatter on a ring: S (n - 1) / n / (2 W), both ways around; a
    line of chips, without the link back, has half of that; k axes of a torus k times as
    much. All-reduce is one of each: twice. All-to-all: S n / (8 W) on a ring. Between
    GPUs of a host S (n - 1) / n / W; over hosts each one's part goes through the
    network too: S (h - 1) / h / network.

    Args:
      collective: which.
      topology: the chips.

    Returns:
      Seconds, of one of its `count`.

    Source: jax-ml.github.io/scaling-book/sharding, with latency as the sum over axes of
      the hops; rings as in NCCL.
    """
    n, size = collective.devices, collective.bytes
    if n < 2:
        return 0.0
    twice = 2 if collective.kind == "all-reduce" else 1
    if topology.chip.kind == "gpu":
        return _between_gpus(collective, topology, twice)
    spans = collective.spans or whole_axes(topology, n)
    ways = [(s, wraps(topology, i)) for i, s in enumerate(spans) if s > 1]
    if not ways:  # devices of one chip
        return size / topology.chip.bandwidth
    wire = topology.chip.link
    rate = sum(wire * (2 if wrap else 1) for _, wrap in ways)
    hops = sum(s // 2 if wrap else s - 1 for s, wrap in ways)
    if collective.kind == "collective-permute":
        return size / wire + HOP
    if collective.kind == "all-to-all":
        longest, wrap = max(ways)
        return size * longest / (8 if wrap else 4) / wire + HOP * hops
    return twice * (size * (n - 1) / n / rate + HOP * hops)


def _between_gpus(collective, topology, twice):
    hosts, per_host = topology.shape
    n, size = collective.devices, collective.bytes
    inside = min(n, per_host)
    over = max(1, math.ceil(n / per_host))
    if collective.kind in ("all-to-all", "collective-permute"):
        out = size * (over - 1) / over if over > 1 else 0.0
        network = out * inside / topology.chip.network
        return size / topology.chip.link + network + LAUNCH
    taken = size * (inside - 1) / inside / topology.chip.link
    if over > 1:
        taken += size * (over - 1) / over / topology.chip.network
    return twice * taken + LAUNCH


def wraps(topology: Topology, axis: int) -> bool:
    """Whether the torus closes along an axis.

    A v5e or v6e axis of 16; of the others, one that is a multiple of 4 in a slice of
    whole cubes of 4 x 4 x 4.
    """
    chip, shape = topology.chip, topology.shape
    if chip.axes == 2:
        return shape[axis] == 16
    return all(side % 4 == 0 for side in shape)


def whole_axes(topology: Topology, devices: int) -> tuple[int, ...]:
    """Chips along each axis for a group of neighbours, the last axis first."""
    left = max(1, devices // topology.chip.devices)
    spans = [1] * len(topology.shape)
    for i in reversed(range(len(spans))):
        spans[i] = min(left, topology.shape[i])
        left = math.ceil(left / spans[i])
    return tuple(spans)


def spans_of(group: Sequence[int], places: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Chips of a group along each axis.

    Args:
      group: its devices.
      places: of each device, its chip's coordinates.

    Returns:
      How many different coordinates there are along each axis.
    """
    return tuple(
        len(set(axis)) for axis in zip(*(places[i] for i in group), strict=True)
    )
