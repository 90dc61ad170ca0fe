"""The contact sheet: augmented images as a step sees them, each with its text."""

import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from unicl_jax import data, storage
from unicl_jax.augment import make_views
from unicl_jax.checks.report import some
from unicl_jax.checks.setting import Setting
from unicl_jax.errors import InputError

COLUMNS = 8  # pictures in a row, the views of a record side by side
MOST_ROWS = 6  # of all sources together, if they are few
TILE, GAP, MARGIN = 128, 12, 20  # pixels
LINES, LINE, FONT = 3, 16, 12  # of a text; pixels of a line and its letters
HEAD = 40  # pixels of a line over a source's rows
INK, FAINT, FRAME, LABEL = "#202020", "#606060", "#d0d0d0", "#1b7837"
MOST_BATCHES = 8  # read until every source has its rows
PLAIN_PIXELS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean, deviation: not normalised
_ELSEWHERE = (
    "CJK",
    "Unicode",
    "Noto",
    "Gothic",
    "Hei",
    "Ming",
    "Nirmala",
    "Devanagari",
)


class Tile(NamedTuple):
    """A record as a step sees it.

    Attributes:
      views: [views, S, S, 3] uint8.
      text: as it was tokenised.
      concept: its name; "" for image-text.
    """

    views: np.ndarray
    text: str
    concept: str


