"""Times a train step and its parts, beside the same model in PyTorch.

python -m benchmarks.step --recipe=quickstart
python -m benchmarks.step --recipe=swin_tiny --batch_size=8 --peer=eager,compile
python -m benchmarks.step --markdown

Each framework runs in a process of its own, with all cores or the one device. They take
turns, part by part, so that a busy machine hits both alike; a process that is not
asked sleeps. `benchmarks/README.md` says what each row of the table means.
"""

import argparse
import datetime
import math
import os
import runpy
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.harness import Worker, say
from benchmarks.step_report import table, title
from unicl_jax.host_memory import restart_with_huge_pages

ROOT = Path(__file__).parent.parent
PARTS = ("transfer", "forward", "gradient", "step")
MIN_SAMPLE_SECONDS = 0.1  # a sample is as many calls as it takes to last that long
TRAINER_SECONDS, TRAINER_RUNS = 15, 3


# Recipes: a config of the project, and what has to change to run it here.


def quickstart(folder):
    """The quick start on its own data, with AdamW and without what the peers lack."""
    del folder
    config = _config("quickstart")
    config.optimizer.name = "adamw"  # PyTorch has no comparable Muon
    config.model.image.absolute_positions = False
    return config


def swin_tiny(folder):
    """The recipe's model, optimizer and prompts, on noise: no data set is here.

    224-pixel uint8 noise, half of it labelled in 1,000 classes (so 81 prompts), half
    with captions of 5 to 20 made-up words. No drop path: the peer has none.
    """
    config = _config("swin_tiny")
    config.model.image.drop_path = 0.0
    config.batch_size = 16
    count, size = 256, config.model.image.image_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    words = [_word(rng) for _ in range(2000)]
    captions = [" ".join(rng.choice(words, rng.integers(5, 21))) for _ in images]
    names = [f"{a} {b}" for a, b in zip(words[:1000], words[1000:], strict=True)]
    labels = np.arange(count) % len(names)
    paths = {kind: f"{folder}/{kind}.npz" for kind in ("image_label", "image_text")}
    np.savez(paths["image_label"], images=images, labels=labels, class_names=names)
    np.savez(paths["image_text"], images=images, texts=captions)
    with config.unlocked():
        config.data.sources = {
            kind: dict(format="npz", kind=kind, path=path)
            for kind, path in paths.items()
        }
    return config


RECIPES = {"quickstart": quickstart, "swin_tiny": swin_tiny}


def _config(name):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    with config.unlocked():
        config.evaluations = {}
        config.data.text_length = "full"  # as the peer, which cannot pack
    return config


def _word(rng):
    return "".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(3, 9)))


def _ours(config):
    from benchmarks.step_jax import Ours

    return Ours(config)


def _trainer(config, cache):
    from benchmarks.step_jax import Trainer

    return Trainer(config, cache)


def _peer(*args):
    from benchmarks.step_torch import Peer

    return Peer(*args)


# Measuring.


def measure(options):
    """Runs the whole benchmark; returns what goes to JSON."""
    with tempfile.TemporaryDirectory() as folder:
        config = RECIPES[options.recipe](folder)
        config.model.dtype = options.dtype
        if options.batch_size:
            config.batch_size = options.batch_size
        return _measure(options, config, folder)


def _measure(options, config, folder):
    plain = config.to_dict()
    machine = harness.machine()
    say("compiling")
    ours = Worker(_ours, plain)
    about = ours.ask("describe")
    compiled = ours.ask("compile_step")
    say("first steps")
    memory = _memory_of_steps(ours)
    say("compiling the parts")
    ours.ask("compile_parts")
    workers, results = {"ours": ours}, {"ours": {"compile": compiled}}
    results["ours"]["memory"] = memory
    batches = ours.ask("batches")
    for mode in options.peer:
        worker, found = _best_peer(options, plain, batches, mode, ours)
        workers[mode], results[mode] = worker, found

    say("timing")
    calls = {
        name: {part: _calls(worker, part) for part in PARTS}
        for name, worker in workers.items()
    }
    calls["ours"]["data"] = _calls(ours, "data")
    samples = {name: {part: [] for part in calls[name]} for name in workers}
    cpu = {name: {part: [] for part in calls[name]} for name in workers}
    for turn in range(options.repeats):
        order = list(workers) if turn % 2 == 0 else list(workers)[::-1]
        for part in (*PARTS, "data"):
            for name in order:
                if part in calls[name]:
                    worker, times = workers[name], calls[name][part]
                    start = worker.ask("cpu_seconds")
                    samples[name][part].append(worker.ask("time", part, times))
                    spent = worker.ask("cpu_seconds") - start
                    cpu[name][part].append(spent / times)
    for name, parts in samples.items():
        results[name]["seconds"] = {
            part: {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "cpu_median": statistics.median(cpu[name][part]),
            }
            for part, values in parts.items()
        }
        results[name]["split"] = _split(results[name]["seconds"])
        step = results[name]["seconds"]["step"]["median"]
        results[name]["images_per_second"] = config.batch_size / step
    for mode in options.peer:
        workers[mode].close()
        ratios = [
            b / a
            for a, b in zip(samples["ours"]["step"], samples[mode]["step"], strict=True)
        ]
        results[mode]["step_over_ours"] = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        }

    ours.close()
    trainer = None
    if not options.no_trainer:
        alone = results["ours"]["seconds"]["step"]["median"]
        trainer = _trainer_against_step(config, alone, folder)
    return {
        "recipe": options.recipe,
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.step"),
        "machine": machine
        | {k: about[k] for k in ("backend", "device_kind", "devices")},
        "versions": harness.versions(),
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "image_size": config.model.image.image_size,
        "text_rows": about["text_rows"],
        "text_slots": config.model.text.context_length,
        "parameters": about["parameters"],
        "repeats": options.repeats,
        "results": results,
        "trainer": trainer,
    }


