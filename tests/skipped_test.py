"""What a run says of the records it skipped, and when there are too many."""

import json
import os

import numpy as np
import pytest
from faults_test import good, opened, write
from real_files import SIZE

from unicl_jax import config as config_lib
from unicl_jax import data, train, validation
from unicl_jax.data.damage import Damage
from unicl_jax.data.skipped import SkippedRecords
from unicl_jax.errors import InputError
from unicl_jax.workdir import prepare_workdir

NUM, BATCH = 48, 8
BROKEN = (5, 6, 17, 30)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def some(tmp_path):
    """Class folders and TFRecords, each with the same records broken."""
    records = [(b"broken", b"x") if i in BROKEN else good(i % 20) for i in range(NUM)]
    for form in ("folder", "tfrecord"):
        write(form, tmp_path / form, records)
    (tmp_path / "folder" / "a" / "notes.txt").touch()
    return tmp_path


def sources_of(some):
    return dict(
        labels=dict(format="folder", kind="image_label", path=str(some / "folder")),
        texts=dict(
            format="tfrecord",
            kind="image_text",
            path=str(some / "tfrecord"),
            fields=dict(image="image", text="caption"),
        ),
    )


def make_batches(some, **changes):
    config = dict(
        sources=sources_of(some),
        mixture="balanced",
        templates="short",
        share_prompts=False,
        text_length="full",
        max_skipped=0.5,
    )
    processes = {k: changes.pop(k) for k in [*changes] if k.startswith("process")}
    return data.make_train_iterator(
        config | changes, SIZE, BATCH, 3, data.Tokenizer(8, 600), **processes
    )


def take(batches, count):
    """Some batches, and what was skipped up to each."""
    found, skipped = [], []
    for _ in range(count):
        found.append(next(batches))
        skipped.append(batches.skipped(batches.state()["step"]))
    batches.close()
    return found, skipped


STEPS = 40  # 3.3 times through each source


def test_each_record_is_listed_once_with_its_place(some, tmp_path):
    batches = make_batches(some)
    batches.keep_skipped(tmp_path)
    _, skipped = take(batches, STEPS)
    found = lines(tmp_path / "skipped.jsonl")
    assert found[0] == {
        "source": "labels",
        "reason": "no image suffix",
        "path": str(some / "folder" / "a"),
        "count": 1,
        "first": ["notes.txt"],
        "step": 0,
    }
    reason = "image cannot be decoded"
    met = {(x["source"], x["index"]): x for x in found[1:]}
    assert sorted(met) == [(s, i) for s in ("labels", "texts") for i in BROKEN]
    assert len(found) == 1 + len(met)
    for (source, index), line in met.items():
        assert line["reason"] == reason and 1 <= line["step"] <= NUM // 4
        if source == "labels":
            assert line["path"] == str(some / "folder" / "a" / f"{index:03d}.png")
        else:
            assert line["shard"] == str(some / "tfrecord" / f"{index // 8}.tfrecord")
    skipped = skipped[-1]
    share = skipped.pop("labels"), skipped.pop("texts")
    assert skipped == {
        "labels/no image suffix": 1,
        f"labels/{reason}": 4,
        f"texts/{reason}": 4,
    }
    assert share == pytest.approx((4 / 48, 4 / 48), rel=0.3)


@pytest.mark.parametrize("at", [1, 5, 13, 30])
def test_a_resumed_run_has_the_same_batches_lines_and_counts(at, some, tmp_path):
    whole = make_batches(some)
    whole.keep_skipped(tmp_path)
    expected, skipped = take(whole, STEPS)
    again = tmp_path / "again"
    again.mkdir()
    # As if all had been read ahead, and the last line cut off by a kill.
    listed = (tmp_path / "skipped.jsonl").read_text()
    (again / "skipped.jsonl").write_text(listed + '{"source": "labels", "rea')
    second = make_batches(some)
    second.restore({"step": at})
    second.keep_skipped(again)
    assert all(x["step"] <= at for x in lines(again / "skipped.jsonl"))
    rest, skipped_again = take(second, STEPS - at)
    for a, b in zip(rest, expected[at:], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])

    def by_record(path):
        found = lines(path / "skipped.jsonl")
        # Read-ahead of the end, of a step that no one asked for, may be in one of them.
        return sorted(json.dumps(x) for x in found if x["step"] <= STEPS)

    assert by_record(again) == by_record(tmp_path)
    for counts in skipped + skipped_again:  # the shares are of the rows of each start
        counts.pop("labels", 0), counts.pop("texts", 0)
    assert skipped_again == skipped[at:]


