"""Writes a source as a prepared folder; see `prepared` for what lies in one.

Shards are written one after the other, each record read and checked by any of the
workers: one shard is enough to keep them all busy, and a kill costs one shard.
"""

import concurrent.futures
import hashlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from unicl_jax.config import MAX_PIXELS
from unicl_jax.data import prepare_plan as plans
from unicl_jax.data import prepared
from unicl_jax.data.indexing import index_tfrecords, index_to_bytes
from unicl_jax.data.prepare_plan import Options
from unicl_jax.data.prepared import INDEX, MANIFEST, PLAN, UNFINISHED, VERSION
from unicl_jax.data.raw import make_filter, open_raw
from unicl_jax.data.readers import Unreadable
from unicl_jax.data.shard_writer import (
    FRAME,
    Row,
    in_order,
    made_whole,
    make_index,
    remove,
    remove_leftovers,
    serialize,
    write_json,
    write_shard,
)
from unicl_jax.data.shards import gfile
from unicl_jax.data.tensorflow import import_tensorflow
from unicl_jax.errors import InputError

_CHUNK = 4  # records a worker takes at once
_SAMPLE = 128  # records whose sizes say how many shards there will be


class Progress(NamedTuple):
    """How far it is.

    Attributes:
      done: records read, those of an earlier start among them.
      total: of the source.
      left_out: of the former.
      size: bytes written by this start.
    """

    done: int
    total: int
    left_out: int
    size: int


