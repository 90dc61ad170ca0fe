"""Text to token ids: CLIP's byte-pair encoding in pure Python.

A text is cleaned, split into words, and each word starts as its UTF-8 bytes; the
merge learned first is applied first until none fits. Ids are laid out as

    0..255               a byte inside a word
    256..511             the same byte as the last of its word
    512..vocab_size - 3  the merges, in the order in which they were learned
    vocab_size - 2, - 1  SOT and EOT

Shapes: N texts, L = context_length.
Source: Radford et al., ICML 2021, arXiv 2103.00020, section 2.4 (lower-cased byte
pairs, SOT and EOT around the text); Sennrich et al., ACL 2016, arXiv 1508.07909 (the
merge rule). `vocab/README.md` holds the source and licence of the vocabulary.
"""

import functools
import gzip
import heapq
import html
import itertools
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources

import ftfy
import numpy as np
import regex

from unicl_jax.errors import InputError

FULL_VOCAB_SIZE = 49408  # CLIP: 512 byte symbols, 48,894 merges, SOT, EOT
_NUM_BYTE_SYMBOLS = 512
_MIN_VOCAB_SIZE = _NUM_BYTE_SYMBOLS + 2  # no merges at all: bytes, SOT, EOT

# Texts may name the two markers by these strings, as they may in open_clip.
_SOT_TEXT, _EOT_TEXT = "<start_of_text>", "<end_of_text>"

