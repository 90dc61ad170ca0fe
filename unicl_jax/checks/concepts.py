"""The concept table: what was merged, what perhaps should be, what was never named."""

import collections
import re
from collections.abc import Iterable, Mapping

import numpy as np

from unicl_jax.checks.records import Sample
from unicl_jax.checks.report import Section, named, some
from unicl_jax.data import ConceptTable, Source
from unicl_jax.data.prompts import clean_class_name
from unicl_jax.errors import InputError

FREQUENT = 2  # records of a sample with the same caption


def look_at_concepts(
    section: Section, concepts: ConceptTable, samples: Mapping[str, Sample]
) -> None:
    """Says what is one concept, and what may be.

    Args:
      section: to add to.
      concepts: of the run.
      samples: of the sources, by name.
    """
    if not concepts.names:
        section.note("none: every image has a caption")
        return
    section.good(f"{some(len(concepts.names), 'concept')}: {named(concepts.names)}")
    if concepts.unknown_synonyms:
        section.warn(
            "names of data.synonyms that no source has: "
            + named(concepts.unknown_synonyms),
            "look for typos",
        )
    inside = {name: np.bincount(of) for name, of in concepts.of_source.items()}
    for source, counts in inside.items():
        double = [concepts.names[c] for c in np.flatnonzero(counts > 1)]
        if double:
            section.warn(
                f"{source}: several classes of one concept: {named(double)}",
                "give them names of their own, if they are not the same: now their "
                "rows are each other's positives",
            )
    holders = collections.Counter(
        int(c) for of in concepts.of_source.values() for c in np.unique(of)
    )
    shared = [concepts.names[c] for c, count in holders.items() if count > 1]
    if shared:
        section.note(f"in several sources, one concept each: {named(shared)}")
    alike = near_duplicates(concepts.names)
    if alike:
        pairs = [" / ".join(f'"{name}"' for name in group) for group in alike]
        section.warn(
            f"nearly the same: {named(pairs, '')}",
            "join them by data.synonyms, if they mean the same: now they are negatives",
        )
    known = concepts.index.keys()
    for source, sample in samples.items():
        captions = collections.Counter(
            key for texts in sample.texts for key in {*_keys(texts)} & known
        )
        frequent = [key for key, count in captions.items() if count >= FREQUENT]
        if frequent:
            rows = sum(bool({*_keys(texts)} & known) for texts in sample.texts)
            of = some(len(sample.texts), "record")
            section.warn(
                f"{source}: the caption of {rows} of {of} "
                f"is a concept's name, as {named(frequent)}",
                "such captions and that concept's images are negatives in a batch: "
                "make an image-label source of those records",
            )


def look_at_unnamed(
    section: Section, evaluations: Mapping[str, Source], concepts: ConceptTable
) -> None:
    """Says which names evaluations ask for that are no concept.

    Args:
      section: to add to.
      evaluations: by name.
      concepts: of the run.
    """
    known = concepts.index.keys()
    if not known:
        return
    for task, source in evaluations.items():
        new = [name for name in source.class_names if not {*_keys([name])} & known]
        if new:
            section.note(
                f"{task}: {len(new):,} of {some(len(source.class_names), 'name')} are "
                f"no concept of training, as {named(new)}: zero-shot indeed"
            )


def near_duplicates(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ in a hyphen, a space or a plural alone.

    Args:
      names: distinct.

    Returns:
      The groups of two or more, in the names' order.
    """
    groups = collections.defaultdict(list)
    for name in names:
        groups[_bare(name)].append(name)
    return [group for bare, group in groups.items() if bare and len(group) > 1]


def _bare(name):
    """Letters and digits, without the ending of a plural."""
    bare = re.sub(r"[\W_]+", "", name.lower())
    bare = re.sub(r"(?<=[^sui])s$", "", bare)  # not "grass", "bus", "iris"
    bare = re.sub(r"(?<=[sxzhi])e$", "", bare)  # "boxe", "house", "berrie"; not "cape"
    return re.sub(r"y$", "i", bare)


def _keys(texts):
    for text in texts:
        try:
            yield clean_class_name(text).lower()
        except InputError:  # nothing of it is a word
            continue
