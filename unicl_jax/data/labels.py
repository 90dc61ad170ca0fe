"""Class names of a source, and the label that a folder or a cell of a table gets."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from unicl_jax.data.prompts import clean_class_name
from unicl_jax.data.shards import open_shard
from unicl_jax.data.synonyms import name_key
from unicl_jax.errors import InputError

# Names that ship with the package: TFDS, for one, knows ImageNet's classes by id only.
CLASS_NAMES = {"imagenet": "imagenet.txt"}

_NAMED = 3  # examples in a message
OUT_OF_RANGE, NO_CLASS = "label out of range", "label is no class"


def load_class_names(source: str, value) -> tuple[str, ...]:
    """Class names from a list, a text file with one a line, or a key of CLASS_NAMES.

    Args:
      source: the source's name, for errors.
      value: what its config says.

    Returns:
      The names, in label order.

    Raises:
      InputError: if there is none, a name is empty, or they are not in label order.
    """
    names = _load(source, value)
    if isinstance(names, Mapping):
        raise InputError(
            f'source "{source}": class_names must be in label order, for labels are '
            f"numbers in this format: got a name for each of {_some(names)}; set "
            "`class_names` to a list or a text file with one name a line."
        )
    if not names:
        raise InputError(
            f'source "{source}": class_names must name every class of an image-label '
            "source: got none; set `class_names` to a list or a text file with one "
            "name a line."
        )
    return names


def number_folders(
    source: str, folders: Sequence[str], value
) -> tuple[tuple[str, ...], list[int]]:
    """Names class folders and numbers them.

    Args:
      source: the source's name, for errors.
      folders: their names, sorted.
      value: `class_names` of the config. None: a folder is called as its class is, with
        "_" for spaces. A list or a text file: in its order if it has the name of every
        folder, else one name a folder. A mapping, or a text file of lines
        folder<TAB>name: the name of each folder.

    Returns:
      The names in label order, and the label of each folder.

    Raises:
      InputError: if `value` cannot be read or leaves a folder without a name.
    """
    names = _load(source, value)
    if isinstance(names, Mapping):
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise InputError(
                f'source "{source}": class_names must name every class folder: '
                f"{len(missing)} of {len(folders)} have no name, as {_some(missing)}; "
                "add them to `class_names`."
            )
        names = tuple(names[folder] for folder in folders)
    elif names:
        label = {_key(name): i for i, name in enumerate(names)}
        if all(_key(folder) in label for folder in folders):
            return names, [label[_key(folder)] for folder in folders]
        if len(names) != len(folders):
            raise InputError(
                f'source "{source}": class_names must hold one name a class folder, in '
                f"the folders' order, or the names of the folders: got {len(names)} "
                f"names and {len(folders)} folders, from {_some(folders)}; mend "
                "`class_names`, or make it a mapping from folder to name."
            )
    else:
        for folder in folders:
            if not _key(folder):
                raise InputError(
                    f'source "{source}": a class folder must be called as its class '
                    f'is: got "{folder}", which holds no word; rename it, or set '
                    "`class_names` to a mapping from folder to name."
                )
        names = tuple(map(clean_class_name, folders))
    return names, list(range(len(folders)))


def number_cells(
    source: str, cells: Iterable[str], value, offset: int
) -> tuple[tuple[str, ...], dict[str, int | str]]:
    """Numbers the labels of a table, which are class names or integers.

    Args:
      source: the source's name, for errors.
      cells: the distinct ones.
      value: `class_names` of the config. None: the cells are the names, sorted. A list
        or a text file: cells are among the names, or their numbers. A mapping, or a
        text file of lines cell<TAB>name: the name of each cell.
      offset: the number of the first class, where cells are integers.

    Returns:
      The names in label order; cell -> label, or the reason why it has none.

    Raises:
      InputError: if `value` cannot be read, or cells are integers without names.
    """
    names, cells = _load(source, value), sorted(cells)
    if isinstance(names, Mapping):
        known = [cell for cell in cells if cell in names]
        label = dict.fromkeys(cells, NO_CLASS) | {c: i for i, c in enumerate(known)}
        return tuple(names[cell] for cell in known), label
    integers = {cell: _integer(cell) for cell in cells}
    if not names:
        if cells and None not in integers.values():
            raise InputError(
                f'source "{source}": labels must be class names, or integers with '
                f"class_names: got {_some(cells)} and no class_names; set `class_names`"
                " to a list or a text file with one name a line."
            )
        words = [cell for cell in cells if _key(cell)]
        names = tuple(dict.fromkeys(map(clean_class_name, words)))
    by_name = {_key(name): i for i, name in reversed([*enumerate(names)])}
    label = {}
    for cell, number in integers.items():
        if _key(cell) in by_name:
            label[cell] = by_name[_key(cell)]
        elif number is None:
            label[cell] = NO_CLASS
        else:
            is_there = 0 <= number - offset < len(names)
            label[cell] = number - offset if is_there else OUT_OF_RANGE
    return names, label


def _key(name: str) -> str:
    try:
        return name_key(name)  # as the concept table compares them
    except InputError:  # nothing of it is a word: a cell like that is no class
        return ""


def _integer(cell: str) -> int | None:
    try:
        return int(cell)
    except ValueError:
        return None


def _some(names: Iterable[str]) -> str:
    names = [f'"{name}"' for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _load(source: str, value) -> tuple[str, ...] | dict[str, str]:
    """The names, in order or by folder; () if there are none."""
    if value is None or value == "":
        return ()
    where = "entry"
    if isinstance(value, str):
        value, where = _lines(source, value), "line"
        parts = [line.split("\t", 1) for line in value]
        if value and all(len(part) == 2 for part in parts):
            value = dict(parts)
    if hasattr(value, "items"):  # a ConfigDict is no Mapping
        value = {str(k).strip(): str(v).strip() for k, v in value.items()}
        names = list(value.values())
    else:
        value = names = tuple(str(name).strip() for name in value)
    for number, name in enumerate(names, 1):
        if not _key(name):
            found = f'holds no word ("{name}")' if name else "is empty"
            raise InputError(
                f'source "{source}": class_names must not be empty: {where} {number} '
                f"{found}; mend it."
            )
    return value


def _lines(source: str, path: str) -> list[str]:
    if path in CLASS_NAMES:
        file = resources.files(__package__) / "class_names" / CLASS_NAMES[path]
        return file.read_text(encoding="utf-8").splitlines()
    try:
        with open_shard(path) as file:
            return file.read().decode("utf-8-sig").rstrip().splitlines()
    except Exception as error:  # gfile has error types of its own
        raise InputError(
            f'source "{source}": class_names must be a list or a readable text file '
            f"with one name a line: {path} is not ({error}); set `class_names`."
        ) from error