# CLIP's words: English clitics, runs of letters, single digits, runs of the rest. No
# alternative holds white space, so a text may be split at white space first.
_WORD = regex.compile(
    rf"{_SOT_TEXT}|{_EOT_TEXT}"
    r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_WHITE_SPACE = regex.compile(r"\s+")

_CACHE_WORDS = 1 << 16
_MAX_CACHED_CHARS = 64  # longer words are rare; without this the cache has no bound
_HEAD_CHARS = 4096  # of a longer text, first the lines that end before this


class Tokenizer:
    """CLIP's tokenizer, or a smaller one that keeps its most frequent merges.

    With a `vocab_size` below 49,408 only the first `vocab_size - 514` merges apply: the
    same texts take more ids, down to one a byte, and none is unknown. So a small model
    can have a small embedding table. Ids below `vocab_size - 2` mean the same in every
    size.

    Attributes:
      vocab_size: number of ids, the rows of the embedding table.
      sot: id that starts every text, `vocab_size - 2`.
      eot: id that ends every text and fills the row after it, `vocab_size - 1`.
      context_length: ids in a row, SOT and EOT included.
    """

    def __init__(self, context_length: int = 77, vocab_size: int = FULL_VOCAB_SIZE):
        """Reads the vocabulary that is shipped with the package.

        Args:
          context_length: ids in a row, at least 3 (SOT, one id, EOT).
          vocab_size: number of ids, 514 to 49,408.

        Raises:
          TypeError: if either is not an int.
          InputError: if either is out of its range.
        """
        _check_int("context_length", context_length)
        _check_int("vocab_size", vocab_size)
        if context_length < 3:
            raise InputError(
                "context_length must be at least 3, for SOT, one id and EOT: got "
                f"{context_length}; CLIP and UniCL use 77."
            )
        if not _MIN_VOCAB_SIZE <= vocab_size <= FULL_VOCAB_SIZE:
            raise InputError(
                f"vocab_size must be between {_MIN_VOCAB_SIZE} (bytes alone) and "
                f"{FULL_VOCAB_SIZE} (CLIP's): got {vocab_size}; small models do well "
                "with 4096 or 8192."
            )
        self.context_length = int(context_length)
        self.vocab_size = int(vocab_size)
        self.sot = self.vocab_size - 2
        self.eot = self.vocab_size - 1
        self._byte_ids, self._merges, self._pieces = _read_vocab(self.vocab_size)
        self._cached_word_ids = functools.lru_cache(_CACHE_WORDS)(self._word_ids)

    def __reduce__(self):
        """Pickles the two arguments, so loader processes can be sent a tokenizer."""
        return type(self), (self.context_length, self.vocab_size)

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Token rows as the text towers take them: SOT, ids, then EOT to the end.

        Rows are filled with EOT, as UniCL does; CLIP fills with 0. Both give the same
        features: the tower pools at the first EOT, and under its causal mask that
        position sees nothing after itself. A text that is too long loses its tail and
        keeps EOT as its last id, without which pooling would land on some other token.

        Args:
          texts: one text or a sequence of N, of any length and in any script.

        Returns:
          [N, context_length], int32, in [0, vocab_size); N is 1 for a single string.

        Raises:
          TypeError: if a text is not a string; names its index and type.

        Source: microsoft/UniCL pads with CLIPTokenizer's pad token, which is EOT.
        """
        if isinstance(texts, str):
            texts = [texts]
        elif isinstance(texts, bytes) or not isinstance(texts, Iterable):
            raise TypeError(
                "texts must be a string or a sequence of strings: got "
                f"{type(texts).__name__}; {_advice(texts)}."
            )
        limit = self.context_length - 2
        padding = [self.eot] * self.context_length
        rows = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"texts must be strings: got {type(text).__name__} at index "
                    f"{index}; {_advice(text)}."
                )
            ids = self._text_ids(text, limit)[:limit]
            rows.append([self.sot, *ids, *padding[len(ids) + 1 :]])
        return np.array(rows, np.int32).reshape(len(rows), self.context_length)

    def cut(self, texts: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Which texts were too long, and lost their tails.

        Args:
          texts: N of them.
          rows: [N, context_length], what calling the tokenizer made of them.

        Returns:
          [N] bool.
        """
        limit = self.context_length - 2
        is_cut = rows[:, -2] != self.eot  # or it just fits
        for index in np.flatnonzero(is_cut):
            is_cut[index] = len(self._text_ids(texts[index], limit + 1)) > limit
        return is_cut

    def encode(self, text: str) -> list[int]:
        """Ids of one text, all of them and without SOT and EOT.

        Args:
          text: any string. The strings `<start_of_text>` and `<end_of_text>` in it
            become the markers they name, as in open_clip.

        Returns:
          Ids in [0, vocab_size), empty for an empty text.

        Raises:
          TypeError: if `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a string: got {type(text).__name__}; {_advice(text)}."
            )
        return self._text_ids(text, None)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a row of ids, its words separated by single spaces.

        SOT is dropped and reading stops at the first EOT, where the text towers pool.
        Punctuation comes back as words of its own: "hi!" reads "hi !".

        Args:
          ids: [any length], integers in [0, vocab_size).

        Returns:
          Lower-case text; bytes that are not UTF-8, as in a cut word, become U+FFFD.

        Raises:
          InputError: if an id is out of range.
        """
        pieces = []
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"ids must be in [0, {self.vocab_size}): got {token} at index "
                    f"{index}; decode with the vocab_size that made them."
                )
            if token == self.eot:
                break
            if token != self.sot:
                pieces.append(self._pieces[token])
        return b"".join(pieces).decode("utf-8", errors="replace").rstrip(" ")

    def _text_ids(self, text: str, limit: int | None) -> list[int]:
        """Ids of a text, at least the first `limit`; it may stop behind them."""
        if limit is not None and len(text) > _HEAD_CHARS:
            # Lines are repaired one by one, from the first on, and no word or entity
            # goes on in the next: what the first ones give are the text's first ids.
            text = text.lstrip("\n")
            head = text[: text.rfind("\n", 0, _HEAD_CHARS) + 1]
            ids = self._clean_ids(clean_text(head), limit)
            if len(ids) >= limit:
                return ids
        return self._clean_ids(clean_text(text), limit)

    def _clean_ids(self, text: str, limit: int | None) -> list[int]:
        ids: list[int] = []
        for word in text.split(" "):
            if len(word) <= _MAX_CACHED_CHARS:
                ids += self._cached_word_ids(word)
            else:
                ids += self._word_ids(word, limit and limit - len(ids))
            if limit is not None and len(ids) >= limit:
                break
        return ids

    def _word_ids(self, word: str, limit: int | None = None) -> tuple[int, ...]:
        """Ids of a text that holds no white space, at least the first `limit`."""
        ids: list[int] = []
        for match in _WORD.finditer(word):
            part = match[0]
            if part == _SOT_TEXT:
                ids.append(self.sot)
            elif part == _EOT_TEXT:
                ids.append(self.eot)
            elif len(part) <= _MAX_CACHED_CHARS:
                ids += self._merge(part.encode("utf-8"))
            else:
                for piece, is_end in self._apart(part.encode("utf-8")):
                    ids += self._merge(piece, is_end)
                    if limit is not None and len(ids) >= limit:
                        break
            if limit is not None and len(ids) >= limit:
                break
        return tuple(ids)

    def _apart(self, part: bytes) -> Iterator[tuple[bytes, bool]]:
        """Cuts between bytes that no id holds side by side: nothing merges over them.

        Yields:
          A piece, and whether it is the last one.
        """
        start, within = 0, self._neighbours
        for at, pair in enumerate(itertools.pairwise(part), 1):
            if pair not in within:
                yield part[start:at], False
                start = at
        yield part[start:], True

    @functools.cached_property
    def _neighbours(self) -> set[tuple[int, int]]:
        """Bytes that stand side by side in an id."""
        pieces = (piece.rstrip(b" ") for piece in self._pieces)
        return {pair for piece in pieces for pair in itertools.pairwise(piece)}

    def _merge(self, part: bytes, is_end: bool = True) -> list[int]:
        """Bytes of a word or its piece, merged in rank order, in O(n log n).

        A merge's id grows with its rank and is larger than those of its two symbols,
        so what a merge makes possible always comes after it: a heap of (merged id,
        position) gives the result of merging in rounds, and stays quick where a text
        without spaces is one long word.
        """
        symbols = [self._byte_ids[byte] for byte in part]
        if is_end:
            symbols[-1] += 256  # the form that ends a word
        size = len(symbols)
        left_of, right_of = list(range(-1, size - 1)), list(range(1, size + 1))
        merges = self._merges
        heap = [
            (merges[pair], position)
            for position, pair in enumerate(itertools.pairwise(symbols))
            if pair in merges
        ]
        heapq.heapify(heap)
        while heap:
            merged, left = heapq.heappop(heap)
            right = right_of[left]
            # An entry is stale once either of its two symbols has been merged.
            if right == size or merges.get((symbols[left], symbols[right])) != merged:
                continue
            symbols[left], symbols[right] = merged, -1
            following = right_of[left] = right_of[right]
            if following < size:
                left_of[following] = left
                self._push(heap, symbols, left, following)
            if left_of[left] >= 0:
                self._push(heap, symbols, left_of[left], left)
        return [symbol for symbol in symbols if symbol >= 0]

    def _push(self, heap, symbols: list[int], left: int, right: int) -> None:
        """Queues the merge of two neighbours, if there is one."""
        merged = self._merges.get((symbols[left], symbols[right]))
        if merged is not None:
            heapq.heappush(heap, (merged, left))


