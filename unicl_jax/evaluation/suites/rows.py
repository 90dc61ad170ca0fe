"""One row of a suite's file -> a task; what is wrong is said with file, task, field."""

import os
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from unicl_jax.data import quickstart
from unicl_jax.data.prompts import TEMPLATES, load_templates
from unicl_jax.data.shards import open_shard
from unicl_jax.data.synonyms import name_key
from unicl_jax.errors import InputError, did_you_mean
from unicl_jax.evaluation.derived import RULES
from unicl_jax.evaluation.places import FORMATS, SPLITS, Place
from unicl_jax.evaluation.tasks import KINDS, METRICS, Task

FIELDS = {
    "like": '"suite/task": a row whose fields count where this one has none',
    "name": "letters, digits and _",
    "title": "for people",
    "kind": f"one of {', '.join(KINDS)}; the first is the default",
    "metric": f"one of {', '.join(METRICS)}; the first is the default",
    "class_names": "a list, a table key -> name, a file, or the name of one that ships",
    "classes": "keys of the classes there are, as class_names; all if left out",
    "templates": "a list, a file, the name of one that ships, or of a run's templates",
    "sizes": "split -> the records that the protocol has",
    "how": "how to get the data; {data_dir} is filled in",
    "where": "tables, best place first; places.Place",
    "squash": "whether images are resized to a square, not cropped",
}
_PLACE = ("format", "path", *SPLITS, "labels", "order", "options")
_BUILT_IN = {
    "emoji_names": quickstart.emoji_names,
    "emoji_subgroups": lambda: quickstart.emoji_subgroups()[1],
    "fashion_mnist": lambda: quickstart.FASHION_CLASSES,
}


def task_of(
    row: Mapping[str, Any],
    suite: str,
    file: str,
    number: int,
    like: Callable[[str, str], Mapping[str, Any]],
) -> Task:
    """Makes the task of a row.

    Args:
      row: its fields.
      suite: its suite's name.
      file: where it stands, for errors.
      number: of the row there, from 1.
      like: ("suite/task", where it is said) -> the fields of that row.

    Returns:
      The task.

    Raises:
      InputError: names file, task and field.
    """
    row = _plain(row)
    at = f'{file}: task "{row.get("name") or row.get("like") or number}"'
    unknown = sorted(set(row) - set(FIELDS))
    if unknown:
        raise InputError(
            f'{at}: fields must be known: got "{unknown[0]}"; '
            f"{did_you_mean(unknown[0], FIELDS)}"
        )
    folders = []
    if "like" in row:
        found = like(row.pop("like"), f"{at}: like")
        folders, row = [found["name"]], {**found, **row}
    name = row.get("name", "")
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise InputError(
            f'{at}: name must be letters, digits and "_": got {name!r}; mend it.'
        )
    kind = _one_of(f"{at}: kind", row.get("kind", KINDS[0]), KINDS)
    squash = row.get("squash", False)
    if not isinstance(squash, bool):
        raise InputError(f"{at}: squash must be true or false: got {squash!r}.")
    fields = dict(
        name=name,
        title=str(row.get("title", name)),
        suite=suite,
        kind=kind,
        metric="",
        sizes=_sizes(at, row.get("sizes", {})),
        how=str(row.get("how", "")),
        where=_places(at, file, [name, *folders], kind, row.get("where")),
        squash=squash,
    )
    if kind == "retrieval":
        for field in ("metric", "class_names", "classes", "templates"):
            if field in row:
                raise InputError(
                    f"{at}: {field} must be left out of a retrieval task: got "
                    f"{row[field]!r}."
                )
        return Task(**fields)
    metric = _one_of(f"{at}: metric", row.get("metric", METRICS[0]), METRICS)
    keys, names, aliases = _classes(at, file, row)
    if metric == "roc_auc" and len(keys) != 2:
        raise InputError(
            f"{at}: metric roc_auc must have two classes: got {len(keys)}; choose "
            "another metric."
        )
    return Task(
        **fields
        | dict(
            metric=metric,
            templates=_templates(at, file, row.get("templates")),
            class_names=names,
            class_keys=keys,
            aliases=aliases,
        )
    )


def _plain(value):
    """A recipe's ConfigDicts and tuples as a TOML file has them."""
    if hasattr(value, "items"):  # a ConfigDict is no Mapping
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _one_of(what, value, choices):
    if value not in choices:
        raise InputError(f'{what}: got "{value}"; {did_you_mean(value, choices)}')
    return value


def _sizes(at, sizes):
    good = isinstance(sizes, Mapping) and all(
        split in SPLITS and type(size) is int and size > 0
        for split, size in sizes.items()
    )
    if not good:
        raise InputError(
            f"{at}: sizes must map {', '.join(SPLITS)} to numbers of records: got "
            f"{sizes!r}."
        )
    return dict(sizes)


def _places(at, file, names, kind, where):
    """The row's places, and then where everybody may put data of these names."""
    if where is None:
        where = []
    if not isinstance(where, list) or not all(isinstance(w, Mapping) for w in where):
        raise InputError(f"{at}: where must be a list of tables: got {where!r}.")
    places = [_place(f"{at}: where", file, place) for place in where]
    if any(place.format == "quickstart" for place in places):
        return tuple(places)
    formats = ["prepared", "webdataset", "folder", "csv", "npz"]
    if kind != "classification":
        formats.remove("folder")
    if kind == "multi_label":
        formats.remove("prepared")
    names = dict.fromkeys(names)
    standard = [Place(format_, name) for name in names for format_ in formats]
    given = [(place.format, place.path) for place in places]
    places += [p for p in standard if (p.format, p.path) not in given]
    return tuple(places)


