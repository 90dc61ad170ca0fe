"""Examples: pairs of classes that are mixed up, and what retrieval found."""

import numpy as np

from unicl_jax.reporting.headline import percent
from unicl_jax.reporting.markup import Html, el, join, name_of, shorten
from unicl_jax.reporting.pictures import Pictures
from unicl_jax.reporting.results import (
    Protocol,
    Task,
    number,
    objects,
    read_arrays,
    text,
    whole,
)

PAIRS = 8
OF_A_PAIR = 3  # wrong pictures
RETRIEVED = 8


def confusions(task: Task, protocol: Protocol, limit: int = PAIRS) -> Html | None:
    """The classes that a model mixes up most, with pictures.

    Args:
      task: whose pictures these are.
      protocol: with `confusions` in its details.
      limit: of pairs.

    Returns:
      A list; None if nothing is known of pairs.
    """
    given = protocol.details.get("confusions")
    if not isinstance(given, list):
        return None
    pairs = [p for p in map(_pair, objects(given)) if p]
    if not pairs:
        return el("p", "No class was taken for another.", class_="note")
    pictures = Pictures(task.folder)
    shown = _guesses(protocol, pictures)
    once = pairs[0][2] == 1  # of a class with one record all is always mixed up
    items = []
    for true, predicted, count, share in pairs[:limit]:
        names = [class_name(task, k) for k in (true, predicted)]
        of = f", {percent(share)} % of its images" if share is not None else ""
        parts = [
            pictures.show(i, f"{names[0]}, taken for {names[1]}", False)
            for i in _of(shown, true, predicted)[:OF_A_PAIR]
        ]
        for k, name in zip((true, predicted), names, strict=True):
            right = _of(shown, k, k)[:1]
            if right:
                parts.append(pictures.show(right[0], name, True))
            elif k == predicted:  # what it looks like, whatever it was taken for
                parts += [pictures.show(i, name) for i in _of(shown, k)[:1]]
        head = [name_of(names[0], 80), " \u2192 ", name_of(names[1], 80)]
        tail = None if once else el("small", f" {count:,}\u00d7{of}")
        box = el("div", *parts, class_="pics") if any(parts) else None
        items.append(el("li", el("div", *head, tail), box))
    told = "No pair of classes is mixed up more than once. Some mistakes:"
    note = el("p", told, class_="note") if once else None
    return join(note, el("ol", *items, class_="pairs"))


def class_name(task: Task, index: int) -> str:
    """A class's name, or its number if it has none."""
    names = task.class_names
    return names[index] if 0 <= index < len(names) else f"class {index}"


def retrieval(task: Task, protocol: Protocol) -> Html | None:
    """What was found for some queries, both ways; None if there are no examples."""
    given = protocol.details.get("examples")
    if not isinstance(given, dict):
        return None
    pictures = Pictures(task.folder)
    texts = [_of_image(e, pictures) for e in objects(given.get("image_to_text"))]
    images = [_of_text(e, pictures) for e in objects(given.get("text_to_image"))]
    parts = []
    if texts:
        items = el("ul", *texts[:RETRIEVED], class_="queries")
        parts.append(join(el("h5", "Image to text: the best texts"), items))
    if images:
        items = el("ul", *images[:RETRIEVED], class_="queries")
        parts.append(join(el("h5", "Text to image: the best images"), items))
    return join(*parts) if parts else None


def _pair(row):
    found = [whole(row.get(k)) for k in ("true", "predicted", "count")]
    return None if None in found else (*found, number(row.get("share")))


def _guesses(protocol, pictures):
    """What each record with a picture is and was taken for: {index: (true, guess)}."""
    arrays = read_arrays(protocol.arrays)
    if not {"predictions", "labels", "index"} <= arrays.keys():
        return {}
    predictions, labels = arrays["predictions"], arrays["labels"]
    if labels.ndim != 1 or not len(predictions) == len(labels) == len(arrays["index"]):
        return {}
    first = predictions[:, 0] if predictions.ndim == 2 else predictions
    kept = np.flatnonzero(np.isin(arrays["index"], pictures.indices))
    return {int(arrays["index"][i]): (int(labels[i]), int(first[i])) for i in kept}


def _of(shown, true, predicted=None):
    """The records with pictures of a class, taken for another or for any."""
    return [i for i, (a, b) in shown.items() if a == true and predicted in (None, b)]


def _rank(example):
    rank = whole(example.get("rank"))
    if rank is None:
        return None
    said = "found first" if rank == 1 else f"the right one is at rank {rank:,}"
    return el("small", said)


def _of_image(example, pictures):
    index = whole(example.get("image"))
    query = pictures.show(index, "the query") if index in pictures else None
    if query is None:
        query = el("span", f"image {index}", class_="none")
    rows = []
    for found in objects(example.get("texts")):
        right = bool(found.get("right"))
        mark = el("span", "\u2713" if right else "\u2717", aria_hidden="true")
        said = el("span", "right: " if right else "wrong: ", class_="unseen")
        score = number(found.get("score"))
        score = el("small", f" {score:.2f}") if score is not None else None
        name = name_of(text(found.get("text")) or "", 200)
        rows.append(el("li", mark, " ", said, name, score,
                       class_="right" if right else "wrong"))  # fmt: skip
    given = example.get("right")
    own = [x for x in given if isinstance(x, str)] if isinstance(given, list) else []
    tail = None
    if own and (whole(example.get("rank")) or 2) > len(rows):
        tail = el("small", "; its own text: ", name_of(own[0], 200))
    return el("li", query, el("div", el("ol", *rows), _rank(example), tail))


def _of_text(example, pictures):
    query = text(example.get("text")) or ""
    shown, seen = [], set()
    for found in objects(example.get("images")):
        index, right = whole(found.get("image")), bool(found.get("right"))
        seen.add(index)
        picture = pictures.show(index, f"found for {shorten(query, 80)}", right)
        shown.append(picture or el("span", f"image {index}", class_="none"))
    given = example.get("right")
    own = [whole(x) for x in given] if isinstance(given, list) else []
    lost = [i for i in own if i is not None and i not in seen and i in pictures]
    if lost and not seen & set(own):
        picture = pictures.show(lost[0], f"the right one for {shorten(query, 80)}")
        shown.append(el("span", el("small", "right: "), picture, class_="one"))
    head = el("div", "\u201c", name_of(query, 300), "\u201d ", _rank(example))
    return el("li", el("div", head, el("div", *shown, class_="pics")))
