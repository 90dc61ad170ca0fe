"""The doctor: real files with planted faults, and what its report says of each."""

import collections
import re
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from real_files import CLASSES, Image, photo, write_ten

from unicl_jax import config as config_lib
from unicl_jax import data, doctor, validation
from unicl_jax.checks import Setting, contact_sheet, examine, resources
from unicl_jax.checks.concepts import near_duplicates
from unicl_jax.checks.mixture import expected_positives
from unicl_jax.checks.records import spread
from unicl_jax.checks.report import (
    NOTE,
    PROBLEM,
    WARNING,
    Section,
    make_console,
    show,
    size,
    two_digits,
    verdict,
)
from unicl_jax.checks.setting import abstract_state, look_at_config
from unicl_jax.data.arrays import ArraySource
from unicl_jax.data.iterator import TrainIterator
from unicl_jax.errors import InputError
from unicl_jax.step import init_state
from unicl_jax.workdir import keep_concepts, prepare_workdir

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "own_data.py"
COLOURS = {
    "deep_red": (200, 20, 30),
    "green": (30, 180, 40),
    "sky_blue": (90, 160, 250),
    "yellow": (240, 220, 30),
}


def write(path, colour, **options):
    """A flat picture of a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), COLOURS[colour]).save(path, **options)


@pytest.fixture
def own(tmp_path):
    """A user's files, nothing wrong with them."""
    folder = tmp_path / "own"
    lines = ["filepath,caption"]
    for i in range(24):
        colour = list(COLOURS)[i % 4]
        write(folder / "pictures" / colour / f"{i}.png", colour)
        write(folder / "held_out" / colour / f"{i}.jpg", colour)
        write(folder / "more" / f"{i}.webp", colour, lossless=True)
        lines.append(f"more/{i}.webp,number {i} is {colour.replace('_', ' ')}")
    (folder / "captions.csv").write_text("\n".join([*lines, ""]))
    return folder


@pytest.fixture
def config(own):
    """The recipe with its paths, as the command line sets them, and a smaller model."""
    config = runpy.run_path(str(RECIPE))["get_config"]().lock()
    config.data.sources.labels.path = str(own / "pictures")
    config.data.sources.captions.path = str(own / "captions.csv")
    config.evaluations.held_out.path = str(own / "held_out")
    config.batch_size, config.total_steps = 16, 30
    config.optimizer.warmup_steps = 5
    config.model.image.image_size, config.model.image.patch_size = 32, 8
    config.model.image.depths, config.model.image.num_heads = (1,), (1,)
    config.model.text.vocab_size, config.model.text.context_length = 600, 40
    return config


def setting_of(config, out, **changes):
    options = dict(workdir=None, processes=1, devices=8, records=64) | changes
    return Setting(config=config, out=Path(out), **options)


def found(config, out, mark=None, **changes):
    """The findings of one mark, or of all: title -> texts with what to do."""
    sections = [*examine(setting_of(config, out, **changes))]
    return {
        section.title: "\n".join(
            f"{finding.text}; {finding.todo}"
            for finding in section.findings
            if mark in (None, finding.mark)
        )
        for section in sections
        if mark is None or section.count(mark)
    }


# --- The command.


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command in this process: exit code, lines of stdout, of stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")

    def forget():
        for name in ("config", "workdir"):
            flags.FLAGS[name].unparse()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # overrides define themselves
        flags.FLAGS.unparse_flags()

    def run(*arguments):
        forget()
        monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
        code = doctor.main(sys.argv)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    yield run
    forget()


# ml_collections reads recipes by a method that Python 3.12 deprecates.
load_module = pytest.mark.filterwarnings(r"ignore:.*load_module\(\):DeprecationWarning")


def arguments(own, workdir):
    return [
        "--config=configs/own_data.py",
        f"--workdir={workdir}",
        f"--config.data.sources.labels.path={own}/pictures",
        f"--config.data.sources.captions.path={own}/captions.csv",
        f"--config.evaluations.held_out.path={own}/held_out",
    ]


