"""What a recipe can say: every field, its meaning and its default."""

import json
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from unicl_jax.errors import InputError, did_you_mean

# Fields that may change between restarts of a run: none of them touches what is learnt.
FREE = (
    "log_every_steps",
    "evaluate_every_steps",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "checkpoints_kept",
    "checkpoints_keep_every",
    "max_nonfinite",
    "hang_minutes",
    "evaluations",
    "mesh",
    "micro_batches",
)
CAPTION_IDENTITIES = ("row", "text")
MAX_PIXELS = 178_956_970  # of an image: Pillow's limit, 2^29 / 3
# And these, in any section: they say when a run stops, where its files lie (the records
# tell whether they are the same) and how they are read.
FREE_FIELDS = (
    *("max_skipped", "max_skips_in_a_row"),
    *("path", "root", "index_cache", "in_blocks"),
)
# Of `model`'s parameters, those that can be frozen.
PARTS = ("image", "text", "image_projection", "text_projection", "logit_scale")


def default() -> ConfigDict:
    """Every field there is, with its meaning; a recipe sets those that matter to it.

    Returns:
      The config, unlocked. `model.image`, `model.text`, `data.sources` and
      `evaluations` are empty: a recipe fills them.
    """
    c = ConfigDict()
    c.seed = 0  # of parameters, order, prompts, crops and drop path
    c.objective = "unicl"  # a name in objectives.OBJECTIVES
    c.views = 1  # pictures that a step makes of each image; supcon takes 2 or more
    # Where its model starts: a run's workdir, a weights file or folder that
    # `unicl_jax.load` reads, or several, with commas between them.
    c.init_from = placeholder(str)
    c.frozen = ()  # parts of the model that don't learn: names in PARTS
    # Whether vectors that an objective has for classes start as the embeddings of the
    # classes' prompts, by the text tower of `init_from`; else they are random.
    c.classes_from_prompts = False
    c.batch_size = 4096  # global; divisible by the number of devices
    # Parts of a batch that the towers embed one behind another, each in so much less
    # memory; the loss is of all its rows together, the numbers are those of 1.
    c.micro_batches = 1
    c.total_steps = placeholder(int)

    c.model = ConfigDict()
    c.model.image = ConfigDict()  # `name` in encoders.IMAGE_TOWERS, and its options
    c.model.text = ConfigDict()  # `name` in encoders.TEXT_TOWERS, and its options
    c.model.embed_dim = 512  # width of the joint space
    c.model.logit_scale_init = 1.0  # theta; the multiplier is exp(theta)
    c.model.logit_scale_max = placeholder(float)  # cap of theta; None: no cap
    c.model.normalization = "imagenet"  # or "clip": of pixels, for CLIP's weights
    c.model.dtype = "float32"  # or "bfloat16": of the towers' arithmetic

    c.mesh = ConfigDict()  # devices along each axis; see sharding.py
    c.mesh.data = placeholder(int)  # None: what the others leave
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.data = ConfigDict()
    c.data.sources = ConfigDict()  # by name; see docs/data.md
    c.data.mixture = "balanced"  # or "proportional", "weights": sampler.MIXTURES
    c.data.templates = "unicl_81"  # prompts for class names in training
    # One prompt a class and step, and each distinct text of a batch encoded once;
    # otherwise one prompt a record, as in the paper.
    c.data.share_prompts = False
    # Names of one concept beside equal ones: groups of names, or a text file, a group a
    # line, tabs between its names.
    c.data.synonyms = placeholder(object)
    # Whose positive a caption is: "row", its own image's alone; "text", also that of
    # every row of the batch with an equal caption. One of CAPTION_IDENTITIES.
    c.data.caption_identity = "row"
    # Slots a text takes: "full", the tower's context_length; "bucket", the batch's
    # longest; "pack", several texts share a row. The embeddings are the same.
    c.data.text_length = "full"
    # A window of this many records is mixed at a time, so that shards are read mostly
    # in sequence; 0: all of a source is, with reads here and there. See docs/data.md.
    c.data.window = 0
    # Equal parts of a batch that read shards of their own: a multiple of the number of
    # processes.
    c.data.lanes = 1
    # Largest share of a source's records that may be unreadable before the run stops
    # with a list of them; a source's own `max_skipped` goes before it.
    c.data.max_skipped = 0.1
    # > 0: write this many made-up records a source, in its own format, and use those.
    c.data.made_up_records = 0

    # Pixels of a side of the images that travel to the device; None: the image tower's.
    # Larger, `augment.crop` has more to cut its windows from.
    c.data.image_size = placeholder(int)

    c.augment = ConfigDict()  # on the device; see augment.make_augment
    c.augment.crop = 1.0  # least share of the area in a random crop; 1: none
    c.augment.shift = 0  # pixels
    c.augment.flip = False  # left-right
    c.augment.color = 0.0  # +- fraction of brightness, contrast and channel gains
    c.augment.grayscale = 0.0  # probability
    c.augment.blur = 0.0  # greatest standard deviation, pixels; half are blurred
    c.strong_augment = ConfigDict()  # what differs for the views after the first

    c.mix = ConfigDict()  # of two images, after all else; see mix.make_mix
    c.mix.mixup = 0.0  # parameter of Beta; 0: off. Swin's is 0.8
    c.mix.cutmix = 0.0  # parameter of Beta; 0: off. Swin's is 1.0
    c.mix.probability = 1.0  # of a batch to be mixed
    c.mix.cutmix_share = 0.5  # of the mixed batches, where both are on

    c.optimizer = ConfigDict()
    # Or "sgd" (Nesterov), "muon", "lamb", "lion", "adafactor".
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-3  # peak
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.warmup_steps = 0
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 0.0  # of the global gradient; 0: no clipping
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.momentum = 0.9  # of sgd
    # Factor of the learning rate a layer down from the tower's end; 1: none.
    c.optimizer.image_layer_decay = 1.0
    c.optimizer.text_layer_decay = 1.0
    c.optimizer.multipliers = ConfigDict()  # of it, by part: names in PARTS, objective

    # Of the average of the parameters over steps, which is what evaluations and later
    # uses of the run then see; 0: none is kept. See step.averaged.
    c.ema_decay = 0.0

    # By name: a source and `templates`; or a suite's `task` and `data_dir`. `protocol`
    # is "zero_shot" unless it says "knn", "linear_probe" (both learn from `train`) or
    # "retrieval"; see docs/evaluation.md. With `at_end=True` it is done after the last
    # step alone, as for a test set that nothing may be chosen on.
    c.evaluations = ConfigDict()
    c.evaluate_every_steps = 1000
    c.checkpoint_every_steps = 1000
    c.checkpoint_every_minutes = 0.0  # since the last one, too; 0: by steps alone
    c.checkpoints_kept = 2  # the newest; older ones are deleted
    c.checkpoints_keep_every = 0  # multiples of this many steps never are; 0: none
    # Steps in a row whose loss or gradient is not finite: each update is skipped. One
    # more, and the run stops.
    c.max_nonfinite = 3
    # Without a step, or a batch of an evaluation, for so long, a process writes where
    # it stands and ends, to be started again; 0: it waits for ever.
    c.hang_minutes = 30.0
    c.log_every_steps = 50

    # The whole config of a stage that follows, from what this one learnt; see
    # `followed_by` and stages.py. Empty: none does.
    c.then = ConfigDict()
    return c


