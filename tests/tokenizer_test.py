"""The tokenizer gives CLIP's ids, at every vocabulary size and for every text."""

import itertools
import json
import pathlib
import pickle
import random

import numpy as np
import pytest

from unicl_jax.data import tokenizer as tokenizer_lib
from unicl_jax.data.tokenizer import FULL_VOCAB_SIZE, Tokenizer, clean_text

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "token_ids.json").read_text("utf-8")
)
GOLDEN_TEXTS = [case["text"] for case in GOLDEN]
SMALL_SIZES = [514, 515, 1024, 4096, 30000]
# Texts in which every word ends at a space, so decoding gives back the cleaned text.
SPACED_TEXTS = [
    "",
    "a photo of a cat",
    "  Grinning   FACE with\tbig eyes ",
    "Zürich café naïve smörgåsbord",
    "Привет мир",
    "你好 世界",
    "😀 thumbs 👍🏽",
    "été &eacute;t&eacute; sÃ£o",
    "supercalifragilisticexpialidocious",
    "!!! ??? 7 8 9",
]


@pytest.fixture(scope="module")
def full():
    return Tokenizer()


@pytest.fixture(scope="module", params=SMALL_SIZES)
def small(request):
    return Tokenizer(vocab_size=request.param)


def without_spaces(text):
    return "".join(text.split())


def test_ids_equal_the_golden_ones(full):
    assert len(GOLDEN) == 128
    wrong = [case for case in GOLDEN if full.encode(case["text"]) != case["ids"]]
    assert not wrong


def test_golden_ids_do_not_depend_on_what_was_encoded_before(full):
    for case in reversed(GOLDEN):
        assert full.encode(case["text"]) == case["ids"]


def test_a_row_is_sot_ids_eot_and_eot_to_the_end(full):
    rows = full(GOLDEN_TEXTS)
    assert rows.shape == (128, 77)
    assert rows.dtype == np.int32
    for row, case in zip(rows, GOLDEN, strict=True):
        end = 1 + len(case["ids"])
        assert row[0] == full.sot == 49406
        assert row[1:end].tolist() == case["ids"]
        assert np.all(row[end:] == full.eot)
    assert full.eot == 49407


def test_one_string_is_a_batch_of_one(full):
    np.testing.assert_array_equal(full("a cat"), full(["a cat"]))
    assert full("a cat")[0, :4].tolist() == [49406, 320, 2368, 49407]


def test_no_texts_give_no_rows(full):
    assert full([]).shape == (0, 77)


def test_tuples_and_arrays_of_strings_are_sequences_too(full):
    texts = ["a cat", "a dog"]
    np.testing.assert_array_equal(full(tuple(texts)), full(texts))
    np.testing.assert_array_equal(full(np.array(texts)), full(texts))


@pytest.mark.parametrize("context_length", [3, 4, 7, 8, 16])
def test_truncation_keeps_the_first_ids_and_eot_last(context_length):
    short = Tokenizer(context_length)
    for text in [*GOLDEN_TEXTS, "cat " * 500, "x" * 3000, "世界" * 1000]:
        ids = short.encode(text)
        (row,) = short(text)
        kept = min(len(ids), context_length - 2)
        assert row.shape == (context_length,)
        assert row[0] == short.sot
        assert row[-1] == short.eot
        assert row[1 : 1 + kept].tolist() == ids[:kept]


def test_a_text_that_just_fits_is_not_truncated():
    row = Tokenizer(context_length=5)("cat cat cat")[0]
    assert row.tolist() == [49406, 2368, 2368, 2368, 49407]


def test_what_is_truncated_is_told_from_what_just_fits():
    tokenize = Tokenizer(context_length=5)
    texts = ["cat cat cat", "cat " * 4, "", "x" * 3000, "cat"]
    is_cut = tokenize.cut(texts, tokenize(texts))
    assert is_cut.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("text", ["<end_of_text>", "a <END_OF_TEXT> b"])
def test_marker_strings_become_the_markers(full, text):
    assert full.eot in full.encode(text)
    small = Tokenizer(vocab_size=1024)
    assert small.eot in small.encode(text)


def test_other_spellings_of_the_markers_are_plain_text(full):
    for text in ["<|endoftext|>", "<|startoftext|>", "<end of text>", "<eot>"]:
        assert max(full.encode(text)) < full.sot


