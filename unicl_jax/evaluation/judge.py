"""From class scores to all that they tell."""

import numpy as np

from unicl_jax.evaluation.confusion import confusions, examples, per_class
from unicl_jax.evaluation.context import Context, Outcome
from unicl_jax.evaluation.features import Features
from unicl_jax.evaluation.scores import METRICS, average_precision_11, top_k

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
    score = METRICS[task.metric](scores, labels)
    metrics = {task.metric: score}
    details = {"class_names": names}
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
    return Outcome(score, metrics, len(labels), details, arrays, examples=shown)
