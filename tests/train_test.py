"""The whole run in this process: what it leaves behind, and that it can go on.

A Swin with drop path, a text transformer, 16-pixel pictures in `.npz` files of both
kinds, augmentation on: small, but with every source of randomness that a run has.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from tiny_run import TIMES, assert_same_bits, saved
from tiny_run import rows as timeless

from unicl_jax import augment, program, train
from unicl_jax import config as config_lib
from unicl_jax.analysis.end_of_run import evaluation_table
from unicl_jax.checkpoint import NotSaved
from unicl_jax.data import sampler
from unicl_jax.errors import InputError
from unicl_jax.evaluation import Scores, encoders
from unicl_jax.export import export
from unicl_jax.workdir import prepare_workdir, saved_steps

SIZE, STEPS = 16, 6
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "white": (250, 250, 250),
    "yellow": (240, 220, 30),
    "grey": (128, 128, 128),
}


def pictures(labels, seed):
    """Squares of a colour in noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(0, SIZE // 2, 2)
        patch = image[row : row + 8, column : column + 8]
        patch[:] = list(COLOURS.values())[label]
    return images


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Three files: labelled, captioned, held out."""
    folder, names = tmp_path_factory.mktemp("sources"), list(COLOURS)
    labels = np.arange(36) % 6
    np.savez(
        folder / "labelled.npz",
        images=pictures(labels, 0),
        labels=labels,
        class_names=names,
    )
    given = np.arange(48) % 6
    np.savez(
        folder / "captioned.npz",
        images=pictures(given, 1),
        texts=[f"a {names[k]} square, number {i}" for i, k in enumerate(given)],
    )
    held_out = np.arange(20) % 6
    np.savez(
        folder / "held_out.npz",
        images=pictures(held_out, 2),
        labels=held_out,
        class_names=names,
    )
    return folder


# One block of one stage: for what needs no second one, a step sooner compiled.
ONE_BLOCK = dict(model__image__depths=(1,), model__image__num_heads=(2,))


@pytest.fixture
def make_config(sources):
    """A config of the small run; changes by path, as on the command line."""

    def make(**changes):
        c = config_lib.default()
        c.batch_size, c.total_steps, c.seed = 16, STEPS, 3
        c.model.image.name = "swin"
        c.model.image.image_size = SIZE
        c.model.image.patch_size = 4
        c.model.image.window_size = 2
        c.model.image.embed_dim = 16
        c.model.image.depths = (1, 1)
        c.model.image.num_heads = (2, 2)
        c.model.image.drop_path = 0.3
        c.model.text.name = "transformer"
        c.model.text.vocab_size = 600
        c.model.text.context_length = 12
        c.model.text.width = 32
        c.model.text.num_heads = 2
        c.model.text.num_layers = 1
        c.model.embed_dim = 16
        for name, kind in (("labelled", "image_label"), ("captioned", "image_text")):
            path = str(sources / f"{name}.npz")
            c.data.sources[name] = dict(format="npz", path=path, kind=kind)
        c.data.templates = "short"
        c.augment.shift, c.augment.color, c.augment.flip = 1, 0.2, True
        c.optimizer.warmup_steps = 2
        c.evaluations.squares = dict(
            format="npz",
            path=str(sources / "held_out.npz"),
            kind="image_label",
            templates="short",
        )
        c.evaluate_every_steps = c.checkpoint_every_steps = 3
        c.log_every_steps = 1
        for path, value in changes.items():
            *parents, leaf = path.split("__")
            section = c
            for parent in parents:
                section = section[parent]
            section[leaf] = value
        return c

    return make


def rows(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal while a step runs, once."""
    original = train.StopRequest.requested

    def requested(self, at):
        if at == step:
            os.kill(os.getpid(), number)
        return original(self, at)

    monkeypatch.setattr(train.StopRequest, "requested", requested)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The directories of runs that nothing stopped, by name: each is run once."""
    return tmp_path_factory.mktemp("uninterrupted"), {}


@pytest.fixture
def whole(uninterrupted, make_config):
    """The run of `make_config()`, never stopped: its directory and its result."""
    folder, done = uninterrupted
    if "whole" not in done:
        done["whole"] = train.run(make_config(), folder / "whole")
    return folder / "whole", done["whole"]


# --- What a run leaves behind.


def test_a_run_saves_its_config(whole, make_config):
    workdir, _ = whole
    assert (workdir / "config.json").read_text() == config_lib.to_json(make_config())


def test_every_step_is_logged_with_every_scalar(whole):
    workdir, _ = whole
    steps = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    named = {
        "loss",
        "excess",
        "per_image",
        "per_text",
        "positives_per_row",
        "label_share",
        "logit_scale",
        "learning_rate",
        "grad_norm",
        "param_norm",
        "update_norm",
        "epochs/labelled",
        "epochs/captioned",
        "rows/labelled",
        "rows/captioned",
        "duplicate_captions",
        "texts_cut",
    }
    for row in steps:
        assert named <= row.keys()
        assert all(isinstance(row[key], float) for key in named)
    # The first step compiles: its time is nobody's step time.
    assert all(set(TIMES) <= row.keys() for row in steps[1:2] + steps[4:5])
    timed = [row for row in steps if "step_seconds" in row]
    for row in timed:
        assert row["step_seconds"] > 0 and 0 <= row["data_wait"] <= 1
        assert row["images_per_second"] == pytest.approx(16 / row["step_seconds"])


def test_the_logged_scalars_fit_each_other(whole):
    """The loss is the mean of its directions, and the batch is what was asked for."""
    workdir, _ = whole
    for row in (row for row in rows(workdir) if "loss" in row):
        # Float32 means of 16 rows, summed in another order.
        both = (row["per_image"] + row["per_text"]) / 2
        assert row["loss"] == pytest.approx(both, rel=1e-5)
        assert 0 <= row["excess"] <= row["loss"]
        assert row["label_share"] == 0.5  # exactly: 8 of 16 rows, a power of two
        # 8 labelled rows of 6 classes: at least (6 + 2 repeats), at most all alike.
        assert 1 < row["positives_per_row"] <= (8 * 8 + 8) / 16
        step = row["step"]
        assert row["epochs/labelled"] == 8 * step / 36
        assert row["epochs/captioned"] == 8 * step / 48
        assert row["rows/labelled"] == row["rows/captioned"] == 8
        assert row["duplicate_captions"] == 0  # each has a number of its own
    rates = [row["learning_rate"] for row in rows(workdir) if "loss" in row]
    # Warm-up over two steps from 0 to the peak, then down.
    np.testing.assert_allclose(rates[:3], [0, 5e-4, 1e-3], rtol=1e-6)
    assert np.all(np.diff(rates[2:]) < 0)
    first = next(iter(rows(workdir)))
    # exp(theta) at theta = 1: float32's e.
    assert first["logit_scale"] == pytest.approx(np.e, rel=1e-6)
    # Untrained, every text is about as likely as every other of the 16.
    assert first["loss"] == pytest.approx(np.log(16), rel=0.3)


def test_evaluations_are_logged_on_schedule_and_returned(whole):
    workdir, result = whole
    scored = [row for row in rows(workdir) if "eval/squares_top1" in row]
    assert [row["step"] for row in scored] == [3, 6]
    for row in scored:
        assert row.keys() == {"step", "eval/squares_top1", "eval/squares_top5"}
        assert 0 <= row["eval/squares_top1"] <= row["eval/squares_top5"] <= 1
    assert {"step": 6, **result} == scored[-1]


def test_the_newest_checkpoints_are_kept(whole):
    workdir, _ = whole
    assert saved_steps(workdir) == [3, 6]
    assert saved(workdir, 3)["['step']"] == 3
    assert saved(workdir, 6)["['step']"] == 6


@pytest.mark.parametrize("name", ["curves.png", "predictions.png"])
def test_the_pictures_open_and_show_something(whole, name):
    workdir, _ = whole
    with Image.open(workdir / name) as image:
        image.load()
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    assert pixels.std() > 5  # a blank page has 0
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_predictions_show_the_held_out_pictures(whole):
    """The squares' colours are in the picture: it shows the set, not just axes."""
    workdir, _ = whole
    with Image.open(workdir / "predictions.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    seen = [(pixels == colour).all(1).any() for colour in COLOURS.values()]
    assert sum(seen) >= 5


def test_event_files_are_written(whole):
    workdir, _ = whole
    (event_file,) = (workdir / "tensorboard").iterdir()
    content = event_file.read_bytes()
    for tag in (b"loss", b"eval/squares_top1", b"epochs/labelled"):
        assert tag in content


# --- Concepts and captions.


def test_the_concepts_are_saved_and_another_list_of_classes_stops_the_run(
    whole, make_config, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    path = workdir / "concepts.json"
    said = json.loads(path.read_text())
    assert said["names"] == list(COLOURS)
    assert said["sources"] == {"labelled": [*range(6)]}
    # As if the names had been others when the run began.
    said["names"][2] = "azure"
    path.write_text(json.dumps(said))
    with pytest.raises(InputError, match='class 2 was "azure", is "blue"'):
        train.run(make_config(), workdir)


def test_names_that_join_are_said_in_a_line_each(
    make_config, sources, tmp_path, capsys
):
    synonyms = tmp_path / "synonyms.txt"
    synonyms.write_text("red\tscarlet\nwhite\tgrey\n")
    config = make_config(evaluations={}, data__synonyms=str(synonyms))
    path = str(sources / "held_out.npz")
    config.data.sources.more = dict(format="npz", path=path, kind="image_label")
    train.run(config, tmp_path / "run")
    out = capsys.readouterr().out
    line = '5 classes joined concepts of other sources: more "red", more "green", more '
    assert out.count(line + '"blue" and 2 more; concepts.json has all') == 1
    line = (
        'of their own source: labelled "grey" (as "white"), more "grey" (as "white");'
    )
    assert out.count("2 classes joined another " + line) == 1
    assert out.count('names of data.synonyms that no source has: 1, as "scarlet"') == 1
    said = json.loads((tmp_path / "run" / "concepts.json").read_text())
    assert said["synonyms"] == {"grey": "white"}
    assert said["unknown_synonyms"] == ["scarlet"]


def test_equal_captions_count_and_are_positives_by_text(make_config, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)
    texts = [("Nice  Day", "nice day")[i % 2] for i in range(40)]
    np.savez(tmp_path / "alike.npz", images=images, texts=texts)
    first = {}
    for identity in ("row", "text"):
        config = make_config(evaluations={}, data__caption_identity=identity)
        config.data.sources.captioned["path"] = str(tmp_path / "alike.npz")
        train.run(config, tmp_path / identity)
        first[identity] = rows(tmp_path / identity)[0]
    by_row, by_text = first["row"], first["text"]
    assert by_row["duplicate_captions"] == by_text["duplicate_captions"] == 1
    assert by_row["label_share"] == by_text["label_share"] == 0.5
    more = by_text["positives_per_row"] - by_row["positives_per_row"]
    assert more == pytest.approx((8 * 8 - 8) / 16, rel=1e-6)
    # None of 8 images can be told its own of 8 equal texts: nothing is below log 8.
    assert by_text["excess"] < by_row["excess"] - 0.3


# --- Going on.


def test_running_a_finished_run_again_trains_nothing_and_prints_the_table(
    whole, make_config, monkeypatch, capsys
):
    workdir, result = whole
    before, lines = saved(workdir), timeless(workdir)
    made = (workdir / "checkpoints" / "6").stat().st_mtime_ns

    def no_step(*args, **kwargs):
        def refuse(state, batch, step):
            raise AssertionError("a finished run must not train")

        return refuse

    monkeypatch.setattr(program, "make_train_step", no_step)
    again = train.run(make_config(), workdir)
    printed = capsys.readouterr().out
    assert again == result
    assert "finished before, at step 6" in printed
    assert "squares" in printed and "top-1 %" in printed and "curves.png" in printed
    assert f"{100 * result['eval/squares_top1']:.1f}" in printed
    assert (workdir / "checkpoints" / "6").stat().st_mtime_ns == made
    assert_same_bits(saved(workdir), before)
    assert timeless(workdir) == lines


def test_texts_in_fewer_slots_train_alike(make_config, tmp_path, capsys):
    changes = dict(model__text__context_length=40, total_steps=3, **ONE_BLOCK)
    full = train.run(make_config(**changes), tmp_path / "full")
    for text_length, slots in (("bucket", "16 x 32"), ("pack", "8 x 128")):
        changes |= dict(data__text_length=text_length)
        workdir = tmp_path / text_length
        assert train.run(make_config(**changes), workdir) == full
        assert f"texts of {slots} slots" in capsys.readouterr().out
        for a, b in zip(rows(tmp_path / "full"), rows(workdir), strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - set(TIMES):
                # Sums in another order, and gradients that are divided by their size.
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key


def test_texts_that_nothing_reads_have_one_shape(make_config, tmp_path, capsys):
    changes = dict(model__text__context_length=40, data__text_length="bucket")
    changes |= ONE_BLOCK
    config = make_config(objective="cross_entropy", total_steps=3, **changes)
    config.data.mixture, config.evaluations = "proportional", {}
    del config.data.sources["captioned"]
    train.run(config, tmp_path)
    out = capsys.readouterr().out
    assert out.count("compiled in") == 1 and "slots" not in out


def test_a_shape_that_is_met_late_is_in_no_steps_time(
    make_config, tmp_path, monkeypatch
):
    def shaped(batches, *_):
        for step, batch in enumerate(batches, 1):
            slots = 40 if step == 3 else 32
            yield batch | dict(tokens=batch["tokens"][:, :slots])

    monkeypatch.setattr(train.data, "in_equal_shapes", shaped)
    config = make_config(
        model__text__context_length=40,
        total_steps=4,
        evaluations={},
        checkpoint_every_steps=4,
        **ONE_BLOCK,
    )
    train.run(config, tmp_path)
    seconds = {row["step"]: row.get("step_seconds") for row in rows(tmp_path)}
    assert seconds[1] is seconds[3] is None  # compiled
    assert seconds[2] > 0 and seconds[4] > 0


@pytest.mark.parametrize("step, number", [(3, signal.SIGTERM), (4, signal.SIGINT)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    whole, make_config, tmp_path, monkeypatch, capsys, step, number
):
    """At step 3, where a checkpoint and an evaluation are due, and between them."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(train.Stopped, match=rf"stopped at step {step}, saved"):
            train.run(make_config(), tmp_path)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert saved_steps(tmp_path)[-1] == step
    result = train.run(make_config(), tmp_path)
    assert f"going on from step {step} of {STEPS}" in capsys.readouterr().out
    workdir, expected = whole
    assert result == expected
    # Parameters, optimizer state, step: bit by bit, though drop path and augmentation
    # draw at random: all that is random depends on the seed and the step alone.
    assert_same_bits(saved(tmp_path), saved(workdir))
    assert timeless(tmp_path) == timeless(workdir)


def test_randomness_is_on_and_the_seed_decides_it(whole, make_config, tmp_path):
    """Else the law above would hold for want of anything random."""
    workdir, _ = whole
    losses = [row["loss"] for row in rows(workdir) if "loss" in row]
    for name, changes in {
        "still": dict(augment__shift=0, augment__color=0.0, augment__flip=False),
        "no_drop_path": dict(model__image__drop_path=0.0),
    }.items():
        config = make_config(evaluations={}, total_steps=3, **changes)
        train.run(config, tmp_path / name)
        assert rows(tmp_path / name)[0]["loss"] != losses[0], name


def test_what_is_logged_and_evaluated_does_not_touch_what_is_learnt(
    whole, make_config, tmp_path
):
    config = make_config(
        evaluations={}, log_every_steps=4, checkpoint_every_steps=6, checkpoints_kept=1
    )
    assert train.run(config, tmp_path) == {}
    assert_same_bits(saved(tmp_path), saved(whole[0]))
    assert [row["step"] for row in rows(tmp_path)] == [4, 6]  # the last one always
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "predictions.png").exists()  # of nothing


def quickstart_config(make_config, seed):
    config = make_config(
        seed=seed,
        batch_size=128,
        total_steps=160,
        model__image__image_size=32,
        model__image__window_size=4,
        model__image__drop_path=0.0,
        model__image__init_std=0.08,
        model__image__embed_dim=32,
        model__logit_scale_init=2.659,
        augment__color=0.0,
        augment__flip=False,
        data__share_prompts=True,
        optimizer__learning_rate=3e-3,
        optimizer__warmup_steps=15,
        optimizer__b2=0.98,
        optimizer__clip_norm=1.0,
        data__mixture="weights",
        evaluate_every_steps=1000,
        checkpoint_every_steps=1000,
        log_every_steps=30,
    )
    config.data.sources = {}
    for name, kind, weight in (
        ("emoji_captions", "image_text", 1),
        ("fashion_mnist", "image_label", 3),
    ):
        config.data.sources[name] = dict(
            format="quickstart", path=name, kind=kind, weight=weight
        )
    config.evaluations = dict(
        fashion_mnist=dict(format="quickstart", path="fashion_mnist", templates="short")
    )
    return config


@pytest.mark.slow
def test_a_small_model_learns_to_name_held_out_clothes(make_config, tmp_path, capsys):
    """Of ten sorts, pictures it never saw; half a minute of one core."""
    result = train.run(quickstart_config(make_config, seed=0), tmp_path)
    # Seeds 0, 1, 2 gave top-1 of 0.397, 0.616, 0.629 (jax 0.10) and 0.437, 0.615, 0.627
    # (jax 0.12); in another order of records 0.642, 0.658, 0.552. Chance is 0.1; the
    # floor is one and a half standard deviations (0.09) below the least of these.
    assert result["eval/fashion_mnist_top1"] > 0.25
    # 0.938 to 0.989; chance is 0.5.
    assert result["eval/fashion_mnist_top5"] > 0.8
    # From 2.44 to 2.61 at step 30 down to 1.60 to 1.98 at step 160: by 0.58 at
    # least.
    excess = [row["excess"] for row in rows(tmp_path) if "excess" in row]
    assert excess[-1] < excess[0] - 0.3
    assert "pixel 1-NN %" in capsys.readouterr().out  # the baseline beside it


# --- When things go wrong.


def test_a_non_finite_loss_is_named_and_the_state_before_it_is_saved(
    make_config, tmp_path
):
    # A learning rate of 1e30 in the second step (the first one's is 0): parameters
    # whose products overflow, so the third step's loss is no number.
    config = make_config(
        optimizer__learning_rate=1e30,
        optimizer__warmup_steps=1,
        checkpoint_every_steps=100,
        **ONE_BLOCK,
    )
    with pytest.raises(train.NonFiniteLoss) as caught:
        train.run(config, tmp_path)
    message = str(caught.value)
    step = int(re.search(r"step (\d+) gave", message)[1])
    assert step >= 2
    assert "lower optimizer.learning_rate" in message
    assert saved_steps(tmp_path) == [step - 1]
    arrays = saved(tmp_path)
    assert arrays["['step']"] == step - 1
    for path, array in arrays.items():
        assert np.isfinite(array).all(), path
    logged = [row["step"] for row in rows(tmp_path) if "loss" in row]
    assert logged == list(range(1, step))
    # The same command meets the same step: the batch is what it was.
    with pytest.raises(train.NonFiniteLoss, match=f"step {step} gave"):
        train.run(config, tmp_path)
    assert saved_steps(tmp_path) == [step - 1]


def fail_at(monkeypatch, step, error):
    """Makes the reading of one step's batch fail; steps count from 0 there."""
    original = sampler.Sampler.plan

    def plan(self, at):
        if at == step:
            raise error
        return original(self, at)

    monkeypatch.setattr(sampler.Sampler, "plan", plan)


def test_a_data_error_saves_what_was_learnt_and_the_run_goes_on(
    whole, make_config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        fail_at(patch, 4, OSError("no such disk"))  # the fifth batch
        with pytest.raises(OSError, match="no such disk"):
            train.run(make_config(), tmp_path)
    assert saved_steps(tmp_path)[-1] == 4
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3, 4]
    with pytest.raises(
        InputError, match=r"optimizer\.b2: the run has 0\.999, now 0\.9"
    ):
        train.run(make_config(optimizer__b2=0.9), tmp_path)
    train.run(make_config(), tmp_path)
    assert_same_bits(saved(tmp_path), saved(whole[0]))
    assert timeless(tmp_path) == timeless(whole[0])


def test_a_data_error_before_the_first_step_leaves_nothing_that_binds(
    make_config, tmp_path, monkeypatch
):
    fail_at(monkeypatch, 0, OSError("no such disk"))
    with pytest.raises(OSError, match="no such disk"):
        train.run(make_config(), tmp_path)
    assert saved_steps(tmp_path) == []
    prepare_workdir(tmp_path, make_config(batch_size=8), write=True)


@pytest.mark.parametrize(
    "field, value",
    [
        ("batch_size", 12),
        ("objective", "unicorn"),
        ("data__mixture", "balance"),
        ("data__templates", "shrot"),
        ("optimizer__name", "adamwm"),
        ("model__image__name", "swim"),
    ],
)
def test_a_wrong_config_does_not_block_its_directory_for_the_right_one(
    make_config, tmp_path, field, value
):
    with pytest.raises(InputError, match=str(value)):
        train.run(make_config(**{field: value}), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == []
    right = make_config()
    assert prepare_workdir(tmp_path / "run", right, write=True)


def test_a_checkpoint_of_another_model_is_refused_by_step_and_path(
    whole, make_config, tmp_path
):
    """As when someone copies checkpoints between directories."""
    config = make_config(model__text__num_layers=2)
    prepare_workdir(tmp_path, config, write=True)
    (tmp_path / "checkpoints").symlink_to(whole[0] / "checkpoints")
    with pytest.raises(
        InputError, match="checkpoint 6.*must be of this model.*nothing"
    ):
        train.run(config, tmp_path)


def test_pixels_are_normalised_as_the_config_says(make_config, tmp_path, monkeypatch):
    """In training and in evaluation; CLIP's weights expect it."""
    seen = []
    for module in (augment, encoders):

        def normalize(images, normalization, original=module.normalize):
            seen.append(normalization)
            return original(images, normalization)

        monkeypatch.setattr(module, "normalize", normalize)
    config = make_config(total_steps=3, model__normalization="clip", **ONE_BLOCK)
    train.run(config, tmp_path)
    assert seen == ["clip"] * 2


def test_a_run_starts_from_another_ones_towers(whole, make_config, tmp_path, capsys):
    """A frozen image tower gives what it gave there; the other parts go on learning."""
    # Another seed: what is not taken over starts elsewhere.
    changes = dict(init_from=str(whole[0]), frozen=("image",), total_steps=3, seed=9)
    config = make_config(**changes)
    train.run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"logit_scale from step 6 of {whole[0]}" in said
    theirs, ours = (
        saved_state(workdir, step)
        for workdir, step in ((whole[0], 6), (tmp_path / "run", 3))
    )
    assert ours["step"] == 3
    jax.tree.map(
        np.testing.assert_array_equal,
        ours["params"]["image"],
        theirs["params"]["image"],
    )
    moved = np.abs(
        ours["params"]["text_projection"] - theirs["params"]["text_projection"]
    )
    # Three steps of 1e-3 from there; two seeds' starts are up to 0.06 apart.
    assert 0 < moved.max() < 0.01
    # From a file that holds that run's model, it is the same start.
    file = tmp_path / "model.safetensors"
    export(whole[0], file)
    config.init_from = str(file)
    train.run(config, tmp_path / "from_file")
    assert f"logit_scale from {file}" in capsys.readouterr().out
    jax.tree.map(
        np.testing.assert_array_equal,
        saved_state(tmp_path / "from_file", 3)["params"],
        ours["params"],
    )
    config.init_from = str(whole[0])
    # The same command again goes on from its own checkpoint, not from there.
    train.run(config, tmp_path / "run")
    assert "logit_scale from" not in capsys.readouterr().out


def test_a_kill_in_the_first_save_does_not_lose_the_start(
    whole, make_config, tmp_path, capsys
):
    config = make_config(evaluations={}, init_from=str(whole[0]))
    prepare_workdir(tmp_path / "run", config, write=True)
    (tmp_path / "run/checkpoints/2.orbax-checkpoint-tmp").mkdir(parents=True)
    train.run(config, tmp_path / "run")
    assert f"logit_scale from step 6 of {whole[0]}" in capsys.readouterr().out
    torn = tmp_path / "torn"
    (torn / "checkpoints/2.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(InputError, match="workdir of a run that saved.*no checkpoint"):
        train.run(make_config(init_from=str(torn)), tmp_path / "other")


def saved_state(workdir, step):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(step, args=args)["state"]


def test_where_there_is_nothing_to_start_from_it_is_said(
    whole, make_config, tmp_path, capsys
):
    with pytest.raises(InputError, match="workdir of a run that saved.*holds no"):
        train.run(make_config(init_from=str(tmp_path / "nowhere")), tmp_path / "run")
    other = make_config(init_from=str(whole[0]), model__text__num_layers=2)
    with pytest.raises(
        InputError, match="of this model.*text.num_layers 1, here it is 2"
    ):
        train.run(other, tmp_path / "other")
    other = make_config(init_from=str(whole[0]), model__image__window_size=4)
    with pytest.raises(InputError, match=r"a run of this model.*\(9, 2\) there"):
        train.run(other, tmp_path / "of_other_sizes")
    # Of the same arrays, and yet another model.
    other = make_config(init_from=str(whole[0]), model__text__activation="gelu")
    with pytest.raises(InputError, match="text.activation quick_gelu, here it is gelu"):
        train.run(other, tmp_path / "of_other_options")
    torn = tmp_path / "torn"
    shutil.copytree(whole[0], torn)
    # Not the arrays: Orbax's reads of those go on after the first has failed.
    (torn / "checkpoints/6/state/_METADATA").write_text("")
    with pytest.raises(InputError, match="init_from must hold a whole .*remove that s"):
        train.run(make_config(init_from=str(torn)), tmp_path / "third")
    # The run itself goes on from the one before it, to the same bits.
    train.run(make_config(), torn)
    assert "checkpoint 6 is damaged: reading it failed" in capsys.readouterr().out
    assert (torn / "checkpoints" / "6.damaged").is_dir()
    assert_same_bits(saved(torn), saved(whole[0]))


def test_a_checkpoint_that_cannot_be_written_is_told_once_and_not_tried_again(
    make_config, tmp_path, monkeypatch
):
    tries = []

    def full(manager, step, **_):
        tries.append(step)
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(NotSaved, match="No space left on device.; none is there. Make"):
        train.run(make_config(), tmp_path)
    assert tries == [3]


def table_lines(name, width, *kinds):
    class Task:
        ways, by = 21_841, "prompts"

    Task.name = name
    scores = {name: Scores({"top1": 0.1234, "top5": 0.4567})}
    console = Console(width=width)
    with console.capture() as capture:
        tasks = [Task, *(type("Task", (Task,), {"by": by}) for by in kinds)]
        console.print(evaluation_table(tasks, scores, {name: (0.5, 1.0)}))
    return capture.get().splitlines()


def test_the_table_says_what_tells_the_classes_apart():
    assert "task, by prompts" in table_lines("pets", 80)[1]
    mixed = "\n".join(table_lines("pets", 80, "k-NN"))
    assert "task, by" not in mixed
    assert "pets, by prompts " in mixed and "pets, by k-NN " in mixed


def test_the_table_fits_80_columns():
    cells = ("21,841", "12.3", "45.7", "0.00", "50.0 / 100.0")
    # A name of 20 letters fits as it is; a longer one is folded, the numbers never.
    for name, width in (("t" * 20, 200), ("t" * 40, 80)):
        lines = table_lines(name, width)
        assert max(map(cell_len, lines)) <= 80
        assert all(any(cell in line for line in lines) for cell in cells)


# --- The house.


def test_importing_the_trainer_does_not_import_tensorflow():
    code = "import unicl_jax.train, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    modules = set(done.stdout.split())
    assert "unicl_jax.train" in modules
    assert not modules & {"tensorflow", "tensorflow_datasets", "matplotlib"}


def test_a_bucket_is_no_directory(make_config):
    with pytest.raises(InputError, match='gs://.: got "s3://bucket/run"; mount'):
        prepare_workdir("s3://bucket/run", make_config(), write=True)
