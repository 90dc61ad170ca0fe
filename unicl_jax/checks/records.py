"""What a source gives: whether it opens, what is broken, how its images are."""

import collections
import contextlib
import io
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unicl_jax import data
from unicl_jax.checks.report import Section, named, percent, some, two_digits
from unicl_jax.data.records import Request

TIMED = 16  # records that are read one by one, against the clock
LARGE = 4.0  # megapixels that the model cannot see and the reader decodes all the same
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright

# What to do about the reasons that sources give; a part of the reason is enough.
ADVICE = {
    "cannot be decoded": "delete these files, or save them again as JPEG or PNG",
    "file is missing": "mend the paths in the table, or set the source's `root`",
    "file cannot be read": "mend the permissions of these files",
    "out of range": "mend the labels, `label_offset`, or the list in `class_names`",
    "label is no class": "add these to `class_names`, or mend the labels",
    "no image suffix": "save them as .jpg or .png if they are images",
    "in no class folder": "move them into the folder of their class",
    "no UTF-8": "save the table as UTF-8",
    "empty": "fill them in, or delete the rows",
    "web address": "download the images, and name the files instead",
    "damaged shard": "fetch that shard again",
    "no field": "set the source's `fields`",
    "member": "set the source's `fields`, or write both members of each record",
}
HARMLESS = ("hidden",)  # what every folder of a desktop has


class Sample(NamedTuple):
    """What was read of a source.

    Attributes:
      indices: [n] int64, of the records.
      texts: n tuples of captions; () of image-label records.
      labels: [n] int32, within the source.
      seconds: to read one record, in one thread.
    """

    indices: np.ndarray
    texts: list
    labels: np.ndarray
    seconds: float


class _Header(NamedTuple):
    index: int
    width: int
    height: int
    mode: str
    is_turned: bool

    @property
    def megapixels(self):
        return self.width * self.height / 1e6


def open_source(
    section: Section, name: str, config: Mapping, image_size: int, train: bool
) -> data.Source:
    """Opens a source, and says what it is and what it has left out.

    Args:
      section: to add to.
      name: the source's.
      config: of the source.
      image_size: pixels of a side.
      train: or for an evaluation.

    Returns:
      The source.

    Raises:
      InputError: as the trainer would.
    """
    with _overheard() as lines:
        source = data.make_source(name, config, image_size, train)
    classes = f", {some(len(source.class_names), 'class')}" * bool(source.class_names)
    where = config["path"]
    where = where if isinstance(where, str) else named(list(where), "")
    section.good(
        f"{config['format']}, {source.kind.replace('_', '-')}: "
        f"{some(len(source), 'record')}{classes}, {where}"
    )
    for reason, count in source.skipped.items():
        if reason in HARMLESS:
            section.note(f"left out: {count:,} x {reason}")
            continue
        said = [x.removeprefix(f'source "{name}": ') for x in _more(lines, reason)]
        what = f"left out: {count:,} x {reason}"
        section.warn("\n".join([what, *said]), _advice(reason))
    return source


def read_sample(
    section: Section,
    source: data.Source,
    image_size: int,
    count: int,
    seed: int,
    max_skipped: float = 1.0,
) -> Sample:
    """Reads some records as training does, and looks at their files.

    Args:
      section: to add to.
      source: that was opened.
      image_size: pixels of a side that it makes.
      count: how many, at most.
      seed: of which.
      max_skipped: the largest share of them that training lets be unreadable.

    Returns:
      What was read.

    Raises:
      InputError: as the trainer would, if too many are unreadable.
    """
    indices = spread(len(source), count, seed)
    before = sum(source.skipped.values())
    request = Request(indices, np.zeros(len(indices), np.uint32))
    start = time.perf_counter()
    (rows,) = source.stream([request])  # to its end: an open one has TensorFlow warn
    took = (time.perf_counter() - start) / len(indices)
    if not hasattr(source, "encoded"):
        section.good(f"{some(len(indices), 'record')} read, with nothing to decode")
        return Sample(indices, rows.texts, rows.labels, took)
    broken = {}
    if sum(source.skipped.values()) > before:
        reasons = ((int(i), source.why_unreadable(int(i))) for i in indices)
        broken = {i: reason for i, reason in reasons if reason}
    for reason in dict.fromkeys(broken.values()):
        files = [source.where(i) for i, r in broken.items() if r == reason]
        share = percent(len(files) / len(indices))
        section.warn(
            f"{len(files)} of {some(len(indices), 'record')} read ({share}): {reason}, "
            f"as {named(_unlike(files), '')}; the next readable one stands in",
            _advice(reason),
        )
    if len(broken) > max_skipped * len(indices):
        section.fail(
            f"at most {percent(max_skipped)} of the records may be skipped "
            f"(max_skipped): {len(broken)} of {some(len(indices), 'record')} read are",
            "mend them, as above, or raise data.max_skipped: training would stop",
        )
    good = [int(i) for i in indices if int(i) not in broken]
    if not good:
        return Sample(indices, rows.texts, rows.labels, took)
    seconds = _seconds(source, good)
    if not broken:
        section.good(f"{some(len(indices), 'record')} read, all of them readable")
    rate = 1 / max(np.mean(seconds), 1e-9)
    took = two_digits(1e3 * np.median(seconds))
    section.note(
        f"an image takes {took} ms to read and crop (median of {len(seconds)}): "
        f"{two_digits(rate)} images/s for each core"
    )
    _look_at_files(section, source, good, image_size)
    return Sample(indices, rows.texts, rows.labels, float(np.mean(seconds)))


