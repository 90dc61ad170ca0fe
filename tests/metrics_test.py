"""What a run reports: the JSON lines, the event files, the clock, the console."""

import io
import json
import math
import sys
import time
import types

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from unicl_jax import metrics as metrics_lib
from unicl_jax.metrics import ConsoleProgress, Metrics, StepTimer, clock

# --- metrics.jsonl


def write(workdir, first_step, rows, active=True):
    metrics = Metrics(workdir, first_step, active)
    for step, scalars in rows:
        metrics.write(step, scalars)
    metrics.close()


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_write_is_one_json_line_on_disk_at_once(tmp_path):
    metrics = Metrics(tmp_path, 0, active=True)
    metrics.write(1, {"loss": 2.5, "eval/a_top1": 0.25})
    # Before `close`: a kill loses no line.
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "eval/a_top1": 0.25}]
    metrics.close()


def test_numbers_survive_to_the_last_bit(tmp_path):
    value = 0.1 + 0.2
    write(tmp_path, 0, [(1, {"loss": value})])
    assert lines(tmp_path)[0]["loss"] == value


@pytest.mark.filterwarnings("ignore:NaN or Inf found:UserWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(tmp_path, value):
    write(tmp_path, 0, [(1, {"loss": value, "excess": 1.0})])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "excess": 1.0}


def test_a_resume_drops_what_is_run_again_and_keeps_the_rest(tmp_path):
    rows = [
        (2, {"loss": 2.0}),
        (4, {"loss": 4.0}),
        (4, {"eval/a_top1": 0.4}),  # of the checkpoint's step: evaluated again
        (6, {"loss": 6.0}),
        (6, {"eval/a_top1": 0.6}),
    ]
    write(tmp_path, 0, rows)
    write(tmp_path, 4, [(4, {"eval/a_top1": 0.4}), (6, {"loss": 6.0})])
    assert lines(tmp_path) == [{"step": s, **scalars} for s, scalars in rows[:4]]


def test_a_new_start_drops_every_line(tmp_path):
    write(tmp_path, 0, [(1, {"loss": 1.0})])
    write(tmp_path, 0, [(2, {"loss": 2.0})])
    assert lines(tmp_path) == [{"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', '"step"', "7", "[2]", "\n", "{}"])
def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path, cut):
    write(tmp_path, 0, [(1, {"loss": 1.0})])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(cut)
    write(tmp_path, 2, [(3, {"loss": 3.0})])
    assert [row["step"] for row in lines(tmp_path)] == [1, 3]


def test_a_line_that_lacks_only_its_end_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    write(tmp_path, 2, [(3, {"loss": 3.0})])
    assert [row["step"] for row in lines(tmp_path)] == [1, 3]


def test_reading_leaves_out_a_line_that_is_cut_off(tmp_path):
    write(tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "lo')
    assert [row["step"] for row in metrics_lib.read(tmp_path)] == [1, 2]


def test_an_inactive_process_writes_nothing(tmp_path):
    write(tmp_path, 0, [(1, {"loss": 1.0})], active=False)
    assert not list(tmp_path.iterdir())


# --- Event files, read back as TensorBoard reads them.


def tensorboard(module):
    """A module of TensorBoard's readers, without the TensorFlow that it would load."""
    name = "tensorboard.compat.notf"  # its own switch
    sys.modules.setdefault(name, types.ModuleType(name))
    return pytest.importorskip(
        f"tensorboard.backend.event_processing.{module}",
        reason="TensorBoard reads its own files",
    )


def events(workdir):
    """[(tag, step, value)] over all event files."""
    loader = tensorboard("event_file_loader")
    return [
        (value.tag, event.step, value.simple_value)
        for path in sorted((workdir / "tensorboard").iterdir())
        for event in loader.LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def test_the_event_file_holds_the_same_scalars(tmp_path):
    write(tmp_path, 0, [(1, {"loss": 2.5}), (3, {"eval/a_top1": 0.25, "loss": 2.0})])
    assert events(tmp_path) == [
        ("loss", 1, 2.5),
        ("eval/a_top1", 3, 0.25),
        ("loss", 3, 2.0),
    ]


def test_tensorboard_hides_what_a_resume_ran_again(tmp_path):
    accumulator = tensorboard("event_accumulator")
    write(tmp_path, 0, [(2, {"loss": 2.0}), (4, {"loss": 4.0}), (6, {"loss": 6.0})])
    # Event files are read in the order of their names, which start with the second
    # they were made in.
    time.sleep(1.1)
    write(tmp_path, 4, [(6, {"loss": 6.5})])
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (2, 2.0),
        (4, 4.0),
        (6, 6.5),
    ]


# --- Time.


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (7.9, "0:07"),
        (60, "1:00"),
        (754, "12:34"),
        (3599.9, "59:59"),
        (3600, "1:00:00"),
        (3723, "1:02:03"),
        (360000, "100:00:00"),
    ],
)
def test_seconds_read_as_a_clock(seconds, text):
    assert clock(seconds) == text


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics_lib.time, "perf_counter", lambda: self.now)

    def batches(self, *waits):
        for wait in waits:
            self.now += wait
            yield wait


