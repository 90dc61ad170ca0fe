"""The records that a run skipped: each counted once, listed, and never too many.

`skipped.jsonl` has one object a line: `source`, `reason`, `shard` or `path`, `index`
(the record's in the source) and `step` (the training step that met it first). What
indexing left out has `step` 0, and instead of `index` a `count` for its place and the
`first` few by name. Every process lists its own records: the others' files are
`skipped-00001.jsonl` and so on.
"""

import collections
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicl_jax import storage
from unicl_jax.data.records import Rows, Source
from unicl_jax.errors import InputError

_LEAST, _ENOUGH = 100, 1000  # records looked at before a share says something
_NAMED = 3  # places in a message, by reason
_OTHERS = re.compile(r"skipped-(\d+)\.jsonl")


class SkippedRecords:
    """Counts, lists and limits; for one thread at a time.

    A record counts once for the run, however often it is met: `counts` and the file say
    the same, before and after a resume. The share is of the rows since this start, for
    the data may have been mended before it.

    Attributes:
      counts: of each source, reason -> records skipped or left out.
    """

    def __init__(self, sources: Sequence[Source], max_skipped: Sequence[float]):
        """Takes over what indexing left out.

        Args:
          sources: of the run.
          max_skipped: of each, the largest share of its records that may be skipped.

        Raises:
          InputError: if indexing left out too many.
        """
        self._sources, self._max_skipped = tuple(sources), tuple(max_skipped)
        self.counts = {s.name: collections.Counter(s.skipped) for s in sources}
        # A bit a record; what was met before is neither counted nor written again.
        self._known = [np.zeros(len(s) // 8 + 1, np.uint8) for s in sources]
        self._rows = [0] * len(sources)
        self._replaced = [0] * len(sources)
        self._found = [collections.Counter() for _ in sources]  # of the replaced
        self._first = [{} for _ in sources]  # reason -> places
        self._path, self._file = None, None
        for source, most in zip(sources, max_skipped, strict=True):
            damage = getattr(source, "damage", None)
            if damage and damage.lost + len(source) >= _LEAST:
                self._check_damage(source, damage, most)

    def keep(
        self,
        workdir: str | Path,
        step: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> "SkippedRecords":
        """Goes on with the file of an earlier start, or begins one.

        Args:
          workdir: of the run.
          step: updates made; lines of later ones are dropped: they will be met again.
          process_index: of this process.
          process_count: of all; files of processes that are no more are taken over.

        Returns:
          Itself.
        """
        self.close()
        workdir = storage.path(workdir)
        self._path = _file_of(workdir, process_index)
        found = map(_OTHERS.fullmatch, storage.names(workdir))
        numbers = {int(match[1]) for match in found if match}
        left = sorted(n for n in numbers if n >= process_count)
        mine = [n for n in left if n % process_count == process_index]
        others = [_file_of(workdir, number) for number in mine]
        lines = [] if process_index else self._damage_lines()
        found = [path for path in (self._path, *others) if path.exists()]
        if found:
            with storage.written_whole(self._path) as new:
                for path in found:
                    old = storage.lines(path)
                    new.writelines(x for x in old if self._is_kept(x, step))
        for path in others:
            storage.remove(path)
        self._write(lines)
        return self

    def add(self, place: int, step: int, rows: Rows) -> None:
        """Counts and lists what was met on the way to a step's rows.

        Args:
          place: the source's, among the sources.
          step: the training step that these rows are for.
          rows: of the source.

        Raises:
          InputError: with the list, if the source's share is too large.
        """
        source, lines = self._sources[place], []
        self._rows[place] += len(rows.labels)
        replaced = set()
        for row, index, reason in rows.skipped:
            where = source.place(index)
            if row not in replaced:  # what stands in its place may be unreadable, too
                replaced.add(row)
                self._found[place][reason] += 1
                self._name(place, reason, *where.values())
            if self._mark(place, index):
                self.counts[source.name][reason] += 1
                line = {"source": source.name, "reason": reason, **where}
                lines.append({**line, "index": index, "step": step})
        self._replaced[place] += len(replaced)
        self._write(lines)
        self._check_share(place)

    def scalars(self) -> dict[str, float]:
        """Returns counts by "source/reason", and by "source" the share, if not 0."""
        scalars = {
            f"{source}/{reason}": count
            for source, counts in self.counts.items()
            for reason, count in counts.items()
        }
        for place, source in enumerate(self._sources):
            if self._replaced[place]:
                scalars[source.name] = self._replaced[place] / self._rows[place]
        return scalars

    def sync(self) -> None:
        """Has the file be there, to the last line, before a save is."""
        with contextlib.suppress(OSError):  # the next one brings all of it
            storage.sync(self._file)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _name(self, place: int, reason: str, path: str) -> None:
        named = self._first[place].setdefault(reason, [])
        if len(named) < _NAMED and path not in named:
            named.append(path)

    def _mark(self, place: int, index: int) -> bool:
        """Whether a record was unknown; it no longer is."""
        known, bit = self._known[place], np.uint8(1 << (index & 7))
        is_new = not known[index >> 3] & bit
        known[index >> 3] |= bit
        return is_new

    def _is_kept(self, line: str, step: int) -> bool:
        """Whether a line of an earlier start stands; if so, it is counted."""
        try:
            found = json.loads(line)
            source, reason, index = found["source"], found["reason"], found["index"]
            if not 0 < found["step"] <= step:
                return False
        except (ValueError, KeyError, TypeError):
            return False  # a line that a kill cut off, or what indexing left out then
        for place, known in enumerate(self._sources):
            if known.name == source and hasattr(known, "place"):
                is_there = type(index) is int and 0 <= index < len(known)
                if is_there and known.place(index).items() <= found.items():
                    if not self._mark(place, index):
                        return False  # two processes met it
                self.counts[source][reason] += 1
        return True

    def _damage_lines(self) -> Iterator[dict[str, Any]]:
        for source in self._sources:
            damage = getattr(source, "damage", None)
            for left_out in damage.places() if damage else ():
                yield {
                    "source": source.name,
                    "reason": left_out.reason,
                    [*source.place(0)][0]: left_out.place,
                    "count": left_out.count,
                    "first": left_out.first,
                    "step": 0,
                }

    def _write(self, lines) -> None:
        if self._path is None:
            return
        for line in lines:
            if self._file is None:
                self._file = storage.open_log(self._path)
            self._file.write(json.dumps(line) + "\n")
        if self._file is not None:
            self._file.flush()

    def _check_share(self, place: int) -> None:
        source, most = self._sources[place], self._max_skipped[place]
        rows, replaced = self._rows[place], self._replaced[place]
        if rows < max(_LEAST, min(_ENOUGH, len(source))) or replaced <= most * rows:
            return
        counts = [
            (reason, n, self._first[place][reason])
            for reason, n in self._found[place].most_common()
        ]
        raise _too_many(source, most, replaced, rows, counts, self._path)

    def _check_damage(self, source, damage, most: float) -> None:
        total = damage.lost + len(source)
        if damage.lost <= most * total:
            return
        counts = []
        for reason, count in damage.most_common():
            found = [each for each in damage.places() if each.reason == reason]
            named = [" ".join([each.place, *each.first[:1]]) for each in found[:_NAMED]]
            counts.append((reason, count, named))
        raise _too_many(source, most, damage.lost, total, counts, None)


def _file_of(workdir: Path, process: int) -> Path:
    return workdir / (f"skipped-{process:05d}.jsonl" if process else "skipped.jsonl")


def _too_many(source, most, count, total, counts, path) -> InputError:
    found = "; ".join(
        f"{n} x {reason} (as {', '.join(places)})" for reason, n, places in counts
    )
    listed = f' ("{path}" lists them)' if path else ""
    return InputError(
        f'source "{source.name}": at most {100 * most:g} % of the records may be '
        f"skipped (max_skipped): {count} of {total} looked at are: {found}. Mend these "
        f"files or take them out{listed}, or raise data.max_skipped or the source's "
        "`max_skipped`; the same command goes on from the last save."
    )
