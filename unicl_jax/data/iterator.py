"""The training batches: plan, read, prompt, tokenise, prefetch."""

import collections
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unicl_jax.data import reading
from unicl_jax.data.captions import caption_lanes
from unicl_jax.data.concepts import ConceptTable
from unicl_jax.data.permutation import hash_bits
from unicl_jax.data.prompts import fill
from unicl_jax.data.records import NO_LABEL, Request, Source
from unicl_jax.data.sampler import Plan, Sampler, SourceInfo
from unicl_jax.data.skipped import SkippedRecords
from unicl_jax.data.text_length import TEXT_LENGTHS

Batch = dict[str, Any]
Tokenize = Callable[[Sequence[str]], np.ndarray]
CACHED_TEXTS = 1 << 16  # 20 MB of tokens at 77 slots
_CACHED_CHARS = 1000
_LAST_READ = 10  # seconds that a thread which is no longer needed is waited for
KEPT = 64  # batches whose figures can be asked for, those read ahead among them


class TrainIterator:
    """This process's rows of every batch, from any step on.

    A batch is a pure function of (seed, step), so the whole state is the number of the
    next step. Reading runs ahead in a thread.

    A batch is a dict of `image` [b, H, W, 3] uint8, `label` [b] int32 (concepts, or
    NO_LABEL) and `tokens` [b, L] int32. With `share_prompts` there are only as many
    rows of tokens as distinct texts may need, and `text_index` [b] int32 tells which
    is row i's: `tokens[text_index[i]]`. If a source has captions, `caption` [b, 2]
    int32 is equal where those are (`captions.caption_lanes`); labelled rows have
    NO_LABEL there. With `text_length="pack"` the tokens are
    `encoders.Packed`, a group of them for each device.

    Attributes:
      said: lines for the start of the run, on how its shards are read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        concepts: ConceptTable,
        templates: Sequence[str],
        tokenize: Tokenize,
        *,
        batch_size: int,
        mixture: str,
        seed: int,
        weights: Sequence[float] | None = None,
        share_prompts: bool = False,
        process_index: int = 0,
        process_count: int = 1,
        devices: int = 1,
        text_length: str = "full",
        lanes: int = 1,
        window: int = 0,
        prefetch: int = 2,
        max_skipped: Sequence[float] | None = None,
    ):
        """Plans the run; nothing is read until the first batch is asked for.

        Args:
          sources: where records come from.
          concepts: the concept of each source's classes.
          templates: prompts for class names; one is drawn for each record.
          tokenize: texts -> [n, L] int32; a `Tokenizer`, or what has a `cut` as it has.
          batch_size: global; divisible by process_count.
          mixture: a key of `sampler.MIXTURES`.
          seed: of order, prompts, captions and crops.
          weights: one a source, for the mixture; default 1.
          share_prompts: draw one prompt a class and step instead of one a record, and
            give each distinct text of a batch once; for a single process.
          process_index: of this process.
          process_count: of all.
          devices: of this process, over which token rows are divided; their number
            is rounded up to a multiple.
          text_length: a key of `text_length.TEXT_LENGTHS`.
          lanes: equal runs of a batch's rows, each of which reads shards of its own.
          window: records that a lane mixes; 0: all of a source's. See `windows`.
          prefetch: batches read ahead.
          max_skipped: of each source, the largest share of its records that may be
            skipped; default 1.
        """
        self.sources, self.concepts, self._prefetch = tuple(sources), concepts, prefetch
        self._templates, self._tokenize = tuple(templates), tokenize
        self._seed, self._share_prompts = seed, share_prompts
        weights = weights or [1.0] * len(sources)
        self.sampler = Sampler(
            [
                SourceInfo(s.name, s.kind, len(s), w, s.shard_sizes)
                for s, w in zip(sources, weights, strict=True)
            ],
            batch_size,
            mixture,
            seed,
            lanes,
            window,
        )
        self.said = reading.prepare(
            self.sources, self.sampler, process_index, process_count
        )
        local = batch_size // process_count
        self._process = process_index, process_count
        # Each source's stream and the batch itself ask for the same step's plan.
        self._plan = functools.lru_cache(8)(self.sampler.plan)
        self._rows = slice(process_index * local, (process_index + 1) * local)
        slots = min(local, self._most_texts()) if share_prompts else local
        self.text_slots = -(-slots // devices) * devices
        self._devices, self._text_length = devices, TEXT_LENGTHS[text_length]
        self._token_cache: dict[str, tuple[np.ndarray, bool]] = {}
        # Of the last batches, by step.
        self._figures: dict[int, dict[str, float]] = {}
        self._skipped: dict[int, dict[str, float]] = {}
        self._records = SkippedRecords(sources, max_skipped or [1.0] * len(sources))
        self._step, self._queue, self._stop = 0, None, threading.Event()
        self._worker = None

    def _most_texts(self):
        """The most distinct texts of a batch: a class brings one prompt a step."""
        most = self.sampler.most_rows()
        return sum(
            min(n, len(s.class_names)) if s.class_names else n
            for n, s in zip(most, self.sources, strict=True)
        )

    def state(self) -> dict[str, Any]:
        """The position: the step whose batch comes next."""
        return {"step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; read-ahead of another one is dropped."""
        self.close()
        self._step = int(state["step"])

    def keep_skipped(self, workdir) -> None:
        """Lists skipped records in a run's directory, going on from this position.

        Args:
          workdir: of the run; see `skipped`.
        """
        self.close()
        self._records.keep(workdir, self._step, *self._process)

    def sync_skipped(self) -> None:
        """Has that list be there, to the last line, before a save is."""
        self._records.sync()

    def skipped(self, step: int | None = None) -> dict[str, float]:
        """What this process skipped in the run up to a step; see `skipped`.

        Args:
          step: of the training, one of the last few that were read; None: all read.

        Returns:
          By "source/reason" how many records, those that indexing left out among them;
          by "source" the share of its rows that hold another record since this start.
        """
        return self._records.scalars() if step is None else self._skipped[step]

    def figures(self, step: int) -> dict[str, float]:
        """What a step's batch was made of.

        Args:
          step: of the training: 1 is the first. One of the last few that were read.

        Returns:
          texts_cut: share of texts that were too long and lost their tails, among this
            process's rows.
          rows/<source>: rows of the global batch, exact.
          epochs/<source>: seen up to this step, by all processes together, exact.
        """
        before, after = self.sampler.drawn(step - 1), self.sampler.drawn(step)
        rows = {
            f"rows/{source.name}": float(stop - start)
            for source, start, stop in zip(self.sources, before, after, strict=True)
        }
        epochs = {f"epochs/{k}": v for k, v in self.sampler.epochs(step).items()}
        return self._figures[step] | rows | epochs

    def records(self, step: int) -> list[dict[str, Any]]:
        """Which records a step's batch is planned of; nothing is read.

        Args:
          step: of the training: 1 is the first.

        Returns:
          Of each row of the global batch `source`, `index` and, if the source lies in
          files, `key`. In the place of an unreadable record the row holds the next
          one; `skipped.jsonl` lists those.
        """
        plan, found = self._plan(step - 1), []
        for s, index in zip(plan.source.tolist(), plan.index.tolist(), strict=True):
            source = self.sources[s]
            found.append(dict(source=source.name, index=index))
            if hasattr(source, "key"):
                found[-1]["key"] = source.key(index)
        return found

    def __iter__(self):
        """Returns itself; the batches never end."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, or raises what the reading thread met."""
        if self._worker is None:
            self._queue = queue.Queue(self._prefetch)
            self._stop = threading.Event()
            self._worker = threading.Thread(
                target=self._work,
                args=(self._step, self._queue, self._stop),
                daemon=True,
            )
            self._worker.start()
            # Python's exit does not wait for daemons, and TensorFlow's threads abort.
            self._end = weakref.finalize(
                self, _end, self._worker, self._queue, self._stop
            )
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._step += 1
        return item

    def close(self) -> None:
        """Stops reading ahead; the next batch starts it again."""
        if self._worker is not None:
            self._end()
            self._worker = None
        self._records.close()

    def _work(self, step, out, stop):
        try:
            for batch in self._batches(step):
                out.put(batch)
                if stop.is_set():
                    return
        except BaseException as error:  # reraised by __next__, in the main thread
            out.put(error)

    def _batches(self, first):
        """Every batch from step `first` on; each source is read by one stream."""

        def requests(s):
            step = first
            while True:
                plan = self._local(step)
                mine = plan.source == s
                yield Request(plan.index[mine], plan.seed[mine])
                step += 1

        streams = [s.stream(requests(i)) for i, s in enumerate(self.sources)]
        step = first
        try:
            while True:
                plan = self._local(step)
                parts = [next(stream) for stream in streams]
                for s, rows in enumerate(parts):
                    self._records.add(s, step + 1, rows)
                self._skipped[step + 1] = self._records.scalars()
                self._skipped.pop(step + 1 - KEPT, None)
                yield self._assemble(step, plan, parts)
                step += 1
        finally:
            # An error's traceback would keep them, and their threads, to the very end.
            for stream in streams:
                stream.close()

    def _local(self, step) -> Plan:
        return Plan(*(x[self._rows] for x in self._plan(step)))

    def _assemble(self, step, plan, parts) -> Batch:
        """Puts the sources' rows in the plan's order and gives each row its text."""
        size = len(plan.source)
        images = np.empty((size, *parts[0].images.shape[1:]), np.uint8)
        labels = np.full(size, NO_LABEL, np.int32)
        captions = np.full((size, 2), NO_LABEL, np.int32)
        texts: list[str] = [""] * size
        for s, (source, rows) in enumerate(zip(self.sources, parts, strict=True)):
            places = np.flatnonzero(plan.source == s)
            images[places] = rows.images
            seeds = plan.seed[places]
            if source.class_names:
                concepts = self.concepts.of_source[source.name][rows.labels]
                labels[places] = concepts
                if self._share_prompts:
                    seeds = hash_bits(self._seed, 2, step, concepts)
                picks = seeds % np.array(len(self._templates), seeds.dtype)
                for place, concept, pick in zip(places, concepts, picks, strict=True):
                    name = self.concepts.names[concept]
                    texts[place] = fill(self._templates[pick], name)
            else:
                drawn = [
                    own[seed % len(own)]
                    for own, seed in zip(rows.texts, seeds, strict=True)
                ]
                captions[places] = caption_lanes(drawn)
                for place, text in zip(places, drawn, strict=True):
                    texts[place] = text
        batch = dict(image=images, label=labels)
        if not all(source.class_names for source in self.sources):
            batch["caption"] = captions
        rows = np.arange(size)  # of tokens, by record
        if self._share_prompts:
            index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            rows = np.array([index[text] for text in texts], np.int32)
            batch["text_index"] = rows
            texts = list(index)
            texts += texts[:1] * (self.text_slots - len(texts))
        tokens, is_cut = self._tokens(texts)
        self._figures[step + 1] = dict(texts_cut=float(is_cut[rows].mean()))
        self._figures.pop(step + 1 - KEPT, None)
        tokens = self._text_length.prepare(tokens, self._devices)
        return batch | dict(tokens=tokens)

    def _tokens(self, texts) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and which were cut; prompts and captions come back every epoch."""
        cache = self._token_cache
        new = [text for text in dict.fromkeys(texts) if text not in cache]
        if len(cache) + len(new) > CACHED_TEXTS:
            cache.clear()
            new = list(dict.fromkeys(texts))
        if new:
            rows = self._tokenize(new)
            known = zip(rows, self._tokenize.cut(new, rows), strict=True)
            found = dict(zip(new, known, strict=True))
            # Long ones are rare, and 100 kB each would be no 20 MB of tokens.
            cache.update({t: v for t, v in found.items() if len(t) <= _CACHED_CHARS})
            cache = collections.ChainMap(cache, found)
        rows, is_cut = zip(*(cache[text] for text in texts), strict=True)
        return np.stack(rows), np.array(is_cut)


def _end(worker, out, stop):
    stop.set()
    patience = time.monotonic() + _LAST_READ
    # It may be waiting to put; or for a disk that will never answer.
    while worker.is_alive() and time.monotonic() < patience:
        try:
            out.get(timeout=0.05)
        except queue.Empty:
            pass
    out.queue.clear()  # an error in it would hold TensorFlow's iterator for ever