def prepare(
    name: str,
    config: Mapping[str, Any],
    folder: str,
    options: Options,
    *,
    workers: int,
    train: bool = True,
    say: Callable[[str], None] = lambda line: None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Writes a source as a prepared folder, or goes on where a kill ended that.

    The bytes depend on the source and the options, not on the number of workers.

    Args:
      name: the source's name; the shards' names start with it.
      config: its settings, as in a config.
      folder: local or remote; made if it is not there.
      options: what it is to be like.
      workers: threads that read and decode.
      train: whether it is a source, or an evaluation; see `raw.open_raw`.
      say: is told, in a line, what was found there.
      watch: is told how far it is, after each record.

    Returns:
      The manifest.

    Raises:
      InputError: if the source cannot be opened or has no readable record, the folder
        holds something else, or cannot be written.
    """
    folder = os.path.expanduser(folder)
    plans.check_options(options, workers)
    try:
        return _prepare(name, config, folder, options, workers, train, say, watch)
    except InputError:
        raise
    except (OSError, import_tensorflow().errors.OpError) as error:
        raise InputError(
            f'--out must be a folder that can be written: "{folder}" gave {error}; '
            "make room there, or name another folder. The same command goes on."
        ) from error


def _prepare(name, config, folder, options, workers, train, say, watch):
    wanted = plans.wanted(name, config, options)
    manifest = prepared.read_manifest(folder)
    plan = manifest or prepared.read_json(os.path.join(folder, UNFINISHED, PLAN))
    if plan and not manifest and not plans.is_begun(folder):
        plans.discard(folder, plan)  # nothing of it is whole: it binds nobody
        plan = None
    plans.check_folder(folder, plan, wanted)
    damage = prepared.find_damage(folder, manifest) if manifest else {}
    if manifest and not damage:
        remove(os.path.join(folder, UNFINISHED))
        say("it is prepared already; the source was not looked at again.")
        return manifest
    records = open_raw(name, config, train)
    found = {
        "kind": records.kind,
        "class_names": list(records.class_names),
        "source_records": len(records),
        "fingerprint": records.fingerprint(),
    }
    if plan:
        plans.check_unchanged(folder, plan, found)
    max_pixels = int(config.get("max_pixels") or MAX_PIXELS)
    job = _Job(name, folder, records, options, max_pixels, workers, watch)
    gfile().makedirs(os.path.join(folder, UNFINISHED))
    remove_leftovers(folder)
    if manifest:
        say(f"{len(damage)} files are missing or cut off: they are written anew.")
        job.mend(manifest, damage)
        remove(os.path.join(folder, UNFINISHED))
        return manifest
    if not plan:
        plan = {"version": VERSION, **wanted, **found}
        plan["num_shards"] = job.num_shards(options)
        write_json(os.path.join(folder, UNFINISHED, PLAN), plan)
    facts = job.facts_of_whole_shards(plan["num_shards"])
    if facts:
        say(f"going on: {len(facts)} of {plan['num_shards']} shards are there.")
    stop_after = int(config.get("max_skips_in_a_row") or 100)
    facts |= job.write_missing(plan["num_shards"], facts, stop_after)
    manifest = job.finish(plan, [facts[shard] for shard in sorted(facts)])
    remove(os.path.join(folder, UNFINISHED))
    return manifest


class _Job:
    """The writing of one folder."""

    def __init__(self, name, folder, records, options, max_pixels, workers, watch):
        self._name, self._folder, self._records = name, folder, records
        self._keep = make_filter(options.check, options.max_side, max_pixels)
        self._workers, self._watch = workers, watch

    def _path(self, *parts: str) -> str:
        return os.path.join(self._folder, *parts)

    def _facts_of(self, shard: int) -> str:
        return self._path(UNFINISHED, f"{shard:05d}.json")

    def _row(self, index: int) -> Row:
        try:
            raw = self._records.read(index)
            raw = raw._replace(image=self._keep(raw.image))
        except Unreadable as error:
            return Row(b"", error.reason, 0, 0)
        return Row(serialize(raw), "", raw.label, len(raw.texts))

    def num_shards(self, options: Options) -> int:
        """How many there will be, by the mean size of some records."""
        num = len(self._records)
        if options.shards:
            if options.shards > num:
                raise InputError(
                    "--shards must be at most the number of records: got "
                    f'{options.shards} for the {num} of source "{self._name}".'
                )
            return options.shards
        sample = sorted({i * num // _SAMPLE for i in range(_SAMPLE)})
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            sizes = [len(row.payload) + FRAME for row in pool.map(self._row, sample)]
        estimate = sum(sizes) / len(sizes) * num
        return min(num, max(1, math.ceil(estimate / (options.shard_mib * 2**20))))

    def facts_of_whole_shards(self, num_shards: int) -> dict[int, dict[str, Any]]:
        """What an earlier start has written, by shard."""
        facts = {}
        for shard in range(num_shards):
            known = prepared.read_json(self._facts_of(shard))
            if known and prepared.size(self._path(known["file"])) == known["bytes"]:
                facts[shard] = known
        return facts

    def write_missing(self, num_shards, known, stop_after) -> dict[int, dict[str, Any]]:
        """Writes the shards of which nothing is known; returns their facts."""
        facts = {}
        missing = [shard for shard in range(num_shards) if shard not in known]
        for shard, written in self._write(missing, num_shards, known, stop_after):
            # After the shard, so that one without it is written again.
            write_json(self._facts_of(shard), written)
            facts[shard] = written
        return facts

    def _write(self, shards, num_shards, known, stop_after) -> Iterator[tuple]:
        """Writes shards; yields each one's number and facts."""
        ends = [i * len(self._records) // num_shards for i in range(num_shards + 1)]
        left_out = sum(sum(facts["skipped"].values()) for facts in known.values())
        done = sum(ends[shard + 1] - ends[shard] for shard in known)
        progress = Progress(done, len(self._records), left_out, 0)
        chunks = [
            (shard, range(first, min(first + _CHUNK, ends[shard + 1])))
            for shard in shards
            for first in range(ends[shard], ends[shard + 1], _CHUNK)
        ]

        def watched(rows):
            nonlocal progress
            reasons = Counter()  # of those since the last good one
            for row in rows:
                done, total, left_out, size = progress
                if row.reason:
                    reasons[row.reason] += 1
                    left_out += 1
                    if reasons.total() >= stop_after:
                        raise self._unreadable(reasons)
                else:
                    reasons.clear()
                    size += len(row.payload) + FRAME
                progress = Progress(done + 1, total, left_out, size)
                self._watch(progress)
                yield row

        def read(chunk):
            return chunk[0], [self._row(index) for index in chunk[1]]

        pool = concurrent.futures.ThreadPoolExecutor(self._workers)
        try:
            parts = in_order(pool, read, chunks, ahead=2 * self._workers)
            for shard, group in itertools.groupby(parts, key=lambda part: part[0]):
                file = plans.shard_name(self._name, shard, num_shards)
                rows = itertools.chain.from_iterable(rows for _, rows in group)
                facts = write_shard(self._path(file), watched(rows))
                yield shard, {"version": VERSION, "file": file, **facts}
        finally:
            pool.shutdown(cancel_futures=True)

    def _unreadable(self, reasons) -> InputError:
        counts = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
        return InputError(
            f'source "{self._name}": records must be readable, but for a few: got '
            f"{counts}, one after the other; check its files, `fields` and "
            "`label_offset`, or raise `max_skips_in_a_row`. The same command goes on."
        )

    def finish(self, plan, facts) -> dict[str, Any]:
        """Writes the index, then the manifest, which makes the folder a whole one."""

        def total(what):
            return sum((Counter(each[what]) for each in facts), Counter())

        if not sum(each["records"] for each in facts):
            plans.discard(self._folder, plan)
            raise self._unreadable(total("skipped"))
        index, counts = make_index(facts), total("labels")
        self._write_index(index)
        keys = ("file", "records", "bytes", "sha256")
        manifest = {
            **plan,
            "records": sum(each["records"] for each in facts),
            "bytes": sum(each["bytes"] for each in facts),
            "captions": sum(each["captions"] for each in facts),
            "skipped": dict(sorted((total("skipped") + self._records.damaged).items())),
            "class_counts": [counts[str(i)] for i in range(len(plan["class_names"]))],
            "shards": [{key: each[key] for key in keys} for each in facts],
            "index": {
                "file": INDEX,
                "bytes": len(index),
                "sha256": hashlib.sha256(index).hexdigest(),
            },
        }
        write_json(self._path(MANIFEST), manifest)
        return manifest

    def _write_index(self, index: bytes) -> None:
        with made_whole(self._path(INDEX)) as path, open(path, "wb") as file:
            file.write(index)

    def mend(self, manifest, damage) -> None:
        """Writes missing files of a finished folder anew; they must be the same."""
        entries = manifest["shards"]
        bad = [i for i, entry in enumerate(entries) if entry["file"] in damage]
        for shard, facts in self._write(bad, len(entries), {}, math.inf):
            if facts["sha256"] != entries[shard]["sha256"]:
                path = self._path(facts["file"])
                remove(path)
                raise InputError(
                    f'"{path}" must come out as it was: it did not, so the source or '
                    "the libraries that encode images have changed; prepare it into "
                    "another folder."
                )
        if INDEX in damage:
            shards = [self._path(entry["file"]) for entry in entries]
            self._write_index(index_to_bytes(index_tfrecords(self._name, shards)))