def test_a_small_vocabulary_encodes_every_text(small):
    assert (small.sot, small.eot) == (small.vocab_size - 2, small.vocab_size - 1)
    for text in GOLDEN_TEXTS:
        ids = small.encode(text)
        assert all(0 <= i < small.vocab_size for i in ids)
        if "_of_text>" not in text:
            assert all(i < small.sot for i in ids)
    rows = small(GOLDEN_TEXTS)
    assert rows.min() >= 0
    assert rows.max() < small.vocab_size


def test_a_small_vocabulary_never_needs_fewer_ids(small, full):
    for text in GOLDEN_TEXTS:
        assert len(small.encode(text)) >= len(full.encode(text))


def test_an_id_means_the_same_text_in_every_size(small, full):
    for i in range(small.sot):
        assert small.decode([i]) == full.decode([i])


def test_without_merges_a_text_takes_one_id_a_byte():
    ids = Tokenizer(vocab_size=514).encode("a café")
    assert len(ids) == len("acafé".encode())
    # Printable ASCII "!" is id 0; the last byte of a word is 256 further on.
    assert ids[0] == ord("a") - ord("!") + 256


def test_the_first_merge_joins_i_and_n():
    assert Tokenizer(vocab_size=515).encode("ink") == [512, ord("k") - ord("!") + 256]


def test_the_default_vocabulary_is_the_full_one(full):
    explicit = Tokenizer(77, FULL_VOCAB_SIZE)
    assert FULL_VOCAB_SIZE == full.vocab_size == 49408
    for text in GOLDEN_TEXTS:
        assert explicit.encode(text) == full.encode(text)


@pytest.mark.parametrize("vocab_size", [*SMALL_SIZES, FULL_VOCAB_SIZE])
@pytest.mark.parametrize("text", SPACED_TEXTS)
def test_decoding_spaced_words_gives_the_cleaned_text(vocab_size, text):
    tokenizer = Tokenizer(vocab_size=vocab_size)
    assert tokenizer.decode(tokenizer.encode(text)) == clean_text(text)


@pytest.mark.parametrize("vocab_size", [*SMALL_SIZES, FULL_VOCAB_SIZE])
def test_decoding_gives_the_cleaned_text_but_for_spaces(vocab_size):
    tokenizer = Tokenizer(vocab_size=vocab_size)
    for text in GOLDEN_TEXTS:
        if "_of_text>" not in text:
            decoded = tokenizer.decode(tokenizer.encode(text))
            assert without_spaces(decoded) == without_spaces(clean_text(text))


def test_decoding_a_row_drops_the_markers_and_stops_at_the_first_eot(full):
    assert full.decode(full("A photo of a cat!")[0]) == "a photo of a cat !"
    assert full.decode([full.sot, 320, full.eot, 2368]) == "a"
    assert full.decode([]) == ""


def test_decoding_half_a_character_gives_the_replacement_character(full):
    ids = Tokenizer(vocab_size=514).encode("世")
    assert Tokenizer(vocab_size=514).decode(ids[:2]) == "\ufffd"


def test_every_word_merges_as_in_rounds_of_the_definition(full):
    # The definition, slowly: find the pair learned first, merge it everywhere, repeat.
    def merge_in_rounds(part):
        symbols = [full._byte_ids[byte] for byte in part.encode()]
        symbols[-1] += 256
        while True:
            pairs = set(itertools.pairwise(symbols))
            known = [full._merges[pair] for pair in pairs if pair in full._merges]
            if not known:
                return symbols
            best, merged, i = min(known), [], 0
            while i < len(symbols):
                if full._merges.get(tuple(symbols[i : i + 2])) == best:
                    merged.append(best)
                    i += 2
                else:
                    merged.append(symbols[i])
                    i += 1
            symbols = merged

    rng = random.Random(0)
    for alphabet in (
        "ab",
        "aeinorst",
        "abcdefghijklmnopqrstuvwxyz",
        "éüñ世界の",
        "!?.-",
    ):
        for _ in range(200):
            part = "".join(rng.choices(alphabet, k=rng.randint(1, 40)))
            assert full.encode(part) == merge_in_rounds(part), part


def test_a_long_text_without_spaces_is_encoded_whole(full):
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=50_000))
    assert full.decode(full.encode(text)) == text


