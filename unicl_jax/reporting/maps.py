"""Maps: image and text features of a task in two dimensions."""

import contextlib
from typing import NamedTuple

import numpy as np

from unicl_jax.reporting import svg
from unicl_jax.reporting.examples import class_name
from unicl_jax.reporting.markup import Html, el, join, name_of
from unicl_jax.reporting.results import Task, read_arrays

POINTS = 800  # images of a map; more take long and are not seen apart
SHOWN = 10  # classes with colours of their own
FEW = 3  # records of a class: with fewer, colours say what was right instead
SIDE = 300  # pixels of the map


class Map(NamedTuple):
    """Points of a task in the plane."""

    method: str  # "t-SNE" or "PCA"
    images: np.ndarray  # [n, 2] in 0..1
    texts: np.ndarray  # [m, 2] in 0..1
    labels: np.ndarray  # [n]
    classes: np.ndarray  # [m] whose texts they are
    right: np.ndarray | None  # [n] bool, where predictions are known
    gap: float  # the cosine between the mean image and the mean text


def make_map(task: Task, points: int = POINTS) -> Map | None:
    """Puts image features and class embeddings of a task into one plane.

    Images lie by themselves, away from all texts, in a model like this one; the mean of
    each kind is therefore taken off first.

    Args:
      task: whose arrays are read.
      points: images at most; of a task with many classes half of them are of the
        largest.

    Returns:
      The map; None without features of images, or with fewer than ten.

    Source: van der Maaten and Hinton, JMLR 2008; the gap: arXiv 2203.02053.
    """
    features = _features(task)
    if features is None or points < 10:
        return None
    images, labels, index = features
    protocol = task.protocols.get("zero_shot")
    predicted = read_arrays(protocol.arrays) if protocol else {}
    texts = predicted.get("class_embeddings")
    if texts is None:
        found = read_arrays(task.folder / "texts.npz")
        texts = found.get("class_embeddings", np.zeros((0, images.shape[1])))
    if texts.ndim != 2 or texts.shape[1] != images.shape[1]:
        texts = np.zeros((0, images.shape[1]))
    keep = sample(labels, points)
    if len(keep) < 10:
        return None
    images, labels = images[keep], labels[keep]
    classes = np.unique(labels)
    classes = classes[classes < len(texts)]
    right = _right(predicted, index[keep], labels)
    images, texts = _unit(images), _unit(texts[classes])
    gap = float("nan")
    if len(texts):
        means = [_unit(x.mean(0, keepdims=True))[0] for x in (images, texts)]
        gap = float(means[0] @ means[1])
    method, plane = _plane(np.concatenate([_centred(images), _centred(texts)]))
    low, high = plane.min(0), plane.max(0)
    plane = (plane - low) / np.maximum(high - low, 1e-12)
    n = len(images)
    return Map(method, plane[:n], plane[n:], labels, classes, right, gap)


