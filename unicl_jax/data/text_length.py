"""How many token slots a batch's texts take: work that follows their real length.

With a causal tower that reads its feature at the end of the text, what comes after that
end changes nothing. So the slots behind a batch's longest text can be cut, or several
texts be packed into one row. Shapes stay few, as each is a program to compile, and each
is a function of the batch alone: a resumed run computes what it would have.

Letters: b texts of a process, L token slots.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unicl_jax import sharding
from unicl_jax.encoders.packing import Packed, pack, with_rows
from unicl_jax.errors import InputError, choose

BUCKET = 16  # slots; lengths are multiples of it
PACK_SLOTS = 128  # of a packed row: a matrix unit's rows and columns, on a TPU


class TextLength(NamedTuple):
    """One of the ways, in three steps, of which the second may ask other processes.

    prepare(tokens [b, L], groups) -> texts: of one batch, on the reading thread
    size(texts) -> what must be equal on all processes, 0 where nothing has to
    fit(texts, size) -> the texts in a shape made for `size` or more
    """

    prepare: Callable[[np.ndarray, int], np.ndarray | Packed]
    size: Callable[[Any], int]
    fit: Callable[[Any, int], np.ndarray | Packed]


def _as_they_are(tokens, groups):
    del groups
    return tokens


def _packed(tokens, groups):
    return pack(tokens, max(PACK_SLOTS, tokens.shape[1]), groups=groups)


def longest(tokens: np.ndarray) -> int:
    """Ids of the longest text, its end included; the end is the largest id.

    Args:
      tokens: [b, L] integers.

    Returns:
      In [1, L]; 0 if there are no texts.
    """
    return int(tokens.argmax(1).max(initial=-1)) + 1


def cut(tokens: np.ndarray, length: int | None = None) -> np.ndarray:
    """Leaves out slots behind the longest text.

    Args:
      tokens: [b, L] integers.
      length: of the longest text; None: these texts'.

    Returns:
      [b, l]; l is `length` rounded up to a multiple of BUCKET, at most L.
    """
    length = longest(tokens) if length is None else length
    return tokens[:, : max(1, -(-length // BUCKET)) * BUCKET]


def few_sizes(size: int) -> int:
    """Rounds up to a multiple of a power of 2: 1 to 16, 18, 20, ..., 32, 36, ...

    At most an eighth is added, and each doubling has eight sizes.

    Args:
      size: at least 0.

    Returns:
      No less than size.
    """
    step = 1 << max(0, (size - 1).bit_length() - 4)
    return -(-size // step) * step


TEXT_LENGTHS = {
    # All slots that the tower has.
    "full": TextLength(_as_they_are, lambda tokens: 0, lambda tokens, size: tokens),
    # As many as the longest text of the batch needs.
    "bucket": TextLength(_as_they_are, longest, cut),
    # Several texts in a row, a group of rows for each device.
    "pack": TextLength(
        _packed, lambda x: x.rows, lambda x, size: with_rows(x, few_sizes(size))
    ),
}


def make_text_length(name: str, text: Mapping[str, Any]) -> TextLength:
    """Picks the way that a config names.

    Args:
      name: a key of TEXT_LENGTHS.
      text: options of the text tower, defaults included.

    Returns:
      The three steps.

    Raises:
      InputError: if there is no such way, or the tower sees what it would leave out.
    """
    found = choose(TEXT_LENGTHS, name, "data.text_length")
    if name != "full" and not text.get("causal", False):
        raise InputError(
            f'data.text_length="{name}" needs a causal text tower, to which nothing '
            "after a text's end matters: this one sees padding, too; set "
            'data.text_length to "full".'
        )
    return found


def in_equal_shapes(
    batches: Iterable[dict[str, Any]], how: TextLength, mesh: Mesh
) -> Iterator[dict[str, Any]]:
    """Batches whose `tokens` have the same shape on every process.

    With several processes a batch is taken one step ahead, and its size travels while
    the devices are at the step before: nobody waits for it.

    Args:
      batches: this process's rows, texts as `prepare` left them; endless.
      how: the way.
      mesh: the devices of all processes.

    Yields:
      The batches.
    """
    if jax.process_count() == 1 or how is TEXT_LENGTHS["full"]:
        for batch in batches:
            tokens = batch["tokens"]
            yield batch | dict(tokens=how.fit(tokens, how.size(tokens)))
        return
    largest = jax.jit(lambda x: x.max(), out_shardings=sharding.replicated(mesh))

    def announced():
        for batch in batches:
            mine = np.full(jax.local_device_count(), how.size(batch["tokens"]), "i4")
            yield batch, largest(sharding.global_batch(mesh, dict(size=mine))["size"])

    ahead = announced()
    batch, size = next(ahead)
    for following in ahead:
        yield batch | dict(tokens=how.fit(batch["tokens"], int(size)))
        batch, size = following
