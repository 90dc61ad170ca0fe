"""Where batches come from: records, sources, concepts, prompts, mixture, iterator.

TensorFlow is imported inside functions of this room, and only for sources that lie in
files of its formats.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from unicl_jax.data.arrays import make_npz_source
from unicl_jax.data.concepts import ConceptTable, make_concept_table
from unicl_jax.data.iterator import TrainIterator
from unicl_jax.data.parts import part_of
from unicl_jax.data.prompts import load_templates
from unicl_jax.data.quickstart import make_quickstart_source
from unicl_jax.data.records import Source
from unicl_jax.data.shards import BLOCK, set_gcs_reads
from unicl_jax.data.sources import FORMATS as FILE_FORMATS
from unicl_jax.data.sources import make_file_source
from unicl_jax.data.synonyms import load_synonyms
from unicl_jax.data.text_length import (
    TEXT_LENGTHS,
    cut,
    in_equal_shapes,
    make_text_length,
)
from unicl_jax.data.tokenizer import Tokenizer
from unicl_jax.errors import choose

FORMATS: dict[str, Callable[..., Source]] = {
    "npz": make_npz_source,
    "quickstart": make_quickstart_source,
    **dict.fromkeys(FILE_FORMATS, make_file_source),
}

__all__ = [
    "FORMATS",
    "TEXT_LENGTHS",
    "ConceptTable",
    "Source",
    "Tokenizer",
    "TrainIterator",
    "cut",
    "in_equal_shapes",
    "load_templates",
    "make_source",
    "make_text_length",
    "make_train_iterator",
    "with_made_up_records",
]


def make_source(
    name: str, config: Mapping[str, Any], image_size: int, train: bool
) -> Source:
    """Opens one source of a config.

    Args:
      name: its name there.
      config: `format`, a key of FORMATS; `path`; for training `kind`; `part`, as
        `parts.part_of` takes it; and what the format takes.
      image_size: pixels, square.
      train: random crops, or the fixed one of evaluation.

    Returns:
      The source.

    Raises:
      InputError: if the format is unknown, or the data is missing or does not fit.
    """
    make = choose(FORMATS, config["format"], f'source "{name}": format')
    if not (part := config.get("part")):
        return make(name, config, image_size, train)
    if config["format"] == "quickstart":  # whose sets for evaluation are others
        config, train = {**config, "kind": "image_label"}, True
    return part_of(make(name, config, image_size, train), part)


def make_train_iterator(
    config: Mapping[str, Any],
    image_size: int,
    batch_size: int,
    seed: int,
    tokenize: Callable,
    *,
    process_index: int = 0,
    process_count: int = 1,
    local_devices: int = 1,
    sources: Sequence[Source] | None = None,
) -> TrainIterator:
    """Opens the sources that a config's `data` section names, and mixes them.

    Args:
      config: `sources`, `mixture`, `templates`, `share_prompts`, `text_length`; and
        `synonyms`, `lanes`, `window` and `max_skipped` (default 1; a source's own goes
        before it), which may be missing.
      image_size: pixels, square.
      batch_size: global.
      seed: of order, prompts, captions and crops.
      tokenize: texts -> [n, L] int32.
      process_index: of this process.
      process_count: of all.
      local_devices: of this process, over which token rows are divided.
      sources: those of the config, if they are open already.

    Returns:
      The iterator over this process's rows, at step 0.

    Raises:
      InputError: if a source or the mixture does not fit.
    """
    if config.get("window", 0):
        set_gcs_reads(BLOCK)  # before TensorFlow is imported
    synonyms = load_synonyms(config.get("synonyms"))
    if sources is None:
        sources = [
            make_source(name, source, image_size, train=True)
            for name, source in config["sources"].items()
        ]
    concepts = make_concept_table(
        {s.name: s.class_names for s in sources if s.class_names}, synonyms
    )
    return TrainIterator(
        sources,
        concepts,
        load_templates(config["templates"]),
        tokenize,
        batch_size=batch_size,
        mixture=config["mixture"],
        seed=seed,
        weights=[s.get("weight", 1.0) for s in config["sources"].values()],
        share_prompts=config["share_prompts"],
        process_index=process_index,
        process_count=process_count,
        devices=local_devices,
        text_length=config["text_length"],
        lanes=config.get("lanes", 1),
        window=config.get("window", 0),
        max_skipped=[
            s.get("max_skipped", config.get("max_skipped", 1.0))
            for s in config["sources"].values()
        ],
    )


def with_made_up_records(config, workdir: Path):
    """Writes made-up records for every source and evaluation, if the config wants it.

    Args:
      config: the whole config; `data.made_up_records` says how many a source.
      workdir: of the run; the records go below it.

    Returns:
      The config, or a copy whose paths point at the made-up records.
    """
    count = config.data.made_up_records
    if not count:
        return config
    from unicl_jax.data.made_up import write_made_up

    config = copy.deepcopy(config)
    with config.unlocked():
        for name, task in list(config.evaluations.items()):
            if task.get("task") or (task.get("protocol") or "zero_shot") != "zero_shot":
                del config.evaluations[name]  # which made-up records say nothing of
        groups = {"train": config.data.sources, "evaluate": config.evaluations}
        for folder, group in groups.items():
            plain = {
                k: {"kind": "image_label", **v} for k, v in group.to_dict().items()
            }
            made_up = write_made_up(plain, str(workdir / folder), count, config.seed)
            for name, source in made_up.items():
                group[name] = ConfigDict(source)
    return config
