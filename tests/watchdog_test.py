"""The watchdog and the signals: ends of a process that hangs, or is asked to stop."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_run

from unicl_jax.signals import Interrupted, StopRequest
from unicl_jax.watchdog import Watchdog

ROOT = Path(__file__).parents[1]
SECOND = 1 / 60  # in minutes
LIMIT = 300  # seconds until a process counts as hung; each takes a few


def wait_for(is_so, seconds=20):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_a_sign_of_life_it_says_where_and_ends_with_code_5(tmp_path, capfd):
    ends, blocked = [], threading.Event()

    def waits_for_ever():
        blocked.wait(60)

    thread = threading.Thread(target=waits_for_ever, daemon=True)
    thread.start()
    watchdog = Watchdog(tmp_path, 0.2 * SECOND, 3, end=ends.append)
    watchdog.at("step 7, on the devices")
    wait_for(lambda: ends)
    blocked.set()
    assert ends == [5]
    report = (tmp_path / "hang_process_3.txt").read_text()
    for said in (report, capfd.readouterr().err):
        assert "process 3 hangs: 0 s at step 7, on the devices without" in said
        assert "in waits_for_ever" in said and "watchdog_test.py" in said


def test_signs_of_life_patience_and_nought_keep_it_quiet(tmp_path):
    ends = []
    watchdog = Watchdog(tmp_path, 0.5 * SECOND, end=ends.append)
    for _ in range(10):
        watchdog.at("a step")
        time.sleep(0.1)
    watchdog.at("compiling", patience=100)
    off = Watchdog(tmp_path, 0, end=ends.append)
    time.sleep(0.8)
    watchdog.close()
    off.close()
    assert not ends and not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_does_not_keep_the_process(tmp_path, capfd):
    ends = []
    Watchdog(tmp_path / "gone", 0.2 * SECOND, end=ends.append)
    wait_for(lambda: ends)
    assert "cannot be written" in capfd.readouterr().err and ends == [5]


def test_a_signal_ends_a_wait_for_data_and_a_second_sigterm_changes_nothing():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stop = StopRequest()
    try:
        assert stop.requested(1) == 0
        with pytest.raises(Interrupted), stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert stop.requested(1) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(2) == signal.SIGTERM
        with pytest.raises(Interrupted), stop.waiting():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    finally:
        stop.restore()
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert signal.set_wakeup_fd(-1) == -1


# --- In processes of their own, which an accident is arranged for.

PRELUDE = """
import sys, time, signal, os
sys.argv = ["main", "--config={folder}/recipe.py", "--workdir={workdir}", {flags}]
import jax
from unicl_jax import main, program, train
from unicl_jax.data import TrainIterator
from unicl_jax.evaluation import ZeroShotTask
from unicl_jax.watchdog import Watchdog
at = Watchdog.at  # on a busy machine all takes long: impatient at step 3 alone
Watchdog.at = lambda self, what, patience=1: at(
    self, what, 1 if "step 3" in what else 1000
)
{accident}
main.leave(main.main(sys.argv))
"""

STUCK_DATA = """
drawn = TrainIterator._assemble
def stuck(self, step, *rest):
    while step == 2: time.sleep(1)
    return drawn(self, step, *rest)
TrainIterator._assemble = stuck
"""

STUCK_STEP = """
make = program.make_train_step
def made(*args, **kwargs):
    step_of = make(*args, **kwargs)
    def step(state, batch, number):
        def wait(n):
            while n == 2: time.sleep(1)
            return n
        number = jax.pure_callback(wait, jax.ShapeDtypeStruct((), "int32"), number)
        return step_of(state, batch, number)
    return step
program.make_train_step = made
"""

STUCK_COMPILATION = """
make = program.make_train_step
def made(*args, **kwargs):
    step_of = make(*args, **kwargs)
    def step(state, batch, number):
        print("compiling now", flush=True)
        import ctypes
        ctypes.CDLL(None).sleep(600)  # in C: no handler of Python's would run
        return step_of(state, batch, number)
    return step
program.make_train_step = made
"""

LONG_EVALUATION = """
scored = ZeroShotTask.__call__
def score(self, params, state, between):
    print("evaluating now", flush=True)
    for _ in range(6000):
        time.sleep(0.1)
        between()
ZeroShotTask.__call__ = score
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("tiny"))


def started(folder, workdir, accident, *flags):
    code = PRELUDE.format(
        folder=folder,
        workdir=workdir,
        accident=accident,
        flags=", ".join(f'"--config.{flag}"' for flag in flags),
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hung; it had said {process.communicate()}")
    return process.returncode, out, err


def lines_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended before: {process.communicate()}")


@pytest.mark.parametrize(
    "accident, where, function",
    [
        pytest.param(
            *(STUCK_DATA, "the data of step 3", "in stuck"), marks=pytest.mark.slow
        ),
        (STUCK_STEP, "dispatch of step 3|step 3, on the devices", "in wait"),
    ],
)
def test_a_run_that_hangs_reports_and_ends_to_be_started_again(
    folder, tmp_path, accident, where, function
):
    hang = f"hang_minutes={2 * SECOND}"
    process = started(folder, tmp_path, accident, hang, "checkpoint_every_steps=1")
    code, _, err = end(process)
    assert code == 5, err
    report = (tmp_path / "hang_process_0.txt").read_text()
    assert re.search(where, report.splitlines()[0])
    for said in (report, err):
        assert function in said and "unicl_jax/train.py" in said
    assert (tmp_path / "checkpoints" / "1").is_dir()


@pytest.mark.slow
def test_sigterm_while_data_is_stuck_saves_and_stops(folder, tmp_path):
    process = started(folder, tmp_path, STUCK_DATA)
    wait_for(lambda: _steps_written(tmp_path) >= 1, LIMIT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 143, err
    assert "stopped at step 2, saved. The same command goes on from there." in err
    assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_sigterm_in_an_evaluation_ends_it_after_a_save(folder, tmp_path):
    later = ("evaluate_every_steps=2", "checkpoint_every_steps=100")
    process = started(folder, tmp_path, LONG_EVALUATION, *later)
    lines_until(process, "evaluating now")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 143 and "stopped at step 2, saved" in err
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_sigterm_in_the_first_compilation_ends_the_process_at_once(folder, tmp_path):
    process = started(folder, tmp_path, STUCK_COMPILATION)
    lines_until(process, "compiling now")
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert time.monotonic() - start < 5
    assert code == 143 and "stopped before the first step: there was nothing" in err


def _steps_written(workdir):
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in lines), default=0)
