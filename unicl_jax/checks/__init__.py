"""Looking at a config's data before a run, by the trainer's own code."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from unicl_jax import data, evaluation, objectives, sharding
from unicl_jax.checks import contact_sheet
from unicl_jax.checks.concepts import look_at_concepts, look_at_unnamed
from unicl_jax.checks.mixture import (
    look_at_mixture,
    look_at_processes,
    make_batches,
)
from unicl_jax.checks.records import open_source, read_sample
from unicl_jax.checks.report import PROBLEM, Section, some
from unicl_jax.checks.resources import look_at_resources
from unicl_jax.checks.setting import Setting, look_at_config
from unicl_jax.checks.texts import look_at_captions, look_at_labels, look_at_prompts
from unicl_jax.errors import InputError
from unicl_jax.workdir import CONTACT_SHEET, keep_concepts

__all__ = ["Section", "Setting", "examine"]

NOT_ALL = "not looked at: mend what is wrong first"


def examine(setting: Setting) -> Iterator[Section]:
    """Looks at everything, in the order of a run; goes on after what is wrong.

    Args:
      setting: what to look at. The only file that is written is the contact sheet.

    Yields:
      The sections, each as soon as it is whole.
    """
    with tempfile.TemporaryDirectory() as folder:
        section = _section("config", look_at_config, setting)
        if setting.config.data.made_up_records:
            section.note("data.made_up_records: made up in a folder of this look's own")
            setting.config = data.with_made_up_records(setting.config, Path(folder))
        yield section
        for name in setting.config.data.sources:
            yield _section(f"source {name}", _look_at_source, setting, name)
        mixture = _section("mixture", _look_at_mixture, setting)
        for name in setting.config.evaluations:
            yield _section(f"evaluation {name}", _look_at_evaluation, setting, name)
        yield _section("concepts", _look_at_concepts, setting)
        yield mixture
        yield _section("processes", look_at_processes, setting)
        yield _section("disk and memory", _look_at_resources, setting)
        yield _section("contact sheet", _draw_contact_sheet, setting)


def _section(title: str, look: Callable, setting: Setting, *arguments) -> Section:
    section = Section(title)
    try:
        look(section, setting, *arguments)
    except InputError as error:
        section.refuse(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        if setting.is_good:
            raise
        section.note(NOT_ALL)
    setting.is_good &= not section.count(PROBLEM)
    return section


def _look_at_source(section, setting, name):
    config = setting.config.data.sources[name]
    size = setting.image_size
    source = open_source(section, name, config, size, train=True)
    setting.sources[name] = source
    most = config.get("max_skipped", setting.config.data.get("max_skipped", 1.0))
    sample = read_sample(
        section, source, size, setting.records, setting.config.seed, most
    )
    setting.samples[name] = sample
    if source.class_names:
        look_at_labels(section, source, sample, train=True)
        if setting.tokenizer is not None:
            templates = data.load_templates(setting.config.data.templates)
            look_at_prompts(section, source.class_names, templates, setting.tokenizer)
    elif setting.tokenizer is not None:
        by_text = setting.config.data.caption_identity == "text"
        look_at_captions(section, sample, setting.tokenizer, by_text)


def _look_at_evaluation(section, setting, name):
    config = setting.config.evaluations[name]
    if config.get("task") or (config.get("protocol") or "zero_shot") != "zero_shot":
        _look_at_task(section, setting, name, config)
        return
    if not config.path:
        section.warn(
            "not run: its path is not set",
            f"pass --config.evaluations.{name}.path=, or there is no telling what the "
            "run learns",
        )
        return
    size = setting.model_size
    source = open_source(section, name, config, size, train=False)
    setting.evaluations[name] = source
    sample = read_sample(section, source, size, setting.records, setting.config.seed)
    look_at_labels(section, source, sample, train=False)
    templates = data.load_templates(config.templates)
    if setting.tokenizer is None:
        return
    look_at_prompts(section, source.class_names, templates, setting.tokenizer)
    if setting.model is not None and setting.batches is not None:
        encoders = _encoders(setting)
        evaluation.ZeroShotTask(name, source, templates, setting.tokenizer, encoders)


def _look_at_task(section, setting, name, config):
    """One that is a suite's, or is judged by another protocol than zero-shot."""
    if None in (setting.tokenizer, setting.model, setting.batches):
        section.note(NOT_ALL)
        return
    task = evaluation.make_task(
        name, config, setting.model_size, setting.tokenizer, _encoders(setting)
    )
    protocol = config.get("protocol") or "zero_shot"
    section.good(f"{some(len(task.source), 'record')}, judged by {protocol}")


def _encoders(setting):
    mesh, concepts = sharding.make_mesh(), setting.batches.concepts
    objective = objectives.make_objective(
        setting.config.objective,
        setting.model,
        mesh,
        num_concepts=len(concepts.names),
    )
    return evaluation.make_encoders(setting.model, mesh, objective, concepts.index)


def _look_at_mixture(section, setting):
    opened = set(setting.config.data.sources) == set(setting.samples) != set()
    if not opened or setting.tokenizer is None:
        section.note(NOT_ALL)
        return
    setting.batches = make_batches(setting)
    look_at_mixture(section, setting)


def _look_at_concepts(section, setting):
    if setting.batches is None:
        section.note(NOT_ALL)
        return
    concepts = setting.batches.concepts
    if setting.workdir is not None:
        keep_concepts(setting.workdir, concepts, write=False)
    look_at_concepts(section, concepts, setting.samples)
    look_at_unnamed(section, setting.evaluations, concepts)


def _look_at_resources(section, setting):
    if None in (setting.model, setting.tokenizer, setting.optimizer):
        section.note(NOT_ALL)
        return
    look_at_resources(section, setting)


def _draw_contact_sheet(section, setting):
    if setting.batches is None:
        section.note(NOT_ALL)
        return
    path = setting.out / CONTACT_SHEET
    width, height = contact_sheet.draw(setting, path)
    section.good(f"{path}, {width} x {height} pixels: look at it")
