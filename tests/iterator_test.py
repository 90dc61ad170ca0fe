"""The batches: right texts, the same on any number of processes, from any step on."""

import collections
import hashlib
import json
import threading

import numpy as np
import pytest

from unicl_jax.data import quickstart
from unicl_jax.data.arrays import ArraySource, make_npz_source
from unicl_jax.data.captions import caption_lanes
from unicl_jax.data.concepts import make_concept_table
from unicl_jax.data.iterator import TrainIterator
from unicl_jax.data.records import NO_LABEL
from unicl_jax.errors import InputError

TEMPLATES = ("{}", "a {}", "a drawing of a {}.")
LENGTH = 40  # bytes of a text


class Bytes:
    """Bytes as tokens, so that a test can read them back."""

    def __call__(self, texts):
        rows = np.zeros((len(texts), LENGTH), np.int32)
        for row, text in zip(rows, texts, strict=True):
            encoded = text.encode()[:LENGTH]
            row[: len(encoded)] = list(encoded)
        return rows

    def cut(self, texts, rows):
        del rows
        return np.array([len(text.encode()) > LENGTH for text in texts])


def texts_of(batch):
    """The text of every row."""
    rows = batch["tokens"]
    if "text_index" in batch:
        rows = rows[batch["text_index"]]
    return [bytes(row[row > 0].tolist()).decode() for row in rows]