def test_the_word_cache_is_bounded_and_skips_long_words():
    tokenizer = Tokenizer(vocab_size=514)
    assert tokenizer._cached_word_ids.cache_info().maxsize is not None
    tokenizer.encode("a" * 65)
    assert tokenizer._cached_word_ids.cache_info().currsize == 0
    tokenizer.encode("a" * 64)
    assert tokenizer._cached_word_ids.cache_info().currsize == 1


def plain_ascii():
    """All plain texts of one and two characters, and long ones drawn at random."""
    characters = [chr(i) for i in range(32, 127) if chr(i) != "&"]
    yield ""
    yield from characters
    yield from map("".join, itertools.product(characters, repeat=2))
    rng = random.Random(0)
    for _ in range(2000):
        yield "".join(rng.choices(characters, k=rng.randint(3, 200)))
    yield from ("<p>x</p>", "#128512;", "amp; lt; nbsp;", "%C3%A9", "\\u00e9", "^[[31m")


def test_the_short_way_for_plain_ascii_gives_the_result_of_the_long_way():
    texts = list(plain_ascii())
    assert len(texts) > 10_000
    wrong = [t for t in texts if clean_text(t) != tokenizer_lib._repair_text(t)]
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "AT&amp;T",
        "a\tb",
        "a\nb",
        "a\r\nb",
        "\x1b[31mred",
        "a\x00b",
        "caf\xe9",
        "a\x7fb",
    ],
)
def test_the_long_way_is_taken_for_all_else(monkeypatch, text):
    monkeypatch.setattr(tokenizer_lib, "_repair_text", lambda text: "repaired")
    assert clean_text(text) == "repaired"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A\t\nCat ", "a cat"),
        ("R&amp;D &amp;lt; &eacute;", "r&d < é"),
        ("donâ€™t sÃ£o", "don't são"),
        ("ｆｕｌｌ\u3000ﬁ", "full fi"),
        ("a\xa0b\x85c", "a b…c"),
        ("\x01\x02", ""),
        ("\ud83d", "\ufffd"),
    ],
)
def test_cleaning_repairs_unescapes_and_lowers(text, cleaned):
    assert clean_text(text) == cleaned


def test_cleaning_twice_changes_nothing_more():
    for text in GOLDEN_TEXTS:
        assert clean_text(clean_text(text)) == clean_text(text)


def test_pickling_keeps_the_ids():
    tokenizer = Tokenizer(16, 4096)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.context_length, copy.vocab_size) == (16, 4096)
    np.testing.assert_array_equal(copy(GOLDEN_TEXTS), tokenizer(GOLDEN_TEXTS))


@pytest.mark.parametrize("vocab_size", [-1, 0, 513, 49409, 10**9])
def test_a_vocab_size_out_of_range_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"514.*49408.*got {vocab_size}"):
        Tokenizer(vocab_size=vocab_size)


@pytest.mark.parametrize("context_length", [-1, 0, 2])
def test_a_context_without_room_for_an_id_is_refused(context_length):
    with pytest.raises(ValueError, match=f"at least 3.*got {context_length}"):
        Tokenizer(context_length)


@pytest.mark.parametrize("value", [4096.0, "4096", None, True])
def test_sizes_must_be_ints(value):
    with pytest.raises(TypeError, match="vocab_size must be an int"):
        Tokenizer(vocab_size=value)
    with pytest.raises(TypeError, match="context_length must be an int"):
        Tokenizer(value)


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "NoneType"), (b"a", "bytes"), (3, "int"), (["a"], "list")],
)
def test_a_text_that_is_no_string_is_named_by_index_and_type(full, value, name):
    with pytest.raises(TypeError, match=f"got {name} at index 2"):
        full(["a", "b", value])
    with pytest.raises(TypeError, match=f"must be a string: got {name}"):
        full.encode(value)


@pytest.mark.parametrize(("value", "name"), [(None, "NoneType"), (b"a", "bytes")])
def test_texts_must_be_a_string_or_a_sequence(full, value, name):
    with pytest.raises(TypeError, match=f"sequence of strings: got {name}"):
        full(value)


@pytest.mark.parametrize("token", [-1, 4096])
def test_decoding_an_id_out_of_range_is_refused(token):
    with pytest.raises(ValueError, match=f"got {token} at index 1"):
        Tokenizer(vocab_size=4096).decode([320, token])