def _memory_of_steps(worker):
    """Peak bytes while stepping; the first steps are not counted on the CPU."""
    start = worker.ask("rss_peak")
    for _ in range(2):
        worker.ask("time", "step", 1)
    whole = worker.ask("rss_peak")
    worker.ask("reset_peak")
    worker.ask("reset_device_peak")
    for _ in range(2):
        worker.ask("time", "step", 1)
    return {
        "process_before_stepping_bytes": start,
        "process_ever_bytes": whole,
        "process_stepping_bytes": worker.ask("rss_peak"),
        "device_bytes": worker.ask("device_peak"),
    }


def _best_peer(options, config, batches, mode, ours):
    """The fastest of the peer's models; the others' times are kept beside it."""
    workers, found, seconds, same = {}, {}, {}, None
    for model in options.peer_model:
        say(f"PyTorch, {mode}, {model}")
        worker = Worker(_peer, config, batches, model, mode, options.compile_mode)
        workers[model], seconds[model] = worker, []
        found[model] = {"model": model, **worker.ask("describe")}
        found[model]["compile"] = {"first_step_seconds": worker.ask("warm_up")}
        found[model]["memory"] = _memory_of_steps(worker)
        if model == "plain" and mode == options.peer[0]:
            weights, theirs = worker.ask("weights_and_loss")
            same = {"ours": ours.ask("loss_of", weights), "peer": theirs}
    for _ in range(4 if len(workers) > 1 else 0):
        for model, worker in workers.items():
            seconds[model].append(worker.ask("time", "step", 1))
    best = min(workers, key=lambda model: sum(sorted(seconds[model])[:2]))
    for model, worker in workers.items():
        if model != best:
            worker.close()
    found = found[best] | {"steps_of_models_in_turn": seconds}
    if same:
        found["loss_with_equal_weights"] = same
    return workers[best], found


def _calls(worker, part):
    """How many calls make a sample that lasts long enough; warms up, too."""
    worker.ask("time", part, 1)
    seconds = min(worker.ask("time", part, 1) for _ in range(2))
    return max(1, min(200, math.ceil(MIN_SAMPLE_SECONDS / seconds)))


def _split(seconds):
    """Medians of what a step is made of; the parts are differences of medians."""
    medians = {part: values["median"] for part, values in seconds.items()}
    return {
        "forward": medians["forward"],
        "backward": medians["gradient"] - medians["forward"],
        "update": medians["step"] - medians["gradient"],
    }


def _trainer_against_step(config, alone, folder):
    """Seconds a step of the real trainer, and of its compiled step alone, in turn."""
    steps = max(9, min(2000, int(TRAINER_SECONDS / alone)))
    every = max(2, min(config.log_every_steps, steps // 4))
    config.total_steps = steps // every * every
    config.log_every_steps = every
    config.optimizer.warmup_steps = min(
        config.optimizer.warmup_steps, config.total_steps - 1
    )
    runs = []
    for run in range(TRAINER_RUNS + 1):
        say(f"trainer, run {run} of {TRAINER_RUNS}")
        worker = Worker(_trainer, config.to_dict(), f"{folder}/cache")
        # In one process: another one's memory may be faster or slower by a half.
        before = worker.ask("alone", every)
        laps = worker.ask("run", f"{folder}/run{run}")
        after = worker.ask("alone", every)
        worker.close()
        if run == 0:
            continue  # it filled the cache of compiled steps
        seconds = statistics.median(lap for lap, _ in laps)
        runs.append(
            {
                "step_alone_seconds": (before + after) / 2,
                "trainer_step_seconds": seconds,
                "waited_for_data": statistics.median(wait for _, wait in laps),
                "overhead": 2 * seconds / (before + after) - 1,
            }
        )
    return {
        "steps": config.total_steps,
        "log_every_steps": every,
        "overhead": statistics.median(run["overhead"] for run in runs),
        "runs": runs,
    }


def _several(choices):
    def parse(text):
        names = [] if text == "none" else text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f'must be none or some of {", ".join(choices)}: got "{name}"'
                )
        return names

    return parse


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="quickstart")
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--batch_size", type=int, help="default: the recipe's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--peer",
        type=_several(("eager", "compile")),
        default=["eager"],
        help="none, eager, compile, or eager,compile",
    )
    parser.add_argument(
        "--peer_model",
        type=_several(("plain", "transformers")),
        default=["plain", "transformers"],
        help="of several the fastest is reported",
    )
    parser.add_argument("--compile_mode", default="default", help="of torch.compile")
    parser.add_argument("--no_trainer", action="store_true", help="leave that part out")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    return parser.parse_args(argv)


def main(argv):
    """Measures, prints a table and writes JSON; or prints what was measured before."""
    options = _options(argv)
    if options.markdown:
        print(harness.markdown("step", title, table))
        return
    # The frameworks share the device's memory: neither may take all of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = measure(options)
    harness.write(found, f"step_{options.recipe}", options.out)
    print(harness.aligned(title(found), table(found)))


if __name__ == "__main__":
    # As the trainer does; the workers inherit it, so that the peers gain as well.
    restart_with_huge_pages("benchmarks.step")
    main(sys.argv[1:])
