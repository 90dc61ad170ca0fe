"""Times each tower beside the same one in PyTorch: forward, and a training step.

python -m benchmarks.towers
python -m benchmarks.towers --towers=swin_tiny,transformer --batch_size=8
python -m benchmarks.towers --markdown

Each side in a process of its own; they take turns. `benchmarks/README.md` says what is
compared.
"""

import argparse
import datetime
import math
import os
import statistics
import sys
import time
from pathlib import Path

from benchmarks import harness, peers
from benchmarks.harness import Worker, say
from unicl_jax.host_memory import restart_with_huge_pages

MIN_SAMPLE_SECONDS = 0.2
LEARNING_RATE = 1e-4
MIB = 2**20
TEXTS = ("transformer", "bert")


class Ours:
    """A tower of ours, compiled."""

    def __init__(self, tower, batch_size, dtype):
        """Compiles forward and step; keeps how long that took."""
        import jax
        import jax.numpy as jnp
        import optax

        from unicl_jax import encoders

        jax.config.update("jax_enable_compilation_cache", False)
        encoder = peers.ours(tower)(dtype=encoders.DTYPES[dtype])
        params, state = jax.jit(encoder.init)(jax.random.key(0))
        optimizer = optax.adamw(LEARNING_RATE)
        self._x = jnp.asarray(peers.inputs(tower, batch_size))
        self._state = (params, state, jax.jit(optimizer.init)(params))

        def forward(params, state, x):
            return encoder.apply(params, state, x)[0]

        def step(trained, x):
            params, state, opt_state = trained

            def loss(params):
                key = jax.random.key(0)
                features, new = encoder.apply(params, state, x, train=True, key=key)
                return (features**2).mean(), new

            (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), value

        start = time.perf_counter()
        self._forward = jax.jit(forward).lower(params, state, self._x).compile()
        middle = time.perf_counter()
        step = jax.jit(step, donate_argnums=0).lower(self._state, self._x)
        self._step = step.compile()
        self._seconds = {
            "compile_forward": middle - start,
            "compile_step": time.perf_counter() - middle,
        }
        self._about = {
            "backend": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "forward_flops": peers.forward_flops(self._forward, batch_size),
            "temporary_bytes": self._step.memory_analysis().temp_size_in_bytes,
            **self._seconds,
        }

    def about(self):
        """What it is, and what compiling took."""
        return self._about

    def forward(self, calls):
        """Seconds a call."""
        start = time.perf_counter()
        for _ in range(calls):
            self._forward(self._state[0], self._state[1], self._x).block_until_ready()
        return (time.perf_counter() - start) / calls

    def step(self, calls):
        """Seconds a call."""
        start = time.perf_counter()
        for _ in range(calls):
            self._state, value = self._step(self._state, self._x)
            value.block_until_ready()
        return (time.perf_counter() - start) / calls


class Torch:
    """The same tower in PyTorch: timm's, or transformers'."""

    def __init__(self, tower, batch_size, dtype, compiled):
        """Builds it, with random weights."""
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = getattr(torch, dtype)
        self._is_text = tower in TEXTS
        x = peers.inputs(tower, batch_size)
        self._x = torch.from_numpy(
            x if self._is_text else x.transpose(0, 3, 1, 2).copy()
        )
        self._x = self._x.to(self._device)
        self._model = self._make(tower).to(self._device)
        self._run = torch.compile(self._features) if compiled else self._features
        self._optimizer = torch.optim.AdamW(self._model.parameters(), LEARNING_RATE)

    def _make(self, tower):
        if tower == "bert":
            return peers.bert_model()
        if tower == "transformer":
            return peers.clip_text_model()
        return peers.timm_model(tower)

    def _features(self, x):
        import torch

        half = self._dtype != torch.float32
        with torch.autocast(self._device, self._dtype, enabled=half):
            if not self._is_text:
                return self._model(x)
            out = self._model(input_ids=x)
            pooled = getattr(out, "pooler_output", None)
            return out.last_hidden_state[:, 0] if pooled is None else pooled

    def about(self):
        """How many parameters it has."""
        return {"parameters": sum(p.numel() for p in self._model.parameters())}

    def _wait(self):
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()

    def forward(self, calls):
        """Seconds a call."""
        import torch

        self._model.eval()
        with torch.no_grad():
            self._wait()
            start = time.perf_counter()
            for _ in range(calls):
                self._run(self._x)
            self._wait()
        return (time.perf_counter() - start) / calls

    def step(self, calls):
        """Seconds a call."""
        self._model.train()
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            self._optimizer.zero_grad(set_to_none=True)
            (self._run(self._x).float() ** 2).mean().backward()
            self._optimizer.step()
        self._wait()
        return (time.perf_counter() - start) / calls


