"""Class embeddings from names and templates: the weights of a zero-shot classifier."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from unicl_jax.data.prompts import fill
from unicl_jax.errors import InputError
from unicl_jax.evaluation import texts


class Prompts(NamedTuple):
    """The texts of a task's classes, each distinct one once.

    Letters: K classes, T templates, u distinct texts, L slots.
    """

    tokens: np.ndarray  # [u, L] int32
    # [K * T] int64, which text each prompt is: templates of the first class, ...
    index: np.ndarray
    num_classes: int


def make_prompts(
    names: Sequence[str],
    templates: Sequence[str],
    tokenize: Callable[[Sequence[str]], np.ndarray],
) -> Prompts:
    """Fills templates with names, and tokenises what is distinct.

    Args:
      names: of K classes, in their order.
      templates: T texts with one {} each.
      tokenize: texts -> [n, L] int32.

    Returns:
      The prompts.

    Raises:
      InputError: if there are no names or no templates, or one is not as `fill` needs
        it.
    """
    for what, given in (("class names", names), ("templates", templates)):
        if isinstance(given, str) or not len(given):
            raise InputError(f"{what} must be one text or more: got {given!r}.")
    written: dict[str, int] = {}
    index = [
        written.setdefault(fill(template, name), len(written))
        for name in names
        for template in templates
    ]
    # Texts that differ can be the same to the tower, as "Crane" and "crane".
    tokens, again = texts.distinct(np.asarray(tokenize(list(written))))
    return Prompts(tokens, again[np.array(index)], len(names))


def class_embeddings(
    encode: Callable,
    params,
    state,
    prompts: Prompts,
    mesh: Mesh,
    tower: Mapping[str, Any] | None = None,
    between: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The classifier: of each class the mean of its prompts' embeddings, unit.

    c_k = unit(mean_t unit(f_text(prompt_t(name_k))))

    Args:
      encode: (params, state, tokens or packed texts, divided over the devices) -> unit
        embeddings [.., D], a copy on every device.
      params: of the towers.
      state: of the towers.
      prompts: of the classes, the same on every process.
      mesh: the devices.
      tower: options of the text tower, defaults included, which say what slots it need
        not be given; None: it sees all.
      between: called after every batch; what it raises ends the work.

    Returns:
      [K, D] float32.

    Source: CLIP, section 3.1.4; UniCL's release, zero-shot evaluation.
    """
    batches = texts.in_batches(prompts.tokens, tower, texts.groups_of(mesh))
    found = texts.encoded(encode, params, state, batches, mesh, between)
    return mean_by_class(found, prompts)


def mean_by_class(
    embeddings: Iterable[tuple[np.ndarray, np.ndarray]], prompts: Prompts
) -> np.ndarray:
    """Unit means of the embeddings of each class's prompts.

    Args:
      embeddings: parts in any order: which texts [k], and their unit rows [k, D].
      prompts: of the classes.

    Returns:
      [K, D] float32. Sums are in float64, so the order of parts does not matter.
    """
    templates = len(prompts.index) // prompts.num_classes
    order = np.argsort(prompts.index, kind="stable")
    class_of = order // templates  # of each prompt, prompts of one text together
    bounds = np.searchsorted(prompts.index[order], np.arange(len(prompts.tokens) + 1))
    sums = None
    for which, rows in embeddings:
        if sums is None:
            sums = np.zeros((prompts.num_classes, rows.shape[1]))
        uses = np.diff(bounds)[which]
        row = np.repeat(np.arange(len(which)), uses)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(uses) - uses, uses)
        to = class_of[np.repeat(bounds[which], uses) + nth]
        by_class = np.argsort(to, kind="stable")
        first = np.flatnonzero(np.diff(to[by_class], prepend=-1))
        added = np.add.reduceat(rows[row[by_class]].astype(np.float64), first)
        sums[to[by_class][first]] += added
    mean = sums / templates
    norm = np.linalg.norm(mean, axis=-1, keepdims=True)
    return (mean / np.maximum(norm, 1e-12)).astype(np.float32)
