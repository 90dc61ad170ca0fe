"""The concept table: one label space over all image-label sources of a run."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from unicl_jax.data.prompts import clean_class_name


class ConceptTable(NamedTuple):
    """Names by concept, and each source's classes as concepts.

    Attributes:
      names: one name a concept, as the first source to bring it spells it.
      of_source: source name -> [classes] int32, the concept of each of its classes.
      merged: (source, class name) pairs that joined a concept already there: the same
        name in another source, or twice in one (OpenAI's ImageNet list has two such).
    """

    names: tuple[str, ...]
    of_source: dict[str, np.ndarray]
    merged: tuple[tuple[str, str], ...]


def make_concept_table(class_names: Mapping[str, Sequence[str]]) -> ConceptTable:
    """Merges class names that say the same, over all sources.

    Two names are one concept if they are equal after cleaning and lower-casing: "Dog"
    and "dog" would otherwise be negatives of each other with the same text.

    Args:
      class_names: source name -> its class names, in label order.

    Returns:
      The table; concepts are numbered in order of first appearance.
    """
    index: dict[str, int] = {}
    names, of_source, merged = [], {}, []
    for source, classes in class_names.items():
        concepts = []
        for name in classes:
            cleaned = clean_class_name(name)
            key = cleaned.lower()
            if key in index:
                merged.append((source, name))
            else:
                index[key] = len(names)
                names.append(cleaned)
            concepts.append(index[key])
        of_source[source] = np.array(concepts, np.int32)
    return ConceptTable(tuple(names), of_source, tuple(merged))
