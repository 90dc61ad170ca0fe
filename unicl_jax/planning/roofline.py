"""From work, memory and collectives to a step's time, and what bounds it."""

import dataclasses
from collections.abc import Iterable, Sequence

from unicl_jax.planning import network
from unicl_jax.planning.chips import Chip
from unicl_jax.planning.jaxpr import Work
from unicl_jax.planning.network import Collective
from unicl_jax.planning.topology import Topology

# Of a chip's peaks, what programs get: in estimates alone, and assumed. Against what
# the compiler reckons with on v5e:16x16, 16 rows a chip: Swin-T 7 % less, ViT-L/14 with
# remat 45 % more. Nothing was measured on a chip.
PRODUCTS, MEMORY = 0.7, 0.6


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step, on each device.

    Attributes:
      products: of matrix products at the chip's peak.
      memory: of reading and writing at the memory's peak.
      work: of all but collectives.
      links: of all collectives.
      waiting: of those that nothing hides.
    """

    products: float
    memory: float
    work: float
    links: float
    waiting: float

    @property
    def step(self) -> float:
        """One step, as the program is scheduled."""
        return self.work + self.waiting

    @property
    def overlapped(self) -> float:
        """One step with every collective beside other work."""
        return max(self.work, self.links)

    @property
    def serial(self) -> float:
        """One step with nothing beside a collective."""
        return self.work + self.links

    @property
    def efficiency(self) -> float:
        """The step's useful part: against chips that need no others."""
        return self.work / self.step if self.step else 1.0

    @property
    def bound(self) -> str:
        """What a step waits for most: "products", "memory" or "links"."""
        if self.waiting > self.work:
            return "links"
        return "products" if self.products >= self.memory else "memory"


def work_seconds(work: Iterable[Work], chip: Chip) -> tuple[float, float, float]:
    """Roofline of each operation: products at PRODUCTS of peak, or memory at MEMORY.

    sum over operations of max(FLOPs / (peak PRODUCTS), bytes / (bandwidth MEMORY))

    Args:
      work: of one device.
      chip: which.

    Returns:
      Seconds of all products at the peak, of all memory at the peak, and the sum above.

    Source: Williams, Waterman and Patterson, CACM 52(4), 2009.
    """
    products = memory = total = 0.0
    for one in work:
        product = one.flops / (chip.f32 if one.wide else chip.bf16) * chip.devices
        moved = one.bytes / chip.bandwidth * chip.devices
        products, memory = products + product, memory + moved
        total += max(product / PRODUCTS, moved / MEMORY)
    return products, memory, total


def link_seconds(
    collectives: Sequence[Collective], topology: Topology, work: float
) -> tuple[float, float]:
    """Seconds of all collectives, and of what of them the step waits for.

    Args:
      collectives: of a step.
      topology: the devices.
      work: seconds beside which they may be hidden, at most.

    Returns:
      All of them, and those that no scheduled work hides.
    """
    total = hidden = 0.0
    for one in collectives:
        each = network.seconds(one, topology)
        total += one.count * each
        hidden += one.count * min(each, one.hidden or 0.0)
    return total, total - min(hidden, work)
