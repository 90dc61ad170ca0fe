"""Names that mean the same: groups of them, from a config or a file."""

from collections.abc import Iterable, Sequence

from unicl_jax.data.prompts import clean_class_name
from unicl_jax.data.shards import open_shard
from unicl_jax.errors import InputError


class Synonyms:
    """Which names are one, directly or by way of others.

    Attributes:
      names: each that was given, as it was first spelt, by its key.
    """

    def __init__(self, groups: Iterable[Sequence[str]] = ()):
        """Joins the names of each group; a name in two groups joins those, too.

        Args:
          groups: names that mean the same.
        """
        self.names: dict[str, str] = {}
        self._parent: dict[str, str] = {}
        for group in groups:
            keys = [name_key(name) for name in group]
            for key, name in zip(keys, group, strict=True):
                self.names.setdefault(key, name)
                self._parent[self.root(key)] = self.root(keys[0])

    def root(self, key: str) -> str:
        """The key that stands for all that mean the same.

        Args:
          key: of a name, known here or not.

        Returns:
          One of the keys of its group; itself if it has no synonym.
        """
        while (parent := self._parent.setdefault(key, key)) != key:
            self._parent[key] = self._parent[parent]
            key = parent
        return key


def name_key(name: str) -> str:
    """What is compared of a name: it is cleaned, and its case left out."""
    return clean_class_name(name).lower()


def load_synonyms(value: str | Iterable[Sequence[str]] | None) -> Synonyms:
    """Reads `data.synonyms`.

    Args:
      value: groups of names; or a text file, local or `gs://`, a group a line, tabs
        between its names; None or "": none.

    Returns:
      The names that mean the same.

    Raises:
      InputError: if a file cannot be read, or a group has not two names or more.
    """
    where, groups = "group", value or ()
    if isinstance(groups, str):
        where, groups = "line", [line.split("\t") for line in _lines(groups)]
    checked = []
    for number, group in enumerate(groups, 1):
        group = [name.strip() for name in group]
        if group == [""]:
            continue  # an empty line
        if len(group) < 2 or not all(map(_is_name, group)):
            raise InputError(
                "data.synonyms must have two names or more that mean the same in each "
                f"{where}: {where} {number} is {group}; in a file a tab stands between "
                "names. Mend it."
            )
        checked.append(group)
    return Synonyms(checked)


def _is_name(name):
    try:
        return bool(clean_class_name(name))
    except InputError:
        return False


def _lines(path):
    try:
        with open_shard(path) as file:
            return file.read().decode("utf-8-sig").splitlines()
    except Exception as error:  # gfile has error types of its own
        raise InputError(
            "data.synonyms must be groups of names or a readable text file, a group a "
            f"line: {path} is not ({error}); set data.synonyms."
        ) from error
