"""From requests to rows in one tf.data pipeline, with a stand-in for what is broken."""

import collections
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from unicl_jax.config import MAX_PIXELS
from unicl_jax.data.header import CANNOT_DECODE, refusal
from unicl_jax.data.labels import OUT_OF_RANGE
from unicl_jax.data.preprocess import make_preprocess
from unicl_jax.data.probe import check_records
from unicl_jax.data.readers import LostShard, Unreadable, check_target
from unicl_jax.data.records import NO_LABEL, Request, Rows, Skip
from unicl_jax.data.shards import BLOCK, cores, is_remote
from unicl_jax.data.tensorflow import import_tensorflow
from unicl_jax.errors import InputError

_CHUNK = 16  # records that a thread takes at once
_FETCH_AHEAD = 1024  # records whose blocks are on their way, in threads of their own
_READ_AHEAD = 32  # chunks; 77 MB at 224 pixels


class _Pending:
    """A request whose rows are under way, filled by the pipeline's threads."""

    def __init__(self, request: Request, image_size: int):
        """Makes room for the rows; each place of it is written by one thread."""
        num = len(request.indices)
        self.request = request
        self.rows = Rows(
            images=np.empty([num, image_size, image_size, 3], np.uint8),
            texts=[()] * num,
            labels=np.full([num], NO_LABEL, np.int32),
        )
        self.is_filled = np.zeros([num], bool)
        self.failure = None


