"""Runs in a bucket of Cloud Storage: on a server of our own that speaks its API."""

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from fake_gcs import FakeGcs

from unicl_jax import metrics, model, storage, train
from unicl_jax.checkpoint import NotSaved, check_has_saved
from unicl_jax.data.records import Rows
from unicl_jax.data.skipped import SkippedRecords
from unicl_jax.errors import InputError
from unicl_jax.nonfinite import NonFiniteSteps
from unicl_jax.watchdog import Watchdog
from unicl_jax.workdir import has_saved, prepare_workdir, saved_steps

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds until a process counts as hung

# Orbax's other writes go on after one has failed, and find their event loop closed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def no_leftovers():
    """What they left is collected here, not in another file's test."""
    yield
    gc.collect()


def test_without_its_library_a_bucket_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        InputError, match=r'needs gcsfs.*pip install "unicl_jax\[gcs\]"'
    ):
        storage.path("gs://bucket/run")


@pytest.mark.parametrize("scheme", ["s3", "az", "http"])
def test_other_stores_are_refused(scheme):
    with pytest.raises(InputError, match=f'gs://.: got "{scheme}://b/run"; mount'):
        storage.path(f"{scheme}://b/run")


def test_in_a_directory_a_file_is_replaced_at_once_or_not(tmp_path):
    path = tmp_path / "x.txt"
    storage.write_text(path, "old")
    with contextlib.suppress(KeyError), storage.written_whole(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old"


@pytest.fixture(scope="module")
def server():
    patch = pytest.MonkeyPatch()
    with FakeGcs() as gcs:
        for name, value in gcs.environ.items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs")  # which looks at some of them
        yield gcs
    patch.undo()


@pytest.fixture
def gcs(server):
    server.objects.clear()
    server.refuse = lambda method, name: 0
    yield server
    server.refuse = lambda method, name: 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("tiny"))


def of_run(folder, total_steps=6):
    """The config of all runs here: one checkpoint is kept."""
    return tiny_run.config(folder, checkpoints_kept=1, total_steps=total_steps)


@pytest.fixture(scope="module")
def local(tiny):
    """The same run in a directory, never stopped."""
    train.run(of_run(tiny), tiny / "local")
    return tiny / "local"


@pytest.fixture(scope="module")
def finished(server, tiny):
    """The objects of a run of 6 steps that keeps both of its checkpoints."""
    server.objects.clear()
    train.run(tiny_run.config(tiny), "gs://bucket/run")
    return dict(server.objects)


@pytest.fixture
def run(gcs, finished):
    gcs.objects.update(finished)
    return storage.path("gs://bucket/run")


def rows(gcs):
    found = [json.loads(x) for x in gcs.read("run/metrics.jsonl").splitlines()]
    return [{k: v for k, v in x.items() if k not in tiny_run.TIMES} for x in found]


