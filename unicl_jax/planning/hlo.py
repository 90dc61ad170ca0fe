"""Collectives in an optimised HLO program: kind, bytes, groups, how often, hidden.

The text is that of one device's program, `compiled.as_text()`; the instructions of a
computation are in the order in which they run.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from unicl_jax.planning.network import KINDS, Collective, spans_of

_ITEM = re.compile(r"\b(pred|bf16|token|[sufc]\d+\w*)\[([\d,]*)\]")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?)\s([a-z][a-z0-9-]*)\((.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+)(?: \(.*)? ?\{$|(ENTRY )?%?([\w.-]+) \(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|"
    r"called_computations|branch_computations)=\{?(%?[\w.-]+(?:, ?%?[\w.-]+)*)\}?"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    op: str
    rest: str  # operands and attributes

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it makes none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else 0

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        lists = _CALLED.findall(self.rest)
        return [x.strip().lstrip("%") for names in lists for x in names.split(",")]


class Program(NamedTuple):
    """What a compiled step does, from its text.

    collectives: one for each instruction, with `count` times a step
    cycles: that the compiler reckons with for all but collectives; 0: it does not say
    loops: trips of each loop; None where the text does not say
    """

    collectives: list[Collective]
    cycles: float
    loops: list[int | None]


def read(
    text: str, devices: int, places: list | None = None, clock: float = 0.0
) -> Program:
    """Reads a program.

    Args:
      text: of the whole module.
      devices: that it runs on.
      places: of each device, the coordinates of its chip; None: not known.
      clock: cycles a second, to tell how long hidden collectives have; 0: not known.

    Returns:
      Its collectives, cycles and loops.
    """
    computations, entry = _computations(text)
    walk = _Walk(computations, devices, places, clock)
    walk.enter(entry, 1.0)
    return Program(walk.collectives, walk.cycles, walk.loops)


def type_bytes(type_text: str) -> float:
    """Bytes of an array's type, or of all of a tuple: "(f32[8,128]{1,0}, s32[])"."""
    return sum(
        _item_bits(kind) / 8 * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in _ITEM.findall(type_text)
    )


def _item_bits(kind):
    if kind in ("pred", "token"):
        return 8 * (kind == "pred")
    return int(re.search(r"\d+", kind)[0])


def _computations(text):
    found, entry, current = {}, None, None
    for line in text.splitlines():
        if line and not line[0].isspace():
            match = re.match(r"(ENTRY )?%?([\w.-]+)\b.*\{$", line)
            current = None
            if match and not line.startswith("HloModule"):
                current = found.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif current is not None:
            match = _LINE.match(line)
            if match:
                current.append(Instruction(*match.groups()))
    return found, entry