@load_module
def test_good_files_are_ready_to_train(own, command, tmp_path):
    workdir = tmp_path / "run"
    steps = ["--config.total_steps=18", "--config.optimizer.warmup_steps=5"]
    code, out, _ = command(*arguments(own, workdir), *steps)
    assert code == 0
    assert re.fullmatch(r"ready to train \(looked for \d+ s\)", out[-1])
    assert max(map(len, out)) <= 80
    assert not any(mark in line for line in out for mark in "!✗")
    for said in (
        "✓ folder, image-label: 24 records, 4 classes",
        "✓ 24 records read, all of them readable",
        "✓ every class has 6 records",
        "✓ 4 concepts",
        "✓ labels: 64 rows of 128, 48.0 epochs in 18 steps",
        "✓ 1 process: it reads 128 rows a batch",
    ):
        assert any(said in line for line in out), said
    # Nothing else is written, and the run can start there.
    assert [path.name for path in workdir.iterdir()] == ["contact_sheet.png"]
    prepare_workdir(workdir, config_lib.default(), write=True)


@load_module
def test_a_run_that_is_there_keeps_its_files(own, command, tmp_path, config):
    config = runpy.run_path(str(RECIPE))["get_config"]().lock()
    config.data.sources.labels.path = f"{own}/pictures"
    config.data.sources.captions.path = f"{own}/captions.csv"
    config.evaluations.held_out.path = f"{own}/held_out"
    workdir = prepare_workdir(tmp_path / "run", config, write=True)
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    before = (workdir / "config.json").read_bytes()
    code, out, _ = command(*arguments(own, workdir), "--out", str(tmp_path / "look"))
    assert code == 0 and (tmp_path / "look" / "contact_sheet.png").is_file()
    code, out, _ = command(*arguments(own, workdir), "--config.seed=5", "--records=4")
    assert code == 1
    assert any("seed: the run has 0, now 5" in line for line in out)
    names = {"config.json", "checkpoints", "contact_sheet.png"}
    assert {path.name for path in workdir.iterdir()} == names
    assert (workdir / "config.json").read_bytes() == before


@load_module
def test_many_faults_are_told_at_once(own, command, tmp_path):
    code, out, _ = command(
        *arguments(own, tmp_path / "run"),
        f"--config.evaluations.held_out.path={own}/nowhere",
        "--config.optimizer.learning_rate=-1",
        "--config.augment.color=3.0",
        "--config.batch_size=20",
        f"--config.data.sources.labels.path={own}/nothing",
    )
    assert code == 1
    text = " ".join(line.strip() for line in out)
    assert "optimizer.learning_rate must be above 0: got -1" in text
    assert "augment.color must be in [0, 1): got 3.0" in text
    assert "nearest are 16 and 24" in text
    assert "/nowhere" in text and "/nothing" in text
    assert "→ set the source's `path`." in text
    assert "✓ csv, image-text: 24 records" in text  # it goes on
    assert out[-1].startswith("5 problems, 0 warnings (")
    assert not (tmp_path / "run").exists()


@load_module
@pytest.mark.parametrize(
    "more, said",
    [
        (["--records=0"], "--records must be at least 1: got 0."),
        (["--processes=3", "--devices=8"], "--devices must be divisible"),
        (["--config.batchsize=8"], 'did you mean "batch_size"?'),
        (["--out=captions.csv/x"], ""),
    ],
)
def test_wrong_flags_get_one_line(more, said, own, command, tmp_path, monkeypatch):
    if not said:  # a folder that cannot be made, which the last section says
        code, out, _ = command(*arguments(own, tmp_path), f"--out={own}/captions.csv/x")
        assert code == 1 and any("--out must be a folder" in line for line in out)
        return
    code, _, err = command(*arguments(own, tmp_path / "run"), *more)
    assert code == 2
    assert len(err) == 1 and err[0].startswith("error: ") and said in err[0]