def followed_by(config: ConfigDict, after: ConfigDict) -> ConfigDict:
    """Makes a recipe of two stages; what they have in common is set once.

    A flag that changes a field of the first changes it in the second, too, if both
    recipes gave it the same value; `--config.then.<field>` changes the second alone.

    Args:
      config: of the first stage.
      after: of the stage that starts from it; its `init_from` is left out.

    Returns:
      The first one, changed.
    """

    def bind(first, second):
        for name in second:
            if name not in first or name in ("then", "init_from"):
                continue
            one, other = first[name], second[name]
            if isinstance(one, ConfigDict) and isinstance(other, ConfigDict):
                bind(one, other)
            elif type(one) is type(other) and one == other:
                second[name] = first.get_oneway_ref(name)

    bind(config, after)
    config.then = after
    return config


def check_variant(variant: str, variants: Iterable[str]) -> None:
    """Refuses a recipe's variant (what follows the colon) that does not exist.

    Args:
      variant: as given; "" for the plain recipe.
      variants: the others there are.

    Raises:
      InputError: listing them.
    """
    if variant and variant not in variants:
        raise InputError(
            f'the recipe has no variant "{variant}"; {did_you_mean(variant, variants)}'
        )


def base_recipe(
    file: str,
    variant: str,
    labels_only: bool = False,
    variants: Iterable[str] = ("paper",),
) -> ConfigDict:
    """What a recipe in `configs/baselines/` starts from: another recipe's config.

    Args:
      file: of the baseline.
      variant: what starts with "paper" is on `configs/swin_tiny.py`, what does not, on
        the quick start; "paper_mixup" has MixUp and CutMix, too.
      labels_only: without captions, and without evaluations of names that are no class.
      variants: that there are, beside "".

    Returns:
      The config, unlocked.

    Raises:
      InputError: if there is no such variant.
    """
    check_variant(variant, variants)
    on_paper = variant.startswith("paper")
    name = "swin_tiny.py" if on_paper else "quickstart.py"
    recipe = runpy.run_path(str(Path(file).parents[1] / name))["get_config"]
    if not labels_only:
        return recipe()
    config = recipe("labels_mixup" if variant == "paper_mixup" else "labels")
    if not on_paper:
        del config.evaluations["twemoji_names"]
    return config


def flatten(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as {"optimizer.learning_rate": 0.001, ...}, tuples as lists."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.") or {f"{prefix}{key}": {}}
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def to_json(config: ConfigDict) -> str:
    """The resolved config as it is saved with a run."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
