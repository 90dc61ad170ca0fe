"""A look at a few records of a source: what no record fits is a setting, not damage."""

import collections
from collections.abc import Callable

from unicl_jax.data.labels import OUT_OF_RANGE
from unicl_jax.data.readers import NUM_PROBED, Unreadable
from unicl_jax.errors import InputError

_HEAD = 16  # bytes of an image that a message shows


def check_records(source, reader, load: Callable) -> None:
    """Stops if no record of a few can be used, or most have labels without a class.

    Args:
      source: a `stream.FileSource`.
      reader: its reader.
      load: (index, seed) -> a record, or raises Unreadable.

    Raises:
      InputError: says what was found, and the setting to change.
    """
    num = len(source)
    probed = sorted({i * num // NUM_PROBED for i in range(NUM_PROBED)})
    reasons, first, labels = collections.Counter(), {}, []
    for index in probed:
        try:
            load(index, 0)
        except Unreadable as error:
            reasons[error.reason] += 1
            first.setdefault(error.reason, index)
            if error.reason == OUT_OF_RANGE:
                labels.append(error.found)
    if len(labels) > len(probed) // 2:
        raise InputError(
            f'source "{source.name}": labels must lie in [0, '
            f"{len(source.class_names)}), a class name each: {len(labels)} of "
            f"{len(probed)} records have others, from {min(labels)} to {max(labels)} "
            f"({source.where(first[OUT_OF_RANGE])}{reader.has()}); set the "
            "source's `class_names`, `label_offset` or `fields.label`."
        )
    if sum(reasons.values()) < len(probed):
        return
    found = ", ".join(
        f"{count} x {reason} ({source.where(first[reason])}"
        f"{_starts(reader, first[reason])})"
        for reason, count in reasons.most_common()
    )
    raise InputError(
        f'source "{source.name}": its records must hold an image and a text or label '
        f"that can be used: of {len(probed)} from all over it none does: {found}"
        f"{reader.has()}; set the source's {reader.settings}."
    )


def _starts(reader, index: int) -> str:
    """What is where the image should be."""
    try:
        image = reader.read(index)[0]
    except Unreadable:
        return ""
    return f", whose image is {image[:_HEAD]!r}" if image else ", whose image is empty"