def _place(at, file, place):
    unknown = sorted(set(place) - set(_PLACE))
    if unknown:
        raise InputError(
            f'{at}: fields must be known: got "{unknown[0]}"; '
            f"{did_you_mean(unknown[0], _PLACE)}"
        )
    for field in ("format", "path"):
        if not isinstance(place.get(field), str) or not place[field]:
            raise InputError(f"{at}: {field} must be a text: got {place.get(field)!r}.")
    names = {split: place[split] for split in SPLITS if split in place}
    labels, options = place.get("labels", ""), place.get("options", {})
    for field, each in {**names, "labels": labels}.items():
        if not isinstance(each, str):
            raise InputError(f"{at}: {field} must be a text: got {each!r}.")
    if labels:
        _one_of(f"{at}: labels", labels, RULES)
    if not isinstance(options, Mapping):
        raise InputError(f"{at}: options must be a table: got {options!r}.")
    format_ = _one_of(f"{at}: format", place["format"], FORMATS)
    order = ()
    if "order" in place:
        order = tuple(e[0] for e in _entries(f"{at}: order", file, place["order"]))
    return Place(format_, place["path"], names, dict(options), labels, order)


def _classes(at, file, row):
    """Keys, names and aliases of the classes, in label order."""
    if "class_names" not in row:
        raise InputError(
            f"{at}: class_names must say what prompts call the classes: there is none; "
            f"it is {FIELDS['class_names']}."
        )
    entries = _entries(f"{at}: class_names", file, row["class_names"])
    if "classes" in row:
        wanted = _entries(f"{at}: classes", file, row["classes"], ".keys")
        known = {entry[0]: entry for entry in entries}
        lost = [entry[0] for entry in wanted if entry[0] not in known]
        if lost:
            raise InputError(
                f'{at}: classes must be keys of class_names: "{lost[0]}" is none; '
                "mend it."
            )
        entries = [known[entry[0]] for entry in wanted]
    if len(entries) < 2:
        raise InputError(
            f"{at}: class_names must have two classes or more: got {len(entries)}."
        )
    keys = [entry[0] for entry in entries]
    _unlike(f"{at}: class_names: keys", keys)
    aliases = {alias: i for i, entry in enumerate(entries) for alias in entry[2:]}
    return tuple(keys), tuple(entry[1] for entry in entries), aliases


def _entries(at, file, value, suffix=".tsv") -> list[tuple[str, ...]]:
    """(key, name, aliases ...) of each class."""
    if isinstance(value, Mapping):
        return [(str(k), *_words(f"{at}: {k}", v)) for k, v in value.items()]
    if isinstance(value, str) and value in _BUILT_IN:
        value = list(_BUILT_IN[value]())
    if isinstance(value, str):
        lines = _lines(at, file, value, "class_names", suffix)
        entries = [tuple(line.split("\t")) for line in lines]
    else:
        entries = [(str(each),) for each in _words(at, value)]
    entries = [tuple(part.strip() for part in entry) for entry in entries]
    for number, entry in enumerate(entries, 1):
        if not all(entry):
            raise InputError(f"{at} must not be empty: entry {number} is {entry}.")
    return [entry if len(entry) > 1 else (entry[0], entry[0]) for entry in entries]


def _words(at, value):
    value = [value] if isinstance(value, str) else value
    good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    if not good or not all(v.strip() for v in value) or not value:
        raise InputError(f"{at} must be a text or a list of texts: got {value!r}.")
    return tuple(value)


def _unlike(at, names):
    seen = {}
    for name in names:
        other = seen.setdefault(name_key(name), name)
        if other is not name:
            raise InputError(
                f'{at} must be different: got "{other}" and "{name}"; rename one.'
            )


def _templates(at, file, value):
    at = f"{at}: templates"
    if value is None:
        raise InputError(f"{at} must be given: they are {FIELDS['templates']}.")
    if isinstance(value, str) and value not in TEMPLATES:
        value = [line for line in _lines(at, file, value, "templates", ".txt") if line]
    try:
        return load_templates(value)
    except (InputError, TypeError) as error:
        raise InputError(f"{at}: {error}") from error


def _lines(at, file, name, folder, suffix):
    """The lines of a file: one that ships, or one by its path, beside `file`."""
    shipped = resources.files(__package__) / folder
    if "/" not in name and "." not in name:
        files = [os.path.splitext(each.name) for each in shipped.iterdir()]
        names = [stem for stem, end in files if end == suffix]
        if name not in names:
            more = {".txt": TEMPLATES, ".tsv": _BUILT_IN}.get(suffix, ())
            known = {*names, *more}
            raise InputError(f'{at}: got "{name}"; {did_you_mean(name, known)}')
        text = (shipped / f"{name}{suffix}").read_text(encoding="utf-8")
        return text.splitlines()
    path = os.path.join(os.path.dirname(file), os.path.expanduser(name))
    try:
        with open_shard(path) as opened:
            return opened.read().decode("utf-8-sig").rstrip().splitlines()
    except Exception as error:  # gfile has error types of its own
        raise InputError(
            f"{at}: the file must be readable: {path} is not ({error})."
        ) from error
