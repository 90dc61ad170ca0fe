"""Protocols that learn from a task's training set, on features that stay."""

import jax
import numpy as np

from unicl_jax.evaluation import few_shot as few
from unicl_jax.evaluation import knn as nearest
from unicl_jax.evaluation import logistic, probe
from unicl_jax.evaluation.context import Context, Outcome
from unicl_jax.evaluation.judge import judged
from unicl_jax.evaluation.scores import OF_SEVERAL_LABELS


def knn(context: Context) -> Outcome:
    """The nearest training images vote, by cosine."""
    data, test = context.training(), context.features("test")
    k = min(context.options.neighbors, len(data.image))
    scores = nearest.knn(
        data.image, data.label, test.image, k=k, classes=context.task.num_classes
    )
    chosen = {"k": k, "temperature": nearest.TEMPERATURE}
    outcome = judged(context, scores, test)
    return outcome._replace(details={**outcome.details, "chosen": chosen})


def linear_probe(context: Context) -> Outcome:
    """ELEVATER's linear probe, its setting chosen on validation data alone."""
    data, test, task = context.features("train"), context.features("test"), context.task
    validation, start = None, None
    if "val" in context.splits:
        validation = context.features("val")[:2]
    if context.options.text_head and context.embedder.has_texts:
        start = context.classes()
    found = probe.linear_probe(
        data.image,
        data.label,
        test.image,
        test.label,
        classes=task.num_classes,
        metric=task.metric,
        validation=validation,
        start=start,
    )
    scores, theirs = found.scores, found.elevater
    if task.metric in OF_SEVERAL_LABELS:  # ranked as the sweep ranks them
        scores = np.asarray(jax.nn.softmax(scores, axis=-1))
    outcome = judged(context, scores, test)
    details = outcome.details | {
        "head_init": "random" if start is None else "text",
        "chosen": {
            "learning_rate": found.learning_rate,
            "weight_decay": found.weight_decay,
        },
        "curves": [
            {
                "learning_rate": curve.learning_rate,
                "weight_decay": curve.weight_decay,
                "val": None if curve.diverged else curve.steady,
            }
            for curve in found.sweep
        ],
        "diverged": found.diverged,
        "validation": found.validation,
        "selected": found.selected,
        "elevater": theirs._asdict(),
        "best_test_epoch": {
            "score": theirs.best_test_epoch,
            "epoch": theirs.test_curve.index(theirs.best_test_epoch) + 1,
        },
        "epochs": [
            {"epoch": i, "test": score} for i, score in enumerate(theirs.test_curve, 1)
        ],
    }
    said = (
        f"chosen on validation data of {len(found.sweep)} settings ({found.diverged} "
        "diverged); the best epoch on the test set, ELEVATER's number, is "
        f"{100 * theirs.best_test_epoch:.1f}"
    )
    return outcome._replace(
        score=found.selected,
        metrics={
            **outcome.metrics,
            "best_test_epoch": theirs.best_test_epoch,
            "validation": found.validation,
        },
        details=details,
        said=said,
    )


def logistic_probe(context: Context) -> Outcome:
    """CLIP's probe: logistic regression by L-BFGS, C chosen on validation data."""
    data, test, task = context.features("train"), context.features("test"), context.task
    validation = context.features("val")[:2] if "val" in context.splits else None
    found = logistic.logistic_probe(
        data.image,
        data.label,
        test.image,
        test.label,
        classes=task.num_classes,
        metric=task.metric,
        validation=validation,
    )
    outcome = judged(context, found.scores, test)
    details = outcome.details | {
        "chosen": {"c": found.cost},
        "curves": [{"c": fit.cost, "val": fit.score} for fit in found.sweep],
        "validation": found.validation,
        "selected": found.selected,
        "converged": found.converged,
    }
    said = "" if found.converged else "the final fit did not reach its tolerance"
    return outcome._replace(score=found.selected, details=details, said=said)


def few_shot(context: Context) -> Outcome:
    """Linear probes on a few images of each class, drawn anew for each seed."""
    data, test = context.training(), context.features("test")
    task, options = context.task, context.options
    start = None
    if options.text_head and context.embedder.has_texts:
        start = context.classes()
    steps, count = iter(range(1, 10**6)), len(options.shots) * len(options.seeds)
    found = few.few_shot(
        data.image,
        data.label,
        test.image,
        test.label,
        shots=options.shots,
        seeds=options.seeds,
        classes=task.num_classes,
        metric=task.metric,
        start=start,
        done=lambda shots, seed: context.progress.done(next(steps), count),
    )
    rows = [
        {
            "shots": each.shots,
            "mean": each.selected.mean,
            "interval": each.selected.half_width,
            "seeds": [one.selected for one in each.probes],
            "best_test_epoch": each.best_test_epoch.mean,
            "records": list(each.records),
            "classes_short": each.classes_short,
        }
        for each in found
    ]
    last = rows[-1]
    short = [
        f"{row['classes_short']} at {row['shots']}"
        for row in rows
        if row["classes_short"]
    ]
    said = (
        ", ".join(f"{row['shots']} shots {100 * row['mean']:.1f}" for row in rows)
        + f" over {len(options.seeds)} seeds"
    )
    if short:
        said += f"; classes with fewer images: {', '.join(short)}"
    return Outcome(
        last["mean"],
        {f"shots_{row['shots']}": row["mean"] for row in rows},
        len(test.label),
        {"few_shot": rows, "head_init": "random" if start is None else "text"},
        interval=last["interval"],
        intervals={f"shots_{row['shots']}": row["interval"] for row in rows},
        said=said,
    )
