"""Chips and how they hang together: what `--topology` names."""

import dataclasses
import math
import re

from unicl_jax.errors import InputError
from unicl_jax.planning.chips import ALIASES, CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod, or hosts with GPUs.

    Attributes:
      name: as it was given, "v5e:16x16".
      chip: of which it is made.
      shape: chips along each axis of the torus; of GPUs (hosts, GPUs of each).
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many JAX sees."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """How many, a process on each."""
        if self.chip.kind == "gpu":
            return self.shape[0]
        if self.chips <= self.chip.one_host:
            return 1
        return max(1, self.chips // self.chip.per_host)


def parse_topology(text: str) -> Topology:
    """Reads `--topology`.

    Args:
      text: "v5e:16x16" or "v5p:4x4x8" of TPUs; "h100:8" or "h100:2x8", hosts by GPUs,
        of GPUs; "h100" is one.

    Returns:
      The topology.

    Raises:
      InputError: listing the chips, or the shapes.
    """
    name, _, rest = text.strip().lower().partition(":")
    name = ALIASES.get(name, name)
    if name not in CHIPS:
        raise InputError(
            "--topology must be a chip and how many, as in v5e:16x16 or h100:2x8: got "
            f'"{text}"; known chips: {", ".join(CHIPS)}.'
        )
    chip = CHIPS[name]
    if not re.fullmatch(r"\d+(x\d+)*|", rest):
        raise _wrong_shape(text, chip)
    shape = tuple(int(n) for n in rest.split("x")) if rest else (1,)
    if 0 in shape:
        raise _wrong_shape(text, chip)
    if chip.kind == "gpu":
        if len(shape) > 2:
            raise _wrong_shape(text, chip)
        return Topology(text, chip, (1, *shape) if len(shape) == 1 else shape)
    if math.prod(shape) == 1:
        shape = (1,) * chip.axes
    if len(shape) != chip.axes or math.prod(shape) > chip.pod:
        raise _wrong_shape(text, chip)
    return Topology(text, chip, shape)


# Slices that Google Cloud sells, of those libtpu compiles for.
SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
        *("8x8x16", "8x16x16"),
    ),
}


def _wrong_shape(text, chip):
    if chip.kind == "gpu":
        return InputError(
            f"--topology of {chip.title} must be GPUs, or hosts x GPUs: got "
            f'"{text}"; write {chip.name}:8 or {chip.name}:2x8.'
        )
    shapes = ", ".join(f"{chip.name}:{shape}" for shape in SHAPES[chip.axes])
    return InputError(
        f"--topology of {chip.title} must have {chip.axes} axes and at most "
        f'{chip.pod:,} chips: got "{text}"; take one of {shapes}.'
    )