def pictures(length, source):
    """Each picture names its source and record: 4 x 4 of (source, high, low byte)."""
    pixels = np.zeros((length, 4, 4, 3), np.uint8)
    pixels[..., 0] = source
    pixels[..., 1] = (np.arange(length) // 256)[:, None, None]
    pixels[..., 2] = (np.arange(length) % 256)[:, None, None]
    return pixels


def record_of(image):
    source, high, low = (int(x) for x in image[0, 0])
    return source, high * 256 + low


ANIMALS = ("Dog", "cat", "Great_white+shark")
THINGS = ("spoon", "dog", "cup", "spoon")  # "dog" again, and "spoon" twice
LABELS = (np.arange(30) % 3, (np.arange(50) * 7) % 4)
CAPTIONS = [f"caption {i}" for i in range(40)]
ALT_TEXTS = [tuple(f"alt {i}.{k}" for k in range(1 + i % 3)) for i in range(300)]


def make_sources():
    return [
        ArraySource("animals", pictures(30, 0), labels=LABELS[0], class_names=ANIMALS),
        ArraySource("things", pictures(50, 1), labels=LABELS[1], class_names=THINGS),
        ArraySource("captions", pictures(40, 2), texts=CAPTIONS),
        ArraySource("alt", pictures(300, 3), texts=ALT_TEXTS),
    ]


def make_iterator(sources=None, **options):
    sources = make_sources() if sources is None else sources
    concepts = make_concept_table(
        {s.name: s.class_names for s in sources if s.class_names}
    )
    options = {"batch_size": 32, "mixture": "balanced", "seed": 0, **options}
    return TrainIterator(sources, concepts, TEMPLATES, Bytes(), **options)


@pytest.fixture
def opened():
    """Makes iterators and closes them: their threads end with the test."""
    iterators = []

    def make(*args, **options):
        iterators.append(make_iterator(*args, **options))
        return iterators[-1]

    yield make
    for iterator in iterators:
        iterator.close()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


# --- What is in a batch.


@pytest.mark.parametrize("share_prompts", [False, True])
def test_every_row_has_its_own_image_label_and_text(share_prompts, opened):
    iterator = opened(share_prompts=share_prompts)
    concepts = iterator.concepts
    drawn = collections.Counter()
    for _ in range(60):
        batch = next(iterator)
        assert (
            batch["image"].shape == (32, 4, 4, 3) and batch["image"].dtype == np.uint8
        )
        assert ("text_index" in batch) == share_prompts
        integers = [v.dtype for k, v in batch.items() if k != "image"]
        assert set(integers) == {np.dtype("int32")}
        prompts = collections.defaultdict(set)
        rows = zip(batch["image"], batch["label"], texts_of(batch), strict=True)
        for image, label, text in rows:
            source, record = record_of(image)
            if source < 2:
                classes = concepts.of_source[("animals", "things")[source]]
                assert label == classes[LABELS[source][record]]
                filled = [t.replace("{}", concepts.names[label]) for t in TEMPLATES]
                drawn[filled.index(text)] += 1
                prompts[label].add(text)
            else:
                assert label == NO_LABEL
                own = ALT_TEXTS[record] if source == 3 else (CAPTIONS[record],)
                assert text in own
                if len(own) == 3:
                    drawn[text[-2:]] += 1
        most = max(len(texts) for texts in prompts.values())
        assert most == 1 if share_prompts else most > 1
    # Every template and every caption had its turn, none less than half its share.
    assert len(drawn) == 6
    assert min(drawn[k] for k in range(3)) > 60 * 16 / 3 / 2
    assert min(drawn[k] for k in (".0", ".1", ".2")) > 100 / 3 / 2


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("mixture", ["balanced", "proportional", "weights"])
def test_shared_prompts_fit_their_slots_at_every_step(mixture, multiple, opened):
    iterator = opened(mixture=mixture, share_prompts=True, devices=multiple)
    slots = iterator.text_slots
    assert slots % multiple == 0
    for _ in range(60):
        batch = next(iterator)
        assert batch["tokens"].shape == (slots, LENGTH)
        assert batch["text_index"].min() == 0
        used = np.unique(batch["text_index"])
        # Equal texts share a slot, and the used ones come first.
        np.testing.assert_array_equal(used, np.arange(len(used)))
        assert len(set(texts_of(batch))) == len(used) <= slots


def test_shared_prompts_take_few_more_slots_than_texts(opened):
    sources = make_sources()
    iterator = opened([sources[0], sources[3]], share_prompts=True)
    used = [next(iterator)["text_index"].max() + 1 for _ in range(20)]
    # Three classes and 16 captions; one row is left for a mixture that rounds up.
    assert max(used) == 19 and iterator.text_slots == 20


def test_without_sharing_each_row_has_its_own_tokens(opened):
    assert next(opened())["tokens"].shape == (32, LENGTH)
    part = opened(process_index=1, process_count=4)
    assert next(part)["tokens"].shape == (8, LENGTH)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_share_of_texts_that_were_cut_is_told_by_step(opened, share_prompts):
    texts = [(("long " * 20 if i % 2 else "short ") + str(i),) for i in range(40)]
    sources = [ArraySource("captions", pictures(40, 0), texts=texts)]
    options = dict(mixture="proportional", share_prompts=share_prompts)
    iterator = opened(sources, **options)
    for step in range(1, 12):
        record = [record_of(image)[1] for image in next(iterator)["image"]]
        assert iterator.figures(step)["texts_cut"] == np.mean([i % 2 for i in record])


def test_captions_carry_equal_numbers_where_they_are_equal(opened):
    """Within a source, across sources, and of the caption that was drawn."""
    said = [f"a thing {i % 7}" for i in range(40)]
    alt = [
        tuple(f"A  Thing {(i + k) % 9}" for k in range(1 + i % 3)) for i in range(50)
    ]
    labelled, *_ = make_sources()
    sources = [
        labelled,
        ArraySource("said", pictures(40, 2), texts=said),
        ArraySource("alt", pictures(50, 3), texts=alt),
    ]
    iterator, across = opened(sources, mixture="weights"), 0
    for _ in range(5):
        batch = next(iterator)
        texts = np.array([" ".join(t.lower().split()) for t in texts_of(batch)])
        captions, lanes = batch["label"] == NO_LABEL, batch["caption"]
        assert lanes.shape == (32, 2) and lanes.dtype == np.int32
        assert (lanes[~captions] == NO_LABEL).all()
        got = (lanes[captions][:, None] == lanes[captions]).all(-1)
        want = texts[captions][:, None] == texts[captions]
        np.testing.assert_array_equal(got, want)
        source = batch["image"][captions, 0, 0, 0]
        across += (want & (source[:, None] != source)).sum()
        assert want.sum() > len(want)
        np.testing.assert_array_equal(lanes[captions], caption_lanes(texts[captions]))
    assert across


def test_without_captions_there_are_none_to_compare(opened):
    options = dict(mixture="proportional")
    assert "caption" not in next(opened(make_sources()[:2], **options))
    assert "caption" in next(opened(make_sources()[2:], **options))


@pytest.mark.parametrize("processes", [1, 4])
def test_rows_and_epochs_of_each_source_are_told_by_step(processes, opened):
    options = dict(mixture="proportional", batch_size=16)
    parts = [
        opened(process_index=i, process_count=processes, **options)
        for i in range(processes)
    ]
    seen = np.zeros(4, int)
    for step in range(1, 30):
        images = np.concatenate([next(part)["image"] for part in parts])
        rows = np.bincount(images[:, 0, 0, 0], minlength=4)
        seen += rows
        for part in parts:
            figures = part.figures(step)
            for i, source in enumerate(part.sources):
                assert figures[f"rows/{source.name}"] == rows[i]
                assert figures[f"epochs/{source.name}"] == seen[i] / len(source)
    assert len({tuple(part.figures(29)) for part in parts}) == 1


# --- The same on any number of processes, from any step on.


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_slices_of_the_same_batches(processes, opened):
    whole = opened()
    parts = [opened(process_index=i, process_count=processes) for i in range(processes)]
    for _ in range(10):
        batch, local = next(whole), [next(part) for part in parts]
        assert all(x.keys() == batch.keys() for x in local)
        for key, value in batch.items():
            joined = np.concatenate([x[key] for x in local])
            assert joined.tobytes() == value.tobytes()


def test_restoring_a_step_gives_the_batches_that_followed_it(opened):
    straight = opened()
    batches = [next(straight) for _ in range(25)]
    other = opened()
    for step in (17, 3, 20):  # forwards and back, with read-ahead to be dropped
        other.restore({"step": step})
        for k in range(3):
            assert other.state() == {"step": step + k}
            assert_equal(next(other), batches[step + k])


def test_the_state_is_the_step_whatever_was_read_ahead(opened):
    iterator = opened(prefetch=5)
    for _ in range(7):
        next(iterator)
    saved = json.dumps(iterator.state())
    assert saved == '{"step": 7}'
    resumed = opened()
    resumed.restore(json.loads(saved))
    assert_equal(next(resumed), next(iterator))


def test_seeds_give_other_batches(opened):
    a, b = next(opened(seed=0)), next(opened(seed=1))
    assert (a["image"] != b["image"]).any()


def test_weights_are_shares_of_the_mixture(opened):
    iterator = opened(mixture="weights", weights=[1, 1, 4, 2])
    batch = next(iterator)
    assert np.bincount(batch["image"][:, 0, 0, 0]).tolist() == [4, 4, 16, 8]


# --- The reading thread.


class BrokenSource(ArraySource):
    """Fails at its fourth request."""

    def stream(self, requests):
        for count, rows in enumerate(super().stream(requests)):
            if count == 3:
                raise OSError("shard 3 went away")
            yield rows


def broken_sources():
    *sources, _ = make_sources()
    return [*sources, BrokenSource("alt", pictures(300, 3), texts=ALT_TEXTS)]


def readers():
    return [t for t in threading.enumerate() if t is not threading.main_thread()]


def test_an_error_of_a_source_reaches_the_caller_after_the_good_batches(opened):
    before = len(readers())
    iterator = opened(broken_sources())
    for _ in range(3):
        next(iterator)
    with pytest.raises(OSError, match="shard 3 went away"):
        next(iterator)
    assert iterator.state() == {"step": 3}
    assert len(readers()) == before


class WatchedSource(ArraySource):
    """Knows whether what it opened for its stream is closed."""

    is_open = was_open = False

    def stream(self, requests):
        self.is_open = self.was_open = True
        try:
            yield from super().stream(requests)
        finally:
            self.is_open = False


def test_an_error_ends_the_streams_of_all_sources_although_it_is_kept(opened):
    sources = broken_sources()
    sources[2] = WatchedSource("captions", pictures(40, 2), texts=CAPTIONS)
    iterator = opened(sources)
    for _ in range(3):
        next(iterator)
    with pytest.raises(OSError) as kept:
        next(iterator)
    assert sources[2].was_open
    assert not sources[2].is_open and kept.value.__traceback__


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_close_leaves_no_thread(taken, opened):
    before = len(readers())
    iterator = opened(prefetch=2)
    for _ in range(taken):
        next(iterator)
    assert len(readers()) == before + (taken > 0)
    iterator.close()
    assert len(readers()) == before
    iterator.close()  # twice is once
    assert_equal(next(iterator), next(opened_at(opened, taken)))


def opened_at(opened, step):
    iterator = opened()
    iterator.restore({"step": step})
    return iterator


def test_skipped_records_are_told_by_source_and_reason(opened):
    sources = make_sources()
    sources[1].skipped["not a JPEG"] += 2
    assert opened(sources).skipped() == {"things/not a JPEG": 2}


# --- Wrong input.


GOOD = dict(images=pictures(4, 0), labels=[0, 1, 1, 0], class_names=("a", "b"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=pictures(4, 0).astype("f4")), "uint8.*float32"),
        (dict(images=pictures(4, 0)[..., :1]), r"\[n, H, W, 3\].*\(4, 4, 4, 1\)"),
        (dict(images=pictures(3, 0)), "its label or text.*3 images and 4"),
        (dict(images=pictures(0, 0), labels=[]), "0 images"),
        (dict(labels=[0, 1, 2, 0]), r"in \[0, 2\).*got 2 at index 2"),
        (dict(labels=[0, -1, 1, 0]), "got -1 at index 1"),
        (dict(labels=None), "either labels or texts"),
        (dict(texts=["x"] * 4), "either labels or texts"),
        (dict(labels=None, texts=["x", "", "y", "z"]), "empty.*at index 1"),
        (dict(labels=None, texts=["x", "y", ("z", ""), "z"]), "empty.*at index 2"),
        (dict(labels=None, texts=["x", "y", "z", ()]), "empty.*at index 3"),
    ],
)
def test_arrays_that_do_not_fit_are_told_with_the_sources_name(change, message):
    with pytest.raises(InputError, match=f'source "mine": .*{message}'):
        ArraySource("mine", **{**GOOD, **change})


