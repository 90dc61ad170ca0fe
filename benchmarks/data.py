"""From JPEG shards to batches of 224 pixels, beside open_clip, PyTorch and grain.

python -m benchmarks.jpegs FOLDER
python -m benchmarks.data FOLDER
python -m benchmarks.data FOLDER --memory=10000
python -m benchmarks.data --markdown

Every loader reads in turn, in processes of its own, on the same two cores.
`benchmarks/README.md` says what is compared.
"""

import argparse
import datetime
import statistics
import sys
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Worker, say
from benchmarks.loaders import LOADERS, Loader

OURS, PEER = "unicl_jax, tars", "open_clip, tars"
PROTOCOLS = ("crop", "full")
LIBRARIES = (
    *("tensorflow-cpu", "opencv-python-headless", "simplejpeg", "pillow"),
    *("webdataset", "torchvision", "grain"),
)


def measure(options):
    """Every protocol and loader; returns what goes to JSON."""
    machine, protocols = harness.machine(), {}
    arguments = str(options.folder.absolute()), options.batch_size, options.workers
    for protocol in () if options.memory else PROTOCOLS:
        samples = {name: [] for name in options.loaders}
        memory = {}
        for turn in range(options.repeats):
            for name in options.loaders:
                say(f"{protocol}, {turn + 1} of {options.repeats}: {name}")
                worker = Worker(Loader, name, protocol, *arguments, daemon=False)
                samples[name].append(worker.ask("read", options.batches))
                memory[name] = worker.ask("resident")
                worker.close()
        protocols[protocol] = {
            name: {
                key: {
                    "median": statistics.median(s[key] for s in found),
                    "min": min(s[key] for s in found),
                    "max": max(s[key] for s in found),
                }
                for key in found[0]
            }
            | {"resident_bytes": memory[name]}
            for name, found in samples.items()
        }
    found = {
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.data").replace(
            str(options.folder), "FOLDER"
        ),
        "machine": machine,
        "versions": harness.versions(*LIBRARIES),
        "batch_size": options.batch_size,
        "workers": options.workers,
        "batches": options.batches,
        "protocols": protocols,
    }
    if options.memory:
        found["memory"] = over_time(options.memory, arguments)
    return found


def over_time(batches, arguments, points=20):
    """Resident bytes of ours after each twentieth of that many batches."""
    worker = Worker(Loader, OURS, "full", *arguments, daemon=False)
    rows = []
    for point in range(points):
        speed = worker.ask("read", batches // points)["images_per_second"]
        rows.append([(point + 1) * (batches // points), worker.ask("resident"), speed])
        say(f"{rows[-1][0]} batches: {rows[-1][1] / 2**20:,.0f} MiB, {speed:,.0f} /s")
    worker.close()
    return rows


def rows_of(found):
    """The table of one JSON file as rows of text."""
    if "memory" in found:
        rows = [["batches", "resident, MiB", "images/s"]]
        for batches, resident, speed in found["memory"]:
            rows.append([f"{batches:,}", f"{resident / 2**20:,.0f}", f"{speed:,.0f}"])
        return rows
    rows = [["loader", "protocol", "images/s", "a core", "CPU, ms/image", "MiB", ""]]
    cores = found["machine"]["cores"]
    for protocol, loaders in found["protocols"].items():
        for name, measured in loaders.items():
            speed = measured["images_per_second"]["median"]
            peer = loaders[PEER]["images_per_second"]["median"]
            rows.append(
                [
                    name,
                    protocol,
                    f"{speed:,.0f}",
                    f"{speed / cores:,.0f}",
                    f"{measured['cpu_ms_per_image']['median']:.2f}",
                    f"{measured['resident_bytes'] / 2**20:,.0f}",
                    f"{speed / peer:.2f} x",
                ]
            )
    return rows


def title(found):
    """One line: what was measured, on what."""
    what = "memory over time" if "memory" in found else "JPEGs of about 420 x 390"
    return (
        f"{what}, batches of {found['batch_size']}; {harness.where(found['machine'])}"
    )


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", help="that benchmarks.jpegs made"
    )
    parser.add_argument(
        "--loaders",
        type=lambda text: text.split(";"),
        default=";".join(LOADERS),
        help=f"with ; between them, of {'; '.join(LOADERS)}",
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=60, help="a sample")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of the others"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0, help="batches; ours alone")
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    options = parser.parse_args(argv)
    if not options.folder and not options.markdown:
        parser.error("name the folder that `python -m benchmarks.jpegs` made")
    return options


def main(argv):
    """Measures, prints a table and writes JSON; or prints what was measured before."""
    options = _options(argv)
    prefix = "memory" if options.memory else "data"
    harness.report(prefix, options, measure, title, rows_of)


if __name__ == "__main__":
    main(sys.argv[1:])
