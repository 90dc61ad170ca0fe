"""The shapes of a batch before there is data: what a config says, and assumptions."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from unicl_jax import encoders, sharding
from unicl_jax.data.text_length import BUCKET, PACK_SLOTS, few_sizes
from unicl_jax.encoders import Packed
from unicl_jax.errors import InputError
from unicl_jax.objectives import OBJECTIVES

# Ids of a text, its start and end included, and free slots of packed rows: measured on
# ImageNet's names in CLIP's templates, and on titles and keywords of 8,118 drawings;
# the table of `data.text_length` in docs/models.md. Captions of the web are shorter.
PROMPT_SLOTS, CAPTION_SLOTS = 10.0, 21.0
LONGEST_PROMPT = 32  # of a batch of thousands: what "bucket" cuts to
CONCEPTS = 1000  # of the concept table, ImageNet-1K's


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
      arrays: shapes and dtypes, each with its sharding.
      slots: token slots that the text tower computes, over all devices.
      texts: how many it encodes.
      assumed: what the config does not say, a line each.
    """

    arrays: dict[str, Any]
    slots: int
    texts: int
    assumed: list[str]


def uses_text(config: Mapping) -> bool:
    """Whether the objective looks at the text tower."""
    return "text" not in OBJECTIVES[config["objective"]].unused


def mean_slots(config: Mapping) -> float:
    """Slots that a text takes in a packed row, by the kinds of the sources."""
    sources = config["data"]["sources"].values()
    weights = {"image_label": 0.0, "image_text": 0.0}
    for source in sources:
        by_weight = config["data"]["mixture"] == "weights"
        weights[source["kind"]] += source.get("weight", 1.0) if by_weight else 1.0
    if config["data"]["mixture"] != "weights":  # halves, where there are both kinds
        weights = {kind: float(w > 0) for kind, w in weights.items()}
    total = sum(weights.values())
    return (
        PROMPT_SLOTS * weights["image_label"] + CAPTION_SLOTS * weights["image_text"]
    ) / total


def make_batch(
    config: Mapping, mesh: Mesh | AbstractMesh, text_slots: float | None = None
) -> Batch:
    """The batch that `train.run` gives its step, as shapes.

    Args:
      config: the resolved config.
      mesh: the devices, which need not be there.
      text_slots: that a text takes, on average; None: an assumption by its kind.

    Returns:
      The batch.

    Raises:
      InputError: if `text_slots` is none that a text could take.
    """
    sizes = dict(mesh.shape)
    devices = math.prod(sizes[axis] for axis in sharding.batch_axes(mesh))
    size, rows = config["batch_size"], sharding.over_batch(mesh)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    model = config["model"]
    side = config["data"]["image_size"] or model["image"]["image_size"]
    arrays = dict(image=array(size, side, side, 3, dtype=jnp.uint8), label=array(size))
    kinds = {source["kind"] for source in config["data"]["sources"].values()}
    if "image_text" in kinds:
        arrays["caption"] = array(size, 2)
    if config["data"]["share_prompts"]:
        arrays["text_index"] = array(size)
    length = encoders.options("text", model["text"])["context_length"]
    if text_slots is not None and not 2 <= text_slots <= length:
        raise InputError(
            f"--text_slots must be from 2 to context_length, {length}: got "
            f"{text_slots:g}; it is what a text takes on average."
        )
    how = config["data"]["text_length"] if uses_text(config) else "full"
    groups = devices * config["micro_batches"]
    arrays["tokens"], slots, assumed = _TOKENS[how](
        array, config, size, groups, length, text_slots
    )
    if config["data"]["share_prompts"] and uses_text(config):
        assumed.append(
            "data.share_prompts: every text of a batch counted as another one"
        )
    return Batch(arrays, slots, size, assumed)


def _full(array, config, texts, groups, length, text_slots):
    del config, groups, text_slots
    return array(texts, length), texts * length, []


def _bucket(array, config, texts, groups, length, text_slots):
    del groups
    kinds = {source["kind"] for source in config["data"]["sources"].values()}
    longest = length if "image_text" in kinds else LONGEST_PROMPT
    longest = text_slots or longest
    slots = min(length, math.ceil(longest / BUCKET) * BUCKET)
    said = f'data.text_length="bucket": the longest text of a batch takes {slots} slots'
    return array(texts, slots), texts * slots, [said]


def _pack(array, config, texts, groups, length, text_slots):
    mean, width = text_slots or mean_slots(config), max(PACK_SLOTS, length)
    rows = few_sizes(math.ceil(texts // groups * mean / width))
    tokens = array(groups * rows, width)
    said = (
        f'data.text_length="pack": {mean:g} slots a text on average, {rows} rows of '
        f"{width} a device and micro-batch"
    )
    if text_slots is None:
        said += " (--text_slots sets it)"
    ends = array(groups, texts // groups)
    packed = Packed(tokens, tokens, tokens, ends)
    return packed, groups * rows * width, [said]


_TOKENS = {"full": _full, "bucket": _bucket, "pack": _pack}
