"""Learning rates of their own for parts of the model: by depth, and by name.

lr(parameter) = lr * multiplier of its part * decay^(layers behind it in its tower)

A tower with L blocks has layers 0 to L + 1: what makes tokens of its input is layer 0,
block i is layer i, what comes after the last block is layer L + 1. Projections, the
logit scale and an objective's own parameters stand behind both towers: nothing is
behind them.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from unicl_jax.errors import InputError

TOWERS = ("image", "text")
# By the first name inside a tower, of which every parameter's must fit one rule.
FIRST = re.compile(
    "patch_embed|absolute_pos_embed"  # Swin, FocalNets, ViT
    "|class_embedding|positional_embedding|ln_pre"  # ViT
    "|token_embedding|embeddings"  # the text transformer, BERT
    "|conv1|bn1"  # ResNet's stem
)
BLOCK = re.compile(
    r"layers_(\d+)_blocks_(\d+)"  # Swin, FocalNets: stage, block
    r"|layer(\d+)_(\d+)"  # ResNet: stage, block
    r"|resblocks_(\d+)"  # ViT, the text transformer
    r"|encoder_layer_(\d+)"  # BERT
)
HALVES = re.compile(r"layers_(\d+)_downsample")  # goes with its stage's last block
LAST = re.compile("norm|ln_post|ln_final")


def depths(tower: Mapping[str, Any], which: str = "image") -> dict[str, int]:
    """The layer of each of a tower's parameters.

    Args:
      tower: its parameters, by the first name of theirs.
      which: "image" or "text", for errors.

    Returns:
      By that name, 0 to L + 1.

    Raises:
      InputError: if no rule knows a name.

    Source: BEiT, arXiv 2106.08254, appendix H, and its release (embeddings are layer 0,
      the head and the norm before it layer L + 1); SimMIM's release for Swin, whose
      downsampling goes with the stage before it.
    """
    blocks = {}
    for name in tower:
        if found := BLOCK.fullmatch(name):
            blocks[name] = tuple(int(x) for x in found.groups() if x is not None)
    order = {name: i for i, name in enumerate(sorted(blocks, key=blocks.get), 1)}
    layers = dict(order)
    for name in tower:
        if name in layers:
            continue
        if found := HALVES.fullmatch(name):
            stage = int(found[1])
            layers[name] = max(
                order[block] for block, at in blocks.items() if at[0] == stage
            )
        elif FIRST.fullmatch(name):
            layers[name] = 0
        elif LAST.fullmatch(name):
            layers[name] = len(order) + 1
        else:
            raise InputError(
                "layer-wise learning rates need a layer for every parameter: there is "
                f'no rule for "{which}/{name}"; set optimizer.{which}_layer_decay to 1.'
            )
    return layers


def factors(params: Mapping[str, Any], config: Mapping) -> Any:
    """What each parameter's learning rate is multiplied by.

    Args:
      params: the model's, or those that learn, by part.
      config: `image_layer_decay` and `text_layer_decay`, in (0, 1]; `multipliers`, by
        part. What is missing is 1.

    Returns:
      The same tree, of floats.

    Raises:
      InputError: as `depths`.
    """
    found = {}
    for part, tree in params.items():
        factor = dict(config.get("multipliers", {})).get(part, 1.0)
        decay = config.get(f"{part}_layer_decay", 1.0) if part in TOWERS else 1.0
        if decay == 1:
            found[part] = jax.tree.map(lambda _, factor=factor: factor, tree)
            continue
        layers = depths(tree, part)
        last = max(layers.values())
        found[part] = {
            name: jax.tree.map(
                lambda _, f=factor * decay ** (last - layers[name]): f, below
            )
            for name, below in tree.items()
        }
    return found


def is_on(config: Mapping) -> bool:
    """Whether any parameter's learning rate is another than the schedule's."""
    decays = (config.get(f"{tower}_layer_decay", 1.0) for tower in TOWERS)
    values = dict(config.get("multipliers", {})).values()
    return any(x != 1 for x in (*decays, *values))


def scale_by_factors(config: Mapping) -> optax.GradientTransformation:
    """Multiplies finished updates, weight decay's share included.

    Args:
      config: as for `factors`.

    Returns:
      The transformation, to come last; it has no state.
    """

    def scale(updates, params):
        del params
        return jax.tree.map(lambda u, f: u * f, updates, factors(updates, config))

    return optax.stateless(scale)


def check(
    config: Mapping, parts: tuple[str, ...], frozen: tuple[str, ...] = ()
) -> None:
    """Refuses factors that could not be meant.

    Args:
      config: the `optimizer` section.
      parts: of the model, by name, which may have a multiplier.
      frozen: those that don't learn.

    Raises:
      InputError: naming the field, what it must hold, what it holds.
    """
    for tower in TOWERS:
        decay = config[f"{tower}_layer_decay"]
        if type(decay) not in (int, float) or not 0 < decay <= 1:
            raise InputError(
                f"optimizer.{tower}_layer_decay must be in (0, 1], 1 for off: got "
                f"{decay}; BEiT's is 0.65 to 0.9."
            )
        if decay != 1 and tower in frozen:
            raise InputError(
                f"optimizer.{tower}_layer_decay must be 1 for a frozen tower, which "
                f"does not learn: got {decay}; leave one of them out."
            )
    for part, factor in config["multipliers"].items():
        if part in frozen:
            raise InputError(
                f"optimizer.multipliers must name parts that learn: {part} is frozen; "
                "leave it out of one of them."
            )
        if part not in parts:
            raise InputError(
                f"optimizer.multipliers must name parts of the model: got {part}; "
                f"choose from {', '.join(parts)}."
            )
        if type(factor) not in (int, float) or not factor > 0:
            raise InputError(
                f"optimizer.multipliers.{part} must be above 0: got {factor}; what "
                "should not learn goes into frozen."
            )