def test_balanced_from_one_kind_says_what_to_use():
    with pytest.raises(InputError, match="proportional"):
        make_iterator(make_sources()[:2])


def test_too_small_a_batch_names_the_source_it_starves():
    with pytest.raises(InputError, match='"captions".*batch_size 8'):
        make_iterator(batch_size=8)


# --- A .npz of one's own.


def test_an_npz_file_gives_what_it_holds(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **GOOD)
    config = {"kind": "image_label", "path": str(path)}
    source = make_npz_source("mine", config, 4, True)
    assert source.class_names == ("a", "b") and source.labels.tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(source.images, GOOD["images"])
    np.savez(path, images=GOOD["images"], texts=np.array(["w", "x", "y", "z"]))
    config["kind"] = "image_text"
    source = make_npz_source("mine", config, 4, True)
    assert (source.kind, source.texts[1]) == ("image_text", ("x",))
    with pytest.raises(InputError, match='"mine".*labels, class_names.*images, texts'):
        make_npz_source("mine", {**config, "kind": "image_label"}, 4, True)
    with pytest.raises(InputError, match='"mine".*8 x 8.*image_size'):
        make_npz_source("mine", config, 8, True)
    with pytest.raises(InputError, match='"mine".*not there'):
        make_npz_source("mine", {**config, "path": str(tmp_path / "no.npz")}, 4, True)