@load_module
def test_without_a_config_it_says_how(command):
    code, _, err = command("--records=3")
    assert code == 2 and "python -m unicl_jax.doctor --config" in err[0]


# --- What is wrong with files.


def test_broken_and_missing_files_are_named(config, own, tmp_path):
    (own / "pictures" / "green" / "broken.jpg").write_bytes(b"no picture")
    (own / "pictures" / "green" / "notes.txt").write_bytes(b"no picture")
    (own / "more" / "3.webp").unlink()
    table = own / "captions.csv"
    table.write_text(table.read_text() + "more/1.webp,\nhttp://x/y.jpg,web\n")
    said = found(config, tmp_path, WARNING)
    labels, captions = said["source labels"], said["source captions"]
    assert "1 of 25 records read (4.0 %): image cannot be decoded" in labels
    assert "pictures/green/broken.jpg" in labels and "delete these files" in labels
    assert "left out: 1 x no image suffix" in labels
    assert "1 of 24 records read (4.2 %): file is missing" in captions
    assert "more/3.webp" in captions and "`root`" in captions
    assert "left out: 1 x empty caption" in captions
    assert "left out: 1 x path is a web address" in captions


def test_more_missing_files_than_training_allows_are_a_problem(config, own, tmp_path):
    for path in sorted((own / "more").iterdir())[:5]:
        path.unlink()
    problems = found(config, tmp_path, PROBLEM)["source captions"]
    assert "at most 10 % of the records may be skipped (max_skipped): 5 of" in problems
    with config.unlocked():
        config.data.sources.captions.max_skipped = 0.5
    assert not found(config, tmp_path, PROBLEM).get("source captions")


def test_classes_that_are_empty_double_or_nearly_the_same(config, own, tmp_path):
    (own / "pictures" / "unicorn").mkdir()
    for name in ("sky blue", "greens", "t-shirt", "t_shirt"):
        write(own / "pictures" / name / "x.png", "green")
    said = found(config, tmp_path, WARNING)
    assert 'without a record: 1 of 9 classes, "unicorn"' in said["source labels"]
    concepts = said["concepts"]
    assert 'labels: several classes of one concept: "sky blue"' in concepts
    assert '"green" / "greens", "t-shirt" / "t shirt"' in concepts


def test_captions_that_are_long_alike_or_a_class(config, own, tmp_path):
    rows = ["filepath,caption"]
    rows += [f"more/{i}.webp,{'word ' * 50}{i}" for i in range(6)]
    rows += [f"more/{i}.webp,Deep  Red" for i in range(6, 10)]
    rows += [f"more/{i}.webp,a picture {i}" for i in range(10, 24)]
    (own / "captions.csv").write_text("\n".join(rows))
    said = found(config, tmp_path, WARNING)
    captions = said["source captions"]
    assert "of 40: 25 % are cut; raise model.text.context_length" in captions
    assert (
        '17 % of 24 records share a caption with another one, as 4 do "deep red"'
        in (captions)
    )
    text = (
        'captions: the caption of 4 of 24 records is a concept\'s name, as "deep red"'
    )
    assert text in said["concepts"]


def test_equal_captions_that_are_positives_are_no_fault(config, own, tmp_path):
    rows = [f"more/{i}.webp,the same" for i in range(24)]
    (own / "captions.csv").write_text("\n".join(["filepath,caption", *rows]))
    said = found(config, tmp_path, WARNING)
    assert "100 % of 24 records share" in said["source captions"]
    assert 'set data.caption_identity to "text"' in said["source captions"]
    config.data.caption_identity = "text"
    assert "source captions" not in found(config, tmp_path, WARNING)
    assert "100 % of 24" in found(config, tmp_path, NOTE)["source captions"]


def test_synonyms_join_names_and_those_unknown_are_told(config, own, tmp_path):
    with config.unlocked():
        config.data.synonyms = (("green", "verde"), ("gren", "lime"))
    write(own / "held_out" / "verde" / "x.png", "green")
    said = found(config, tmp_path)["concepts"]
    assert 'data.synonyms that no source has: "verde", "gren", "lime"' in said
    assert "no concept of training" not in said  # "verde" is one