def read_tiles(setting: Setting, count: int) -> dict[str, list[Tile]]:
    """The first records of a run, through the iterator and the device's augmentation.

    Args:
      setting: with its batches.
      count: of each source.

    Returns:
      At most `count` by source; fewer of one that has few rows in a batch.
    """
    config, sources = setting.config, setting.batches.sources
    smallest = min(setting.batches.sampler.shares)
    batches = data.make_train_iterator(
        {**config.data, "text_length": "full", "lanes": 1, "window": 0},
        setting.image_size,
        max(count * len(sources), int(-(-1 // smallest))),
        config.seed,
        setting.tokenizer,
        sources=sources,
    )
    augment = jax.jit(
        make_views(
            config.augment,
            config.strong_augment,
            views=config.views,
            image_size=setting.model_size,
            normalization=PLAIN_PIXELS,
        )
    )
    tiles = {source.name: [] for source in sources}
    try:
        for step in range(MOST_BATCHES):
            batch = next(batches)
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            views = np.asarray(augment(key, batch["image"]).images)
            views = np.clip(255 * views + 0.5, 0, 255).astype(np.uint8)
            rows = batch.get("text_index", np.arange(len(views)))
            for i, s in enumerate(batches.sampler.plan(step).source):
                mine = tiles[sources[s].name]
                if len(mine) < count:
                    text = setting.tokenizer.decode(batch["tokens"][rows[i]])
                    text = re.sub(r" ([,.;:!?)])", r"\1", text)  # words of their own
                    label = batch["label"][i]
                    name = batches.concepts.names[label] if label >= 0 else ""
                    mine.append(Tile(views[i], text, name))
            if all(len(mine) == count for mine in tiles.values()):
                break
    finally:
        batches.close()
    return tiles


def draw(setting: Setting, path: Path) -> tuple[int, int]:
    """Draws some records of every source, one band each.

    Args:
      setting: with its batches.
      path: of the PNG.

    Returns:
      Its width and height in pixels.

    Raises:
      InputError: if it cannot be written.
    """
    from PIL import Image, ImageDraw

    config, sources = setting.config, setting.batches.sources
    views = min(config.views, COLUMNS)
    columns = COLUMNS // views
    rows = max(1, MOST_ROWS // len(sources))
    tiles = read_tiles(setting, rows * columns)
    bands = {name: -(-len(mine) // columns) for name, mine in tiles.items()}
    wide = views * TILE  # pixels of a record
    high = TILE + (LINES + 1) * LINE + GAP
    width = 2 * MARGIN + columns * (wide + GAP) - GAP
    height = 2 * MARGIN + 2 * LINE + sum(HEAD + n * high for n in bands.values())
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)

    def write(x, y, text, room, ink=INK, lines=1, size=FONT, bold=False):
        face = font(text, size, bold)
        for i, line in enumerate(wrapped(text, face, room, lines)):
            pen.text((x, y + i * LINE), line, ink, face)

    many = f", {views} views of each" if views > 1 else ""
    title = f"Records as a step sees them{many}, and the texts as they are tokenised"
    write(MARGIN, MARGIN, title, width - 2 * MARGIN, size=14, bold=True)
    top = MARGIN + 2 * LINE
    for source in sources:
        left = MARGIN
        about = f"{source.kind.replace('_', '-')}, {some(len(source), 'record')}"
        about += ": concept, and the prompt drawn" if source.class_names else ""
        for part, ink in ((source.name, INK), (about, FAINT)):
            write(left, top + GAP, part, width - MARGIN - left, ink, size=14)
            left += int(font(part, 14).getlength(part)) + GAP
        top += HEAD
        for i, tile in enumerate(tiles[source.name]):
            x = MARGIN + i % columns * (wide + GAP)
            y = top + i // columns * high
            frame = (x - 1, y - 1, x + wide, y + TILE)  # white ones end somewhere
            pen.rectangle(frame, outline=FRAME)
            for view in range(views):
                image = Image.fromarray(tile.views[view])
                image = image.resize((TILE, TILE), _how(image))
                sheet.paste(image, (x + view * TILE, y))
            y += TILE + 3
            if tile.concept:
                write(x, y, tile.concept, wide, LABEL, bold=True)
                y += LINE
            lines = LINES + (not tile.concept)
            write(x, y, tile.text, wide, lines=lines)
        top += bands[source.name] * high
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.written_whole(path, "wb") as file:
            sheet.save(file, "PNG")
    except OSError as error:
        raise InputError(
            f'--out must be a folder that can be written: "{path.parent}" gave '
            f"{error.strerror or error}; name another one."
        ) from error
    return sheet.size


def wrapped(text: str, face, room: int, lines: int) -> list[str]:
    """Breaks a text between words, and words that are too long anywhere.

    Args:
      text: any.
      face: what it is written in, a PIL font.
      room: pixels of a line.
      lines: at most so many; what is left ends in "…".

    Returns:
      The lines.
    """
    found, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if face.getlength(longer) <= room:
            line = longer
            continue
        if line:
            found.append(line)
        while face.getlength(word) > room:
            fits = (
                n for n in range(len(word), 1, -1) if face.getlength(word[:n]) <= room
            )
            end = next(fits, 1)
            found.append(word[:end])
            word = word[end:]
        line = word
    found += [line] * bool(line)
    if len(found) > lines:
        last = found[lines - 1]
        while last and face.getlength(last + "…") > room:
            last = last[:-1]
        found = [*found[: lines - 1], last.rstrip() + "…"]
    return found


def font(text: str, size: int, bold: bool = False):
    """A font that has a text's letters: DejaVu, or the best that is installed.

    Args:
      text: what will be written; letters that no font has become boxes.
      size: pixels.
      bold: where it is DejaVu.

    Returns:
      A PIL font.
    """
    letters = frozenset(text) - {" "}
    return _face(
        _best(letters, bold) if letters - _letters(_dejavu()) else _dejavu(bold), size
    )


@functools.cache
def _face(path, size):
    from PIL import ImageFont

    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _dejavu(bold=False):
    import matplotlib

    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@functools.lru_cache(64)
def _letters(path) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):  # no font that FreeType reads
        return frozenset()


@functools.lru_cache(256)
def _best(letters: frozenset[str], bold: bool) -> str:
    """The installed font that has the most of some letters."""
    from matplotlib import font_manager

    found = [f for f in font_manager.fontManager.ttflist if "Last Resort" not in f.name]
    found.sort(key=lambda f: not any(part in f.name for part in _ELSEWHERE))
    paths = dict.fromkeys([_dejavu(bold), *(f.fname for f in found)])
    return max(itertools.islice(paths, 60), key=lambda p: len(letters & _letters(p)))


def _how(image):
    from PIL import Image

    whole = image.width <= TILE and TILE % image.width == 0
    return Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
