"""From requests to rows in one tf.data pipeline, with a stand-in for what is broken."""

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from unicl_jax.data.decode import SEPARATOR, import_tensorflow
from unicl_jax.data.preprocess import make_preprocess
from unicl_jax.data.readers import Unreadable
from unicl_jax.data.records import NO_LABEL, Request, Rows
from unicl_jax.errors import InputError

_CHUNK = 16  # records handed from TensorFlow to Python at once
_MARKER = -1  # the place of what stands behind the last row of a request
_READ_AHEAD = 32  # chunks; 77 MB at 224 pixels, where AUTOTUNE may take half the memory


class _Pending(NamedTuple):
    """A request whose rows are under way, and the rows that have arrived."""

    number: int  # of the request in the stream
    request: Request
    rows: Rows
    is_filled: np.ndarray


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
    ):
        """Builds the ops once; `stream` starts the threads.

        Args:
          name: the source's name.
          kind: one of records.KINDS.
          class_names: names by class index; () for image-text.
          reader: what `sources.FORMATS` makes.
          preprocess: see `preprocess.make_preprocess`.
          image_size: pixels of a side of the images.
          train: random crops and flips, or the centre crop.
          max_skips_in_a_row: neighbours tried in place of an unreadable record.
        """
        tf = import_tensorflow()
        self.name = name
        self.kind = kind
        self.class_names = tuple(class_names)
        self.skipped = collections.Counter(reader.index.damaged)
        self._reader = reader
        self._image_size = image_size
        self._max_skips_in_a_row = max_skips_in_a_row
        pixels = make_preprocess(name, preprocess, image_size, train)

        # One graph for the stream and for replacements, so that both round alike. No
        # AutoGraph: nothing here needs it, and where it fails it prints what it saw,
        # the whole environment with it.
        @tf.function(
            autograph=False,
            input_signature=[
                tf.TensorSpec([], tf.string),
                tf.TensorSpec([], tf.string),
                tf.TensorSpec([], tf.int64),
                tf.TensorSpec([], tf.int64),
            ],
        )
        def process(payload, text, label, seed):
            image, text, label = reader.parse(payload, text, label)
            return pixels(image, seed), text, label

        self._process = process

    def __len__(self) -> int:
        """Returns the number of records, readable or not."""
        return len(self._reader.index)

    def stream(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Reads the records of each request; a pure function of indices and seeds.

        An unreadable record is replaced by the next readable one (index + 1, ... modulo
        the length) under the same seed, and counted in `skipped`.

        Args:
          requests: taken ahead of the rows, from another thread; may be endless.

        Yields:
          One Rows per Request, in order.

        Raises:
          InputError: if an index is out of range or too many neighbours are unreadable.
        """
        pending = collections.deque()  # appended by the pipeline, emptied here
        failures = []

        def take_requests():
            try:
                for number, request in enumerate(requests):
                    indices, seeds = self._check(request)
                    pending.append(self._new_pending(number, Request(indices, seeds)))
                    # Behind the rows go markers, enough to fill the chunk: no request,
                    # not even an empty one, waits for a later one.
                    places = np.append(np.arange(len(indices)), [_MARKER] * _CHUNK)
                    yield (
                        np.full_like(places, number),
                        places,
                        np.append(indices, [0] * _CHUNK),
                        np.append(seeds, [0] * _CHUNK),
                    )
            except Exception as error:  # the pipeline passes over errors: keep it here
                failures.append(error)

        for chunk in self._pipeline(take_requests).as_numpy_iterator():
            for number, place, image, text, label in zip(*chunk, strict=True):
                if place != _MARKER:
                    self._fill(pending[0], place, image, text, label)
                elif pending and number == pending[0].number:  # its first marker
                    yield self._finish(pending.popleft())
        if failures:
            raise failures[0]

    def _pipeline(self, take_requests):
        tf = import_tensorflow()

        def read(index):
            try:
                payload, text, label = self._reader.read(int(index))
            except Unreadable:
                payload, text, label = b"", b"", 0  # `process` fails on it
            # As objects: numpy's own bytes type drops trailing zeros.
            return (
                np.array(payload, object),
                np.array(text, object),
                np.int64(label),
            )

        def load(index, seed):
            parts = tf.numpy_function(
                read, [index], [tf.string, tf.string, tf.int64], stateful=False
            )
            parts = [tf.ensure_shape(part, []) for part in parts]
            return self._process(*parts, seed)

        nothing = tf.zeros([self._image_size, self._image_size, 3], tf.uint8)

        def load_row(number, place, index, seed):
            image, text, label = tf.cond(
                place == _MARKER,
                lambda: (nothing, tf.constant(b""), tf.constant(0, tf.int64)),
                lambda: load(index, seed),
            )
            return number, place, image, text, label

        vectors = (tf.TensorSpec([None], tf.int64),) * 4
        dataset = tf.data.Dataset.from_generator(
            take_requests, output_signature=vectors
        )
        dataset = dataset.unbatch()
        dataset = dataset.map(
            tf.autograph.experimental.do_not_convert(load_row),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        dataset = dataset.ignore_errors()  # drops what fails: `_finish` sees the gaps
        return dataset.batch(_CHUNK).prefetch(_READ_AHEAD)

    def _check(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
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
        return indices, seeds

    def _new_pending(self, number: int, request: Request) -> _Pending:
        num, size = len(request.indices), self._image_size
        rows = Rows(
            images=np.zeros([num, size, size, 3], np.uint8),
            texts=[()] * num,
            labels=np.full([num], NO_LABEL, np.int32),
        )
        return _Pending(number, request, rows, np.zeros([num], bool))

    def _fill(self, pending: _Pending, row: int, image, text: bytes, label: int):
        try:
            texts, label = self._check_target(text, int(label))
        except Unreadable:
            return  # `_finish` replaces it
        pending.rows.images[row] = image
        pending.rows.texts[row] = texts
        pending.rows.labels[row] = label
        pending.is_filled[row] = True

    def _check_target(self, text: bytes, label: int) -> tuple[tuple[str, ...], int]:
        """Returns the captions and the label of a row, or raises Unreadable."""
        if self.kind == "image_label":
            if not 0 <= label < len(self.class_names):
                raise Unreadable("label out of range")
            return (), label
        try:
            captions = [part.decode().strip() for part in text.split(SEPARATOR)]
        except UnicodeDecodeError as error:
            raise Unreadable("caption is no UTF-8") from error
        captions = tuple(caption for caption in captions if caption)
        if not captions:
            raise Unreadable("empty caption")
        return captions, NO_LABEL

    def _finish(self, pending: _Pending) -> Rows:
        for row in np.flatnonzero(~pending.is_filled):
            index, seed = (int(part[row]) for part in pending.request)
            self._fill(pending, row, *self._replacement(index, seed))
        return pending.rows

    def _replacement(self, index: int, seed: int):
        """Loads the first readable record from `index` on."""
        reasons = collections.Counter()
        for step in range(min(self._max_skips_in_a_row, len(self))):
            try:
                found = self._load((index + step) % len(self), seed)
            except Unreadable as error:
                reasons[error.reason] += 1
                continue
            self.skipped.update(reasons)
            return found
        self.skipped.update(reasons)
        counts = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
        hint = " and `label_offset`" if "label out of range" in reasons else ""
        raise InputError(
            f'source "{self.name}": fewer than {self._max_skips_in_a_row} records in a '
            f"row may be unreadable: from record {index} on got {counts}; check the "
            f"source's files and `fields`{hint}, or raise `max_skips_in_a_row`."
        )

    def _load(self, index: int, seed: int):
        """Loads one record outside of the pipeline, or raises Unreadable."""
        tf = import_tensorflow()
        payload, text, label = self._reader.read(index)
        reason = self._reader.explain(payload)
        if reason:
            raise Unreadable(reason)
        try:
            image, text, label = self._process(payload, text, label, seed)
        # TensorFlow quotes bytes in its messages, which may be no UTF-8.
        except (tf.errors.OpError, UnicodeDecodeError) as error:
            raise Unreadable("image cannot be decoded") from error
        text, label = text.numpy(), int(label)
        self._check_target(text, label)
        return image.numpy(), text, label