def test_every_process_lists_its_own(some, tmp_path):
    for i in range(2):
        batches = make_batches(some, process_index=i, process_count=2)
        batches.keep_skipped(tmp_path)
        take(batches, NUM // 4)
    one, two = (lines(tmp_path / f) for f in ("skipped.jsonl", "skipped-00001.jsonl"))
    assert [x["step"] for x in one].count(0) == 1 and all(x["step"] for x in two)
    # In the first epoch no record is met by both.
    parts = [{(x["source"], x["index"]) for x in f if x["step"]} for f in (one, two)]
    epoch = {(s, i) for s in ("labels", "texts") for i in BROKEN}
    assert parts[0] | parts[1] == epoch and parts[0] and parts[1]


def test_fewer_processes_take_over_what_more_have_listed(some, tmp_path):
    whole = make_batches(some)
    whole.keep_skipped(tmp_path)
    _, expected = take(whole, STEPS)
    expected[-1].pop("labels"), expected[-1].pop("texts")
    again = tmp_path / "again"
    again.mkdir()
    for i in range(4):
        batches = make_batches(some, process_index=i, process_count=4)
        batches.keep_skipped(again)
        take(batches, 20)
    at = 15
    for count in (2, 1):
        every = [
            make_batches(some, process_index=i, process_count=count)
            for i in range(count)
        ]
        for batches in every:
            batches.restore({"step": at})
            batches.keep_skipped(again)
            batches.close()
        assert len([*again.iterdir()]) == count
    _, found = take(every[0], STEPS - at)
    found[-1].pop("labels"), found[-1].pop("texts")
    assert found[-1] == expected[-1]
    records = [(x["source"], x.get("index")) for x in lines(again / "skipped.jsonl")]
    assert len({*records}) == len(records) == 1 + 2 * len(BROKEN)


def test_what_was_mended_is_not_known_any_more(some, tmp_path):
    batches = make_batches(some)
    batches.keep_skipped(tmp_path)
    take(batches, 12)
    os.rename(some / "folder" / "a", some / "folder" / "b")
    source = opened("folder", some / "folder")
    source.name = "labels"
    records = SkippedRecords([source], [1.0]).keep(tmp_path, 12)
    assert records.counts["labels"]["image cannot be decoded"] == 4  # as it was
    assert records._mark(0, 5) and not records._mark(0, 5)
    records.close()


def test_too_many_skipped_records_stop_the_run_with_a_list(tmp_path):
    records = [
        (b"broken", b"x") if i % 4 == 1 else good(i % 20) for i in range(3 * NUM)
    ]
    write("folder", tmp_path / "folder", records)
    write("tfrecord", tmp_path / "tfrecord", [good(0)] * 20)
    for gone in range(3, 40, 4):
        (tmp_path / "folder" / "a" / f"{gone:03d}.png").write_bytes(b"")
    batches = make_batches(tmp_path, max_skipped=0.2)
    batches.keep_skipped(tmp_path)
    with pytest.raises(
        InputError,
        match=r'source "labels": at most 20 % .*: \d+ of 1\d\d looked at are: \d+ x '
        r"image cannot be decoded \(as /.*png, /.*png, /.*png\).*skipped.jsonl. lists "
        r"them.*raise data.max_skipped",
    ):
        for _ in range(STEPS):
            next(batches)
    step = batches.state()["step"]
    assert step == 144 // 4 - 1  # one look at each of the 144 says enough
    # A source's own share goes before that of all.
    sources = sources_of(tmp_path)
    sources["labels"]["max_skipped"] = 0.6
    batches = make_batches(tmp_path, max_skipped=0.2, sources=sources)
    take(batches, STEPS)


def test_too_many_that_indexing_left_out_stop_before_the_first_step(tmp_path):
    write("csv", tmp_path / "csv", [good(i % 20) for i in range(80)])
    with (tmp_path / "csv" / "t.csv").open("a") as file:
        file.write("000.png,\n" * 20)
    source = opened("csv", tmp_path / "csv")
    SkippedRecords([source], [0.2])
    with pytest.raises(
        InputError,
        match=r"at most 19 % .*: 20 of 100 looked at are: 20 x empty caption .as "
        r"/.*/t.csv line 82.*max_skipped",
    ):
        SkippedRecords([source], [0.19])
    with (tmp_path / "csv" / "t.csv").open("w") as file:  # too few to tell
        file.write("path,caption\n000.png,x\n" + "000.png,\n" * 90)
    SkippedRecords([opened("csv", tmp_path / "csv")], [0.1])


def test_damage_goes_through_a_file_and_joins():
    one, two = Damage(), Damage()
    for i in range(7):
        one.add("no .txt member", "a.tar", f"k{i}")
    two.add("no .txt member", "b.tar", "x")
    two.add("rest", "b.tar", "byte 7", is_record=False)
    two.add("no .txt member", "a.tar", "y")
    both = one.join(two)
    again = Damage.from_lists(json.loads(json.dumps(both.to_lists())))
    for damage in (both, again):
        assert damage == {"no .txt member": 9, "rest": 1} and damage.lost == 9
        found = {(x.reason, x.place): (x.count, x.first) for x in damage.places()}
        assert found == {
            ("no .txt member", "a.tar"): (8, ("k0", "k1", "k2", "k3", "k4")),
            ("no .txt member", "b.tar"): (1, ("x",)),
            ("rest", "b.tar"): (1, ("byte 7",)),
        }


# In a run.


@pytest.fixture
def make_config(some):
    def make(**changes):
        c = config_lib.default()
        c.batch_size, c.total_steps = BATCH, 36
        c.model.image.name, c.model.image.image_size = "swin", SIZE
        c.model.image.patch_size, c.model.image.window_size = 8, 2
        c.model.image.embed_dim = 8
        c.model.image.depths = c.model.image.num_heads = (1,)
        c.model.text.name, c.model.text.vocab_size = "transformer", 600
        c.model.text.context_length, c.model.text.width = 8, 16
        c.model.text.num_heads = c.model.text.num_layers = 1
        c.model.embed_dim = 8
        for name, source in sources_of(some).items():
            c.data.sources[name] = source
        c.data.templates = "short"
        c.log_every_steps, c.checkpoint_every_steps = 1, 10
        c.evaluate_every_steps = 100
        for field, value in changes.items():
            c.data[field] = value
        return c

    return make


def skipped_scalars(workdir):
    rows = lines(workdir / "metrics.jsonl")
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith("skipped/")}
        for row in rows
    }


