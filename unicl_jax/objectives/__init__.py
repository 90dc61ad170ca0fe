"""What a step minimises: a loss, what it is given of a batch, and what it learns.

An objective sees the batch through `Forward`, asks it for the embeddings it needs, and
gives one loss a row. Parameters of its own (a bias, a classifier) lie under
`params["objective"]`, beside the towers'.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from unicl_jax import losses, sharding
from unicl_jax.config import PARTS
from unicl_jax.encoders import TwoTower
from unicl_jax.errors import InputError, choose
from unicl_jax.mix import is_on
from unicl_jax.objectives import classes, contrastive, positives, views
from unicl_jax.objectives.objective import Forward, Objective

__all__ = [
    "OBJECTIVES",
    "Forward",
    "Objective",
    "check",
    "make_objective",
    "positives",
]

LABELS, CAPTIONS = "image_label", "image_text"


class _Entry(NamedTuple):
    make: Callable
    labels_only: bool = False
    unused: tuple[str, ...] = ()  # parts of the model that it does not teach
    least_views: int = 1
    most_views: float = 1
    names_images: bool = True  # or there is nothing to evaluate before another stage
    unmixed: str = ""  # why it takes no images of two records each; "": it does


_TEXT = ("text", "text_projection")

OBJECTIVES = {
    "unicl": _Entry(contrastive.unicl),
    "clip": _Entry(contrastive.clip),
    "one_way": _Entry(contrastive.one_way),  # Table 3 of the paper
    "linear_text": _Entry(  # Table 3
        contrastive.linear_text, labels_only=True, unused=_TEXT
    ),
    "siglip": _Entry(
        contrastive.siglip, unmixed="calls each pair a yes or a no, with no shares"
    ),
    "cross_entropy": _Entry(
        classes.cross_entropy,
        labels_only=True,
        unused=(*_TEXT, "image_projection", "logit_scale"),
    ),
    "cosine_cross_entropy": _Entry(
        classes.cosine_cross_entropy, labels_only=True, unused=_TEXT
    ),
    "multitask": _Entry(  # Table 6
        classes.multitask, unmixed="has no task for half a class and half a caption"
    ),
    "supcon": _Entry(
        views.supcon,
        unused=(*_TEXT, "logit_scale"),
        least_views=2,
        most_views=math.inf,
        names_images=False,
        unmixed="compares several views of an image",
    ),
    "uniclip": _Entry(
        views.uniclip,
        unused=("logit_scale",),
        most_views=math.inf,
        unmixed="is told what was done to a picture, and has no word for this",
    ),
}


def make_objective(
    name: str, model: TwoTower, mesh: Mesh | None = None, num_concepts: int = 0
) -> Objective:
    """Builds an objective.

    Args:
      name: a key of OBJECTIVES.
      model: the two towers.
      mesh: the devices over which batches are divided; None for one device, no mesh.
      num_concepts: of the run's concept table, for those that hold a row for each.

    Returns:
      The objective.

    Raises:
      InputError: if there is none of that name.
    """

    def over(loss):
        if mesh is None:
            return loss
        return losses.sharded(loss, mesh, sharding.batch_axes(mesh))

    entry = choose(OBJECTIVES, name, "objective")
    return entry.make(over, model, num_concepts)._replace(unused=entry.unused)


# Whose own parameters hold a vector for each concept, in the space of texts.
BY_VECTORS = ("linear_text", "cosine_cross_entropy")


def taught_by_both(name: str, other: str, with_texts: bool = False) -> tuple[str, ...]:
    """What a run may take over from another: parts of the model that both teach.

    A text tower that SupCon never looked at, or its temperature, is nothing learnt.

    Args:
      name: a key of OBJECTIVES.
      other: the other run's; if it is not known, it is taken to teach all.
      with_texts: whether this run embeds prompts, although it teaches no texts.

    Returns:
      Names of `config.PARTS`.
    """
    unused = {*OBJECTIVES[name].unused} - {*(_TEXT if with_texts else ())}
    if other in OBJECTIVES:
        unused |= {*OBJECTIVES[other].unused}
    return tuple(part for part in PARTS if part not in unused)


def check(config: Mapping) -> None:
    """Refuses what an objective cannot learn from.

    Args:
      config: the whole config: `objective`, `views`, `mix`, `data.sources`,
        `evaluations`.

    Raises:
      InputError: if there is no such objective, or it needs labels and a source has
        captions, or it takes more or fewer views, or no mixed images, or nothing it
        learns can be evaluated.
    """
    name, count = config["objective"], config["views"]
    entry = choose(OBJECTIVES, name, "objective")
    kinds = {source["kind"] for source in config["data"]["sources"].values()}
    if entry.labels_only and kinds - {LABELS}:
        raise InputError(
            f'objective "{name}" needs a class for every image: data.sources must all '
            f"be {LABELS}, and some are {CAPTIONS}; leave those out."
        )
    if not entry.least_views <= count <= entry.most_views:
        many = "at least " if entry.most_views > entry.least_views else ""
        raise InputError(
            f'objective "{name}" takes {many}{entry.least_views} views of an image: '
            f"views is {count}; set it to {entry.least_views}."
        )
    if config.get("classes_from_prompts") and name not in BY_VECTORS:
        raise InputError(
            "classes_from_prompts is for objectives with a vector for each class "
            f'({", ".join(BY_VECTORS)}): objective is "{name}"; choose one of those.'
        )
    mix = config.get("mix")
    if entry.unmixed and mix is not None and is_on(mix):
        raise InputError(
            f'objective "{name}" {entry.unmixed}: images must not be mixed, and '
            f"mix.mixup is {mix['mixup']}, mix.cutmix {mix['cutmix']}; set both to 0."
        )
    by_names = [
        key
        for key, task in config["evaluations"].items()
        if (task.get("protocol") or "zero_shot") in ("zero_shot", "retrieval")
    ]
    if not entry.names_images and by_names:
        raise InputError(
            f'objective "{name}" learns no names: evaluations must be of protocol '
            f'"knn" or "linear_probe", and {", ".join(by_names)} are not; set it, or '
            "evaluate a classifier that is trained on it, as "
            "configs/baselines/supcon.py:linear does."
        )
    for key, task in config["evaluations"].items():
        if "text" in entry.unused and task.get("protocol") == "retrieval":
            raise InputError(
                f'objective "{name}" teaches no text tower: evaluations.{key} must not '
                "be retrieval; leave it out."
            )
