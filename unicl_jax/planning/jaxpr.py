"""What a traced step computes, holds and moves: counted before any compiler sees it.

XLA fuses what is elementwise into what reads it, and computes it again where that is
cheaper than keeping it. So only some values ever lie in memory: what a product, a
reduction, a gather, a sort or a loop gives. All else is a function of those, and
whatever reads it reads them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

# Operations whose results lie in memory; what is named by none is fused.
_KEPT = (
    *("dot_general", "conv_general_dilated", "ragged_dot", "scan", "while", "cond"),
    *("gather", "scatter", "sort", "top_k", "cum", "reduce_window", "select_and"),
    *("random_bits", "random_gamma", "dynamic_", "reduce_", "arg", "fft", "eigh"),
    *("shard_map", "cholesky", "triangular", "qr", "custom_call", "concatenate"),
)
_INLINED = (
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
    *("remat", "remat2", "checkpoint", "custom_vjp_call_jaxpr", "custom_lin"),
)
# A fused value is kept after all if it is this much smaller than all it is made of: a
# residual stream is one array, not the sum of all that was added to it.
_SMALLER = 0.75


class Work(NamedTuple):
    """One operation that reads memory and writes it.

    name: of its primitive
    flops: of its products; `wide` if their inputs are float32
    bytes: read and written
    """

    name: str
    flops: float
    wide: bool
    bytes: float


class Counted(NamedTuple):
    """A program's work and memory.

    work: its operations, in order; a loop's as often as it runs
    peak: most bytes of intermediate values at once, arguments and results left out
    """

    work: list[Work]
    peak: float

    @property
    def flops(self) -> float:
        """Of all products; a multiplication and an addition are two."""
        return sum(work.flops for work in self.work)

    @property
    def bytes(self) -> float:
        """Read and written."""
        return sum(work.bytes for work in self.work)


def count(closed: Any, mapped: Sequence[Any] | None = None) -> Counted:
    """Counts a program.

    Args:
      closed: a jaxpr, closed or not.
      mapped: what stands in for its `shard_map`s, in their order: a program traced for
        one device has the loss of a small batch; None: they count as they are.

    Returns:
      Its work and memory.
    """
    program = _Program(getattr(closed, "jaxpr", closed))
    return program.counted(None if mapped is None else iter(mapped))


def find(closed: Any, name: str) -> Iterator[Any]:
    """The equations of a primitive, in whatever part of a program.

    Args:
      closed: a jaxpr.
      name: of the primitive.

    Yields:
      The equations.
    """
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in bodies(eqn):
            yield from find(inner, name)


def bodies(eqn: Any) -> Iterator[Any]:
    """The programs inside an equation: of a call, a loop or its branches."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield getattr(one, "jaxpr", one)


def _bytes(v):
    aval = v.aval
    try:
        itemsize = np.dtype(aval.dtype).itemsize
    except TypeError:  # a random key
        itemsize = 8
    return math.prod(aval.shape) * itemsize


