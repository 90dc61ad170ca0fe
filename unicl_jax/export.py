"""Writes a model's weights in others' layouts, reads them again and compares.

python -m unicl_jax.export --from=runs/quickstart --to=model.safetensors
python -m unicl_jax.export --from=model.safetensors --to=swin.safetensors \
  --format=timm_swin
python -m unicl_jax.export --from=runs/swin_tiny --to=swin.pth --format=mmdet_swin

Both models are run on the same random images and texts; the largest difference between
their features is printed; for a layout of a detection framework, how that loads it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from unicl_jax import model
from unicl_jax.encoders import weights
from unicl_jax.encoders.weights import Weights
from unicl_jax.encoders.weights.detection_configs import files_beside, how_to_load
from unicl_jax.encoders.weights.files import write_arrays
from unicl_jax.errors import InputError, choose

# Of a `model` section, what says how to train and not what the model is.
OF_TRAINING = ("dtype", "logit_scale_init")


class Exported(NamedTuple):
    """What there is to say of a file that was written.

    Attributes:
      difference: the largest between the features of the model and those of what
        `model.load` makes of the file.
      untold: options that other readers must be told, for the arrays' names and shapes
        don't.
      how: lines that load it into a detection framework; "" where none reads it.
    """

    difference: float
    untold: dict[str, Any]
    how: str


def export(source: str | Path, to: str | Path, layout: str = "unicl") -> Exported:
    """Writes a model's weights, and compares what it reads there with the model.

    Args:
      source: as for `model.load`.
      to: the file, `.safetensors`, `.npz` or `.pth`.
      layout: a key of `encoders.weights.LAYOUTS`; some hold one tower alone.

    Returns:
      What there is to say of the file.

    Raises:
      InputError: if the source is no model, the layout has no place for it, or the file
        cannot be written.
    """
    loaded = model.load(source)
    family = choose(weights.FITS, layout, "format")
    alone = set(family.towers) if len(family.towers) == 1 else set()
    left = {"image", "text", "embed_dim"} - alone if alone else set()
    config = {k: v for k, v in loaded.config.items() if k not in {*OF_TRAINING, *left}}
    if not alone and loaded.has_own_head:
        raise InputError(
            f'format "{layout}" has no place for the head that embeds the images of '
            'this run (its objective is "uniclip"); write the image tower alone.'
        )
    if "text" in config:  # which a reader would guess from the tower's kind
        config = {"tokenizer": "clip", **config}
    params, state = jax.tree.map(np.asarray, (loaded.params, loaded.state))
    whole = Weights(loaded.config, params, state)
    beside = files_beside(layout, loaded.config, to)
    arrays, untold = weights.to_arrays(whole, layout), weights.untold(whole, layout)
    for name, value in untold.items():  # defaults, too: a reader would guess others
        tower, option = name.split(".")
        config[tower] = {**config[tower], option: value}
    for path in beside:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(to, arrays, {weights.ABOUT: json.dumps(config), "format": "pt"})
    for path, text in beside.items():
        path.write_text(text)
    if alone:  # the tower of a model of both, by itself
        params, state = ({k: tree[k] for k in alone} for tree in (params, state))
    # In float32, as the file is read: a bfloat16 run's rounding is no difference of it.
    compared = model.Model(Weights(config, params, state))
    told = config if Path(to).suffix == ".pth" else {}  # which has no place for it
    return Exported(
        _difference(compared, model.load(to, **told)),
        untold,
        how_to_load(layout, loaded.config, to),
    )


def _difference(one, other):
    """The largest of two models' raw features, over random images and texts."""
    rng = np.random.default_rng(0)
    size, text = one.image_size, one.config.get("text")
    features = []
    if size is not None:
        images = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
        features.append([m.encode_image(images, normalize=False) for m in (one, other)])
    if text is not None:
        shape = (4, text["context_length"])
        tokens = rng.integers(1, text["vocab_size"] - 2, shape, dtype=np.int32)
        tokens[:, -1] = text["vocab_size"] - 1  # ends them
        features.append([m.encode_text(tokens, normalize=False) for m in (one, other)])
    return max(float(np.abs(a - b).max()) for a, b in features)


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: what follows the module's name.

    Returns:
      The exit code: 0; 2 for wrong input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m unicl_jax.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="workdir, weights file, or a tower's name for random weights",
    )
    parser.add_argument("--to", required=True, help=".safetensors, .npz or .pth")
    parser.add_argument("--format", default="unicl", choices=tuple(weights.LAYOUTS))
    options = parser.parse_args(argv)
    try:
        difference, untold, how = export(options.source, options.to, options.format)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    megabytes = Path(options.to).stat().st_size / 1e6
    print(
        f"{options.to}: {megabytes:.1f} MB, {options.format}; read again, the largest "
        f"difference is {difference:.2g}"
    )
    if model.is_random(options.source):
        print(f"Random weights: {options.source} is a name, no file or workdir")
    if untold:
        print(
            "The arrays don't say, and other readers must be told: "
            + ", ".join(f"{name}={value}" for name, value in untold.items())
        )
    if how:
        print(f"To load it:\n\n{how}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