class FileSource:
    """A source over any reader; see `records.Source` for its attributes."""

    def __init__(
        self,
        name: str,
        kind: str,
        class_names: tuple[str, ...],
        reader,
        *,
        preprocess: Mapping,
        image_size: int,
        train: bool,
        max_skips_in_a_row: int = 100,
        in_blocks: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        """Checks the settings; `stream` starts the threads.

        Args:
          name: the source's name.
          kind: one of records.KINDS.
          class_names: names by class index; () for image-text.
          reader: what `sources.FORMATS` makes.
          preprocess: see `preprocess.make_preprocess`.
          image_size: pixels of a side of the images.
          train: random crops and flips, or the centre crop.
          max_skips_in_a_row: neighbours tried in place of an unreadable record.
          in_blocks: whether local shards are read as remote ones are.
          max_pixels: larger images are not decoded: they are unreadable.
        """
        self.name = name
        self.kind = kind
        self.class_names = tuple(class_names)
        self.damage = reader.index.damaged
        self.skipped = collections.Counter(self.damage)
        self.shard_sizes = reader.index.shard_sizes
        self._in_blocks = in_blocks
        self._fetched_ahead = 0  # records; with blocks only
        self._reader = reader
        self._image_size = image_size
        self._max_skips_in_a_row, self._max_pixels = max_skips_in_a_row, max_pixels
        self._preprocess = make_preprocess(name, preprocess, image_size, train)

    def __len__(self) -> int:
        """Returns the number of records, readable or not."""
        return len(self._reader.index)

    def fingerprint(self) -> str:
        """See `records.Source`."""
        return self._reader.index.fingerprint()

    @property
    def index(self):
        """Where the records lie: an `indexing.Index` or a `listing.FileIndex`."""
        return self._reader.index

    def where(self, index: int) -> str:
        """Returns the file that a record is, or lies in."""
        return self._reader.where(index)

    def key(self, index: int) -> str:
        """Returns a record's path, or its shard and the place there, "a.tar#512"."""
        return self._reader.key(index)

    def encoded(self, index: int) -> bytes:
        """Returns a record's image file, not decoded; b"" if that cannot be read."""
        try:
            return self._reader.read(index)[0]
        except Unreadable:
            return b""

    def why_unreadable(self, index: int) -> str:
        """Reads a record by itself.

        Args:
          index: in [0, len(self)).

        Returns:
          The reason why `stream` replaces it; "" if it does not.
        """
        try:
            self._load(index, 0)
        except Unreadable as error:
            return error.reason
        return ""

    @property
    def is_far(self) -> bool:
        """Whether shards are slow to read here and there: remote ones, say."""
        shards = self._reader.index.shards if len(self.shard_sizes) else ()
        return self._in_blocks and bool(shards) or any(map(is_remote, shards))

    def keep_blocks(self, records: int, runs: int) -> int:
        """Reads far shards in whole blocks from now on, and keeps those read last.

        Args:
          records: neighbours that are asked for in any order.
          runs: stretches of shards that these lie in.

        Returns:
          Bytes of the blocks that are kept at most.
        """
        index = self._reader.index
        num_bytes = min(records / len(index), 1) * index.num_bytes
        # Each stretch begins and ends within a block; so do the shards it runs over.
        shards = len(self.shard_sizes)
        cut = 2 * runs + min(records * shards // len(index), shards)
        num_blocks = int(num_bytes // BLOCK) + 1 + cut
        self._reader.shards.keep_blocks(num_blocks)
        # Blocks that come too early would push out those in use.
        self._fetched_ahead = min(_FETCH_AHEAD, records // 4)
        return min(num_blocks * BLOCK, index.num_bytes)

    def times_read(self, pieces: int) -> float:
        """How many times all is fetched if so many read a piece each, in blocks."""
        index = self._reader.index
        # Where a piece ends inside of a block, the next one fetches that block again.
        cut = min(BLOCK, index.num_bytes / len(self.shard_sizes))
        return 1 + (pieces - 1) * cut / index.num_bytes

    def place(self, index: int) -> dict[str, str]:
        """Returns the {"shard": path} or {"path": path} of a record."""
        return {self._reader.index.PLACE: self.where(index)}

    def check_records(self) -> None:
        """Stops if a few records show that a setting is wrong; see `probe`."""
        check_records(self, self._reader, self._load)

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Reads the records of each request; a pure function of indices and seeds.

        An unreadable record is replaced by the next readable one (index + 1, ... modulo
        the length) under the same seed, and counted in `skipped`. One whose shard is
        gone is replaced by the one at its place in the next shard: many are missing at
        once, and one record would be in the place of all.

        Args:
          requests: taken ahead of the rows, from another thread; may be endless.

        Yields:
          One Rows per Request, in order.

        Raises:
          InputError: if an index is out of range or too many neighbours are unreadable.
        """
        pending = {}  # by number of the request in the stream
        failures = []
        if self._fetched_ahead:
            requests = self._fetch_ahead(requests)

        def take_requests():
            try:
                for number, request in enumerate(requests):
                    request = self._check(request)
                    pending[number] = _Pending(request, self._image_size)
                    size = len(request.indices)
                    # A request without records is a chunk, too.
                    for start in range(0, max(size, 1), _CHUNK):
                        yield number, start, start + _CHUNK >= size
            except Exception as error:  # the pipeline passes over errors: keep it here
                failures.append(error)

        def load(number, start, is_last):
            part = pending[int(number)]
            try:
                self._load_chunk(part, int(start))
            except Exception as error:
                part.failure = error
            return number, is_last

        for number, is_last in self._pipeline(take_requests, load):
            if is_last:
                yield self._finish(pending.pop(int(number)))
        if failures:
            raise failures[0]

    def _fetch_ahead(self, requests):
        """Passes requests on, after their blocks were asked for: decoding goes on."""
        waiting, num = collections.deque(), 0
        for request in requests:
            index = self._reader.index
            spans = index.spans(np.asarray(request.indices, np.int64))
            self._reader.shards.fetch_ahead(*(part.tolist() for part in spans))
            waiting.append(request)
            num += len(request.indices)
            while num > self._fetched_ahead:
                num -= len(waiting[0].indices)
                yield waiting.popleft()
        yield from waiting

    def _pipeline(self, take_requests, load):
        """Numbers of chunks, in order, once `load` has filled their rows."""
        tf = import_tensorflow()
        spec = [tf.TensorSpec([], tf.int64)] * 2 + [tf.TensorSpec([], tf.bool)]
        dataset = tf.data.Dataset.from_generator(
            take_requests, output_signature=tuple(spec)
        )

        # Pixels don't pass through TensorFlow, which would copy them twice. No
        # AutoGraph: where it fails it prints what it saw, the whole environment too.
        @tf.autograph.experimental.do_not_convert
        def load_chunk(*chunk):
            return tf.numpy_function(load, chunk, [tf.int64, tf.bool], stateful=False)

        dataset = dataset.map(load_chunk, num_parallel_calls=cores())
        options = tf.data.Options()
        # All of it is set here; and the thread that tunes can miss that it is to end,
        # which then takes until its next turn, up to a minute away.
        options.autotune.enabled = False
        dataset = dataset.prefetch(_READ_AHEAD).with_options(options)
        return dataset.as_numpy_iterator()

    def _check(self, request: Request) -> Request:
        indices = np.asarray(request.indices, np.int64)
        seeds = np.asarray(request.seeds, np.int64)
        if indices.ndim != 1 or indices.shape != seeds.shape:
            raise InputError(
                f'source "{self.name}": a request must hold one seed per index: got '
                f"shapes {indices.shape} and {seeds.shape}; mend the sampler."
            )
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise InputError(
                f'source "{self.name}": indices must lie in [0, {len(self)}): got '
                f"{indices.min()} to {indices.max()}; mend the sampler."
            )
        return Request(indices, seeds)

    def _load_chunk(self, pending: _Pending, start: int) -> None:
        indices, seeds = (part[start : start + _CHUNK] for part in pending.request)
        for row, (index, seed) in enumerate(zip(indices, seeds, strict=True), start):
            try:
                self._fill(pending, row, *self._load(int(index), int(seed)))
            except Unreadable:
                pass  # `_finish` replaces it

    def _load(self, index: int, seed: int):
        """The pixels, captions and label of a record, or raises Unreadable."""
        data, text, label = self._reader.read(index)
        texts, label = check_target(self.kind, len(self.class_names), text, label)
        if reason := refusal(data, self._max_pixels):
            raise Unreadable(reason)
        try:
            image = self._preprocess(data, seed)
        except ValueError as error:
            raise Unreadable(CANNOT_DECODE) from error
        return image, texts, label

    def _fill(self, pending: _Pending, row: int, image, texts, label: int):
        pending.rows.images[row] = image
        pending.rows.texts[row] = texts
        pending.rows.labels[row] = label
        pending.is_filled[row] = True

    def _finish(self, pending: _Pending) -> Rows:
        if pending.failure is not None:
            raise pending.failure
        skipped = []
        for row in map(int, np.flatnonzero(~pending.is_filled)):
            index, seed = (int(part[row]) for part in pending.request)
            found, met = self._replacement(index, seed)
            self._fill(pending, row, *found)
            skipped += [Skip(row, *each) for each in met.items()]
        return pending.rows._replace(skipped=tuple(skipped))

    def _replacement(self, index: int, seed: int):
        """Loads the first readable record from `index` on; tells the others."""
        at, met = index, {}
        for _ in range(min(self._max_skips_in_a_row, len(self))):
            try:
                found = self._load(at, seed)
            except Unreadable as error:
                met[at] = error.reason
                if isinstance(error, LostShard):
                    at = self._reader.index.in_next_shard(at)
                else:
                    at = (at + 1) % len(self)
                continue
            self.skipped.update(met.values())
            return found, met
        self.skipped.update(met.values())
        first = {reason: i for i, reason in reversed(met.items())}
        counts = ", ".join(
            f"{n} x {reason} (as {self.where(first[reason])})"
            for reason, n in collections.Counter(met.values()).most_common()
        )
        hint = " and `label_offset`" if OUT_OF_RANGE in first else ""
        raise InputError(
            f'source "{self.name}": fewer than {self._max_skips_in_a_row} records in a '
            f"row may be unreadable: from record {index} on got {counts}; check the "
            f"source's files and `fields`{hint}, or raise `max_skips_in_a_row`."
        )
