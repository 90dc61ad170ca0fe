"""The restart with huge pages: when it happens, and that it happens once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unicl_jax import host_memory

MODULE, COMMAND = "unicl_jax.main", ["-m", "unicl_jax.main"]
ARGV = ["python", "-u", "-m", "unicl_jax.main", "--config=x.py"]
SEEN = "glibc.malloc.hugetlb=1"


@pytest.fixture(autouse=True)
def cpu_only_linux(monkeypatch, tmp_path):
    """A Linux without accelerators that gives huge pages to those who ask."""
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(host_memory, "_PAGES", pages)
    monkeypatch.setattr(host_memory, "_ACCELERATORS", (str(tmp_path / "accel*"),))
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path


def environment(environ, argv=ARGV):
    return host_memory._environment(environ, argv, MODULE)


def test_it_adds_to_the_environment_and_keeps_the_rest():
    assert environment({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": SEEN}
    kept = environment({"GLIBC_TUNABLES": "glibc.malloc.check=0"})
    assert kept == {"GLIBC_TUNABLES": f"glibc.malloc.check=0:{SEEN}"}


@pytest.mark.parametrize(
    "argv",
    [
        ["python", "-municl_jax.main"],
        ["python", "-X", "dev", "-W", "error", "-I", "-m", "unicl_jax.main"],
    ],
)
def test_other_ways_to_say_the_command_count(argv):
    assert environment({}, argv) is not None


@pytest.mark.parametrize("choice", ["0", "1", "2"])
def test_a_choice_already_made_stands(choice):
    assert environment({"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={choice}"}) is None


@pytest.mark.parametrize(
    "argv",
    [
        ["python", "-m", "ipykernel", "-f", "x"],
        ["python", "-m", "pdb", "-m", "unicl_jax.main"],
        ["python", "script.py", "-m", "unicl_jax.main"],
        ["python", "-c", "pass", "-m", "unicl_jax.main"],
        ["python", "-m"],
        ["python"],
        [],
    ],
)
def test_another_command_is_left_alone(argv):
    assert environment({}, argv) is None


@pytest.mark.parametrize("pages", ["[always] madvise never", "always madvise [never]"])
def test_a_system_that_does_not_ask_is_left_alone(pages, cpu_only_linux):
    (cpu_only_linux / "enabled").write_text(pages)
    assert environment({}) is None
    (cpu_only_linux / "enabled").unlink()
    assert environment({}) is None


def test_a_machine_with_an_accelerator_is_left_alone(cpu_only_linux):
    (cpu_only_linux / "accel0").touch()
    assert environment({}) is None


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert environment({}) is None


def test_the_command_starts_anew_once_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if host_memory._environment({}, ARGV, MODULE) is None:
        pytest.skip("this machine has nothing to gain from it")
    starts = tmp_path / "starts"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nwith open({str(starts)!r}, 'a') as f:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), file=f)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *COMMAND, "--workdir", "a b"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "--config must be given" in done.stderr
    first, second = (line.split() for line in starts.read_text().splitlines())
    assert first[0] == second[0]  # the same process, for whoever signals it
    assert (first[1], second[1]) == ("None", SEEN)