def command(folder, workdir, *more, devices=8):
    return subprocess.Popen(
        [sys.executable, "-m", "unicl_jax.main"]
        + [f"--config={folder / 'recipe.py'}", f"--workdir={workdir}", *more],
        env=os.environ
        | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        # Without it, every start would be two.
        | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# --- Whole runs.


def test_killed_while_it_saves_a_run_ends_in_the_same_bits(gcs, tiny, local, capsys):
    """The kill comes as Orbax wants to mark checkpoint 6 as whole."""
    seen, killed = [], threading.Event()

    def refuse(method, name):
        if method == "POST" and name.startswith("run/checkpoints/3/") and not seen:
            seen.extend(gcs.names("run/metrics.jsonl") and rows(gcs))
        if name == "run/checkpoints/6/commit_success.txt" and method != "GET":
            process.kill()
            killed.set()
            return 503
        return 0

    gcs.refuse = refuse
    process = command(tiny, "gs://bucket/run", "--config.checkpoints_kept=1")
    said, _ = process.communicate(timeout=LIMIT)
    assert killed.is_set(), said
    # What was logged is there before the first of the checkpoint is.
    assert [row["step"] for row in seen] == [1, 2, 3]
    assert gcs.names("run/checkpoints/6/state/")
    workdir = storage.path("gs://bucket/run")
    assert saved_steps(workdir) == [3]

    gcs.refuse = lambda method, name: 0
    train.run(of_run(tiny), "gs://bucket/run")
    assert "going on from step 3 of 6" in capsys.readouterr().out
    assert saved_steps(workdir) == [6]
    assert not gcs.names("run/checkpoints/3/")
    tiny_run.assert_same_bits(tiny_run.saved(workdir), tiny_run.saved(local))
    assert rows(gcs) == tiny_run.rows(local)
    names = {name.split("/")[1] for name in gcs.names("run/")}
    there = {path.name for path in local.iterdir()}
    assert names == there and {"curves.png", "predictions.png"} <= names
    for name in ("config.json", "concepts.json", "records.json"):
        assert gcs.read(f"run/{name}") == (local / name).read_bytes()
    assert len(gcs.names("run/tensorboard/events.out.tfevents.")) == 2


def test_a_damaged_checkpoint_is_set_aside(gcs, run, tiny, local, capsys):
    # All data: which of the objects a reading needs is tensorstore's to know.
    for name in gcs.names("run/checkpoints/6/state/"):
        if "/d/" in name:
            del gcs.objects["bucket", name]
    left = {name: gcs.read(name) for name in gcs.names("run/checkpoints/6/")}
    train.run(tiny_run.config(tiny), run)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "checkpoint 6 is damaged: reading it failed" in said
    assert "going on from step 3 of 6" in said
    moved = {name.replace("6", "6.damaged", 1): data for name, data in left.items()}
    assert {n: gcs.read(n) for n in gcs.names("run/checkpoints/6.damaged/")} == moved
    assert saved_steps(run) == [3, 6]
    tiny_run.assert_same_bits(tiny_run.saved(run), tiny_run.saved(local))


def test_what_cannot_be_read_for_want_of_rights_is_not_damaged(gcs, run, tiny):
    names = gcs.names()
    gcs.refuse = lambda method, name: (
        403 if name and name.startswith("run/checkpoints/6/state/") else 0
    )
    with pytest.raises(Exception, match="403|PERMISSION_DENIED|[Ff]orbidden"):
        train.run(tiny_run.config(tiny), run)
    assert [n for n in gcs.names() if "checkpoints" in n] == [
        n for n in names if "checkpoints" in n
    ]


def test_another_config_and_a_full_folder_are_refused(gcs, run, tiny):
    config = tiny_run.config(tiny, optimizer__learning_rate=1.0)
    with pytest.raises(InputError, match="another config:\n  optimizer.learning_rate"):
        prepare_workdir("gs://bucket/run", config, write=True)
    gcs.put("bucket", "other/readme.txt", b"")
    with pytest.raises(InputError, match="holds readme.txt and no config.json"):
        prepare_workdir("gs://bucket/other/", config, write=True)
    gcs.put("bucket", "empty/", b"")  # as consoles make folders
    prepare_workdir("gs://bucket/empty", config, write=True)
    assert "empty/config.json" in gcs.names()


def test_another_run_and_a_model_start_from_it(gcs, run, tiny):
    config = tiny_run.config(tiny, init_from="gs://bucket/run", total_steps=3)
    train.run(config, tiny / "next")
    loaded = model.load("gs://bucket/run")
    there = tiny_run.saved(run)
    params = tiny_run.jax.tree_util.tree_leaves_with_path(loaded.params)
    assert params
    for path, leaf in params:
        name = f"['params']{tiny_run.jax.tree_util.keystr(path)}"
        np.testing.assert_array_equal(leaf, there[name])
    with pytest.raises(InputError, match="gs://bucket/none.*holds no checkpoint"):
        check_has_saved("gs://bucket/none")
    gcs.put("bucket", "weights/model.safetensors", b"")
    with pytest.raises(InputError, match="must be the workdir of a run.*copy weights"):
        model.load("gs://bucket/weights/model.safetensors")


@pytest.mark.slow
def test_two_processes_share_a_bucket(gcs, tiny):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{s.getsockname()[1]}"
    group = [
        command(
            *(tiny, "gs://bucket/run", address, "--num_processes=2"),
            *(f"--process_id={i}", "--config.total_steps=4"),
            devices=4,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=LIMIT)[0] for process in group]
    assert [process.returncode for process in group] == [0, 0], said
    assert saved_steps("gs://bucket/run") == [3, 4]
    assert [row["step"] for row in rows(gcs) if "loss" in row] == [1, 2, 3, 4]
    assert "token" in json.loads(gcs.read("run/processes.json"))


# --- What is wrong with a bucket.


@pytest.mark.parametrize(
    "workdir, refused, said",
    [
        ("gs://nobody/run", None, 'bucket must be there: "nobody" is not; make it'),
        ("gs://bucket", None, "must be gs://bucket/folder"),
        ("gs://bucket/run", ("GET", 403), "readable.*refused.*grant.*objectUser"),
        ("gs://bucket/run", ("POST", 403), "written.*Forbidden.*grant.*objectUser"),
    ],
)
def test_a_bucket_that_is_not_there_or_not_ours(gcs, tiny, workdir, refused, said):
    if refused:
        gcs.refuse = lambda method, name: refused[1] if method == refused[0] else 0
    with pytest.raises(InputError, match=said):
        prepare_workdir(workdir, tiny_run.config(tiny), write=True)


def test_a_log_that_cannot_be_written_is_said_and_comes_later(gcs):
    gcs.refuse = lambda method, name: 403 if method == "POST" else 0
    said = []
    log = metrics.Metrics(storage.path("gs://bucket/run"), 0, True, said.append)
    log.write(1, {"loss": 1.0})
    log.sync()
    assert len(said) == 1 and "Forbidden" in said[0] and "training goes on" in said[0]
    gcs.refuse = lambda method, name: 0
    log.write(2, {"loss": 2.0})
    log.close()
    assert [row["step"] for row in rows(gcs)] == [1, 2]


# --- Piece by piece.


def test_a_log_is_written_now_and_then_and_at_a_sync(gcs, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    path = storage.path("gs://bucket/x.jsonl")
    storage.write_text(path, "1\n")
    log = storage.open_log(path)
    puts = len(gcs.requests)
    for second in range(130):
        now[0] += 1
        log.write(f"{second}\n")
        log.flush()
    assert len(gcs.requests) - puts == 2
    assert gcs.read("x.jsonl").endswith(b"\n119\n")
    storage.sync(log)
    assert gcs.read("x.jsonl").startswith(b"1\n0\n1\n")
    assert gcs.read("x.jsonl").endswith(b"\n129\n")
    puts = len(gcs.requests)
    storage.sync(log)
    log.close()
    assert len(gcs.requests) == puts  # nothing is new


def test_a_file_that_was_not_finished_leaves_the_old_one(gcs):
    path = storage.path("gs://bucket/x.png")
    with storage.written_whole(path, "wb") as file:
        file.write(b"old")
    with contextlib.suppress(KeyError), storage.written_whole(path, "wb") as file:
        file.write(b"half")
        raise KeyError
    assert gcs.read("x.png") == b"old"


def test_what_others_write_is_seen_at_once(gcs):
    folder = storage.path("gs://bucket/run")
    assert storage.names(folder) == set() and not has_saved(folder)
    gcs.put("bucket", "run/checkpoints/6/state/x", b"")
    gcs.put("bucket", "run/processes.json", b"one")
    assert storage.names(folder) == {"checkpoints", "processes.json"}
    assert not has_saved(folder)
    assert storage.read_text(folder / "processes.json") == "one"
    gcs.put("bucket", "run/checkpoints/6/commit_success.txt", b"")
    gcs.put("bucket", "run/processes.json", b"two")
    gcs.put("bucket", "run/config.json", b"")
    gcs.put("bucket", "run/checkpoints/9/commit_success.txt", b"")
    assert saved_steps(folder) == [6, 9]
    assert storage.names(folder) == {"checkpoints", "processes.json", "config.json"}
    assert storage.read_text(folder / "processes.json") == "two"
    with pytest.raises(FileNotFoundError):
        storage.read_text(folder / "none")


def test_only_half_written_checkpoints_are_removed(gcs):
    for name in ("3/x", "3/commit_success.txt", "6/x", "6/y/z", "9.damaged/x"):
        gcs.put("bucket", f"run/checkpoints/{name}", b"")
    storage.remove_half_written(storage.path("gs://bucket/run/checkpoints"))
    left = [name.removeprefix("run/checkpoints/") for name in gcs.names()]
    assert left == ["3/commit_success.txt", "3/x", "9.damaged/x"]


def test_renaming_that_is_cut_off_leaves_all_or_no_whole_checkpoint(gcs):
    """However far it got, the old one is as it was, or counts as half written."""
    names = ["a/x", "commit_success.txt", "b"]
    folder = storage.path("gs://bucket/run/checkpoints")
    for requests in range(1, 20):
        gcs.objects.clear()
        for name in names:
            gcs.put("bucket", f"run/checkpoints/6/{name}", name.encode())
        left = [requests]

        def refuse(method, name, left=left):
            left[0] -= method in ("POST", "DELETE")
            return 403 if left[0] < 0 else 0

        gcs.refuse = refuse
        with contextlib.suppress(OSError):
            storage.rename_folder(folder / "6", folder / "6.damaged")
        gcs.refuse = lambda method, name: 0
        there = [n for n in names if f"run/checkpoints/6/{n}" in gcs.names()]
        moved = [n for n in names if f"run/checkpoints/6.damaged/{n}" in gcs.names()]
        assert there == names or moved == names
        assert there == names or "commit_success.txt" not in there
        if not there:
            break
    assert not there and requests >= 6  # three copies, three removals


def test_other_files_of_a_run_lie_there_too(gcs, capfd):
    folder, said = storage.path("gs://bucket/run"), []
    gcs.put("bucket", "run/nonfinite.jsonl", b'{"step": 2}\n{"step": 4}\n')
    steps = NonFiniteSteps(folder, 3, True, 2, said.append)
    scalars = dict(loss=float("nan"), grad_norm=1.0, nonfinite=1.0, halted=False)
    steps.add(5, scalars, lambda step: [])
    found = [json.loads(x) for x in gcs.read("run/nonfinite.jsonl").splitlines()]
    assert [row["step"] for row in found] == [2, 5] and len(said) == 1
    ends = []
    Watchdog(folder, 0.2 / 60, 3, end=ends.append)
    deadline = time.monotonic() + 20
    while not ends and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ends == [5]
    assert b"storage_test.py" in gcs.read("run/hang_process_3.txt")


def test_skipped_records_are_listed_there_and_taken_over(gcs):
    class Source:
        name, skipped = "pets", {}

        def __len__(self):
            return 50

        def place(self, index):
            return {"path": f"{index}.jpg"}

    def met(index):
        rows = Rows(*[None] * len(Rows._fields))
        return rows._replace(labels=np.zeros(4), skipped=[(0, index, "broken")])

    folder = "gs://bucket/run"
    for process in range(2):
        records = SkippedRecords([Source()], [1.0]).keep(folder, 0, process, 2)
        for step in (1, 2, 3):
            records.add(0, step, met(10 * process + step))
        records.sync()
    assert gcs.names("run/") == ["run/skipped-00001.jsonl", "run/skipped.jsonl"]
    records = SkippedRecords([Source()], [1.0]).keep(folder, 2)
    records.close()
    assert gcs.names("run/") == ["run/skipped.jsonl"]
    found = [json.loads(x) for x in gcs.read("run/skipped.jsonl").splitlines()]
    assert [row["index"] for row in found] == [1, 2, 11, 12]
    assert records.counts["pets"] == {"broken": 4}


def test_a_checkpoint_that_cannot_be_written_ends_the_run(gcs, tiny):
    gcs.refuse = lambda method, name: (
        403 if method == "POST" and "/checkpoints/" in (name or "") else 0
    )
    with pytest.raises(NotSaved, match="gs://bucket/run/checkpoints"):
        train.run(of_run(tiny), "gs://bucket/run")
    assert not has_saved("gs://bucket/run")
