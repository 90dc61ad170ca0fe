"""ELEVATER's sweep of a linear probe, ours beside PyTorch's loop.

The peers are the toolkit's loop, a run a setting, on features that lie in memory: as it
does it, with a DataLoader and its metrics; and a lean one without them, from the same
start and on the same batches as ours, so that its scores must be ours.
"""

import datetime
import functools
import time

import numpy as np

from benchmarks import harness
from benchmarks.harness import say

RECORDS, TEST, DIM, WAYS, RANK = 10_000, 2_000, 768, 100, 64
TRIAL_STEPS = 30  # to find which number of threads serves a peer better


def add_options(parser):
    """What the command takes."""
    parser.add_argument("--rates", type=int, default=6, help="the last so many rates")
    parser.add_argument("--peers", default="lean,toolkit", help="some of them, or none")


@functools.cache
def data(records=RECORDS):
    """Features and labels to train on and to score on: a mixture of Gaussians.

    Class centres and noise lie in the same few directions of falling strength, and
    some more noise in all: a linear head is right on about three of four records.
    """
    rng = np.random.default_rng(0)
    strength = np.linspace(1, 0.1, RANK)[:, None]
    basis = strength * rng.normal(size=(RANK, DIM)) / RANK**0.5
    centres = rng.normal(size=(WAYS, RANK))
    labels = np.arange(records) % WAYS
    latent = centres[labels] + 2.0 * rng.normal(size=(records, RANK))
    features = latent @ basis + 0.5 * rng.normal(size=(records, DIM)) + 0.3
    return features.astype(np.float32), labels.astype(np.int32)


def _sets():
    from unicl_jax.evaluation import elevater

    features, labels = data()
    fit, held = elevater.split(labels)
    return (features[fit], labels[fit]), (features[held], labels[held])


def _start():
    from unicl_jax.evaluation import heads

    return heads.random_start(WAYS, DIM, 0)


class Ours:
    """`probe.sweep`."""

    def run(self, rates):
        """Seconds, the best validation score, its setting, and runs with their best."""
        from unicl_jax.evaluation import elevater, probe

        fit, held = _sets()
        protocol = probe.Protocol(learning_rates=elevater.LEARNING_RATES[-rates:])
        start = time.perf_counter()
        chosen, curves = probe.sweep(fit, held, _start(), protocol=protocol)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "validation": max(chosen.scores),
            "setting": [chosen.learning_rate, chosen.weight_decay],
            "runs": len(curves),
            "not_trained": sum(not curve.scores for curve in curves),
            "best": {
                f"{curve.learning_rate:g},{curve.weight_decay:.4g}": max(curve.scores)
                for curve in curves
                if not curve.diverged
            },
        }

    def device(self):
        """What jax runs on."""
        import jax

        kind = jax.devices()[0]
        return {"backend": kind.platform, "device_kind": kind.device_kind}


class Peer:
    """The toolkit's loop in PyTorch; `lean` without its DataLoader and metrics."""

    def __init__(self, lean):
        """Takes the number of threads that does a few steps sooner."""
        import torch

        from unicl_jax.evaluation import heads

        self.lean, self.torch = lean, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        fit, held = _sets()
        self.order = heads.batches(len(fit[0]), 10, 64, 1)
        self.sets = [(torch.tensor(x), torch.tensor(y).long()) for x, y in (fit, held)]
        if lean or self.device == "cpu":
            self.sets = [tuple(x.to(self.device) for x in pair) for pair in self.sets]
        took = {}
        for threads in (1, torch.get_num_threads()):
            torch.set_num_threads(threads)
            self._train(0.01, 0.0, TRIAL_STEPS)
            took[threads] = min(self._train(0.01, 0.0, TRIAL_STEPS)[1] for _ in "12")
        self.threads = min(took, key=took.get)
        torch.set_num_threads(self.threads)

    def describe(self):
        """The number of threads it took."""
        return self.threads

    def row(self, rate):
        """One learning rate's part of the search: seconds, scores, settings."""
        from unicl_jax.evaluation import elevater

        runs = {}

        def evaluate(places):
            for _, decay in places:
                if decay not in runs:
                    runs[decay] = self._train(rate, elevater.WEIGHT_DECAYS[decay])
            return [runs[decay][0] for _, decay in places]

        start = time.perf_counter()
        elevater.search(evaluate, 1, len(elevater.WEIGHT_DECAYS))
        return {
            "seconds": time.perf_counter() - start,
            "best": {
                f"{rate:g},{elevater.WEIGHT_DECAYS[decay]:.4g}": score
                for decay, (score, _) in runs.items()
            },
        }

    def _train(self, rate, decay, steps=None):
        """The best validation score of 10 epochs, and seconds."""
        torch = self.torch
        start = time.perf_counter()
        norm = torch.nn.BatchNorm1d(DIM, affine=False).to(self.device)
        linear = torch.nn.Linear(DIM, WAYS).to(self.device)
        if self.lean:
            with torch.no_grad():
                weights, bias = _start()
                linear.weight.copy_(torch.tensor(weights))
                linear.bias.copy_(torch.tensor(bias))
        optimizer = torch.optim.SGD(
            linear.parameters(), lr=rate, momentum=0.9, weight_decay=decay
        )
        cross_entropy = torch.nn.CrossEntropyLoss()
        train, held = self.sets
        if not self.lean:
            train, held = self._loader(train, True), self._loader(held, False)
        best = count = 0
        for epoch in range(10):
            norm.train()
            outputs, targets = [], []
            for features, labels in self._lean(epoch) if self.lean else train:
                features, labels = features.to(self.device), labels.to(self.device)
                optimizer.zero_grad()
                output = linear(norm(features))
                loss = cross_entropy(output, labels)
                loss.backward()
                optimizer.step()
                if not self.lean:
                    loss.item()
                    outputs.append(output.detach())
                    targets.append(labels)
                count += 1
                if count == steps:
                    return 0, time.perf_counter() - start
            if not self.lean:
                self._accuracy(outputs, targets)
            norm.eval()
            with torch.no_grad():
                if self.lean:
                    right = linear(norm(held[0])).argmax(1) == held[1]
                    score = right.float().mean().item()
                else:
                    outputs, targets = [], []
                    for features, labels in held:
                        outputs.append(linear(norm(features.to(self.device))))
                        targets.append(labels)
                    score = self._accuracy(outputs, targets)
            best = max(best, score)
        return best, time.perf_counter() - start

    def _lean(self, epoch):
        features, labels = self.sets[0]
        for rows in self.torch.from_numpy(self.order[epoch]).long():
            rows = rows.to(self.device)
            yield features[rows], labels[rows]

    def _loader(self, pair, shuffle):
        # The toolkit's six workers would read images; for features they cost more.
        torch = self.torch
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*pair),
            batch_size=64,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(0) if shuffle else None,
        )

    def _accuracy(self, outputs, targets):
        chances = self.torch.cat(outputs).softmax(-1).cpu().numpy()
        return float(
            (chances.argmax(1) == self.torch.cat(targets).cpu().numpy()).mean()
        )


