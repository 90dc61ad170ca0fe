"""A run of seconds for tests: a small Swin and a text transformer, both kinds of data.

As a program, `python tiny_run.py FOLDER`, it writes its data and recipe there.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from unicl_jax.workdir import saved_steps

SIZE = 16
TIMES = ("step_seconds", "data_wait", "images_per_second")

RECIPE = """
from unicl_jax import config as config_lib

def get_config():
    c = config_lib.default()
    c.batch_size, c.total_steps = 8, 6
    c.model.image.name = "swin"
    c.model.image.image_size = {size}
    c.model.image.patch_size = 4
    c.model.image.window_size = 2
    c.model.image.embed_dim = 8
    c.model.image.depths = (1,)
    c.model.image.num_heads = (1,)
    c.model.image.drop_path = 0.1
    c.model.text.name = "transformer"
    c.model.text.vocab_size = 600
    c.model.text.context_length = 12
    c.model.text.width = 16
    c.model.text.num_heads = 1
    c.model.text.num_layers = 1
    c.model.embed_dim = 8
    for name, kind in (("labelled", "image_label"), ("captioned", "image_text")):
        path = "{folder}/" + name + ".npz"
        c.data.sources[name] = dict(format="npz", path=path, kind=kind)
    c.data.templates = "short"
    c.augment.shift, c.augment.color = 1, 0.2
    c.optimizer.warmup_steps = 2
    held_out = "{folder}/labelled.npz"
    c.evaluations.held_out = dict(format="npz", path=held_out, templates="short")
    c.evaluate_every_steps = c.checkpoint_every_steps = 3
    c.log_every_steps = 1
    return c
"""


def write(folder):
    """Writes `labelled.npz`, `captioned.npz` and `recipe.py`; the folder's path."""
    rng, folder = np.random.default_rng(0), Path(folder)
    images = rng.integers(0, 250, (24, SIZE, SIZE, 3), dtype=np.uint8)
    names = ["red", "green", "blue"]
    labels = np.arange(24) % 3
    np.savez(folder / "labelled.npz", images=images, labels=labels, class_names=names)
    texts = [f"a {names[i % 3]} square, number {i}" for i in range(24)]
    np.savez(folder / "captioned.npz", images=images[::-1], texts=texts)
    (folder / "recipe.py").write_text(RECIPE.format(folder=folder, size=SIZE))
    return folder


def config(folder, **changes):
    """The recipe's config; changes by path, `optimizer__learning_rate=1.0`."""
    scope = {}
    exec((folder / "recipe.py").read_text(), scope)
    made = scope["get_config"]()
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        section = made
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return made


def rows(workdir, file="metrics.jsonl"):
    """The lines of a file, without what the clock says."""
    lines = (workdir / file).read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines
    ]


def saved(workdir, step=None):
    """The arrays of a checkpoint, the newest unless told, as {path: array}."""
    import orbax.checkpoint as ocp

    step = max(saved_steps(workdir)) if step is None else step
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype),
            checkpointer.metadata(path).item_metadata.tree,
        )
        tree = checkpointer.restore(path, like)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


if __name__ == "__main__":
    write(sys.argv[1])
