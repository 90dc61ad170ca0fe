"""Processes that start, agree and end together; real ones, over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from unicl_jax import exit_codes
from unicl_jax.errors import InputError
from unicl_jax.processes import agreement, roll_call
from unicl_jax.processes.cluster import Place
from unicl_jax.processes.line import Line
from unicl_jax.processes.other import Other
from unicl_jax.processes.roll_call import First, Missing

ROOT = Path(__file__).parents[1]
SAME = {"config": {"batch_size": "64"}}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- The line, between threads.


@pytest.fixture
def closing():
    """Closes lines at the end: all as finished, or one hears that another is lost."""
    lines = []
    yield lambda line: lines.append(line) or line
    for line in lines:
        line._finished.set()
    for line in lines:
        line.close()


def together(closing, facts, seconds=10.0, hosts=()):
    """Calls the roll in a thread for each process; returns the lines and the ends."""
    address = f"127.0.0.1:{free_port()}"
    lines, ends = {}, {}

    def one(index):
        kind = First if index == 0 else Other
        place = Place("test", address, max(facts) + 1, index, hosts=hosts)
        lines[index] = kind(place, 10.0)
        try:
            ends[index] = lines[index].roll_call(facts[index], seconds)
        except (Missing, InputError) as error:
            ends[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in facts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for line in lines.values():
        closing(line)
    return lines, ends


def test_all_that_came_name_the_one_that_did_not(closing):
    start = time.monotonic()
    _, ends = together(
        closing, {0: SAME, 1: SAME, 3: SAME}, 1.0, hosts=("a", "b", "c", "d")
    )
    assert time.monotonic() - start < 5  # one second, and threads to start
    assert len(ends) == 3
    host = socket.gethostname()
    for error in ends.values():
        assert isinstance(error, Missing)
        assert "3 of 4 came in 1 s; process 2 (c) is missing; those that" in str(error)
        assert f"0 on {host}, 1 on {host}, 3 on {host}" in str(error)


def test_a_process_0_that_does_not_answer_is_named_with_its_address():
    place = Place("test", f"127.0.0.1:{free_port()}", 2, 1)
    with pytest.raises(Missing, match="process 0 did not answer at 127.*refused"):
        Other(place, 10.0).roll_call(SAME, 0.5)


def test_it_may_come_late_and_after_strangers(closing):
    """A scanner of ports, and a process that was started again."""
    address = ("127.0.0.1", free_port())
    at = f"127.0.0.1:{address[1]}"
    first, ended = closing(First(Place("test", at, 3, 0), 10.0)), []
    others = [closing(Other(Place("test", at, 3, i), 10.0)) for i in (1, 2)]
    threads = [
        threading.Thread(target=lambda x=line: ended.append(x.roll_call(SAME, 10.0)))
        for line in (first, *others)
    ]
    threads[0].start()
    hello = {"process": 1, "of": 3, "host": "before", "facts": {"config": {"a": "b"}}}
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"", json.dumps(hello).encode() + b"\n"):
        with socket.create_connection(address) as stranger:
            stranger.sendall(words)
            time.sleep(0.1)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert ended == [[]] * 3
    assert first.hosts == others[0].hosts == [socket.gethostname()] * 3


def test_a_port_in_use_is_an_answer():
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(InputError, match="port must be free on process 0's host"):
            First(Place("test", address, 2, 0), 10.0, bind_for=0.0)


@pytest.mark.parametrize("on_one_host", [True, False])
def test_a_second_process_0_is_named_as_that(on_one_host, closing, monkeypatch):
    """Nobody looks for a process 1 that was called 0."""
    port, ended = free_port(), []

    def come(address):
        with pytest.raises(InputError) as error:
            First(Place("test", address, 2, 0), 10.0).roll_call(SAME, 8.0)
        ended.append(str(error.value))

    # Of two hosts each has its own such port, and one of them the address.
    elsewhere = free_port()
    listen = roll_call.listen
    threads = [threading.Thread(target=come, args=(f"localhost:{port}",))]
    threads[0].start()
    time.sleep(0.5)
    if not on_one_host:
        monkeypatch.setattr(roll_call, "listen", lambda _, *a: listen(elsewhere, *a))
    threads.append(threading.Thread(target=come, args=(f"localhost:{port}",)))
    threads[1].start()
    start = time.monotonic()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - start < 6
    host = socket.gethostname()
    said = f"two say they are process 0, on {host} and on {host}. Look at their --pro"
    assert len(ended) == 2 and all(said in x for x in ended), ended


def test_another_number_of_processes_is_an_answer():
    address = f"127.0.0.1:{free_port()}"
    first = First(Place("test", address, 3, 0), 10.0)
    other, ended = Other(Place("test", address, 2, 1), 10.0), []

    def come():
        with pytest.raises(InputError) as error:
            other.roll_call(SAME, 5.0)
        ended.append(str(error.value))

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(InputError, match="told 3; process 1 on .* 2"):
        first.roll_call(SAME, 5.0)
    thread.join(10)
    assert "told 3; process 1 on" in ended[0]


@pytest.fixture
def ends(monkeypatch):
    """What `os._exit` would have ended this process with."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_failure_of_one_is_told_to_all_with_its_code(closing, ends, capsys):
    lines, _ = together(closing, {0: SAME, 1: SAME, 2: SAME})
    lines[2].tell(exit_codes.BAD_INPUT, "no such file")
    wait_for(lambda: len(ends) == 2)
    assert ends == [exit_codes.BAD_INPUT] * 2
    host = socket.gethostname()
    said = f"error: process 2 ({host}) failed: no such file"
    assert capsys.readouterr().err.splitlines() == [said] * 2
    assert lines[0].news == lines[1].news == (2, said.removeprefix("error: "))