class _Walk:
    """A walk through everything that runs, each as often as it does."""

    def __init__(self, computations, devices, places, clock):
        self._computations, self._devices = computations, devices
        self._places, self._clock = places, clock
        self.collectives, self.cycles, self.loops = [], 0.0, []

    def enter(self, name, times):
        """Adds what a computation does, that many times."""
        instructions = self._computations.get(name, [])
        chains = {}  # of collectives in steps, each beside other work: first, last
        for i, instruction in enumerate(instructions):
            kind = _kind(instruction)
            if kind and instruction.op.endswith("-done"):
                continue
            if instruction.op == "while":
                self._loop(instruction, times)
            elif instruction.op == "conditional":
                self._branches(instruction, times)
            elif instruction.op == "call":
                for called in instruction.called:
                    self.enter(called, times)
            elif kind or instruction.op in ("fusion", "async-start"):
                hidden = None
                if instruction.op.endswith("-start"):
                    hidden = self._between(instructions, i)
                for inner, kind in self._collectives_in(instruction):
                    if chain := _chain(instruction, inner):
                        chains.setdefault(chain, [inner, kind, i])[3:] = [i]
                    else:
                        self._add(inner, kind, times, hidden)
                if instruction.op == "fusion":
                    self.cycles += times * instruction.cycles
            else:
                self.cycles += times * instruction.cycles
        for inner, kind, first, last in chains.values():
            cycles = sum(x.cycles for x in instructions[first + 1 : last + 1])
            self._add(inner, kind, times, cycles / self._clock if self._clock else None)

    def _loop(self, instruction, times):
        trips = _TRIPS.search(instruction.rest)
        trips = int(trips[1]) if trips else None
        self.loops.append(trips)
        body = re.search(r"body=%?([\w.-]+)", instruction.rest)
        self.enter(body[1], times * (trips or 1))

    def _branches(self, instruction, times):
        """The branch that exchanges most, then works most: the others don't run."""
        best = None
        for called in instruction.called:
            walk = _Walk(self._computations, self._devices, self._places, self._clock)
            walk.enter(called, times)
            size = sum(c.bytes * c.count for c in walk.collectives), walk.cycles
            if best is None or size > best[0]:
                best = size, walk
        if best:
            self.collectives += best[1].collectives
            self.cycles += best[1].cycles
            self.loops += best[1].loops

    def _collectives_in(self, instruction) -> Iterator:
        """The collective itself, or those of the computation that it is wrapped in."""
        if kind := _kind(instruction):
            yield instruction, kind
            return
        for called in instruction.called:
            inside = self._computations.get(called, [])
            for inner in inside:
                if kind := _kind(inner):
                    # A sum of which each keeps its part.
                    sliced = any(x.op == "dynamic-slice" for x in inside)
                    both = kind == "all-reduce" and sliced
                    yield inner, "reduce-scatter" if both else kind
                elif inner.op in ("fusion", "async-start", "call"):
                    yield from self._collectives_in(inner)

    def _between(self, instructions, start):
        """Seconds of work from a start to its end."""
        name, cycles = instructions[start].name, 0
        for other in instructions[start + 1 :]:
            if other.op.endswith("-done") and re.match(
                rf"(?:\S+ )?%?{re.escape(name)}\b", other.rest
            ):
                break
            if not _kind(other):
                cycles += other.cycles
        return cycles / self._clock if self._clock else None

    def _add(self, instruction, kind, times, hidden):
        group = first_group(instruction.rest, self._devices)
        count = len(group)
        size = type_bytes(instruction.type)
        started = instruction.op.endswith("-start")
        if kind == "all-gather" and started:  # its type holds what goes in, too
            size *= count / (count + 1)
        if kind == "collective-permute":
            count = 2
            if started:
                size = type_bytes(re.sub(r"u32\[\]", "", instruction.type)) / 2
        if kind == "reduce-scatter" and instruction.op.startswith("reduce-scatter"):
            size *= count
        name = re.search(r'op_name="([^"]*)"', instruction.rest)
        spans = None
        if self._places and max(group) < len(self._places):
            spans = spans_of(group, self._places)
        self.collectives.append(
            Collective(kind, size, count, times, hidden, name[1] if name else "", spans)
        )


def _chain(instruction, inner):
    """What steps of one collective share: on TPUs each is part of another fusion."""
    found = re.search(r'chain_id="(\d+)"', inner.rest)
    channel = re.search(r"channel_id=(\d+)", inner.rest)
    inside = instruction.op == "fusion" and found and channel
    return (found[1], channel[1]) if inside else None


def _kind(instruction):
    base = re.sub(r"-(start|done)$", "", instruction.op)
    return base if base in KINDS else None


def first_group(rest: str, devices: int) -> list[int]:
    """The devices of the first group of a collective.

    Args:
      rest: its attributes: `replica_groups={{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`, groups
        by members, made of an iota of that shape with its axes exchanged; or
        `mesh['a'=2,'b'=4] {'b'}`, a group along the axes in braces.
      devices: of all, which are a group if it names none.

    Returns:
      Their numbers.
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if found:
        return [int(n) for n in found[1].split(",")]
    found = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    )
    if not found:
        return _along_axes(rest, devices)
    shape = [int(n) for n in found[3].split(",")]
    order = np.arange(math.prod(shape)).reshape(shape)
    if found[4]:
        order = order.transpose([int(n) for n in found[4].split(",")])
    return order.reshape(int(found[1]), int(found[2]))[0].tolist()


def _along_axes(rest, devices):
    found = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if not found:
        return list(range(devices))
    axes = [(name, int(n)) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])]
    order = np.arange(math.prod(n for _, n in axes)).reshape([n for _, n in axes])
    moved = re.search(r"device_ids=\(?\[([\d,]+)\]T\(([\d,]+)\)", rest)
    if moved:
        shape, turn = ([int(n) for n in moved[i].split(",")] for i in (1, 2))
        order = np.arange(order.size).reshape(shape).transpose(turn)
        order = order.reshape([n for _, n in axes])
    # An axis, or a part of one: 'a':(2)4 is 4 of it after 2.
    chosen = dict(
        (name, (int(before or 1), int(size or 0)))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[2])
    )
    places = []
    for name, n in axes:
        before, size = chosen.get(name, (1, 0))
        whole = name in chosen and not size
        after = n // (before * size) if size else 1
        places.append(range(n) if whole else range(0, (size or 1) * after, after))
    return order[np.ix_(*places)].reshape(-1).tolist()
