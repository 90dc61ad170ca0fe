"""`python -m unicl_jax.prepare`: killed, mistyped, on a recipe, on one source."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_files import SIZE, encoded, example, photo, write_tfrecord

from unicl_jax import data, prepare, validation
from unicl_jax.errors import InputError

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds until a process counts as hung; each takes a few


@pytest.fixture
def pets(tmp_path):
    """Class folders, and the flags that name them."""
    for i in range(6):
        path = tmp_path / "pets" / ["cat", "dog"][i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i)))
    return ["--format=folder", "--kind=image_label", f"--path={tmp_path}/pets"]


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command in this process: exit code, lines of stdout and of stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        code = prepare.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_one_source_by_flags(command, pets, tmp_path):
    code, out, err = command(*pets, f"--out={tmp_path}/to/pets", "--shards=2")
    assert (code, err) == (0, [])
    assert out[0] == f"pets: folder -> {tmp_path}/to/pets"
    assert out[1].startswith("6/6  ") and "records/s" in out[1]
    assert out[2].startswith("pets: 6 records, 2 classes, 0.0 MB, shards: 2, ")
    assert (
        out[-1] == f'format="prepared", kind="image_label", path="{tmp_path}/to/pets"'
    )
    assert (tmp_path / "to" / "pets" / "pets-00001-of-00002.tfrecord").is_file()
    code, out, err = command(*pets, f"--out={tmp_path}/to/pets", "--shards=2")
    assert (code, err) == (0, []) and "it is prepared already" in out[1]
    code, out, err = command("--verify", f"--out={tmp_path}/to")
    assert (code, err) == (0, []) and "as they were written" in out[0]
    path = tmp_path / "to" / "pets" / "pets-00001-of-00002.tfrecord"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out, err = command("--verify", f"--out={tmp_path}/to")
    assert code == 2 and out == [f"{path} has other bytes than were written"]
    assert err[0].startswith("error: every file must be") and str(path) in err[0]


def test_every_field_of_a_source_can_be_said(command, tmp_path):
    payloads = [example(a=encoded(photo(i)), b=i + 1) for i in range(4)]
    for i in range(2):
        write_tfrecord(tmp_path / f"{i}.tfrecord", payloads[2 * i : 2 * i + 2])
    code, _, err = command(
        *("--format=tfrecord", "--kind=image_label", f"--out={tmp_path}/to"),
        f"--path=['{tmp_path}/0.tfrecord', '{tmp_path}/1.tfrecord']",
        *("--fields.image=a", "--fields.label=b", "--label_offset=1"),
        "--class_names=['w', 'x', 'y', 'z']",
        *(f"--index_cache={tmp_path}/index", "--max_skips_in_a_row=3"),
        "--max_pixels=99999",
    )
    assert (code, err) == (0, [])
    manifest = json.loads((tmp_path / "to" / "manifest.json").read_text())
    assert manifest["class_counts"] == [1, 1, 1, 1]
    assert manifest["class_names"] == ["w", "x", "y", "z"]


def test_a_recipe_prepares_its_sources_and_trains_on_them(command, pets, tmp_path):
    lines = ["path,caption", *(f"pets/cat/{i}.jpg,a cat {i}" for i in (0, 2, 4))]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    sources, path = "--config.data.sources", pets[2].removeprefix("--path=")
    flags = [f"{sources}.labels.path={path}"]
    flags += [f"{sources}.captions.path={tmp_path}/captions.csv"]
    flags += [f"--config.evaluations.held_out.path={path}"]
    recipe, to = "--config=configs/own_data.py", tmp_path / "to"
    code, out, err = command(recipe, *flags, f"--out={to}", "--only=labels")
    assert (code, err) == (0, []) and [p.name for p in to.iterdir()] == ["labels"]
    code, out, err = command(recipe, *flags, f"--out={to}", "--evaluations")
    assert (code, err) == (0, [])
    assert sorted(str(p.parent.relative_to(to)) for p in to.rglob("manifest.json")) == [
        *("captions", "evaluations/held_out", "labels"),
    ]
    code, out, err = command(recipe, *flags[:2], f"--out={to}", "--evaluations")
    assert (code, err) == (0, []) and not [line for line in out if "held_out" in line]
    # The recipe takes them by two flags a source: what it leaves empty, it need not
    # say; what it does say of another format is refused.
    config = runpy.run_path(str(ROOT / "configs/own_data.py"))["get_config"]().lock()
    for name, source in config.data.sources.items():
        source.format, source.path = "prepared", str(to / name)
    validation.validate(config, 1)
    for name, source in config.data.sources.items():
        assert len(data.make_source(name, source, SIZE, True)) in (3, 6)
    config.data.sources.captions.root = "somewhere"
    with pytest.raises(InputError, match='captions: a prepared source has no "root"'):
        validation.validate(config, 1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--out={}",), "--config, or --format, --path and --kind must be given"),
        (("{pets}", "--out={}", "--clas_names=x"), 'did you mean "class_names"?'),
        (("{pets}", "--out={}", "--shrads=2"), 'did you mean "shards"?'),
        (("{pets}", "--out={}", "--delimiter=;"), "no flag --delimiter"),
        (("{pets}", "--out={}", "--preprocess.name=x"), "no flag --preprocess"),
        (("{pets}", "--out={}", "--max_skips_in_a_row=x"), "must be a number: got x"),
        (("{pets}", "--out={}", "verify"), "written --name=value: got verify"),
        (("{pets}", "--out={}", "--shards=0"), "--shards must be at least 1: got 0"),
        (("{pets}", "--out={}", "--workers=0"), "--workers must be at least 1: got 0"),
        (("{pets}", "--out={}", "--format=foldr"), 'did you mean "folder"?'),
        (("--format=npz", "--path=x", "--out={}"), "got no --kind"),
        (("--config=none.py", "--out={}"), 'there is no "none.py"'),
        (("--config=tests/conftest.py", "--out={}"), "with a get_config()"),
        (("{own}:none", "--out={}"), 'no variant "none"'),
        (("{own}", "--out={}", "--path=x"), "--config.data.sources.NAME.path="),
        (("{own}", "--out={}", "--config.data.sources.label.path=x"), '"labels"?'),
        (("{own}", "--out={}", "--config.batch_size=x"), "batch_size must be int"),
        (("{own}", "--out={}", "--only=label"), 'did you mean "labels"?'),
        (("{own}", "--out={}"), 'source "captions": path must match'),
        (("--verify", "--out={}"), "must be a prepared folder, or hold some"),
        (("--verify", "--out={}", "--kind=x"), "takes --out alone: got --kind"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    command, pets, tmp_path, arguments, said
):
    given = []
    for argument in arguments:
        argument = argument.replace("{own}", "--config=configs/own_data.py")
        given += (
            pets if argument == "{pets}" else [argument.replace("{}", f"{tmp_path}/to")]
        )
    code, _, err = command(*given)
    assert code == 2
    assert len(err) == 1 and err[0].startswith("error: ") and said in err[0]
    assert not (tmp_path / "to").exists()


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "unicl_jax.prepare", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_stopped_and_run_again_it_ends_in_the_same_bytes(command, tmp_path):
    folder = tmp_path / "pets" / "a"
    folder.mkdir(parents=True)
    image = encoded(photo(1, 1800, 1400))  # 20 ms each: long enough to be met
    for i in range(160):
        (folder / f"{i:03d}.jpg").write_bytes(image)
    flags = ["--format=folder", "--kind=image_label", f"--path={folder.parent}"]
    flags += ["--shards=80", "--max_side=64"]
    to, after = tmp_path / "to" / "x", 0
    for number in (signal.SIGKILL, signal.SIGINT):
        process = start(*flags, f"--out={to}", "--workers=1")
        deadline = time.monotonic() + LIMIT
        while len([*to.glob("unfinished/0*.json")]) < after + 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT)
        after = len([*to.glob("unfinished/0*.json")])
        assert 0 < after < 80 and not (to / "manifest.json").exists()
        if number == signal.SIGINT:
            assert process.returncode == 130 and "Traceback" not in err
            assert err.splitlines()[-1].startswith("stopped. The same command goes on")
        else:
            assert process.returncode == -signal.SIGKILL
    code, out, err = command(*flags, f"--out={to}")
    assert (code, err) == (0, [])
    assert int(re.search(r"going on: (\d+) of 80 shards", "\n".join(out))[1]) == after
    whole = tmp_path / "whole" / "x"
    assert command(*flags, f"--out={whole}", "--workers=3")[0] == 0
    one, two = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (to, whole))
    assert one == two and len(one) == 80 + 2