def test_a_lap_tells_steps_waits_and_images(monkeypatch):
    watch = Clock(monkeypatch)
    timer = StepTimer(10)
    batches = timer.timed(watch.batches(1, 3, 0))
    assert next(batches) == 1
    watch.now += 2
    assert next(batches) == 3
    watch.now += 2
    # 8 seconds for 2 steps, of which 4 were waiting.
    assert timer.lap(12, batch_size=32) == {
        "step_seconds": 4.0,
        "data_wait": 0.5,
        "images_per_second": 8.0,
    }
    # The lap starts the next one.
    next(batches)
    watch.now += 1
    assert timer.lap(13, 32) == {
        "step_seconds": 1.0,
        "data_wait": 0.0,
        "images_per_second": 32.0,
    }


def test_a_batch_read_ahead_is_no_step_done(monkeypatch):
    """The loop takes the next batch before it looks at the step before."""
    watch = Clock(monkeypatch)
    timer = StepTimer(0)
    batches = timer.timed(watch.batches(0, 0, 0))
    for _ in range(3):
        next(batches)
        watch.now += 2
    assert timer.lap(2, 32)["step_seconds"] == 3.0  # 6 seconds, two steps done
    watch.now += 2
    assert timer.lap(3, 32)["step_seconds"] == 2.0  # the last: no batch was taken


def test_a_lap_without_a_step_tells_nothing(monkeypatch):
    watch = Clock(monkeypatch)
    timer = StepTimer(4)
    watch.now += 5
    assert timer.lap(4, 32) == {}
    next(timer.timed(watch.batches(1)))
    timer.restart(5)  # an evaluation, say: what came before is forgotten
    assert timer.lap(5, 32) == {}


# --- The console.


def scalars(loss=12.3456, images_per_second=123456.7, step_seconds=100.0):
    return {
        "loss": loss,
        "excess": loss,
        "images_per_second": images_per_second,
        "step_seconds": step_seconds,
    }


def test_off_a_terminal_a_run_prints_about_twenty_lines(capsys):
    progress = ConsoleProgress(1000, 0)
    for step in range(1, 1001):
        progress.update(step, scalars())
    progress.close()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 20
    assert printed[0].startswith("step 50/1000  loss 12.346  excess 12.346")
    assert printed[-1].startswith("step 1000/1000")
    assert "\x1b" not in "".join(printed)


def test_off_a_terminal_long_lines_are_not_broken(capsys):
    progress = ConsoleProgress(10, 0)
    progress.say("x" * 300)
    assert capsys.readouterr().out == "x" * 300 + "\n"


def test_a_short_run_prints_every_line(capsys):
    progress = ConsoleProgress(3, 0)
    for step in (1, 2, 3):
        progress.update(step, scalars())
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_names_with_brackets_are_no_styles(capsys):
    ConsoleProgress(10, 0).say('class "[/dog] [red]" joined')
    assert capsys.readouterr().out == 'class "[/dog] [red]" joined\n'


def test_an_inactive_process_prints_nothing(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes it for a terminal
    progress = ConsoleProgress(10, 0, active=False)
    progress.update(10, scalars())
    progress.say("hello")
    progress.close()
    out, err = capsys.readouterr()
    assert out + err == ""


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns whose output is kept in `console.file`."""

    def make(**options):
        file = io.StringIO()
        return Console(file=file, force_terminal=True, width=80, **options)

    monkeypatch.setattr(metrics_lib, "Console", make)


def shown(progress):
    """The lines that the terminal was sent, without escape codes."""
    text = Text.from_ansi(progress.console.file.getvalue().replace("\r", "\n")).plain
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "step, total, values",
    [
        (1, 1600, scalars()),
        (299999, 312000, scalars()),
        (99999, 312000, scalars(123.456, 1234567.8, 3.4)),  # nearly 200 hours to go
    ],
)
def test_on_a_terminal_the_line_is_whole_within_80_columns(
    terminal, step, total, values
):
    progress = ConsoleProgress(total, 0)
    progress.update(step, values)
    progress._live.refresh()
    found = [line for line in shown(progress) if "loss" in line]
    progress.close()
    assert found
    left = clock((total - step) * values["step_seconds"])
    for line in found:
        assert cell_len(line.rstrip()) <= 80
        assert f"{step}/{total}" in line
        assert f"excess {values['excess']:.3f}" in line
        assert line.rstrip().endswith(f"ETA {left}")


def test_on_a_terminal_things_are_said_above_the_line_which_goes_away(terminal):
    progress = ConsoleProgress(10, 4)
    progress._live.refresh()
    assert any("4/10" in line and "starting" in line for line in shown(progress))
    progress.say("step 5: shoes 10.0/50.0")
    assert any(line.startswith("step 5: shoes") for line in shown(progress))
    progress.status("evaluating shoes")
    progress._live.refresh()
    assert "evaluating shoes" in shown(progress)[-1]
    progress.close()
    progress.close()  # twice does no harm
    # Transient: the cursor goes up and the line is erased.
    assert "\x1b[2K" in progress.console.file.getvalue()