def clean_text(text: str) -> str:
    """A text as the encoder sees it: repaired, unescaped, one line, lower case.

    Mojibake and odd Unicode forms are mended by ftfy, HTML entities are unescaped twice
    (web captions are often escaped twice), white space becomes single spaces.

    Args:
      text: any string.

    Returns:
      The cleaned text, without white space at its ends.

    Source: the cleaning of CLIP's tokenizer, on which its ids depend.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        # Printable ASCII holds nothing that ftfy mends, and no entity starts without
        # "&": only spaces and case are left to do. Same result, about 30 times faster.
        return " ".join(text.split()).lower()
    return _repair_text(text)


def _repair_text(text: str) -> str:
    """The cleaning in full; `clean_text` says what it does."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITE_SPACE.sub(" ", text.strip()).strip().lower()


def _read_vocab(vocab_size: int):
    """The id of each byte, the id each pair merges into, and the bytes of each id."""
    # The file writes a byte as a visible character: itself where Latin-1 prints it,
    # else the next one from U+0100 on. Byte ids are in that order.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    characters = [*map(chr, visible), *(chr(256 + n) for n in range(len(hidden)))]

    ordered = [*visible, *hidden]
    byte_ids = [ordered.index(byte) for byte in range(256)]
    symbols = {character: i for i, character in enumerate(characters)}
    symbols |= {f"{character}</w>": i + 256 for character, i in symbols.items()}
    pieces = [bytes([byte]) for byte in ordered]
    pieces += [piece + b" " for piece in pieces]  # a word's end reads as a space

    merges: dict[tuple[int, int], int] = {}
    path = resources.files(__package__) / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
    with path.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        num_merges = vocab_size - _MIN_VOCAB_SIZE
        for line in itertools.islice(lines, 1, 1 + num_merges):  # after the header
            left, right = line.split()
            merged = len(pieces)
            merges[symbols[left], symbols[right]] = merged
            pieces.append(pieces[symbols[left]] + pieces[symbols[right]])
            symbols[left + right] = merged
    return byte_ids, merges, pieces


def _check_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name} must be an int: got {value!r} ({type(value).__name__}); "
            "pass a whole number."
        )


def _advice(value) -> str:
    if isinstance(value, bytes):
        return "decode it first, as in value.decode('utf-8')"
    if value is None:
        return "drop records without a text, or give them an empty string"
    return "convert it with str()"
