"""Holds every tower at full size against another's implementation of it.

python -m benchmarks.parity
python -m benchmarks.parity --towers=swin_tiny,bert --precision=float64
python -m benchmarks.parity --markdown

The peer's random weights come to ours as a file's would, and both run on the same
inputs. `benchmarks/README.md` says what is compared.
"""

import argparse
import datetime
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from benchmarks import harness, peers
from benchmarks.harness import Worker, say
from unicl_jax.encoders import weights

PRECISIONS = ("float64", "float32")
TOWERS = (*peers.TIMM, *peers.TEXTS)
# An array of gradients this much smaller than the largest is 0 but for round-off, as
# those of biases of attention's keys.
ROUND_OFF = 1e-12


class Pair:
    """A tower of ours with the weights of its peer, and both on the same inputs."""

    def __init__(self, tower, images):
        """Makes the peer, and reads its weights."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what others warn about while imported
            import torch

            self._peer = peers.make(tower)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._tower, self._x = tower, peers.inputs(tower, images)
        if tower in peers.TEXTS:
            self._x = shortened(self._x, 0 if tower == "bert" else None)
        else:
            self._x = blotched(self._x)
        arrays = {k: v.numpy().copy() for k, v in self._peer.model.state_dict().items()}
        self._names = {name: array.shape for name, array in arrays.items()}
        self._params, self._state, self.layout = self._read(arrays)

    def _read(self, arrays):
        """(params, state, layout's name), of weights or of gradients."""
        file = self._peer.file(arrays)
        part = "text" if self._tower in peers.TEXTS else "image"
        found = weights.from_arrays(file)
        check_told(self._tower, {part: found.model[part]})
        return found.params[part], found.state[part], weights.layout_of(file).name

    def about(self):
        """What it is held against, and how large it is."""
        import jax

        return {
            "peer": self._peer.of,
            "layout": self.layout,
            "parameters": sum(x.size for x in jax.tree.leaves(self._params)),
            "forward_flops": peers.forward_flops(
                self._compiled("float32", gradients=False), len(self._x)
            ),
            "backend": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
        }

    def compare(self, precision, gradients=False):
        """Errors of features, and of gradients, relative to the largest number."""
        want, want_grads = self._theirs(precision, gradients)
        got, got_grads = self._ours(precision, gradients)
        found = {"features": relative_error(got, want)}
        if gradients:
            found["gradients"] = gradient_error(got_grads, want_grads)
        return found

    def rounding(self):
        """How far float32 takes either side from the peer's float64 features."""
        exact, _ = self._theirs("float64")
        return {
            side: relative_error(run("float32")[0], exact)
            for side, run in (("unicl_jax", self._ours), ("torch", self._theirs))
        }

    def _compiled(self, precision, gradients):
        """(params, state, x) -> features and gradients of their weighted sum."""
        import jax

        tower = peers.ours(self._tower)(dtype=np.dtype(precision))
        weight = weighting(len(self._x), tower.width).astype(precision)

        def run(params, state, x):
            if not gradients:
                return tower.apply(params, state, x)[0], None
            features, back = jax.vjp(lambda p: tower.apply(p, state, x)[0], params)
            return features, back(weight)[0]

        with jax.enable_x64(precision == "float64"):
            return jax.jit(run).lower(*self._arguments(precision)).compile()

    def _arguments(self, precision):
        import jax

        x = self._x.astype("int32" if self._tower in peers.TEXTS else precision)
        params, state = jax.tree.map(
            lambda a: a.astype(precision), (self._params, self._state)
        )
        return params, state, x

    def _ours(self, precision, gradients=False):
        import jax

        # On a GPU float32 products would be TF32.
        with (
            jax.enable_x64(precision == "float64"),
            jax.default_matmul_precision("highest"),
        ):
            run = self._compiled(precision, gradients)
            return jax.tree.map(np.asarray, run(*self._arguments(precision)))

    def _theirs(self, precision, gradients=False):
        import torch

        model, dtype = self._peer.model, getattr(torch, precision)
        model.to(dtype).eval()  # the weights are float32 numbers: nothing is lost
        if self._tower in peers.TEXTS:
            x = torch.from_numpy(self._x)
        else:
            x = torch.from_numpy(self._x.transpose(0, 3, 1, 2).copy()).to(dtype)
        with torch.set_grad_enabled(gradients):
            features = self._peer.features(x)
        if not gradients:
            return features.numpy(), None
        weight = torch.from_numpy(weighting(*features.shape)).to(dtype)
        model.zero_grad()
        (features * weight).sum().backward()
        grads = {
            name: np.zeros(shape, precision) for name, shape in self._names.items()
        }
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grads[name] = parameter.grad.numpy()
        return features.detach().numpy(), self._read(grads)[0]


def check_told(tower, found):
    """The reader saw shapes alone, and must have told from them which tower it is."""
    want = {part: peers.section(tower) for part in found}
    if wrong := weights.different_options(found, want):
        raise ValueError(
            f"the weights of {tower} must be read as such: (option, as read, its own) "
            f"differ in {wrong}."
        )


def shortened(tokens, padding):
    """Every other text ends at a quarter of its slots; None: its end's id pads it."""
    tokens, quarter = tokens.copy(), tokens.shape[1] // 4
    ends = tokens[1::2, -1:].copy()
    tokens[1::2, quarter:] = ends if padding is None else padding
    return tokens


def blotched(images):
    """Noise with blotches: the mean over places makes noise alone look all the same."""
    batch, height, width, _ = images.shape
    blotches = np.random.default_rng(2).normal(size=(batch, 7, 7, 3))
    blotches = blotches.repeat(height // 7, 1).repeat(width // 7, 2)
    return (images / 2 + blotches).astype(images.dtype)


def weighting(*shape):
    """Of the features, in the sum whose gradients are compared."""
    return np.random.default_rng(1).normal(size=shape)


def relative_error(got, want):
    """The largest difference over the largest number."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def gradient_error(got, want):
    """The largest difference in an array over that array's largest number, over all.

    Over the largest of all arrays where an array's own are round-off alone.
    """
    import jax

    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))

    def error(got, want):
        own = np.abs(want).max()
        scale = own if own > ROUND_OFF * largest else largest
        return np.abs(got - want).max() / scale

    return float(max(jax.tree.leaves(jax.tree.map(error, got, want))))


def measure(options):
    """Every tower, each in a process of its own; returns what goes to JSON."""
    towers, device = {}, {}
    for tower in options.towers:
        say(tower)
        start = time.perf_counter()
        worker = Worker(Pair, tower, options.images)
        found = worker.ask("about")
        device = {key: found.pop(key) for key in ("backend", "device_kind")}
        for precision in options.precision:
            gradients = options.gradients and precision == "float64"
            found[precision] = worker.ask("compare", precision, gradients)
        if "float32" in options.precision:
            found["float32"]["to_float64"] = worker.ask("rounding")
        found["peak_bytes"] = worker.ask("rss_peak")
        worker.close()
        found["seconds"] = round(time.perf_counter() - start, 1)
        towers[tower] = found
    return {
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.parity"),
        "machine": {
            "cpu": harness.cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            **device,
        },
        "versions": harness.versions(),
        "images": options.images,
        "towers": towers,
    }


def cells(found):
    """What the tables say of a tower: column -> text."""

    def error(precision, what):
        value = found.get(precision, {}).get(what)
        return "" if value is None else f"{value:.0e}"

    return {
        "parameters": f"{found['parameters']:,}",
        "GFLOP": f"{found['forward_flops'] / 1e9:.1f}",
        "float64": error("float64", "features"),
        "float32": error("float32", "features"),
        "gradients": error("float64", "gradients"),
    }


def rows_of(found):
    """The table of one JSON file as rows of text."""
    rows = []
    for tower, each in found["towers"].items():
        texts = cells(each) | {"peer": each["peer"], "layout": each["layout"]}
        rows.append([tower, *texts.values()])
    return [["tower", *texts], *rows]


def title(found):
    """One line: what was measured, on what."""
    machine = found["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    if machine["backend"] != "cpu":
        where = machine["device_kind"]
    return (
        f"largest difference over the largest number, {found['images']} images of "
        f"{peers.SIZE} px or texts of {peers.LENGTH} slots; {where}"
    )


def _options(argv):
    def names(text):
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--towers", type=names, default=list(TOWERS))
    parser.add_argument("--precision", type=names, default=list(PRECISIONS))
    parser.add_argument("--images", type=int, default=2, help="or texts")
    parser.add_argument(
        "--gradients", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    options = parser.parse_args(argv)
    for name, all_ in (("towers", TOWERS), ("precision", PRECISIONS)):
        if wrong := [x for x in getattr(options, name) if x not in all_]:
            parser.error(f"--{name} must be some of {', '.join(all_)}: got {wrong}")
    return options


def main(argv):
    """Compares, prints a table and writes JSON; or prints what was found before."""
    harness.report("parity", _options(argv), measure, title, rows_of)


if __name__ == "__main__":
    main(sys.argv[1:])