def measure(options):
    """Every tower; returns what goes to JSON."""
    machine, towers, about = harness.machine(), {}, {}
    for tower in options.towers:
        say(tower)
        shape = (tower, options.batch_size, options.dtype)
        workers = {"unicl_jax": Worker(Ours, *shape)}
        if options.peer:
            workers["torch"] = Worker(Torch, *shape, options.compiled)
        found = {name: worker.ask("about") for name, worker in workers.items()}
        about = {k: found["unicl_jax"].pop(k) for k in ("backend", "device_kind")}
        for part in ("forward", "step"):
            _time(part, workers, found, options.repeats)
        for name, worker in workers.items():
            found[name]["peak_bytes"] = worker.ask("rss_peak")
            worker.close()
        towers[tower] = found
    return {
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.towers"),
        "machine": machine | about,
        "versions": harness.versions(),
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "compiled": options.compiled,
        "repeats": options.repeats,
        "towers": towers,
    }


def _time(part, workers, found, repeats):
    calls, samples = {}, {name: [] for name in workers}
    for name, worker in workers.items():
        worker.ask(part, 1)  # the first call makes what later ones have
        seconds = worker.ask(part, 1)
        calls[name] = max(1, min(50, math.ceil(MIN_SAMPLE_SECONDS / seconds)))
    for turn in range(repeats):
        for name in list(workers) if turn % 2 == 0 else list(workers)[::-1]:
            samples[name].append(workers[name].ask(part, calls[name]))
    for name, values in samples.items():
        found[name][part] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }


def rows_of(found):
    """The table of one JSON file as rows of text."""
    header = ["tower", "parameters", "GFLOP", "forward/s", "step/s", "compiling", "MiB"]
    rows = [header]
    for tower, sides in found["towers"].items():
        ours, peer = sides["unicl_jax"], sides.get("torch")

        def rate(part, ours=ours, peer=peer):
            per_second = found["batch_size"] / ours[part]["median"]
            if peer is None:
                return f"{per_second:,.1f}"
            ratio = peer[part]["median"] / ours[part]["median"]
            return f"{per_second:,.1f} ({ratio:.2f} x)"

        memory = f"{ours['peak_bytes'] / MIB:,.0f}"
        if peer is not None:
            memory += f" ({peer['peak_bytes'] / MIB:,.0f})"
        rows.append(
            [
                tower,
                f"{ours['parameters'] / 1e6:,.1f} M",
                f"{ours['forward_flops'] / 1e9:,.1f}",
                rate("forward"),
                rate("step"),
                f"{ours['compile_step']:.0f} s",
                memory,
            ]
        )
    return rows


def title(found):
    """One line: what was measured, on what."""
    machine = found["machine"]
    where = harness.where(machine)
    peer = "compiled PyTorch" if found["compiled"] else "PyTorch"
    return (
        f"batch {found['batch_size']}, {found['dtype']}; {where}: images or "
        f"texts a second, and how many times {peer}'s"
    )


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = (*peers.TIMM, *TEXTS)
    parser.add_argument(
        "--towers", type=lambda text: text.split(","), default=list(names)
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action="store_true", help="torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    options = parser.parse_args(argv)
    if wrong := [tower for tower in options.towers if tower not in names]:
        parser.error(f"--towers must be some of {', '.join(names)}: got {wrong}")
    return options


def main(argv):
    """Measures, prints a table and writes JSON; or prints what was measured before."""
    harness.report("towers", _options(argv), measure, title, rows_of)


if __name__ == "__main__":
    restart_with_huge_pages("benchmarks.towers")
    main(sys.argv[1:])