class _Program:
    """A program as a list of equations without calls; values are numbers.

    A call's body may be one object for many calls, so its variables are no names.
    """

    def __init__(self, jaxpr):
        self.sizes, self.steps = [], []
        names = {v: self._new(v) for v in (*jaxpr.constvars, *jaxpr.invars)}
        self.arguments = set(names.values())
        self._add(jaxpr, names)
        self.results = self._known(jaxpr.outvars, names)

    def _new(self, v):
        self.sizes.append(_bytes(v))
        return len(self.sizes) - 1

    def _known(self, variables, names):
        return [names[v] for v in variables if not isinstance(v, Literal)]

    def _add(self, jaxpr, names):
        for eqn in jaxpr.eqns:
            name, inputs = eqn.primitive.name, self._known(eqn.invars, names)
            body = next(bodies(eqn), None)
            if name.startswith(_INLINED) and body is not None:
                inner = {v: self._new(v) for v in body.constvars}
                for mine, theirs in zip(body.invars, eqn.invars, strict=True):
                    literal = isinstance(theirs, Literal)
                    inner[mine] = self._new(mine) if literal else names[theirs]
                if name.startswith(("remat", "checkpoint")):
                    self.steps.append((None, inputs, []))
                self._add(body, inner)
                for mine, theirs in zip(body.outvars, eqn.outvars, strict=True):
                    literal = isinstance(mine, Literal)
                    names[theirs] = self._new(theirs) if literal else inner[mine]
            else:
                outputs = [self._new(v) for v in eqn.outvars]
                names |= dict(zip(eqn.outvars, outputs, strict=True))
                self.steps.append((eqn, inputs, outputs))

    def counted(self, mapped):
        """Two walks: what is kept and who reads it; then how much lives at a time."""
        made_of = {v: frozenset([v]) for v in self.arguments}
        reads = []  # of each step that works: what it reads, what it keeps
        barriers = {v for eqn, inputs, _ in self.steps if eqn is None for v in inputs}
        kept_here = []
        for eqn, inputs, outputs in self.steps:
            source = frozenset().union(*(made_of.get(v, ()) for v in inputs))
            if eqn is None:
                continue
            if eqn.primitive.name.startswith(_KEPT):
                made_of |= {v: frozenset([v]) for v in outputs}
                reads.append((eqn, source, outputs))
                continue
            whole = sum(self.sizes[v] for v in source)
            for v in outputs:
                if v in barriers or self.sizes[v] < _SMALLER * whole:
                    made_of[v] = frozenset([v])
                    kept_here.append(v)
                    reads.append((eqn, source, [v]))
                else:
                    made_of[v] = source
        end = frozenset().union(*(made_of.get(v, ()) for v in self.results))
        reads.append((None, end, []))
        last, given = {}, self.arguments | set(self.results)
        for i, (_, source, _) in enumerate(reads):
            last |= dict.fromkeys(source - given, i)
        ends = {}
        for v, i in last.items():
            ends.setdefault(i, []).append(v)
        live = peak = 0.0
        work = []
        for i, (eqn, source, outputs) in enumerate(reads):
            live += sum(self.sizes[v] for v in outputs if v in last)
            inside = 0.0
            if eqn is not None:
                moved = sum(self.sizes[v] for v in (*source, *outputs))
                done, inside = _work(eqn, moved, mapped)
                work += done
            peak = max(peak, live + inside)
            live -= sum(self.sizes[v] for v in ends.get(i, ()))
        return Counted(work, peak)


def _work(eqn, moved, mapped):
    """The work of an equation, and bytes that it holds beside its results."""
    name = eqn.primitive.name
    if name == "dot_general":
        return [Work(name, _dot(eqn), _is_wide(eqn), moved)], 0.0
    if name == "conv_general_dilated":
        return [Work(name, _convolution(eqn), _is_wide(eqn), moved)], 0.0
    if name == "shard_map" and mapped is not None:
        body = count(next(mapped))
        return body.work, body.peak
    inner = [count(body) for body in bodies(eqn)]
    if not inner or name.startswith(("reduce_", "scatter", "sort", "cum", "custom")):
        return [Work(name, 0.0, False, moved)], 0.0
    if name == "cond":
        body = max(inner, key=lambda counted: (counted.flops, counted.bytes))
        # Without products it rewrites what it is given where that lies: an update.
        return body.work, body.peak if body.flops else 0.0
    times = eqn.params.get("length", 1)  # of "while" nobody knows: once
    work = [work for body in inner for work in body.work] * times
    return work, max(body.peak for body in inner)


def _is_wide(eqn):
    return all(np.dtype(v.aval.dtype).itemsize >= 4 for v in eqn.invars[:2])


def _dot(eqn):
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return (
        2.0
        * math.prod(eqn.outvars[0].aval.shape)
        * math.prod(lhs[i] for i in contracted)
    )


def _convolution(eqn):
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    out = eqn.outvars[0].aval.shape
    taps = [kernel[i] for i in numbers.rhs_spec[1:]]  # inputs of a group, and places
    # Where the input is spread out with zeros between, those cost nothing.
    spread = math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(out) * math.prod(taps) / spread
