"""Every check of a config that needs no device, no file and no download."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from unicl_jax import learning_rates, micro_batches
from unicl_jax.augment import NORMALIZATIONS
from unicl_jax.config import (
    CAPTION_IDENTITIES,
    MAX_PIXELS,
    PARTS,
    default,
    flatten,
)
from unicl_jax.errors import InputError, choose, did_you_mean, nearest_multiples
from unicl_jax.mix import check_mix
from unicl_jax.sharding import mesh_sizes


def validate(config: ConfigDict, num_devices: int, num_processes: int = 1) -> None:
    """Checks what can be checked without a device, a file or a download.

    Args:
      config: the resolved config.
      num_devices: over all processes.
      num_processes: of the run.

    Raises:
      InputError: naming the field, what it must hold, what it holds.
    """
    for problem in problems(config, num_devices, num_processes):
        raise problem


def problems(
    config: ConfigDict, num_devices: int, num_processes: int = 1
) -> Iterator[InputError]:
    """What `validate` refuses; all of it that can be told at once.

    Args:
      config: the resolved config.
      num_devices: over all processes.
      num_processes: of the run.

    Yields:
      The errors, the first one being what `validate` raises.
    """
    is_good = True
    for check in (
        _check_fields,
        _check_counts,
        lambda config: _check_batch(config, num_devices, num_processes),
        _check_optimizer,
        _check_numbers,
        _check_lanes,
        _check_skips,
        _check_views,
        lambda config: check_mix(config, num_devices),
        lambda config: _check_micro_batches(config, num_devices),
        lambda config: _check_concepts(config.data),
        lambda config: _check_processes(config, num_processes),
    ):
        try:
            for problem in check(config) or ():
                is_good = False
                yield problem
        except InputError as error:
            is_good = False
            yield error
        except (AttributeError, KeyError, TypeError):
            if is_good:
                raise
            # What is wrong was said: here it only got in the way.


def _check_counts(config):
    for field in (
        "batch_size",
        "total_steps",
        "evaluate_every_steps",
        "checkpoint_every_steps",
        "checkpoints_kept",
        "log_every_steps",
    ):
        if type(config[field]) is not int or config[field] < 1:  # nor a bool
            yield InputError(
                f"{field} must be a whole number of at least 1: got {config[field]}."
            )
    for field in ("checkpoints_keep_every", "max_nonfinite"):
        if type(config[field]) is not int or not 0 <= config[field] < 2**31:
            yield InputError(
                f"{field} must be a whole number of at least 0: got {config[field]}."
            )
    for field in ("checkpoint_every_minutes", "hang_minutes"):
        if not config[field] >= 0:
            yield InputError(
                f"{field} must be at least 0, which is never: got {config[field]}."
            )


def _check_batch(config, num_devices, num_processes):
    sizes = mesh_sizes(config.mesh, num_devices)
    batch, unit = config.batch_size, sizes["data"] * sizes["fsdp"]
    if num_devices // num_processes % sizes["tensor"]:
        raise InputError(
            "mesh.tensor must divide the devices of a process, which its rows stay on: "
            f"got {sizes['tensor']} for {num_devices // num_processes}."
        )
    if batch % unit:
        raise InputError(
            "batch_size must be divisible by the number of devices"
            f"{'' if unit == num_devices else ' along mesh.data and mesh.fsdp'}: got "
            f"{batch} for {unit} devices; {nearest_multiples(batch, unit)}."
        )
    if batch < 2:
        raise InputError(
            f"batch_size must be at least 2, for something to contrast: got {batch}."
        )


def _check_micro_batches(config, num_devices):
    sizes = mesh_sizes(config.mesh, num_devices)
    micro_batches.check(config, sizes["data"] * sizes["fsdp"])


def _check_optimizer(config):
    optimizer = config.optimizer
    for field in ("learning_rate", "eps"):
        if not optimizer[field] > 0:
            yield InputError(
                f"optimizer.{field} must be above 0: got {optimizer[field]}."
            )
    for field in ("final_learning_rate", "weight_decay", "clip_norm", "warmup_steps"):
        if not optimizer[field] >= 0:
            yield InputError(
                f"optimizer.{field} must be at least 0: got {optimizer[field]}."
            )
    for field in ("b1", "b2", "momentum"):
        if not 0 <= optimizer[field] < 1:
            yield InputError(
                f"optimizer.{field} must be in [0, 1): got {optimizer[field]}."
            )
    learning_rates.check(optimizer, (*PARTS, "objective"), config.frozen)
    if type(config.ema_decay) not in (int, float) or not 0 <= config.ema_decay < 1:
        yield InputError(
            f"ema_decay must be in [0, 1), 0 for off: got {config.ema_decay}; 0.9999 "
            "is common for long runs."
        )
    if optimizer.warmup_steps >= config.total_steps:
        yield InputError(
            "optimizer.warmup_steps must be below total_steps: got "
            f"{optimizer.warmup_steps} and {config.total_steps}; lower the first."
        )


def _check_processes(config, num_processes):
    if config.data.share_prompts and num_processes > 1:
        raise InputError(
            "data.share_prompts needs a single process: got "
            f"{num_processes} processes; pass --config.data.share_prompts=False."
        )


def _check_views(config):
    """Augmentation, views, and what does not learn."""
    image_size = config.model.image.get("image_size", 224)
    if type(config.views) is not int or not 1 <= config.views <= 16:
        raise InputError(
            f"views must be a whole number from 1 to 16: got {config.views}."
        )
    pixels = f"[0, {image_size}) pixels"
    allowed = {
        "crop": (float, lambda x: 0 < x <= 1, "(0, 1], a share of the area"),
        "shift": (int, lambda x: 0 <= x < image_size, f"{pixels}, whole ones"),
        "flip": (bool, lambda x: True, "True or False"),
        "color": (float, lambda x: 0 <= x < 1, "[0, 1)"),
        "grayscale": (float, lambda x: 0 <= x <= 1, "[0, 1], a probability"),
        "blur": (float, lambda x: 0 <= x < image_size, pixels),
    }
    for section in ("augment", "strong_augment"):
        for field, value in config[section].items():
            kind, inside, where = allowed[field]
            fits = type(value) is kind or (kind is float and type(value) is int)
            if not fits or not inside(value):
                yield InputError(f"{section}.{field} must be in {where}: got {value}.")
    choose(NORMALIZATIONS, config.model.normalization, "model.normalization")
    if config.views == 1 and config.strong_augment:
        raise InputError(
            "strong_augment is of the views after the first: views is 1; set views to "
            "2 or more, or leave strong_augment out of the recipe."
        )
    size = config.data.image_size
    if size is not None and (type(size) is not int or size < image_size):
        raise InputError(
            "data.image_size must be a whole number of at least model.image.image_size:"
            f" got {size} and {image_size}; leave it out for equal ones."
        )
    if not isinstance(config.frozen, tuple | list):
        raise InputError(
            f"frozen must be a tuple of names: got {config.frozen!r}; for one, write "
            f"({config.frozen!r},)."
        )
    for part in config.frozen:
        choose(dict.fromkeys(PARTS), part, "frozen")
    if set(config.frozen) == set(PARTS):
        raise InputError(
            f"frozen must leave a part to learn: got all of {', '.join(PARTS)}; name "
            "fewer."
        )
    if {"image", "text"} & set(config.frozen) and not config.init_from:
        raise InputError(
            "a frozen tower must have learnt before: frozen is "
            f"{tuple(config.frozen)} and init_from is not set; pass "
            "--config.init_from= and the workdir of a run, or a weights file."
        )


def _check_concepts(data):
    """What makes rows positives of each other."""
    choose(
        dict.fromkeys(CAPTION_IDENTITIES),
        data.caption_identity,
        "data.caption_identity",
    )
    groups = data.synonyms
    if groups is None or isinstance(groups, str):
        return
    fits = isinstance(groups, tuple | list) and all(
        isinstance(group, tuple | list)
        and len(group) > 1
        and all(isinstance(name, str) for name in group)
        for group in groups
    )
    if not fits:
        raise InputError(
            "data.synonyms must be a text file's path, or groups of two names or more: "
            f'got {groups!r}; write (("sofa", "couch"), ("airplane", "aeroplane")).'
        )


def _check_numbers(config):
    """Every number is finite and no larger than could be meant; sizes are sizes."""
    if type(config.seed) is not int or not 0 <= config.seed < 2**31:
        raise InputError(f"seed must be in [0, 2^31): got {config.seed}.")
    for field in ("batch_size", "total_steps"):
        if config[field] >= 2**31:
            raise InputError(f"{field} must be below 2^31: got {config[field]}.")
    for path, value in flatten(config).items():
        values = value if isinstance(value, list) else [value]
        for x in values:
            if isinstance(x, float) and not math.isfinite(x):
                yield InputError(f"{path} must be finite: got {value}.")
            leaf = path.split(".")[-1]
            if leaf in SIZES and path.startswith("model.") and not _is_size(x):
                yield InputError(
                    f"{path} must be a whole number of at least 1: got {value}."
                )
    if not abs(config.model.logit_scale_init) < 80:  # exp of it is in float32
        raise InputError(
            "model.logit_scale_init must be in (-80, 80), a logarithm: got "
            f"{config.model.logit_scale_init}; CLIP's is 2.659."
        )
    drop_path = config.model.image.get("drop_path", 0.0)
    if not 0 <= drop_path < 1:
        raise InputError(f"model.image.drop_path must be in [0, 1): got {drop_path}.")
    if not config.model.image.get("init_std", 1.0) > 0:
        raise InputError(
            f"model.image.init_std must be above 0: got {config.model.image.init_std}."
        )
    if config.data.made_up_records < 0:
        raise InputError(
            f"data.made_up_records must be at least 0: got "
            f"{config.data.made_up_records}."
        )


def _check_lanes(config):
    lanes, window = config.data.lanes, config.data.window
    if not _is_size(lanes) or config.batch_size % lanes:
        raise InputError(
            "data.lanes must be a whole number that divides batch_size: got "
            f"{lanes} and {config.batch_size}."
        )
    if type(window) is not int or not 0 <= window < 2**31:
        raise InputError(
            f"data.window must be a whole number in [0, 2^31): got {window}."
        )


def _check_skips(config):
    """What may be skipped, over all and by source."""
    groups = {"data.": {"": config.data}, "data.sources.": config.data.sources}
    groups["evaluations."] = config.evaluations
    for prefix, group in groups.items():
        for name, fields in group.items():
            path = f"{prefix}{name}." if name else prefix
            share = fields.get("max_skipped", 0)
            is_number = isinstance(share, int | float) and share is not True
            if not is_number or not 0 <= share <= 1:
                yield InputError(
                    f"{path}max_skipped must be in [0, 1], a share of the records: got "
                    f"{share}; 1 never stops the run."
                )
            for field in ("max_skips_in_a_row", "max_pixels") if name else ():
                most = MAX_PIXELS if field == "max_pixels" else math.inf
                value = fields.get(field, 1)
                if not _is_size(value) or value > most:
                    what = (
                        f", at most {most}, Pillow's limit" if most < math.inf else ""
                    )
                    yield InputError(
                        f"{path}{field} must be a whole number of at least 1{what}: "
                        f"got {value}; leave it out for its default."
                    )


def _is_size(x):
    return type(x) is int and x >= 1


# Fields of `model` that count something.
SIZES = (
    "embed_dim",
    "image_size",
    "patch_size",
    "window_size",
    "depths",
    "num_heads",
    "width",
    "hidden",
    "context_length",
    "vocab_size",
    "num_layers",
)


def _check_fields(config):
    """The fields are those of `default`, and the sections that recipes fill hold."""
    known = default()
    for path, section in (("", config), *((f"{s}.", config[s]) for s in SECTIONS)):
        names = known if not path else known[path[:-1].removeprefix("strong_")]
        for name in section:
            if name not in names:
                yield InputError(
                    f'there is no config field "{path}{name}"; '
                    f"{did_you_mean(name, names)}"
                )
    for tower in ("image", "text"):
        if "name" not in config.model[tower]:
            yield InputError(f"model.{tower}.name must say which tower: it is not set.")
    if not config.data.sources:
        raise InputError("data.sources must name at least one source: it is empty.")
    for what in ("data.sources", "evaluations"):
        group = config.evaluations if what == "evaluations" else config.data.sources
        for name, source in group.items():
            needed = ["format", "path"]
            needed += ["kind"] if what == "data.sources" else _of_protocol(source)
            try:
                if source.get("task") and what == "evaluations":
                    _check_task(name, source)
                    continue
                check_source(what, name, source, needed)
            except InputError as error:
                yield error


def _of_protocol(evaluation):
    """What an evaluation needs beside its records."""
    protocol = evaluation.get("protocol") or "zero_shot"
    if protocol in ("knn", "linear_probe"):
        return ["train"]
    return ["templates"] if protocol == "zero_shot" else []


def _check_task(name, evaluation):
    for field, value in evaluation.items():
        if field not in OF_TASKS and any(flatten({field: value}).values()):
            raise InputError(
                f'evaluations.{name}: one that has a `task` has no "{field}"; '
                f"{did_you_mean(field, OF_TASKS)}"
            )


def check_source(
    group: str, name: str, source: Mapping[str, Any], needed: Iterable[str]
) -> None:
    """Checks which fields a source or an evaluation has, not what they hold.

    Args:
      group: where it stands, for errors.
      name: its name there.
      source: its fields.
      needed: those that it must have.

    Raises:
      InputError: naming the field.
    """
    missing = [key for key in needed if key not in source]
    if missing:
        raise InputError(f"{group}.{name} must say {', '.join(missing)}.")
    form = source["format"]
    names = SOURCE_FIELDS["all"] + SOURCE_FIELDS.get(form, ())
    for field, value in source.items() if form in SOURCE_FIELDS else ():
        # What is empty says nothing: a recipe's fields may be of another format.
        if field not in names and any(flatten({field: value}).values()):
            raise InputError(
                f'{group}.{name}: a {form} source has no "{field}"; '
                f"{did_you_mean(field, names)}"
            )


_OF_IMAGES = ("preprocess", "max_skips_in_a_row", "max_skipped", "max_pixels")
_OF_FILES = ("class_names", *_OF_IMAGES)
_OF_SHARDS = (*_OF_FILES, "fields", "label_offset", "index_cache", "in_blocks")
# What a source or an evaluation may say, by format; see docs/data.md.
SOURCE_FIELDS = {
    "all": (
        *("format", "path", "kind", "weight", "templates", "part"),
        *("protocol", "train", "at_end"),
    ),
    "quickstart": (),
    "npz": ("class_names",),
    "tfrecord": _OF_SHARDS,
    "webdataset": _OF_SHARDS,
    "tfds": (*_OF_SHARDS, "split"),
    "folder": _OF_FILES,
    "csv": (*_OF_FILES, "fields", "root", "delimiter", "label_offset"),
    "prepared": (*_OF_IMAGES, "in_blocks"),
}
# And an evaluation that is a suite's task.
OF_TASKS = ("task", "data_dir", "protocol", "preprocess", "templates", "at_end")
SECTIONS = ("model", "mesh", "data", "augment", "strong_augment", "mix", "optimizer")