def test_an_npz_file_may_hold_several_captions_an_image(tmp_path):
    texts = np.array([["w", "v"], ["x", ""], ["y", "z"], ["z", ""]])
    np.savez(tmp_path / "mine.npz", images=GOOD["images"], texts=texts)
    config = {"kind": "image_text", "path": str(tmp_path / "mine.npz")}
    source = make_npz_source("mine", config, 4, True)
    assert source.texts == [("w", "v"), ("x",), ("y", "z"), ("z",)]


def test_the_class_names_of_an_npz_file_may_stand_in_the_config(tmp_path):
    arrays = {k: v for k, v in GOOD.items() if k != "class_names"}
    np.savez(tmp_path / "mine.npz", **arrays)
    config = {"path": str(tmp_path / "mine.npz"), "class_names": ["x", "y"]}
    assert make_npz_source("mine", config, 4, True).class_names == ("x", "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=np.array([0, 1, 1, 2**32])), "labels must be in .*4294967296"),
        (dict(labels=np.uint64([0, 1, 1, 2**64 - 2**32])), "labels must be in"),
        (dict(labels=np.zeros((4, 2), int)), r"labels must be \[n\] integers"),
        (dict(labels=np.array([0, 1, 1, np.nan])), r"labels must be \[n\] integers"),
        (dict(labels=np.array(0)), "labels must have one entry"),
        (dict(class_names=np.array("a")), "class_names must have one entry"),
        (
            dict(class_names=np.array(["a", "b"], object)),
            '"class_names".*Python objects',
        ),
    ],
)
def test_what_is_wrong_in_an_npz_file_is_named(change, message, tmp_path):
    np.savez(tmp_path / "mine.npz", **{**GOOD, **change})
    config = {"kind": "image_label", "path": str(tmp_path / "mine.npz")}
    with pytest.raises(InputError, match=f'"mine": .*{message}'):
        make_npz_source("mine", config, 4, True)


