"""What a source says of its images: captions, and labels."""

import collections
from collections.abc import Sequence

import numpy as np

from unicl_jax import data
from unicl_jax.checks.records import Sample
from unicl_jax.checks.report import Section, named, percent, some
from unicl_jax.data.prompts import fill
from unicl_jax.data.tokenizer import Tokenizer, clean_text

MANY_CUT = 0.05  # share of texts that lose their tails
MANY_EQUAL = 0.1  # share of records whose caption another one has, too
MANY_TIMES = 50  # the largest class over the median one
FEW = 2  # records of a class


def look_at_captions(
    section: Section, sample: Sample, tokenizer: Tokenizer, by_text: bool
) -> None:
    """How long captions are, and how many are alike.

    Args:
      section: to add to.
      sample: of an image-text source.
      tokenizer: of the run.
      by_text: whether equal captions are positives, as data.caption_identity says.
    """
    texts = [text for captions in sample.texts for text in captions]
    lengths = np.array([len(tokenizer.encode(text)) + 2 for text in texts])
    length = tokenizer.context_length
    said = (
        f"{some(len(texts), 'caption')}: median {np.median(lengths):.0f} tokens, "
        f"longest {lengths.max()}, of {length}"
    )
    share = tokenizer.cut(texts, tokenizer(texts)).mean()
    if share > MANY_CUT:
        section.warn(
            f"{said}: {percent(share)} are cut",
            "raise model.text.context_length, or shorten the captions: what is cut is "
            "not learnt from",
        )
    else:
        section.good(said + (f": {percent(share)} are cut" if share else ""))
    empty = int((lengths == 2).sum())
    if empty:
        section.warn(f"{some(empty, 'caption')} of these have no token", "delete them")
    owners = collections.Counter(
        text
        for captions in sample.texts
        for text in dict.fromkeys(map(clean_text, captions))
    )
    equal = [
        any(owners[clean_text(text)] > 1 for text in captions)
        for captions in sample.texts
    ]
    if not any(equal):
        return
    top, count = owners.most_common(1)[0]
    said = (
        f"{percent(np.mean(equal))} of {some(len(equal), 'record')} share a caption "
        f'with another one, as {count} do "{_short(top)}"'
    )
    if np.mean(equal) > MANY_EQUAL and not by_text:
        section.warn(
            said,
            'set data.caption_identity to "text", or they are each other\'s negatives; '
            "or make an image-label source of them, where they are class names",
        )
    else:
        section.note(said)


def look_at_labels(
    section: Section, source: data.Source, sample: Sample, train: bool
) -> None:
    """Which classes have no record, and how unlike their sizes are.

    Args:
      section: to add to.
      source: image-label.
      sample: of it.
      train: or for an evaluation, where a class without images does no harm.
    """
    counts = class_counts(source)
    names = source.class_names
    if counts is None:
        seen = len(np.unique(sample.labels))
        section.note(f"{some(seen, 'class')} of {len(names):,} in these records")
        return
    empty = [names[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        text = f"without a record: {len(empty):,} of {some(len(names), 'class')}, "
        text += named(empty)
        if train:
            section.warn(text, "add images of them, or take them out of the classes")
        else:
            section.note(text)
    there = np.flatnonzero(counts)
    rarest, largest = (there[f(counts[there])] for f in (np.argmin, np.argmax))
    median = np.median(counts[there])
    if counts[rarest] == counts[largest]:
        section.good(f"every class has {some(int(median), 'record')}")
        return
    text = (
        f'classes have {counts[rarest]:,} ("{names[rarest]}") to '
        f'{some(int(counts[largest]), "record")} ("{names[largest]}"), '
        f"median {median:,.1f}".removesuffix(".0")
    )
    few = int((counts[there] < FEW).sum())
    if train and counts[largest] > MANY_TIMES * median:
        section.warn(text, "balance them: rare classes are hardly ever in a batch")
    elif train and few > len(there) // 2:
        section.warn(text, "add images: most classes have a single one")
    else:
        section.good(text)


def class_counts(source: data.Source) -> np.ndarray | None:
    """Records of each class, where that is known without reading them.

    Args:
      source: any.

    Returns:
      [classes] int64; None if only the records know their labels.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        labels = getattr(getattr(source, "index", None), "labels", None)
    if labels is None or not source.class_names or len(labels) != len(source):
        return None
    return np.bincount(labels, minlength=len(source.class_names))


def look_at_prompts(
    section: Section,
    names: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer,
) -> None:
    """Whether class names fit into the longest prompt.

    Args:
      section: to add to.
      names: of classes.
      templates: their prompts.
      tokenizer: of the run.
    """
    longest = max(templates, key=lambda t: len(tokenizer.encode(t)))
    texts = [fill(longest, name) for name in names]
    cut = np.flatnonzero(tokenizer.cut(texts, tokenizer(texts)))
    if not len(cut):
        return
    text = (
        f'too long in "{longest}" for {tokenizer.context_length} tokens: {len(cut):,} '
        f"of {some(len(names), 'class name')}, {named([names[i] for i in cut])}"
    )
    if len(cut) > MANY_CUT * len(names):
        section.warn(text, "raise model.text.context_length, or shorten the names")
    else:
        section.note(text)


def _short(text):
    return text if len(text) <= 40 else text[:39] + "…"