def sample(labels: np.ndarray, points: int, seed: int = 0) -> np.ndarray:
    """Which images a map shows.

    Args:
      labels: [n] integer.
      points: at most so many.
      seed: of the choice.

    Returns:
      Positions in order. Where there are more than SHOWN classes, half of them are of
      those SHOWN with most records.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    if len(labels) <= points:
        return np.sort(order)
    largest = np.isin(labels[order], shown_classes(labels))
    half = order[largest][: points // 2]
    rest = order[~np.isin(order, half)][: points - len(half)]
    return np.sort(np.concatenate([half, rest]))


def shown_classes(labels: np.ndarray) -> np.ndarray:
    """The classes with colours of their own: those with most records, in order."""
    classes, counts = np.unique(labels, return_counts=True)
    largest = np.lexsort((classes, -counts))[:SHOWN]
    if counts[largest].mean() < FEW:
        return classes[:0]
    return np.sort(classes[largest])


def map_figure(found: Map, task: Task, run: str) -> Html:
    """Draws a map.

    Args:
      found: by `make_map`.
      task: for the names of classes.
      run: whose it is.

    Returns:
      A figure with its legend.
    """
    chosen = shown_classes(found.labels)
    parts: list[Html] = []
    legend: list[Html] = []

    def draw(mask, size, style):
        if mask.any():
            parts.append(svg.dots(*_pixels(found.images[mask]), size, class_=style))

    if len(chosen):
        draw(~np.isin(found.labels, chosen), 2.5, "other")
        for i, k in enumerate(chosen):
            draw(found.labels == k, 3.5, f"c{i}")
            swatch = svg.dots([6], [6], 9, class_=f"c{i}")
            drawn = el("svg", swatch, viewbox="0 0 12 12", aria_hidden="true")
            legend.append(el("li", drawn, name_of(class_name(task, int(k)), 40)))
    elif found.right is not None:
        for value, style, said in ((False, "c1", "wrong"), (True, "c0", "right")):
            draw(found.right == value, 3, style)
            swatch = svg.dots([6], [6], 9, class_=style)
            drawn = el("svg", swatch, viewbox="0 0 12 12", aria_hidden="true")
            legend.append(el("li", drawn, f"image, named {said}"))
    else:
        draw(np.ones(len(found.labels), bool), 3, "c0")
    colors = {int(k): i for i, k in enumerate(chosen)}
    texts = sorted(
        zip(found.classes, found.texts, strict=True), key=lambda x: int(x[0]) in colors
    )
    for k, point in texts:
        (x,), (y,) = _pixels(point[None])
        own = colors.get(int(k))
        style = "other" if own is None else f"c{own}"
        size = 2 if own is None else 6
        mark = f"M{svg.at(x)} {svg.at(y - size)}l{size} {size} -{size} {size} "
        mark += f"-{size} -{size}z"
        name = class_name(task, int(k))
        parts.append(el("path", el("title", name), d=mark, class_=f"text {style}"))
        if own is not None:
            to_left = x > 0.62 * svg.WIDTH
            parts.append(
                svg.label(x - 9 if to_left else x + 9, y + 4, name, 18, class_="halo",
                          text_anchor="end" if to_left else None)
            )  # fmt: skip
    words = f"{found.method} map of {len(found.images)} image features"
    words += f" and {len(found.texts)} class embeddings of {task.title}, {run}"
    notes = [
        f"{found.method}: dots are {len(found.images):,} images, diamonds "
        f"{len(found.texts):,} classes' texts, each kind about its own mean"
        + (
            f" (the cosine of the two means is {found.gap:.2f})."
            if np.isfinite(found.gap)
            else "."
        )
    ]
    if found.method == "PCA":
        notes.append(
            "A projection on two directions, since scikit-learn is not here: pip "
            "install unicl_jax[report] gives t-SNE."
        )
    drawn = svg.svg(words, *parts, height=SIDE + 20)
    box = el("ul", *legend, class_="legend") if legend else None
    return svg.figure(join("Map, ", name_of(run, 40)), join(box, drawn), *notes)


def _pixels(points):
    return (
        (12 + points[:, 0] * (svg.WIDTH - 24)).tolist(),
        (10 + (1 - points[:, 1]) * SIDE).tolist(),
    )


def _features(task):
    """Image features, labels and indices of the split that is judged; or None."""
    for split in ("test", "val"):
        arrays = read_arrays(task.folder / f"features_{split}.npz")
        image, label = arrays.get("image"), arrays.get("label")
        if image is None or label is None or image.ndim != 2:
            continue
        index = arrays.get("index", np.arange(len(image)))
        if not len(image) == len(label) == len(index):
            continue
        keep = np.isfinite(image).all(1)
        if label.ndim == 2:  # several classes: an image of two has no one colour
            keep &= (label > 0).sum(1) == 1
            label = label.argmax(1)
        keep &= label >= 0
        return image[keep].astype(np.float32), label[keep].astype(int), index[keep]
    return None


def _right(arrays, index, labels):
    if not {"predictions", "index"} <= arrays.keys():
        return None
    predictions = arrays["predictions"]
    first = predictions[:, 0] if predictions.ndim == 2 else predictions
    guess = dict(zip(arrays["index"].tolist(), first.tolist(), strict=False))
    if not all(i in guess for i in index.tolist()):
        return None
    return np.array([guess[i] for i in index.tolist()]) == labels


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _centred(x):
    return _unit(x - x.mean(0, keepdims=True)) if len(x) else x


def _plane(x):
    """t-SNE, or without scikit-learn the two widest directions."""
    start = _pca(x)
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return "PCA", start
    start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4  # scikit-learn's own
    perplexity = min(30.0, (len(x) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init=start, random_state=0)
    with _one_thread():
        return "t-SNE", tsne.fit_transform(x.astype(np.float32))


def _one_thread():
    """Of so few points threads do more waiting than work, ten times on a busy box."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(1)


def _pca(x):
    x = x - x.mean(0, keepdims=True)
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    plane = x @ directions[:2].T
    if plane.shape[1] < 2:  # features of one number
        plane = np.concatenate([plane, np.zeros((len(x), 1))], 1)
    return plane.astype(np.float32)
