"""What the text tower costs by `data.text_length`, on real captions and prompts.

python -m benchmarks.text_length
python -m benchmarks.text_length --corpora=emoji,clipart:clipart.txt --batch_sizes=64
python -m benchmarks.text_length --markdown

The tower takes each corpus's batches in all slots, cut, and packed, in turns.
`benchmarks/README.md` says what is compared.
"""

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.harness import Worker, say
from unicl_jax import data
from unicl_jax.data.quickstart import emoji_captions
from unicl_jax.data.text_length import TEXT_LENGTHS, longest
from unicl_jax.host_memory import restart_with_huge_pages

LENGTH = 77
SHAPED = 50  # batches whose shapes are counted; a few of them are timed


def emoji():
    """Captions of the quick start's pictures."""
    return sorted({text for texts in emoji_captions() for text in texts})


def prompts():
    """A prompt for each of ImageNet's classes, from the 80 templates in turn."""
    templates = data.load_templates("clip_imagenet_80")
    names = Path(data.__file__).parent / "class_names" / "imagenet.txt"
    return [
        templates[i % len(templates)].replace("{}", name)
        for i, name in enumerate(names.read_text().splitlines())
    ]


CORPORA = {"emoji": emoji, "prompts": prompts}


def batches(texts, batch_size, count):
    """Tokens of `count` batches, drawn as training draws: each text once an epoch."""
    tokens = data.Tokenizer(LENGTH)(texts)
    rng = np.random.default_rng(0)
    epochs = -(-count * batch_size // len(tokens))
    order = np.concatenate([rng.permutation(len(tokens)) for _ in range(epochs)])
    return [tokens[order[i * batch_size :][:batch_size]] for i in range(count)]


def fitted(way, tokens):
    """The tokens in that way's shape."""
    prepared = way.prepare(tokens, 1)
    return way.fit(prepared, way.size(prepared))


class Tower:
    """Gradients of the method's text tower, compiled for each shape it meets."""

    def __init__(self, dtype):
        """Makes the parameters."""
        import jax

        from unicl_jax import encoders

        encoder = encoders.transformer(dtype=encoders.DTYPES[dtype])
        self._params, _ = jax.jit(encoder.init)(jax.random.key(0))
        self._given = {}

        def loss(params, tokens):
            features, _ = encoder.apply(params, {}, tokens, train=True)
            return (features**2).mean()

        self._gradients = jax.jit(jax.grad(loss))
        self._about = {
            "backend": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
        }

    def about(self):
        """The device."""
        return self._about

    def give(self, name, tokens):
        """Takes batches, and compiles for them."""
        import jax

        self._given = self._given | {name: jax.device_put(tokens)}
        for each in self._given[name]:
            jax.block_until_ready(self._gradients(self._params, each))

    def step(self, name):
        """Seconds for one of those batches, on the average."""
        import jax

        start = time.perf_counter()
        for each in self._given[name]:
            jax.block_until_ready(self._gradients(self._params, each))
        return (time.perf_counter() - start) / len(self._given[name])


def measure(options):
    """Every corpus, batch size and way; returns what goes to JSON."""
    machine, corpora = harness.machine(), {}
    tower = Worker(Tower, options.dtype)
    for name, texts in options.corpora.items():
        lengths = (data.Tokenizer(LENGTH)(texts).argmax(1) + 1).tolist()
        corpora[name] = {
            "texts": len(texts),
            "ids_mean": statistics.mean(lengths),
            "ids_longest": max(lengths),
            "batches": {},
        }
        for batch_size in options.batch_sizes:
            say(f"{name}, batches of {batch_size}")
            drawn = batches(texts, batch_size, SHAPED)
            ways = {}
            for key, way in TEXT_LENGTHS.items():
                start = time.perf_counter()
                short = [fitted(way, tokens) for tokens in drawn]
                ways[key] = {
                    "host_seconds": (time.perf_counter() - start) / SHAPED,
                    "slots": statistics.mean(_slots(x) for x in short) / batch_size,
                    "shapes": len({_shape(x) for x in short}),
                }
                tower.ask("give", key, short[: options.timed])
            samples = {key: [] for key in ways}
            for _ in range(options.repeats):
                for key in ways:
                    samples[key].append(tower.ask("step", key))
            for key, values in samples.items():
                ways[key]["step_seconds"] = {
                    "median": statistics.median(values),
                    "min": min(values),
                    "max": max(values),
                }
            corpora[name]["batches"][batch_size] = {
                "longest_mean": statistics.mean(map(longest, drawn)),
                "ways": ways,
            }
    about = tower.ask("about")
    tower.close()
    return {
        "date": datetime.date.today().isoformat(),
        "command": harness.command("benchmarks.text_length"),
        "machine": machine | about,
        "versions": harness.versions(),
        "dtype": options.dtype,
        "repeats": options.repeats,
        "timed": options.timed,
        "corpora": corpora,
    }


def _shape(texts):
    return np.shape(texts if isinstance(texts, np.ndarray) else texts.tokens)


def _slots(texts):
    return int(np.prod(_shape(texts)))


def rows_of(found):
    """The table of one JSON file as rows of text."""
    rows = [["texts", "ids", "batch", "way", "slots", "shapes", "host", "texts/s", ""]]
    for name, corpus in found["corpora"].items():
        for batch_size, measured in corpus["batches"].items():
            full = measured["ways"]["full"]["step_seconds"]["median"]
            for key, way in measured["ways"].items():
                seconds = way["step_seconds"]["median"]
                rows.append(
                    [
                        name,
                        f"{corpus['ids_mean']:.1f}",
                        str(batch_size),
                        key,
                        f"{way['slots']:.1f}",
                        str(way["shapes"]),
                        f"{1e3 * way['host_seconds']:.1f} ms",
                        f"{int(batch_size) / seconds:,.1f}",
                        f"{full / seconds:.2f} x",
                    ]
                )
    return rows


def title(found):
    """One line: what was measured, on what."""
    machine = found["machine"]
    where = harness.where(machine)
    return f"12 x 512 causal tower, {found['dtype']}, gradients; {where}"


def _corpus(text):
    name, _, file = text.partition(":")
    if file:
        return name, Path(file).read_text().splitlines()
    if name not in CORPORA:
        raise argparse.ArgumentTypeError(
            f"must be {', '.join(CORPORA)} or name:file of texts, one a line: {text}"
        )
    return name, CORPORA[name]()


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corpora",
        type=lambda text: dict(map(_corpus, text.split(","))),
        default=",".join(CORPORA),
        help=f"of {', '.join(CORPORA)}, and name:file of texts, one a line",
    )
    parser.add_argument(
        "--batch_sizes",
        type=lambda text: [int(x) for x in text.split(",")],
        default="64",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--timed", type=int, default=3, help="batches a sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
    parser.add_argument("--markdown", action="store_true", help="print all results")
    return parser.parse_args(argv)


def main(argv):
    """Measures, prints a table and writes JSON; or prints what was measured before."""
    harness.report("text_length", _options(argv), measure, title, rows_of)


if __name__ == "__main__":
    restart_with_huge_pages("benchmarks.text_length")
    main(sys.argv[1:])
