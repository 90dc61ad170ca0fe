"""How a model is judged on a task: each protocol, from features to a score."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from unicl_jax.errors import InputError
from unicl_jax.evaluation import learned
from unicl_jax.evaluation.context import Context, Outcome, unit
from unicl_jax.evaluation.found_texts import retrieval_examples
from unicl_jax.evaluation.judge import judged
from unicl_jax.evaluation.retrieval import retrieval


class Protocol(NamedTuple):
    """One way to judge.

    Attributes:
      run: Context -> Outcome.
      learns: whether it needs labelled images to learn from, beside those it is
        scored on.
      kinds: of tasks that it judges.
      needs_texts: whether the model must have a text tower.
      options: names of those `Options` that it heeds.
      is_slow: whether it has to be asked for by its name.
    """

    run: Callable[[Context], Outcome]
    learns: bool
    kinds: tuple[str, ...] = ("classification",)
    needs_texts: bool = False
    options: tuple[str, ...] = ()
    is_slow: bool = False

    def unfit(self, context: Context) -> str:
        """Why it cannot judge this model on this task; "" if it can."""
        if context.task.kind not in self.kinds:
            return f"not for tasks of {context.task.kind.replace('_', ' ')}"
        if self.needs_texts and not context.embedder.has_texts:
            return "the model has no text tower that was taught"
        if self.learns and "train" not in context.splits:
            return "there is no training data"
        return ""

    def splits(self, context: Context) -> tuple[str, ...]:
        """The splits that it looks at."""
        return tuple(s for s in context.splits if s == "test" or self.learns)


def zero_shot(context: Context) -> Outcome:
    """An image gets the class whose texts it is nearest to."""
    classes, found = context.classes(), context.features("test")
    scores = unit(found.image) @ classes.T
    outcome = judged(context, scores, found)
    arrays = {**outcome.arrays, "class_embeddings": classes}
    details = {**outcome.details, "templates": list(context.task.templates)}
    return outcome._replace(arrays=arrays, details=details)


def recall(context: Context) -> Outcome:
    """Images find their captions, and captions their images."""
    found = context.features("test")
    has_text = found.texts != ""
    if not len(found.texts) or not has_text.any(1).all():
        raise InputError(
            f'task "{context.task.name}" must have a caption for every image: some '
            "have none; leave those images out."
        )
    images = unit(found.image)
    owners, slots = np.nonzero(has_text)
    captions = found.texts[owners, slots].tolist()
    context.progress.start(f"{context.task.name}: captions")
    texts = context.texts(captions)
    scored = retrieval(images, texts, owners, mesh=context.embedder.mesh)
    metrics = scored.metrics
    ways = ("image_to_text", "text_to_image")
    score = float(np.mean([metrics[f"{way}_r1"] for way in ways]))
    shown, pictures = retrieval_examples(
        images, texts, owners, captions, scored, found.index
    )
    details = {"examples": shown}
    details["counts"] = {"images": len(images), "texts": len(texts)}
    return Outcome(score, metrics, len(images), details, examples=pictures)


PROTOCOLS = {
    "zero_shot": Protocol(
        zero_shot,
        learns=False,
        kinds=("classification", "multi_label"),
        needs_texts=True,
    ),
    "knn": Protocol(learned.knn, learns=True, options=("neighbors",)),
    "linear_probe": Protocol(
        learned.linear_probe,
        learns=True,
        kinds=("classification", "multi_label"),
        options=("text_head",),
    ),
    "logistic_probe": Protocol(
        learned.logistic_probe,
        learns=True,
        kinds=("classification", "multi_label"),
        is_slow=True,
    ),
    "few_shot": Protocol(
        learned.few_shot,
        learns=True,
        kinds=("classification", "multi_label"),
        options=("text_head", "shots", "seeds"),
        is_slow=True,
    ),
    "retrieval": Protocol(recall, learns=False, kinds=("retrieval",), needs_texts=True),
}
