"""From class scores to all that they tell."""

import numpy as np

from unicl_jax.errors import InputError
from unicl_jax.evaluation.confusion import confusions, examples, per_class
from unicl_jax.evaluation.context import Context, Outcome
from unicl_jax.evaluation.features import Features
from unicl_jax.evaluation.scores import METRICS, average_precision_11, top_k, wilson

TOP = 5


def judged(context: Context, scores: np.ndarray, found: Features) -> Outcome:
    """The outcome of class scores.

    Args:
      context: of the protocol.
      scores: [n, K], of the test set's rows.
      found: its features.

    Returns:
      All that the scores tell, whatever made them.
    """
    task, labels = context.task, found.label
    names = list(task.class_names)
    details = {"class_names": names}
    if labels.ndim == 2 and task.metric == "accuracy":
        score, records = any_of(scores, labels)
        return Outcome(score, {"top1": score}, records, details)
    score = METRICS[task.metric](scores, labels)
    metrics = {task.metric: score}
    if labels.ndim == 2:
        each = average_precision_11(scores, labels)
        details |= {
            "per_class": each.tolist(),
            "per_class_records": labels.sum(0).tolist(),
        }
        return Outcome(score, metrics, len(labels), details)
    metrics["top1"] = top_k(scores, labels, 1)
    if len(names) > TOP:
        metrics["top5"] = top_k(scores, labels, TOP)
    if task.metric != "roc_auc":
        metrics["mean_per_class"] = METRICS["mean_per_class"](scores, labels)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP].astype(np.int32)
    accuracy, records = per_class(order, labels, len(names))
    details |= {
        "per_class": accuracy,
        "per_class_records": records,
        "confusions": confusions(order, labels, len(names)),
    }
    arrays = {"predictions": order, "labels": labels, "index": found.index}
    shown = found.index[examples(order, labels)].tolist()
    interval = None
    if task.metric == "accuracy":
        low, high = wilson(score, len(labels))
        interval = (high - low) / 2
    return Outcome(
        score, metrics, len(labels), details, arrays, interval, examples=shown
    )


def any_of(scores: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """How often the best class is one of those that a record has.

    Args:
      scores: [n, K] finite.
      targets: [n, K] of 0 and 1; records with none don't count.

    Returns:
      In [0, 1], and the records that count.

    Raises:
      InputError: if no record has a class.

    Source: ReaL, Beyer et al., arXiv 2006.07159, section 3.
    """
    counted = targets.any(1)
    if not counted.any():
        raise InputError("a record must have a class: none of the test set has one.")
    hits = np.take_along_axis(targets, scores.argmax(1)[:, None], 1)[counted, 0]
    return float((hits > 0).mean()), int(counted.sum())