def test_a_run_that_skips_too_much_is_saved_and_goes_on_when_more_is_allowed(
    some, make_config, tmp_path
):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="at most 5 %.*looked at are: "):
        train.run(make_config(max_skipped=0.05), run)
    stopped = max(skipped_scalars(run))
    assert stopped == 24  # 100 rows of a source were looked at in the 25th step
    assert (run / "checkpoints" / "24").is_dir()
    train.run(make_config(max_skipped=0.2), run)  # else the same config
    found = skipped_scalars(run)
    assert [*found] == [*range(1, 37)]
    reason = "image cannot be decoded"
    assert found[36][f"skipped/labels/{reason}"] == 4
    assert found[36]["skipped/labels/no image suffix"] == 1
    assert 0 < found[24]["skipped/texts"] < 0.2
    counts = [row.get(f"skipped/texts/{reason}", 0) for row in found.values()]
    assert counts == sorted(counts) and counts[-1] == 4
    listed = [x for x in lines(run / "skipped.jsonl") if x["source"] == "texts"]
    assert sorted(x["index"] for x in listed) == [*BROKEN]
    assert [sum(x["step"] <= step for x in listed) for step in found] == counts


@pytest.mark.parametrize(
    ("of", "share"),
    [(of, x) for of in ("data", "labels") for x in (-0.1, 1.5, "0.1", None)]
    + [("labels", True)],  # ml_collections makes 1.0 of the other
)
def test_a_share_is_a_share(of, share, make_config):
    config = make_config()
    section = config.data if of == "data" else config.data.sources.labels
    with config.ignore_type():
        section.max_skipped = share
    with pytest.raises(InputError, match=r"max_skipped must be in \[0, 1\]"):
        validation.validate(config, 1)


@pytest.mark.parametrize("field", ["max_pixels", "max_skips_in_a_row"])
@pytest.mark.parametrize("value", [0, 1.5, "many", 10**9])
def test_limits_are_whole_numbers(field, value, make_config):
    config = make_config()
    config.data.sources.labels[field] = value
    if (field, value) == ("max_skips_in_a_row", 10**9):
        return validation.validate(config, 1)
    with pytest.raises(
        InputError, match=f"data.sources.labels.{field} must be a whole"
    ):
        validation.validate(config, 1)


@pytest.mark.parametrize("form", ["prepared", "folder", "csv", "tfds", "webdataset"])
def test_every_format_of_files_has_limits(form):
    limits = dict(max_pixels=10, max_skips_in_a_row=3, max_skipped=0.5)
    validation.check_source("data.sources", "mine", dict(format=form, **limits), ())


def test_limits_may_change_between_restarts(make_config, tmp_path):
    run = tmp_path / "run"
    prepare_workdir(run, make_config(), write=True)
    (run / "checkpoints" / "3").mkdir(parents=True)
    config = make_config(max_skipped=0.7)
    config.data.sources.labels.max_skips_in_a_row = 7
    prepare_workdir(run, config, write=True)
    config.data.sources.labels.max_pixels = 7
    with pytest.raises(
        InputError, match="max_pixels: the run has no such field, now 7"
    ):
        prepare_workdir(run, config, write=True)
