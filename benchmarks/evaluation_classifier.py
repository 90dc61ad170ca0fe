"""ImageNet's zero-shot classifier: texts packed, beside texts in 77 slots each.

python -m benchmarks.evaluation classifier
python -m benchmarks.evaluation classifier --every=1 --texts=256

The paper's text tower (12 layers, width 512, 8 heads), random weights, float32; names
and templates are ImageNet's 1,000 and CLIP's 80. `--every=N` takes every Nth class
for ours; the others, whose every text costs the same, are timed on a batch of `--texts`
prompts. All take turns.
"""

import os
import statistics
import time

import numpy as np

from benchmarks import harness
from benchmarks.harness import Worker, say
from benchmarks.text_length import LENGTH

WIDTH, HEADS, LAYERS, VOCAB = 512, 8, 12, 49408


def add_options(parser):
    """The options of this part."""
    parser.add_argument("--every", type=int, default=32, help="1: all 1,000 classes")
    parser.add_argument("--texts", type=int, default=128, help="of a padded batch")
    parser.add_argument("--repeats", type=int, default=3)


def names_and_templates(every):
    """Every so many of the class names, and the templates."""
    from importlib import resources

    from unicl_jax.data import load_templates

    path = resources.files("unicl_jax.data") / "class_names" / "imagenet.txt"
    names = path.read_text(encoding="utf-8").splitlines()[::every]
    return names, load_templates("clip_imagenet_80")


def some_prompts(texts):
    """Tokens of a batch, of classes and templates all over."""
    from unicl_jax.data import Tokenizer

    names, templates = names_and_templates(1)
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(names) * len(templates), texts, replace=False)
    count = len(templates)
    given = [templates[i % count].replace("{}", names[i // count]) for i in drawn]
    return Tokenizer(LENGTH)(given)


class Ours:
    """Our tower, with prompts packed or in all slots."""

    def __init__(self):
        """Makes the parameters."""
        import jax

        from unicl_jax import encoders, sharding

        encoder = encoders.transformer()
        self._params, _ = jax.jit(encoder.init)(jax.random.key(0))
        self._mesh = sharding.make_mesh()
        rows, whole = sharding.over_batch(self._mesh), sharding.replicated(self._mesh)
        self._encode = jax.jit(
            lambda p, s, t: encoders.unit(encoder.apply(p, s, t)[0]),
            in_shardings=(None, None, rows),
            out_shardings=whole,
        )
        self._params = jax.device_put(self._params, whole)

    def about(self):
        """The device."""
        import jax

        return {
            "backend": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
        }

    def classes(self, every):
        """Seconds of class embeddings, from names on; texts, and slots they took."""
        import jax

        from unicl_jax.data import Tokenizer
        from unicl_jax.evaluation import classifier, texts

        tokenizer = Tokenizer(LENGTH)
        start = time.perf_counter()
        prompts = classifier.make_prompts(*names_and_templates(every), tokenizer)
        host = time.perf_counter() - start
        classifier.class_embeddings(
            self._encode, self._params, {}, prompts, self._mesh, {"causal": True}
        )
        seconds = time.perf_counter() - start
        groups = texts.groups_of(self._mesh)
        batches = texts.in_batches(prompts.tokens, {"causal": True}, groups)
        leaves = [np.shape(batch.tokens.tokens) for batch in batches]
        return {
            "seconds": seconds,
            "tokenize_seconds": host,
            "texts": len(prompts.tokens),
            "ids": int((prompts.tokens.argmax(1) + 1).sum()),
            "slots": int(sum(np.prod(shape) for shape in leaves)),
            "shapes": len(set(leaves)),
            "devices": len(jax.devices()),
        }

    def padded(self, count):
        """Seconds of a batch in all slots, and its features."""
        import jax

        tokens = some_prompts(count)
        start = time.perf_counter()
        found = jax.block_until_ready(self._encode(self._params, {}, tokens))
        return time.perf_counter() - start, np.asarray(found)

    def packed(self, count):
        """The features of those texts by `text_features`."""
        from unicl_jax.evaluation import texts

        return texts.text_features(
            self._encode,
            self._params,
            {},
            some_prompts(count),
            self._mesh,
            {"causal": True},
        )


class OpenClip:
    """open_clip's text tower of the same size."""

    def __init__(self):
        """Makes the parameters."""
        import torch
        from open_clip.transformer import TextTransformer

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch = torch
        self._tower = TextTransformer(
            context_length=LENGTH,
            vocab_size=VOCAB,
            width=WIDTH,
            heads=HEADS,
            layers=LAYERS,
            output_dim=WIDTH,
        ).eval()

    def padded(self, count):
        """Seconds of a batch in all slots."""
        torch = self._torch
        tokens = torch.from_numpy(some_prompts(count)).long()
        start = time.perf_counter()
        with torch.inference_mode():
            torch.nn.functional.normalize(self._tower(tokens), dim=-1)
        return time.perf_counter() - start, None


def measure(options):
    """All in turns."""
    machine = harness.machine()
    ours, peer = Worker(Ours), Worker(OpenClip)
    features = ours.ask("padded", options.texts)[1]
    apart = float(np.abs(features - ours.ask("packed", options.texts)).max())
    peer.ask("padded", options.texts)
    found = ours.ask("classes", options.every)
    say(
        f"first: {found['seconds']:.0f} s, with compilation; features {apart:.0e} apart"
    )
    first, per_text = found["seconds"], {}
    ways = {
        "unicl_jax": lambda: ours.ask("classes", options.every)["seconds"],
        "unicl_jax, 77 slots": lambda: ours.ask("padded", options.texts)[0],
        "open_clip, 77 slots": lambda: peer.ask("padded", options.texts)[0],
    }
    for _ in range(options.repeats):
        for name, run in ways.items():
            count = found["texts"] if name == "unicl_jax" else options.texts
            per_text.setdefault(name, []).append(run() / count)
            say(f"{name}: {1e3 * per_text[name][-1]:.2f} ms a text")
    about = ours.ask("about")
    ours.close(), peer.close()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": harness.command("benchmarks.evaluation"),
        "machine": machine | about,
        "versions": harness.versions(),
        "repeats": options.repeats,
        "padded_texts": options.texts,
        "packed": found | {"seconds": None, "first_seconds": first},
        "features_differ": apart,
        "seconds_per_text": {k: statistics.median(v) for k, v in per_text.items()},
        "samples": per_text,
    }


def rows_of(found):
    """A table: a header, and a row for each way."""
    rows = [["way", "slots a text", "ms a text", "80,000 texts, s", ""]]
    ours = found["seconds_per_text"]["unicl_jax"]
    packed = found["packed"]
    for name, seconds in found["seconds_per_text"].items():
        slots = packed["slots"] / packed["texts"] if name == "unicl_jax" else LENGTH
        rows.append(
            [
                name,
                f"{slots:.1f}",
                f"{1e3 * seconds:.2f}",
                f"{80_000 * seconds:,.0f}",
                f"{seconds / ours:.1f} x",
            ]
        )
    return rows


def title(found):
    """What the table is of."""
    return (
        f"{found['packed']['texts']:,} prompts of ImageNet, 12 x 512 text tower, "
        f"float32; {harness.where(found['machine'])}"
    )