def measure(options):
    """Ours, whole, in turns with each peer's runs of one learning rate."""
    from unicl_jax.evaluation import elevater

    machine = harness.machine()
    ours = harness.Worker(Ours)
    machine |= ours.ask("device")
    names = [name for name in options.peers.split(",") if name and name != "none"]
    peers = {name: harness.Worker(Peer, name == "lean") for name in names}
    found = {
        "command": harness.command("benchmarks.evaluation"),
        "date": str(datetime.date.today()),
        "versions": harness.versions("scikit-learn"),
        "machine": machine,
        "records": RECORDS,
        "dim": DIM,
        "ways": WAYS,
        "rates": list(elevater.LEARNING_RATES[-options.rates :]),
        "ours": [],
        "peers": {
            name: {"threads": peer.ask("describe"), "rows": []}
            for name, peer in peers.items()
        },
    }
    for i, rate in enumerate(found["rates"]):
        if i % 2 == 0:
            found["ours"].append(_with_cpu(ours, "run", options.rates))
            say(f"ours, all of the sweep: {found['ours'][-1]['seconds']:.1f} s")
        for name, peer in peers.items():
            row = _with_cpu(peer, "row", rate) | {"rate": rate}
            found["peers"][name]["rows"].append(row)
            say(f"{name}, rate {rate:g}: {row['seconds']:.1f} s, {len(row['best'])}")
    found["peak_bytes"] = ours.ask("rss_peak")
    for worker in (ours, *peers.values()):
        worker.close()
    return found


def _with_cpu(worker, *what):
    """What a worker found, with the seconds of all cores that it took for it."""
    before = worker.ask("cpu_seconds")
    found = worker.ask(*what)
    return found | {"cpu_seconds": worker.ask("cpu_seconds") - before}


def rows_of(found):
    """The table of one JSON file as rows of text."""
    header = "", "seconds", "times", "CPU seconds", "times", "runs", "validation, %"
    first, *later = found["ours"]
    ours = {
        key: float(np.median([run[key] for run in later or [first]]))
        for key in ("seconds", "cpu_seconds")
    }

    def row(name, took, runs, score):
        cells = [name]
        for key, own in ours.items():
            cells += [f"{took[key]:.1f}", f"{took[key] / own:.1f}"]
        return [*cells, str(runs), f"{100 * score:.2f}"]

    rows = [[*header]]
    for name, took in {"ours": ours, "ours, first call: compiles": first}.items():
        runs = f"{first['runs']}, of which {first['not_trained']} foreseen to diverge"
        rows.append(row(name, took, runs, first["validation"]))
    names = {
        "lean": "PyTorch, lean, same start and batches",
        "toolkit": "PyTorch, the toolkit's loop",
    }
    for name, peer in found["peers"].items():
        best = {k: v for part in peer["rows"] for k, v in part["best"].items()}
        took = {key: sum(part[key] for part in peer["rows"]) for key in ours}
        called = f"{names[name]}, threads: {peer['threads']}"
        rows.append(row(called, took, len(best), max(best.values())))
    return rows


def title(found):
    """One line: what was measured, on what."""
    return (
        f"ELEVATER's sweep, {found['records']} x {found['dim']} features, "
        f"{found['ways']} classes: {harness.where(found['machine'])}"
    )
