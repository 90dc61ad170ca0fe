"""How this process reads the sources' shards, and what that costs."""

from collections.abc import Sequence

from unicl_jax.data.records import Source
from unicl_jax.data.sampler import Sampler
from unicl_jax.data.windows import WindowedOrder

_WINDOWS = 2  # of a lane: the one that ends and the one that begins
_MUCH = 1.25  # times the data, from where on it is said


def own_lanes(sampler: Sampler, process_index: int, process_count: int) -> range:
    """The lanes that a process has rows of.

    Args:
      sampler: of the run.
      process_index: of this process.
      process_count: of all.

    Returns:
      lanes / processes of them where that is whole; else some are shared.
    """
    first = process_index * sampler.lanes // process_count
    return range(first, -(-(process_index + 1) * sampler.lanes // process_count))


def prepare(
    sources: Sequence[Source],
    sampler: Sampler,
    process_index: int = 0,
    process_count: int = 1,
) -> list[str]:
    """Sets the sources to their windows.

    Args:
      sources: as the sampler has them.
      sampler: of the run.
      process_index: of this process.
      process_count: of all.

    Returns:
      Lines for the start of the run: which shards are this process's, the memory that
      blocks take, and settings that cost reading.
    """
    said = []
    lanes = own_lanes(sampler, process_index, process_count)
    for s, source in enumerate(sources):
        if s in sampler.windowed:
            line = _prepare_one(source, sampler.windowed[s], lanes, process_count)
            if process_count > 1 or source.is_far:
                said.append(f"{source.name}: {line}")
        elif source.is_far:
            said.append(
                f"{source.name}: {len(source.shard_sizes)} shards are read record by "
                "record, which is slow where they are remote: set data.window"
            )
    if sampler.windowed and sampler.lanes % process_count:
        read = sum(
            len(own_lanes(sampler, p, process_count)) for p in range(process_count)
        )
        said.append(
            f"data.lanes is {sampler.lanes} and there are {process_count} processes: "
            "those that share a lane all read what it reads, together "
            f"{read / sampler.lanes:.1f} times the data; with lanes divisible by the "
            "processes it is read once"
        )
    return said


def _prepare_one(source: Source, order: WindowedOrder, own: range, processes: int):
    """Sets a source to its window; says how it is read."""
    num = len(source.shard_sizes)
    line = f"{num} shards in {order.lanes} lanes"
    if processes > 1:
        start, stop = (order.chunk(0, lane).start for lane in (own.start, own.stop))
        mine = len(order.shards_between(0, start, stop))
        line += f"; this process's {len(own)} read {mine} of them in the first epoch"
    if source.is_far:
        runs = _WINDOWS * len(own)
        chunk = -(-order.length // order.lanes)
        kept = source.keep_blocks(runs * min(order.window, chunk), runs)
        line += f"; up to {_size(kept)} of blocks are kept"
        if (times := source.times_read(order.lanes)) > _MUCH:
            line += (
                f"; lanes are short, and blocks at their ends are read twice: "
                f"{times:.1f} times the data; fewer data.lanes lower that"
            )
    if num < min(order.lanes, processes):
        most = min(processes, -(-processes // num) + 1)
        line += f"; a shard is read by up to {most} processes, each a part of it"
    return line


def _size(num_bytes: int) -> str:
    """A size for people, in powers of 1024."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.1f} GiB"
    return f"{num_bytes / (1 << 20):.0f} MiB"