@pytest.mark.parametrize("gone", [0, 1])
def test_one_that_is_gone_is_named_at_once(gone, closing, ends, capsys, monkeypatch):
    # Process 0 waits for its own checkpoint; not here.
    monkeypatch.setattr(
        "unicl_jax.processes.roll_call.patience", lambda code, usual: 0.0
    )
    lines, _ = together(closing, {0: SAME, 1: SAME, 2: SAME})
    line = lines[gone]
    line._finished.set()  # this end hears nothing any more
    start = time.monotonic()
    for peer in [*line._peers.values()] if gone == 0 else [line._peer]:
        peer.socket.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: len(ends) == 2)
    assert time.monotonic() - start < 2
    assert ends == [exit_codes.LOST] * 2
    lost = [x for x in capsys.readouterr().err.splitlines() if "was lost" in x]
    assert len(lost) == 2 and all(f"process {gone} (" in x for x in lost)


def test_nothing_is_said_of_one_that_ends_as_it_should(closing, ends, capsys):
    lines, _ = together(closing, {0: SAME, 1: SAME})
    for line in lines.values():
        line.finish()
    for peer in lines[0]._peers.values():
        peer.socket.close()
    lines[1]._peer.socket.close()
    assert lines[0].wait_for_news(0.5) is None and ends == []
    assert capsys.readouterr().err == ""


def test_one_that_ends_by_itself_is_not_ended_for_another(ends):
    """All processes come to a non-finite loss at one step, and save before."""
    line = Line(Place("test", "a:1", 2, 1), 10.0)
    threading.Timer(0.2, line._finished.set).start()
    line._end(exit_codes.NON_FINITE, "loss is nan", 60.0)
    assert ends == []


# --- What must be the same.


def test_each_difference_is_named_with_who_has_what():
    facts = {
        p: {"config": {"a": "1", "b": "2"}, "better": {"numpy": "2"}} for p in range(6)
    }
    facts[3] = {"config": {"a": "1", "b": "3", "c": "4"}, "better": {"numpy": "1"}}
    error, warnings = agreement.differences(facts)
    assert error.splitlines()[1:] == [
        "  config: b is 2 on processes 0-2, 4 and 5; 3 on process 3",
        "  config: c is none on processes 0-2, 4 and 5; 4 on process 3",
        "Start all of them with the same command, from the same recipe.",
    ]
    assert warnings == [
        "processes differ: numpy is 2 on processes 0-2, 4 and 5; 1 on process 3"
    ]
    del facts[3]
    assert agreement.differences(facts) == (None, [])


def test_what_a_run_is_made_of_is_told():
    facts = agreement.of_this_process({"seed": 0, "data.sources.x.path": "/a"})
    assert facts["config"] == {"seed": "0"}  # a path is a host's own affair
    assert {"jax", "jaxlib", "flax", "optax"} <= facts["version"].keys()
    assert "unicl_jax/losses/__init__.py" in facts["code"]
    assert json.loads(json.dumps(facts)) == facts


def test_exit_codes_are_those_of_the_launchers():
    text = (ROOT / "launch" / "exit_codes.sh").read_text()
    script = f"{text}\nfor i in {{0..255}}; do if restarts $i; then echo $i; fi; done"
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert out.stderr == ""
    assert {*map(int, out.stdout.split())} == {*exit_codes.RESTART}


# --- Real processes.

