"""Features and labels that fit each other, and the sets that a probe makes of them."""

from typing import NamedTuple

import numpy as np

from unicl_jax.errors import InputError
from unicl_jax.evaluation import elevater


class Sets(NamedTuple):
    """Features and labels of each set: float32, and int32 or, if several, float32."""

    fit: tuple[np.ndarray, np.ndarray]  # the sweep trains on
    held: tuple[np.ndarray, np.ndarray]  # and is judged on
    whole: tuple[np.ndarray, np.ndarray]  # the final run trains on
    test: tuple[np.ndarray, np.ndarray]
    ways: int


def sets_of(
    train, test, validation, classes, several, merge=True, split=elevater.split
) -> Sets:
    """Checks a task's sets, and takes validation records where there are none.

    Args:
      train: features [n, D] and labels, [n] integer or, if several, [n, K] of 0 and 1.
      test: likewise.
      validation: likewise, or None: `split` takes it from the training set.
      classes: K, if the labels do not tell.
      several: whether a record has several labels.
      merge: whether the final run has the validation records, too.
      split: labels to training and validation rows.

    Returns:
      The sets, all with features of one size.

    Raises:
      InputError: where the arguments are not so.
    """
    ways = num_classes(classes, train[1], test[1], several)
    fit = train = checked(*train, ways, several, "training")
    test = checked(*test, ways, several, "test")
    if validation is None:
        rows, held = split(train[1])
        fit, held = tuple(x[rows] for x in train), tuple(x[held] for x in train)
        whole = train if merge else fit
    else:
        held = checked(*validation, ways, several, "validation")
        same_size(held[0], train[0], "validation")
        whole = train
        if merge:
            whole = tuple(
                np.concatenate(pair) for pair in zip(train, held, strict=True)
            )
    same_size(test[0], train[0], "test")
    if len(fit[0]) < 2:
        raise InputError(
            "a probe needs at least 2 records to train on beside those to validate on: "
            f"got {len(fit[0])}. Use more records."
        )
    return Sets(fit, held, whole, test, ways)


def same_size(features, training, what):
    """Says so if features of a set have another size than the training set's."""
    if features.shape[1] != training.shape[1]:
        raise InputError(
            f"{what} features must have the training features' size: got "
            f"{features.shape[1]} and {training.shape[1]}. Use one model for all."
        )


def num_classes(classes, labels, test_labels, several):
    """The number of classes, as given or as the labels have it.

    Args:
      classes: as given; None to count.
      labels: of the training set; [n], or [n, K] of 0 and 1.
      test_labels: of the test set, likewise.
      several: whether a record has several labels.

    Returns:
      At least 2, or at least 1 if a record may have several labels.

    Raises:
      InputError: where the labels have another shape or there is one class alone.
    """
    labels, test_labels = np.asarray(labels), np.asarray(test_labels)
    if several:
        if labels.ndim != 2 or test_labels.ndim != 2:
            raise InputError(
                "labels must be [n, K] of 0 and 1 for a metric of several labels: got "
                f"{list(labels.shape)} and {list(test_labels.shape)}."
            )
        found = labels.shape[1]
    else:
        both = [x.max() for x in (labels, test_labels) if x.size and x.ndim == 1]
        found = int(max(both, default=0)) + 1
    ways = found if classes is None else classes
    if ways < 2 and not several:
        raise InputError(
            f"at least 2 classes are needed to tell apart: got {ways}. Check the "
            "labels, or give `classes`."
        )
    return ways


def checked(features, labels, ways, several, what):
    """Features as float32 and labels that fit them, or says what is wrong.

    Args:
      features: [n, D], n at least 1, finite.
      labels: [n] integer in [0, ways), or [n, ways] of 0 and 1.
      ways: the number of classes.
      several: whether a record has several labels.
      what: the set's name, for messages.

    Returns:
      [n, D] float32, and [n] int32 or [n, ways] float32.

    Raises:
      InputError: where the arguments are not so.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    expected = (len(features), ways) if several else (len(features),)
    if features.ndim != 2 or not features.size or labels.shape != expected:
        raise InputError(
            f"{what} features must be [n, D] and labels "
            f"{'[n, K]' if several else '[n]'}, n at least 1, K = {ways}: got "
            f"{list(features.shape)} and {list(labels.shape)}."
        )
    if wrong := int((~np.isfinite(features)).any(1).sum()):
        raise InputError(
            f"{what} features must be finite: got NaN or infinity in {wrong} of "
            f"{len(features)} records. Look at the model that gave them."
        )
    if several:
        if not np.isin(labels, (0, 1)).all():
            raise InputError(
                f"{what} labels must be 0 or 1 for each class: got "
                f"{np.unique(labels)[:5].tolist()} among them."
            )
        return features, labels.astype(np.float32)
    if labels.dtype.kind not in "iub":
        raise InputError(f"{what} labels must be integers: got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= ways:
        raise InputError(
            f"{what} labels must be in [0, {ways}): got {labels.min()} to "
            f"{labels.max()}."
        )
    return features, labels.astype(np.int32)
