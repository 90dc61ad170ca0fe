"""CSV and TSV files whose rows name an image and its caption or label."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence

from absl import logging

from unicl_jax.data.damage import Damage
from unicl_jax.data.shards import is_remote, open_shard
from unicl_jax.errors import InputError, did_you_mean

# Columns that are looked for, the first one present counts, in any case.
COLUMNS = {
    "image": (
        *("filepath", "file_path", "image_path", "path", "image", "file"),
        *("filename", "file_name"),
    ),
    "text": ("caption", "text", "title"),
    "label": ("label", "class", "class_name"),
}
_WHAT = {"image": "image paths", "text": "captions", "label": "labels"}
_TAB_SUFFIXES = (".tsv", ".tab")
_OTHER_DELIMITERS = {";": '";"', "\t": '"tab"', "|": '"|"', ",": '","'}

Row = tuple[bytes, str]  # the image's path, and its caption or label


def read_tables(
    source: str,
    tables: Sequence[str],
    fields: Mapping[str, str],
    root: str = "",
    delimiter: str = "",
) -> tuple[list[Row], Damage]:
    """Reads the rows of tables that have an image and its caption or label.

    Args:
      source: the source's name, for errors.
      tables: paths of UTF-8 files, local or remote, whose first row names the columns.
      fields: column of "image" and of "text" or "label"; "": one of COLUMNS.
      root: folder that paths are relative to; "": each table's own.
      delimiter: between columns; "": a tab in .tsv and .tab files, else a comma.

    Returns:
      The rows in their order, and what was left out.

    Raises:
      InputError: if a table cannot be read, a column is not there, or no row is left.
    """
    delimiter = {r"\t": "\t", "tab": "\t"}.get(delimiter, delimiter)
    if len(delimiter) > 1 or delimiter in ('"', "\n", "\r"):
        raise InputError(
            f'source "{source}": delimiter must be one character, such as ";", or '
            f'"tab": got {delimiter!r}; mend it, or leave it out.'
        )
    rows, skipped = [], Damage()
    for path in tables:
        by_suffix = "\t" if path.lower().endswith(_TAB_SUFFIXES) else ","
        bad = Damage()
        folder = os.path.expanduser(root) or os.path.dirname(path)
        try:
            with open_shard(path, buffered=True) as file:
                rows += _rows(
                    source, path, file, fields, delimiter or by_suffix, folder, bad
                )
        except InputError:
            raise
        except Exception as error:  # gfile has error types of its own
            raise InputError(
                f'source "{source}": a table must be a readable file: {path} is not '
                f"({error}); set the source's `path`."
            ) from error
        if bad:
            logging.warning(
                'source "%s": rows of %s are left out: %s.', source, path, _said(bad)
            )
        skipped.join(bad)
    if not rows:
        raise InputError(
            f'source "{source}": at least one row must have an image and its '
            f"{'label' if 'label' in fields else 'caption'}: got "
            f"{_said(skipped) or 'no row'} in {', '.join(tables[:3])}; mend the table, "
            "or set `fields`."
        )
    return rows, skipped


def _said(counts):
    return ", ".join(f"{n} x {reason}" for reason, n in counts.most_common())


def _rows(source, path, file, fields, delimiter, folder, bad) -> Iterator[Row]:
    """The good rows; `bad` counts the others."""
    reader = _parsed(_decoded(source, path, file), delimiter, path, bad)
    _, header = next(reader, (0, []))
    image, value = (
        _column(source, path, header, role, fields[role], delimiter)
        for role in ("image", "label" if "label" in fields else "text")
    )
    what = "label" if "label" in fields else "caption"
    of_windows = None  # whether its paths have \ for /: the first one with a \ tells
    for line, row in reader:
        if not any(row):
            continue  # a blank line
        if len(row) <= max(image, value):
            bad.add("row is too short", path, f"line {line}")
            continue
        name, text = row[image].strip(), row[value].strip()
        full = _full_path(folder, name)
        if "\\" in name and of_windows is None:
            of_windows = not os.path.exists(full)
        if of_windows:
            full = _full_path(folder, name.replace("\\", "/"))
        reason = ""
        if not name:
            reason = "empty path"
        elif name.startswith(("http://", "https://")):
            reason = "path is a web address"
        elif not text:
            reason = f"empty {what}"
        elif not _is_utf8(text):
            reason = f"{what} is no UTF-8"
        elif not _is_utf8(name) and not os.path.exists(os.fsencode(full)):
            reason = "path is no UTF-8"  # other bytes may name a file, but do not
        if reason:
            bad.add(reason, path, f"line {line}")
        else:
            yield os.fsencode(full), text


def _full_path(folder, name):
    return name if is_remote(name) else os.path.join(folder, name)


def _decoded(source, path, file) -> Iterator[str]:
    """Lines as text; what is no UTF-8 becomes surrogates, which a path may hold."""
    for number, line in enumerate(file):
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")  # Excel's byte-order mark
            packed = line.startswith(b"\x1f\x8b")
            if packed or b"\0" in line:
                found = "gzip-compressed" if packed else "something else, as UTF-16"
                raise InputError(
                    f'source "{source}": a table must be text in UTF-8: {path} is '
                    f"{found}; {'unpack it' if packed else 'save it as UTF-8'}."
                )
        yield line.decode("utf-8", "surrogateescape")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parsed(lines, delimiter, path, bad) -> Iterator[tuple[int, list[str]]]:
    """Rows, and the lines they end at."""
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a quote that never ends, say; it goes on at the next line
            bad.add("row cannot be parsed", path, f"line {reader.line_num}")
        else:
            yield reader.line_num, row


def _column(source, path, header, role, wanted, delimiter) -> int:
    """Where a column is."""
    header = [name.strip() for name in header]
    if wanted in header and wanted:
        return header.index(wanted)
    lower = [name.lower() for name in header]
    for name in () if wanted else COLUMNS[role]:
        if name in lower:
            return lower.index(name)
    there = ", ".join(f'"{name}"' for name in header) or "nothing"
    todo = f"set `fields.{role}` to one of them"
    if wanted:
        todo += f"; {did_you_mean(wanted, header)}"
    elif len(header) == 1 and (marks := [c for c in _OTHER_DELIMITERS if c in there]):
        todo = f"set `delimiter` to {_OTHER_DELIMITERS[marks[0]]}"
    else:
        todo += ", or name the columns in the first row"
    expected = f'"{wanted}"' if wanted else f"one of {', '.join(COLUMNS[role])}"
    raise InputError(
        f'source "{source}": the table must have a column of {_WHAT[role]} '
        f"({expected}): {path} has {there}; {todo.rstrip('.')}."
    )
