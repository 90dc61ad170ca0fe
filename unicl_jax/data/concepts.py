"""The concept table: one label space over all image-label sources of a run."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unicl_jax.data.prompts import clean_class_name
from unicl_jax.data.synonyms import Synonyms, name_key

_NAMED = 3  # examples in a line; concepts.json has all


class Joined(NamedTuple):
    """A class whose concept was there before it."""

    source: str
    label: int  # in its source
    name: str  # as its source spells it
    to_source: str  # the class that it joined: the first of the concept
    to_label: int
    to_name: str
    by_synonym: bool  # or by its name


class ConceptTable(NamedTuple):
    """Names by concept, and each source's classes as concepts.

    Attributes:
      names: one name a concept, as the first source to bring it spells it.
      of_source: source name -> [classes] int32, the concept of each of its classes.
      index: what is compared of a name (`name_key`) -> its concept; synonyms that no
        source has are in it, if they are some concept's.
      merged: classes that joined the concept of another source's.
      duplicates: classes that joined one of their own source (OpenAI's ImageNet list
        has two such): it cannot tell them apart, and their rows are positives.
      unknown_synonyms: names that have synonyms and that no source has.
    """

    names: tuple[str, ...]
    of_source: dict[str, np.ndarray]
    index: dict[str, int]
    merged: tuple[Joined, ...] = ()
    duplicates: tuple[Joined, ...] = ()
    unknown_synonyms: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """What became of names, in a few lines whatever their number.

        Returns:
          No line for what did not happen.
        """
        lines = []
        if self.merged:
            lines.append(
                f"{_count(self.merged)} joined concepts of other sources: "
                f"{_some(self.merged, _said)}; concepts.json has all"
            )
        if self.duplicates:
            lines.append(
                f"{_count(self.duplicates)} joined another of their own source: "
                f"{_some(self.duplicates, _said)}; their rows are positives of each "
                "other"
            )
        if self.unknown_synonyms:
            names = self.unknown_synonyms
            lines.append(
                f"warning: names of data.synonyms that no source has: {len(names):,}, "
                f"as {_some(names, _quoted)}; look for typos"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The table in JSON's types, as it is saved with a run."""
        return {
            "names": list(self.names),
            "sources": {name: c.tolist() for name, c in self.of_source.items()},
            "merged": [x._asdict() for x in self.merged],
            "duplicates": [x._asdict() for x in self.duplicates],
            "synonyms": {
                x.name: self.names[self.of_source[x.source][x.label]]
                for x in (*self.merged, *self.duplicates)
                if x.by_synonym
            },
            "unknown_synonyms": list(self.unknown_synonyms),
        }

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Where labels mean something else than they did.

        Args:
          saved: a table as `to_dict` gave it.

        Returns:
          A line each, classes before concepts; none if all are the same but for case,
          which no text keeps.
        """
        was, now = saved["names"], self.names
        lines = []
        for source in dict.fromkeys([*saved["sources"], *self.of_source]):
            old = [was[c] for c in saved["sources"].get(source, ())]
            new = [now[c] for c in self.of_source.get(source, ())]
            lines += _changed(f'source "{source}": class', old, new)
        return lines + _changed("concept", was, now)


def make_concept_table(
    class_names: Mapping[str, Sequence[str]], synonyms: Synonyms | None = None
) -> ConceptTable:
    """Merges class names that say the same, over all sources.

    Two names are one concept if they are equal after cleaning and lower-casing ("Dog"
    and "dog" would otherwise be negatives of each other with the same text), or if
    synonyms join them.

    Args:
      class_names: source name -> its class names, in label order.
      synonyms: names that mean the same; default none.

    Returns:
      The table; concepts are numbered in order of first appearance.
    """
    synonyms = Synonyms() if synonyms is None else synonyms
    concept_of: dict[str, int] = {}  # by the key that stands for all synonyms
    first: dict[tuple[str | None, int], tuple[str, int, str]] = {}
    index: dict[str, int] = {}
    names, of_source, merged, duplicates = [], {}, [], []
    for source, classes in class_names.items():
        concepts = []
        for label, name in enumerate(classes):
            key = name_key(name)
            concept = concept_of.setdefault(synonyms.root(key), len(names))
            own = first.get((source, concept))
            if own or concept < len(names):
                to = own or first[None, concept]
                joined = Joined(source, label, name, *to, key != name_key(to[2]))
                (duplicates if own else merged).append(joined)
            else:
                names.append(clean_class_name(name))
            for scope in (source, None):
                first.setdefault((scope, concept), (source, label, name))
            index[key] = concept
            concepts.append(concept)
        of_source[source] = np.array(concepts, np.int32)
    unknown = tuple(name for key, name in synonyms.names.items() if key not in index)
    for key in synonyms.names:
        if (root := synonyms.root(key)) in concept_of:
            index[key] = concept_of[root]
    return ConceptTable(
        tuple(names), of_source, index, tuple(merged), tuple(duplicates), unknown
    )


def _count(joined: Sequence[Joined]) -> str:
    return "1 class" if len(joined) == 1 else f"{len(joined):,} classes"


def _said(joined: Joined) -> str:
    synonym = f' (as "{joined.to_name}")' if joined.by_synonym else ""
    return f'{joined.source} "{joined.name}"{synonym}'


def _some(things: Sequence, say: Callable[[Any], str]) -> str:
    more = f" and {len(things) - _NAMED:,} more" if len(things) > _NAMED else ""
    return ", ".join(map(say, things[:_NAMED])) + more


def _quoted(name: str) -> str:
    return f'"{name}"'


def _changed(what: str, old: Sequence[str], new: Sequence[str]) -> list[str]:
    pairs = itertools.zip_longest(map(_quoted, old), map(_quoted, new))
    return [
        f"{what} {number} was {a or 'not there'}, is {b or 'not there'}"
        for number, (a, b) in enumerate(pairs)
        if (a or "").lower() != (b or "").lower()
    ]
