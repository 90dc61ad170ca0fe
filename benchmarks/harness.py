"""What the benchmarks share: workers in processes of their own, and the machine."""

import importlib.metadata
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BUSY = 0.25  # load for each core above which others are at work, too
START = time.perf_counter()


class Worker:
    """An object in a process of its own; `ask` calls its methods."""

    def __init__(self, make, *args, daemon=True):
        """Starts the process, which runs `make(*args)`; a daemon has no children."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, args), daemon=daemon
        )
        self._process.start()
        theirs.close()
        self._receive()

    def ask(self, method, *args):
        """The result of a method of the object, or of a function in `_HERE`."""
        self._pipe.send((method, args))
        return self._receive()

    def close(self):
        """Ends the process."""
        self._pipe.close()
        self._process.join()

    def _receive(self):
        good, value = self._pipe.recv()
        if not good:
            raise RuntimeError(f"a worker failed:\n{value}")
        return value


def _serve(pipe, make, args):
    served = None
    while True:
        try:
            if served is None:
                served, value = make(*args), None
            else:
                method, args = pipe.recv()
                value = _HERE.get(method) or getattr(served, method)
                value = value(*args)
            pipe.send((True, value))
        except EOFError:
            return
        except Exception:
            pipe.send((False, traceback.format_exc()))
            return


def _rss_peak():
    """Most resident bytes of this process since `_reset_rss_peak`, or ever."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_rss_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: the peak is then that of the whole process
        return False
    return True


_HERE = {
    "rss_peak": _rss_peak,
    "reset_peak": _reset_rss_peak,
    "cpu_seconds": time.process_time,
}


def machine(**more):
    """What it was measured on; warns where others are at work."""
    cores, busy = len(os.sched_getaffinity(0)), load()
    if busy > BUSY * cores:
        say(f"others keep {busy:.1f} cores busy: don't trust the figures")
    return {"cpu": cpu_name(), "cores": cores, "load_before": busy, **more}


def where(machine):
    """The processor or the device, for a title; and whether it was ours alone."""
    place = f"{machine['cpu']}, {machine['cores']} cores"
    if machine.get("backend", "cpu") != "cpu":
        place = machine["device_kind"]
    return place + " (shared with other work)" * shared_with_others(machine)


def shared_with_others(machine):
    """Whether so much else ran that figures mean little."""
    return machine["load_before"] > BUSY * machine["cores"]


def cpu_name():
    """What the processor calls itself."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        return re.search(r"model name\s*: (.*)", info)[1].strip()
    except (OSError, TypeError):
        import platform

        return platform.processor() or platform.machine()


def load(seconds=2.0):
    """How many cores others keep busy, seen over a while in which we sleep."""

    def used():
        try:  # user, nice, system; then idle, iowait; irq, softirq, steal
            times = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
            return sum(map(int, times)) - sum(map(int, times[3:5]))
        except (OSError, ValueError):
            return None

    start = used()
    if start is None:  # not Linux
        return os.getloadavg()[0]
    time.sleep(seconds)
    return (used() - start) / os.sysconf("SC_CLK_TCK") / seconds


def versions(*more):
    """Of Python and the libraries compared, and more of them."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in (
        "jax",
        "flax",
        "optax",
        "torch",
        "timm",
        "transformers",
        "open_clip_torch",
        *more,
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def command(module):
    """The command line, without the folders of this machine."""
    arguments = [
        re.sub(r"([=:])/[^,]*/", r"\1", argument)
        for argument in sys.argv[1:]
        if argument
    ]
    return " ".join([f"python -m {module}", *arguments])


def say(what):
    """A line to the terminal with the seconds since the start."""
    print(f"{time.perf_counter() - START:4.0f} s  {what}", file=sys.stderr, flush=True)


def markdown(prefix, title, rows_of):
    """The section of docs/performance.md, from every result of one benchmark.

    `title(found)` and `rows_of(found)` make a line and a table of a file's content.
    """
    lines = []
    for path in sorted(RESULTS.glob(f"{prefix}_*.json")):
        found = json.loads(path.read_text())
        header, *rows = rows_of(found)
        libraries = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
        lines += [
            f"**{title(found)}**",
            "",
            f"`{found['command']}`, {found['date']}, {libraries}:",
            "",
            "| " + " | ".join(header) + " |",
            "|---" + "|--:" * len(header[1:]) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def aligned(title, rows):
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [title]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(prefix, options, measure, title, rows_of):
    """What a benchmark's command does: measures, writes JSON and prints a table.

    Or, with `options.markdown`, prints what was measured before. `prefix` starts the
    names of its results.
    """
    if options.markdown:
        print(markdown(prefix, title, rows_of))
        return
    found = measure(options)
    write(found, prefix, options.out)
    print(aligned(title(found), rows_of(found)))


def write(found, prefix, out):
    """Writes a result as JSON: to `out`, or under its device's name in RESULTS."""
    kind = found["machine"].get("device_kind", "cpu").lower()
    device = re.sub(r"\W+", "_", kind).strip("_")
    out = out or RESULTS / f"{prefix}_{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