def test_a_concept_table_that_has_changed_is_refused(config, own, tmp_path):
    workdir = tmp_path / "run"
    setting = setting_of(config, tmp_path, workdir=workdir)
    assert not any(section.count(PROBLEM) for section in examine(setting))
    prepare_workdir(workdir, config, write=True)
    keep_concepts(workdir, setting.batches.concepts, write=True)
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    assert not found(config, tmp_path, PROBLEM, workdir=workdir)
    (own / "pictures" / "green").rename(own / "pictures" / "lime")
    said = found(config, tmp_path, PROBLEM, workdir=workdir)
    assert [*said] == ["concepts"] and 'was "green", is "lime"' in said["concepts"]


def test_labels_out_of_range(config, own, tmp_path):
    rows = [f"more/{i}.webp,{i % 3}" for i in range(24)]
    (own / "labels.csv").write_text("\n".join(["path,label", *rows]))
    with config.unlocked():
        config.data.sources.labels = ConfigDict(
            dict(
                format="csv",
                kind="image_label",
                path=str(own / "labels.csv"),
                class_names=["zero", "one"],
            )
        )
        config.evaluations.held_out.class_names = ""
    said = found(config, tmp_path)
    assert "left out: 8 x label out of range" in said["source labels"]
    assert '8 rows are left out: "2", for one, is no class.' in said["source labels"]
    assert "held_out: 4 of 4 names are no concept of training" in said["concepts"]
    np.savez(
        own / "bad.npz",
        images=np.zeros((4, 32, 32, 3), np.uint8),
        labels=np.arange(4),
        class_names=["a", "b"],
    )
    with config.unlocked():
        config.data.sources.labels = ConfigDict(
            dict(format="npz", kind="image_label", path=str(own / "bad.npz"))
        )
    said = found(config, tmp_path, PROBLEM)
    assert [*said] == ["source labels"]
    assert (
        "labels must be in [0, 2), one class name each: got 2" in said["source labels"]
    )