@pytest.mark.parametrize(
    "texts",
    [np.arange(4), np.zeros(4), np.array([["a"]] * 4)[..., None], np.array("a")],
)
def test_captions_of_an_npz_file_must_be_strings(texts, tmp_path):
    np.savez(tmp_path / "mine.npz", images=GOOD["images"], texts=texts)
    config = {"kind": "image_text", "path": str(tmp_path / "mine.npz")}
    with pytest.raises(InputError, match='"mine": texts must'):
        make_npz_source("mine", config, 4, True)


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_caption_is_named(blank, tmp_path):
    texts = np.array(["w", "x", blank, "z"])
    np.savez(tmp_path / "mine.npz", images=GOOD["images"], texts=texts)
    config = {"kind": "image_text", "path": str(tmp_path / "mine.npz")}
    with pytest.raises(InputError, match="captions must not be empty.*at index 2"):
        make_npz_source("mine", config, 4, True)


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut off", "flipped", "npy"])
def test_a_file_that_is_no_npz_is_named(damage, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    if damage == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        flipped = bytearray(whole)
        flipped[200] ^= 255
        path.write_bytes(
            {
                "garbage": b"garbage",
                "empty": b"",
                "cut off": whole[: len(whole) // 2],
                "flipped": bytes(flipped),
            }[damage]
        )
    config = {"kind": "image_label", "path": str(path)}
    with pytest.raises(InputError, match='"mine": path must be a .npz file'):
        make_npz_source("mine", config, 4, True)


# --- The quick start's data.


def make_quickstart(name, kind, **change):
    options = dict(image_size=32, train=True) | change
    config = {"path": name, "kind": kind}
    return quickstart.make_quickstart_source(name, config, **options)


def test_the_quick_start_has_its_records_and_names():
    captions = make_quickstart("emoji_captions", "image_text")
    subgroups = make_quickstart("emoji_subgroups", "image_label")
    fashion = make_quickstart("fashion_mnist", "image_label")
    assert [len(s) for s in (captions, subgroups, fashion)] == [5127, 5127, 4000]
    for source in (captions, subgroups, fashion):
        assert source.images.shape[1:] == (32, 32, 3)
    assert len(set(quickstart.emoji_names())) == 1898
    assert len(set(subgroups.class_names)) == 99
    assert len(set(fashion.class_names)) == 10
    assert set(subgroups.labels) == set(range(99))
    assert np.bincount(fashion.labels).tolist() == [400] * 10
    table = make_concept_table({s.name: s.class_names for s in (subgroups, fashion)})
    assert len(table.names) == 109 and not table.merged


def test_a_caption_starts_with_the_name_of_what_is_drawn():
    source = make_quickstart("emoji_captions", "image_text")
    names = quickstart.emoji_names()
    rows = np.concatenate([quickstart.emoji(v)[1] for v in quickstart.TRAIN_VENDORS])
    for texts, row in zip(source.texts, rows, strict=True):
        assert texts[0] == names[row]
        assert all(text.startswith(names[row]) for text in texts)


def test_the_evaluation_sets_ask_for_their_names():
    sizes = {
        name: (len(s.images), len(s.class_names))
        for name in quickstart.EVALUATION_SETS
        for s in [quickstart.evaluation_set(name)]
    }
    assert sizes["twemoji_names"] == (1898, 1898)
    assert sizes["twemoji_subgroups"] == (1898, 99)
    assert sizes["fashion_mnist"] == (1000, 10)
    assert 1600 < sizes["twemoji_without_flags"][0] < 1898
    for name in quickstart.EVALUATION_SETS:
        one = quickstart.evaluation_set(name)
        assert len(one.labels) == len(one.images)
        assert 0 <= one.labels.min() and one.labels.max() < len(one.class_names)


def digests(images):
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def test_no_evaluation_image_is_in_a_training_source():
    trained = set()
    for name, (kind, _) in quickstart.SETS.items():
        trained |= digests(make_quickstart(name, kind).images)
    for name in quickstart.EVALUATION_SETS:
        one = quickstart.evaluation_set(name)
        assert not digests(one.images) & trained, name
        baseline, labels = quickstart.training_examples(name)
        assert digests(baseline) <= trained  # nor in what a baseline may look at
        assert len(baseline) == len(labels)


def test_quick_start_settings_that_do_not_fit_are_told():
    with pytest.raises(InputError, match='did you mean "emoji_captions"'):
        make_quickstart("emoji_caption", "image_text")
    with pytest.raises(InputError, match="of kind image_text: got image_label"):
        make_quickstart("emoji_captions", "image_label")
    with pytest.raises(InputError, match="32 x 32.*64"):
        make_quickstart("emoji_captions", "image_text", image_size=64)
    with pytest.raises(InputError, match="evaluation set.*twemoji_names"):
        quickstart.evaluation_set("twemoji")