def spread(length: int, count: int, seed: int) -> np.ndarray:
    """Records from all over a source: one at random of each of `count` equal parts.

    Args:
      length: of the source.
      count: how many.
      seed: of the choice.

    Returns:
      [min(length, count)] int64, ascending.
    """
    count = min(length, count)
    edges = np.arange(count + 1) * length // count
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def _seconds(source, indices) -> list[float]:
    some_of = indices[:: max(1, len(indices) // TIMED)][:TIMED]
    source.why_unreadable(some_of[0])  # the first one waits for more than its bytes
    seconds = []
    for index in some_of:
        start = time.perf_counter()
        source.why_unreadable(index)
        seconds.append(time.perf_counter() - start)
    return seconds


def _look_at_files(section, source, indices, image_size):
    headers = [h for i in indices if (h := _header(i, source.encoded(i)))]
    if not headers:
        return
    sides = sorted(min(h.width, h.height) for h in headers)
    modes = collections.Counter(h.mode for h in headers).most_common()
    span = f"{sides[0]:,}" + f" to {sides[-1]:,}" * (sides[0] < sides[-1])
    small = sum(side < image_size for side in sides) / len(sides)
    section.note(
        f"shorter sides of {span} pixels, for {image_size} x {image_size}"
        + f" ({percent(small)} are enlarged)" * bool(small)
        + "; colours: "
        + ", ".join(f"{n:,} {mode}" for mode, n in modes)
    )
    large = [h for h in headers if h.megapixels > LARGE]
    if large and sides[-1] >= 2 * image_size:
        top = max(large, key=lambda h: h.megapixels)
        source.why_unreadable(top.index)
        start = time.perf_counter()
        source.why_unreadable(top.index)
        took = 1e3 * (time.perf_counter() - start)
        section.warn(
            f"over {LARGE:g} megapixels: {len(large)} of "
            f"{some(len(headers), 'image')}, as {source.where(top.index)}, {top.width} "
            f"x {top.height}, which takes {took:.0f} ms",
            f"write them smaller, once, as `python -m unicl_jax.prepare` does with "
            f"--max_side={2 * image_size}: enough for crops of {image_size}",
        )
    turned = [h for h in headers if h.is_turned]
    if turned:
        section.warn(
            f"stored turned: {len(turned)} of {some(len(headers), 'image')}, as "
            f"{source.where(turned[0].index)}: EXIF's orientation is not applied",
            "turn their pixels, once, as `mogrify -auto-orient` does",
        )


def _header(index: int, encoded: bytes) -> _Header | None:
    """What a file says of itself before its pixels; None if Pillow cannot tell."""
    from PIL import Image

    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # it decodes nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # at odd metadata
            with Image.open(io.BytesIO(encoded)) as image:
                turned = image.getexif().get(_ORIENTATION, 1) != 1
                return _Header(index, *image.size, image.mode, turned)
    except Exception:  # whatever a decoder raises at damaged bytes
        return None
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _unlike(files):
    return list(dict.fromkeys(map(_short_path, files)))


def _short_path(path):
    """The end of a path: what tells files of a source apart."""
    return os.path.join(*Path(path).parts[-3:])


def _more(lines, reason):
    """Of what was logged, the lines that name a label, or the place of damage."""
    for part, word in (("damaged", "damaged"), ("label", "for one")):
        if part in reason:
            return [line for line in lines if word in line]
    return []


def _advice(reason):
    found = (todo for part, todo in ADVICE.items() if part in reason)
    return next(found, "mend these records, or leave them out")


@contextlib.contextmanager
def _overheard() -> Iterator[list[str]]:
    """Takes the lines that sources log, which the report says in its own way."""
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("absl"), Handler()
    old, old_propagate = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [handler], False
    try:
        yield lines
    finally:
        logger.handlers[:], logger.propagate = old, old_propagate