def test_images_that_are_large_or_turned(config, own, tmp_path):
    photo(1, 3000, 2000).save(own / "pictures" / "green" / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    write(own / "pictures" / "yellow" / "turned.jpg", "yellow", exif=exif)
    said = found(config, tmp_path, WARNING)["source labels"]
    assert re.search(
        r"over 4 megapixels: 1 of 26 images, as \S+large.jpg, 3000 x 2000, which", said
    )
    assert "--max_side=64: enough for crops of 32" in said
    assert re.search(r"stored turned: 1 of 26 images, as \S+turned.jpg: EXIF", said)


def test_what_cannot_be_mixed_is_said_once_and_the_rest_goes_on(config, tmp_path):
    with config.unlocked():
        del config.data.sources["captions"]
    said = found(config, tmp_path)
    assert "needs image-label and image-text sources" in said["mixture"]
    assert "24 records" in said["evaluation held_out"]
    assert not (tmp_path / "contact_sheet.png").exists()
    assert [*found(config, tmp_path, PROBLEM)] == ["mixture"]


def test_a_source_without_a_format_does_not_end_the_look(config, tmp_path):
    with config.unlocked():
        del config.data.sources.labels["format"]
    said = found(config, tmp_path)
    assert "data.sources.labels must say format" in said["config"]
    assert "not looked at" in said["source labels"]
    assert "24 records" in said["source captions"]


def test_an_evaluation_that_an_objective_cannot_take_is_refused(config, own, tmp_path):
    write(own / "held_out" / "purple" / "1.png", "green")
    with config.unlocked():
        del config.data.sources["captions"]
    config.objective, config.data.mixture = "cross_entropy", "proportional"
    said = found(config, tmp_path, PROBLEM)
    assert [*said] == ["evaluation held_out"]
    assert '1 of 5 are not among them, as "purple"' in said["evaluation held_out"]


def test_made_up_records_leave_nothing(tmp_path):
    config = runpy.run_path(str(ROOT / "configs" / "swin_tiny.py"))["get_config"](
        "debug"
    )
    workdir = tmp_path / "run"
    said = found(config, workdir, workdir=workdir, processes=4)
    assert "made up in a folder of this look's own" in said["config"]
    assert "gcc: 2 shards for 4 processes" in said["processes"]
    assert "--shards=4" in said["processes"]
    assert "4 processes: each reads 8 rows a batch" in said["processes"]
    assert "at least" in said["mixture"]
    assert [path.name for path in workdir.iterdir()] == ["contact_sheet.png"]


def test_shards_of_one_process_are_no_fault(tmp_path, config):
    write_ten(tmp_path)
    with config.unlocked():
        config.data.sources.labels = ConfigDict(
            dict(
                format="tfrecord",
                kind="image_label",
                path=str(tmp_path),
                fields=dict(image="jpg", label="cls"),
                class_names=CLASSES,
            )
        )
        del config.evaluations["held_out"]
    said = found(config, tmp_path, NOTE)
    assert "labels: 2 shards" in said["processes"]
    assert "7 classes of 7 in these records" in said["source labels"]
    config.data.share_prompts = False
    said = found(config, tmp_path, NOTE, processes=2)["processes"]
    assert "labels: 2 shards: records are divided by rows" in said
    config.data.window, config.data.lanes = 4, 2
    said = found(config, tmp_path, NOTE, processes=2)["processes"]
    assert "divided by rows" not in said and "2 shards in 2 lanes" in said
    assert (tmp_path / "contact_sheet.png").is_file()


def test_disk_and_memory_that_are_too_small(config, tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "free_disk", lambda folder: (1000, folder))
    monkeypatch.setattr(resources, "free_memory", lambda: 1000)
    said = found(config, tmp_path, WARNING)["disk and memory"]
    assert "3 checkpoints of" in said and "of 1.0 kB free" in said
    assert "lower checkpoints_kept" in said and "lower batch_size" in said
    monkeypatch.setattr(resources, "free_memory", lambda: None)
    assert "memory of the host" in found(config, tmp_path, NOTE)["disk and memory"]


def test_the_system_tells_what_is_free(tmp_path):
    disk, folder = resources.free_disk(tmp_path / "a" / "b")
    assert folder == tmp_path and disk > 0
    assert resources.free_memory() > 1e6


def test_a_checkpoint_is_as_large_as_the_state(config, tmp_path):
    setting = setting_of(config, tmp_path)
    next(examine(setting))
    from unicl_jax.objectives import make_objective

    objective = make_objective(config.objective, setting.model)
    parts = setting.model, objective, setting.optimizer
    state = jax.jit(lambda: init_state(*parts, 0))()
    real = sum(x.nbytes for x in jax.tree.leaves(state))
    assert resources.bytes_of(abstract_state(setting)) == real


def test_the_model_is_traced_once_for_all_numbers_of_concepts(config, tmp_path):
    config.objective, config.ema_decay = "cross_entropy", 0.9
    setting = setting_of(config, tmp_path)
    look_at_config(Section("config"), setting)
    traced, init = [], setting.model.init
    setting.towers = None
    setting.model = setting.model._replace(init=lambda k: traced.append(1) or init(k))
    few, many = abstract_state(setting, 3), abstract_state(setting, 7)
    assert len(traced) == 1
    assert few.params["objective"]["class_bias"].shape == (3,)
    assert many.params["objective"]["class_bias"].shape == (7,)
    shapes = [jax.tree.map(lambda x: x.shape, s.params["image"]) for s in (few, many)]
    assert shapes[0] == shapes[1] == jax.tree.map(lambda x: x.shape, few.ema["image"])


# --- The contact sheet.


def test_the_sheet_shows_each_record_with_its_own_text(config, tmp_path):
    config.augment.color = 0.0
    config.views, config.objective = 2, "uniclip"
    setting = setting_of(config, tmp_path)
    assert all(not section.count(PROBLEM) for section in examine(setting))
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        # 4 records of 2 views in a row, 3 rows of each of 2 sources.
        assert sheet.size == (2 * 20 + 4 * 268 - 12, 2 * 20 + 32 + 2 * (40 + 3 * 204))
        assert sheet.mode == "RGB"
    tiles = contact_sheet.read_tiles(setting, 12)
    assert [*tiles] == ["captions", "labels"]
    colour_of = {name.replace("_", " "): rgb for name, rgb in COLOURS.items()}
    for name, mine in tiles.items():
        assert len(mine) == 12
        for tile in mine:
            assert tile.views.shape == (2, 32, 32, 3)
            if name == "labels":
                assert tile.concept in tile.text
                said = tile.concept
            else:
                assert tile.concept == ""
                said = tile.text.split(" is ")[1]
            off = np.abs(tile.views.astype(int) - colour_of[said]).max()
            assert off <= 2, (name, tile.text)
    assert len({tile.concept for tile in tiles["labels"]}) == 4


def test_texts_of_any_script_can_be_drawn(config, own, tmp_path):
    texts = [
        "猫が窓辺で寝ています",
        "кошка",
        "قطة على النافذة",
        "🐈‍⬛ cat",
        "a\u200bb $x^2$",
    ]
    texts += ["x" * 300, "e\u0301\u0327" * 9, "\U00012000 \ue000"]
    rows = [f"more/{i}.webp,{text}" for i, text in enumerate(texts)]
    (own / "captions.csv").write_text("\n".join(["path,caption", *rows]))
    (own / "pictures" / "deep_red").rename(own / "pictures" / "赤い花")
    assert not found(config, tmp_path, PROBLEM)
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000


def test_lines_are_broken_to_fit():
    face = contact_sheet.font("a", 12)
    text = "some words and an" + " extremely" * 30
    lines = contact_sheet.wrapped(text, face, 128, 3)
    assert len(lines) == 3 and lines[0].startswith("some words") and lines[2][-1] == "…"
    assert contact_sheet.wrapped("猫" * 40, face, 128, 9)[1][0] == "猫"
    assert contact_sheet.wrapped("", face, 128, 3) == []
    for line in [*lines, *contact_sheet.wrapped("猫" * 40, face, 128, 9)]:
        assert 0 < face.getlength(line) <= 128


def test_letters_that_dejavu_lacks_come_from_another_font():
    letter = "\u2a0c\U0001d4d0"  # mathematics, of which matplotlib ships more fonts
    assert "DejaVuSans.ttf" in contact_sheet.font("plain", 12).path
    assert "DejaVuSans-Bold.ttf" in contact_sheet.font("plain", 12, True).path
    path = contact_sheet.font(letter, 12).path
    assert "DejaVuSans.ttf" not in path
    assert set(letter) <= contact_sheet._letters(path)
    # No font has these: boxes, and no complaint.
    contact_sheet.font("\U0010fffd", 12).getlength("\U0010fffd")


# --- Parts.


def test_all_of_a_configs_problems_are_told():
    config = runpy.run_path(str(RECIPE))["get_config"]()
    assert [*validation.problems(config, 1)] == []
    config.batch_size, config.seed, config.views = 0, -1, 99
    config.optimizer.eps = config.optimizer.b1 = -1.0
    with config.unlocked():
        config.data.sources.labels.pth = "x"
    said = " ".join(map(str, validation.problems(config, 1, 2)))
    for field in (
        *("batch_size", "seed", "views", "optimizer.eps", "optimizer.b1"),
        *('no "pth"', "share_prompts"),
    ):
        assert field in said, field
    first = next(validation.problems(config, 1, 2))
    with pytest.raises(InputError) as caught:
        validation.validate(config, 1, 2)
    assert str(caught.value) == str(first)


@pytest.mark.parametrize("length, count", [(1, 64), (64, 64), (65, 64), (10**9, 50)])
def test_records_come_from_all_over_a_source(length, count):
    indices = spread(length, count, 0)
    assert len(indices) == min(length, count) == len(set(indices.tolist()))
    assert (np.diff(indices) > 0).all() and 0 <= indices[0] and indices[-1] < length
    assert (np.diff(indices) <= 2 * -(-length // count)).all()
    assert np.array_equal(indices, spread(length, count, 0))
    if length > 10**6:
        assert not np.array_equal(indices, spread(length, count, 1))


@pytest.mark.parametrize(
    "names, groups",
    [
        (["T-shirt", "t shirt", "shirt"], [["T-shirt", "t shirt"]]),
        (["box", "boxes", "fox"], [["box", "boxes"]]),
        (
            ["berry", "berries", "house", "houses"],
            [["berry", "berries"], ["house"] * 2],
        ),
        (["cap", "cape", "glass", "bus", "iris", "car", "care"], []),
        (["cookie", "cookies", "👍", "!!"], [["cookie", "cookies"]]),
    ],
)
def test_names_that_are_nearly_the_same(names, groups):
    found = near_duplicates(names)
    assert [group[0] for group in found] == [group[0] for group in groups]
    assert all(len(group) == 2 for group in found)


def test_expected_positives_are_those_of_batches():
    rng = np.random.default_rng(0)
    pixels = np.zeros((400, 2, 2, 3), np.uint8)
    labels = rng.choice(4, 400, p=[0.6, 0.2, 0.15, 0.05])
    sources = [
        ArraySource("a", pixels, labels=labels, class_names=["w", "x", "y", "z"]),
        ArraySource("b", pixels, labels=labels % 2, class_names=["X", "q"]),
        ArraySource("c", pixels, texts=["some text"] * 400),
    ]
    concepts = data.concepts.make_concept_table(
        {s.name: s.class_names for s in sources if s.class_names}
    )
    tokenizer = data.Tokenizer(8, 600)
    batches = TrainIterator(
        *(sources, concepts, ["{}"], tokenizer),
        batch_size=12,
        mixture="weights",
        seed=0,
        weights=[3, 2, 1],
    )
    expected, is_exact = expected_positives(batches)
    seen = []
    for _ in range(2000):
        label = next(batches)["label"]
        counts = collections.Counter(label[label >= 0].tolist())
        seen += [counts[c] for c in label[label >= 0].tolist()]
    batches.close()
    assert is_exact and expected == pytest.approx(np.mean(seen), rel=0.01)


def test_a_report_counts_and_can_do_without_unicode(monkeypatch):
    section = Section("x")
    assert verdict([section]) == (0, "ready to train")
    section.good("[bold]fine")
    section.warn("odd", "mend it")
    assert verdict([section]) == (0, "ready to train: 0 problems, 1 warning")
    section.refuse(InputError("a must hold; got b (c; d) here"))
    section.refuse(InputError("a must be 1: got 2; set a."))
    assert [(f.text, f.todo) for f in section.findings[2:]] == [
        ("a must hold; got b (c; d) here", ""),
        ("a must be 1: got 2", "set a."),
    ]
    problems, said = verdict([section, section])
    assert (problems, said) == (4, "4 problems, 2 warnings")
    console = make_console()
    with console.capture() as captured:
        show(console, section)
    assert "✓ [bold]fine" in captured.get() and "→ mend it" in captured.get()
    monkeypatch.setattr(type(console), "encoding", "ascii")
    with console.capture() as captured:
        show(console, section)
    assert captured.get().isascii() and "-> mend it" in captured.get()


@pytest.mark.parametrize(
    "count, said",
    [(0, "0 bytes"), (999, "999 bytes"), (1e3, "1.0 kB"), (2.34e7, "23 MB")]
    + [(5e9, "5.0 GB"), (1e16, "10000 TB")],
)
def test_sizes_are_readable(count, said):
    assert size(count) == said


def test_measured_numbers_have_two_digits():
    found = [two_digits(x) for x in (0.0826, 0.5, 9.96, 853.0, 14321.0)]
    assert found == ["0.083", "0.5", "10", "850", "14,000"]
