"""A real run goes from two processes to one, to two, and on from a damaged checkpoint.

One chain of starts of the command, over loopback, each of them going on where the last
one ended: two of the processes' devices hold half the state each (`mesh.fsdp=2`).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from kills import free_port

from unicl_jax.workdir import saved_steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds: a run that hangs is a failure, not a slow machine
STEPS = 8

# Each process leaves what it restored, and where in its arrays that lies.
PROGRAM = """
import ctypes, json, sys
import jax, numpy as np
from unicl_jax import main, program, restoring
from unicl_jax.checkpoint import Checkpoints

restore = Checkpoints.restore
def restored(self, like, *rest):
    found = restore(self, like, *rest)
    if found:
        parts = {{}}
        for path, x in jax.tree_util.tree_leaves_with_path(found[0]._asdict()):
            for shard in x.addressable_shards:
                at = [[s.start or 0, s.stop or n] for s, n in zip(shard.index, x.shape)]
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                parts[json.dumps([name, at])] = np.asarray(shard.data)
        np.savez(f"{restored}_{{jax.process_index()}}.npz", **parts)
    return found
Checkpoints.restore = restored

listed = restoring.saved_steps  # of which NFS shows others an older state
restoring.saved_steps = lambda at: [] if jax.process_index() else listed(at)

make = program.make_train_step
def made(*args, **kwargs):
    step_of = make(*args, **kwargs)
    def step(state, batch, number):
        print("compiling now", flush=True)
        ctypes.CDLL(None).sleep({longer})  # in C: no handler of Python's would run
        return step_of(state, batch, number)
    return step
program.make_train_step = made
main.leave(main.main(sys.argv))
"""


class Run:
    """One start of the command; what its processes say goes to files."""

    def __init__(self, folder, name, processes, longer=0):
        self.restored = folder / f"restored_{name}"
        self.logs = [folder / f"{name}_{i}.log" for i in range(processes)]
        program = PROGRAM.format(restored=self.restored, longer=longer)
        command = [
            *(sys.executable, "-c", program),
            f"--config={folder}/recipe.py",
            f"--workdir={folder}/run",
            f"--config.total_steps={STEPS}",
            "--config.checkpoint_every_steps=4",
            "--config.checkpoints_kept=9",
            f"--config.evaluate_every_steps={STEPS}",
            "--config.mesh.fsdp=2",
        ]
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        environ["JAX_NUM_CPU_DEVICES"] = str(2 // processes)
        self.processes = []
        for i, log in enumerate(self.logs):
            several = [address, f"--num_processes={processes}", f"--process_id={i}"]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command + several * (processes > 1),
                        env=environ,
                        cwd=folder,
                        stdout=file,
                        stderr=file,
                    )
                )

    def wait_until_all_say(self, text):
        deadline = time.monotonic() + LIMIT
        while not all(text in said for said in self.said()):
            assert all(p.poll() is None for p in self.processes), self.end()
            assert time.monotonic() < deadline, self.end()
            time.sleep(0.01)

    def said(self):
        return [log.read_text(errors="replace") for log in self.logs]

    def end(self):
        """Exit codes, and what each said; those that hang are killed."""
        deadline = time.monotonic() + LIMIT
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"hung: {self.said()}")
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes], self.said()

    def parts(self):
        """What was restored: (process, path, where in the array, numbers)."""
        for i in range(len(self.processes)):
            with np.load(f"{self.restored}_{i}.npz") as file:
                for name, part in file.items():
                    path, at = json.loads(name)
                    yield i, path, tuple(slice(*ends) for ends in at), part


def assert_restored_bit_by_bit(run, saved):
    """Every part of every array, of which some are cut in two."""
    saved = {"/".join(re.findall(r"\w+", path)): x for path, x in saved.items()}
    seen = {path: np.zeros(x.shape, bool) for path, x in saved.items()}
    cut = set()
    for _, path, at, part in run.parts():
        assert part.dtype == saved[path].dtype and part.shape == saved[path][at].shape
        np.testing.assert_array_equal(part, saved[path][at], err_msg=path)
        seen[path][at] = True
        cut |= {path} if part.shape != saved[path].shape else set()
    assert all(x.all() for x in seen.values())
    assert any("embed" in path for path in cut)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def stopped(folder):
    """Two processes, one of which gets SIGTERM while both compile."""
    run = Run(folder, "stopped", 2, longer=3)
    run.wait_until_all_say("compiling now")
    run.processes[1].send_signal(signal.SIGTERM)
    return run.end()


def test_sigterm_in_the_first_compilation_saves_and_ends_all(stopped, folder):
    codes, said = stopped
    assert codes == [143, 143], said
    (step,) = saved_steps(folder / "run")
    assert 0 < step < 4
    for err in said:
        assert f"stopped at step {step}, saved. The same command goes on" in err
        assert "error:" not in err and "lost" not in err


@pytest.fixture(scope="module")
def alone(stopped, folder):
    """One process goes on from what two have saved, to the end."""
    saved = tiny_run.saved(folder / "run")
    run = Run(folder, "alone", 1)
    return run, run.end(), saved


def test_one_process_goes_on_from_what_two_have_saved(alone, folder):
    run, (codes, said), saved = alone
    assert codes == [0], said
    step = int(saved["['step']"])
    assert f"going on from step {step} of {STEPS}" in said[0]
    assert "damaged" not in said[0]
    assert_restored_bit_by_bit(run, saved)
    assert saved_steps(folder / "run") == [step, 4, STEPS]


@pytest.fixture(scope="module")
def together(alone, folder):
    """Two processes go on from what one has saved, to the end."""
    shutil.rmtree(folder / "run" / "checkpoints" / str(STEPS))
    saved = tiny_run.saved(folder / "run")
    before = tiny_run.rows(folder / "run")
    run = Run(folder, "together", 2)
    return run, run.end(), saved, before


def test_two_processes_go_on_from_what_one_has_saved(together, folder):
    run, (codes, said), saved, before = together
    assert codes == [0, 0], said
    assert f"going on from step 4 of {STEPS}" in said[0]
    assert_restored_bit_by_bit(run, saved)
    rows = tiny_run.rows(folder / "run")
    assert [r["step"] for r in rows if "loss" in r] == [*range(1, STEPS + 1)]
    for a, b in zip(rows, before, strict=True):
        # Sums over devices are Gloo's between processes, in another order than XLA's.
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_part_that_one_process_finds_damaged_makes_all_fall_back(together, folder):
    checkpoints = folder / "run" / "checkpoints"
    expected = tiny_run.saved(folder / "run", STEPS)
    # What process 1 alone reads is what it wrote: its half of the cut arrays.
    files = (checkpoints / str(STEPS) / "state" / "ocdbt.process_1" / "d").iterdir()
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    run = Run(folder, "damaged", 2)
    codes, said = run.end()
    assert codes == [0, 0], said
    # Process 0 read its own half; it says what it heard.
    (why,) = re.findall(rf"checkpoint {STEPS} is damaged: (.*)", said[0])
    assert "reading it failed" in why and "on process 1. It is" in why
    assert f"going on from step 4 of {STEPS}" in said[0]
    assert (checkpoints / f"{STEPS}.damaged").is_dir()
    steps = {int(x) for _, path, _, x in run.parts() if path == "step"}
    assert steps == {4}
    tiny_run.assert_same_bits(tiny_run.saved(folder / "run", STEPS), expected)