WORKER = """
import os, signal, sys, time
from unicl_jax import processes
from unicl_jax.processes import agreement, roll_call
from unicl_jax.errors import InputError
address, count, index, workdir = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
config, records = {"batch_size": 64}, {"pairs": (100, "aaaa")}
processes._SHARED_FOR = 0.5
def train():
    pass
PATCH
try:
    place = processes.find_place(address, count, index)
    processes.start(place, config, 30.0, 10.0)
    processes.agree(records, workdir)
    code, why = train() or 0, ""
except InputError as error:
    code, why = 2, str(error)
except OSError as error:
    code, why = 1, str(error)
print(why, file=sys.stderr)
code = processes.leave(code, why)
os._exit(code) if 0 < code < 128 else sys.exit(code)
"""


def run(folder, count, patch):
    """Runs processes that start, agree and train; exit codes, and what each said."""
    address = f"127.0.0.1:{free_port()}"
    script = WORKER.replace("PATCH", textwrap.dedent(patch))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(count), str(i), str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for i in range(count)
    ]
    try:
        said = [worker.communicate(timeout=100)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], said


@pytest.mark.parametrize(
    ("count", "patch", "messages"),
    [
        (
            3,
            """
            config["batch_size"] += index == 2
            whole = agreement.code()
            whole["unicl_jax/step.py"] = "new" if index == 1 else "old"
            agreement.code = lambda: whole
            """,
            [
                "config: batch_size is 64 on processes 0 and 1; 65 on process 2",
                "code: unicl_jax/step.py is old on processes 0 and 2; new on pro",
            ],
        ),
        (
            2,
            "records['pairs'] = (100 + index, 'aaaa')",
            ["data: pairs is 100 records (aaaa) on process 0; 101 records (aaaa) on "],
        ),
        (
            2,
            "workdir += str(index)\nos.makedirs(workdir)",
            ["1, without what process 0 wrote there, on process 1"],
        ),
    ],
    ids=["config and code", "data", "workdir"],
)
def test_processes_that_differ_all_say_where_and_leave(
    count, patch, messages, tmp_path
):
    codes, said = run(tmp_path, count, patch)
    assert codes == [exit_codes.BAD_INPUT] * count, said
    for err in said:
        for message in messages:
            assert message in err


@pytest.mark.parametrize(
    ("error", "code"),
    [("OSError", exit_codes.FAILED), ("InputError", exit_codes.BAD_INPUT)],
)
def test_all_end_with_the_code_of_the_one_that_fails(error, code, tmp_path):
    patch = f"""
        def train():
            if index == 1:
                raise {error}("no such disk")
            time.sleep(100)
        """
    codes, said = run(tmp_path, 2, patch)
    assert codes == [code] * 2, said
    assert ") failed: no such disk" in said[0]


@pytest.mark.parametrize(
    ("error", "code"),
    [("OSError", exit_codes.FAILED), ("InputError", exit_codes.BAD_INPUT)],
)
def test_what_all_fail_at_has_its_own_code_on_all(error, code, tmp_path):
    """Not jax's abort, after which launchers would try it again."""
    patch = f"""
        def train():
            from jax.experimental import multihost_utils
            multihost_utils.sync_global_devices("both train")
            time.sleep(0.3 * (1 - index))
            raise {error}("no such disk")
        """
    codes, said = run(tmp_path, 2, patch)
    assert codes == [code] * 2, said


def test_a_killed_one_is_named_and_the_rest_ask_to_be_started_again(tmp_path):
    patch = """
        def train():
            from jax.experimental import multihost_utils
            multihost_utils.sync_global_devices("both train")
            if index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            start[:] = [time.monotonic()]
            try:
                multihost_utils.sync_global_devices("waits for both, as a step does")
            except Exception as error:
                raise OSError(str(error))
            finally:
                print("waited", time.monotonic() - start[0], file=sys.stderr)
        start = []
        """
    codes, said = run(tmp_path, 2, patch)
    assert codes == [exit_codes.LOST, -signal.SIGKILL], said
    assert "error: process 1 (" in said[0] and "was lost" in said[0]


def test_a_preemption_of_one_ends_all_together_and_in_silence(tmp_path):
    patch = """
        def train():
            from jax.experimental import multihost_utils
            multihost_utils.sync_global_devices("both train")
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            for step in range(1000):
                multihost_utils.sync_global_devices("a step")
                if multihost_utils.reached_preemption_sync_point(step):
                    return 143
                time.sleep(0.05)
        """
    codes, said = run(tmp_path, 2, patch)
    assert codes == [143] * 2, said
    assert not any("error:" in err or "lost" in err for err in said), said
