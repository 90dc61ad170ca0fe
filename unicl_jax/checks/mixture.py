"""What a batch is made of, and who reads it."""

import numpy as np

from unicl_jax import data
from unicl_jax.checks.report import Section, some, two_digits
from unicl_jax.checks.setting import Setting
from unicl_jax.checks.texts import class_counts
from unicl_jax.data.shards import cores, is_remote

MANY_EPOCHS = 50  # of captions; the paper's longest run sees each of GCC's 43 times


def make_batches(setting: Setting) -> data.TrainIterator:
    """The training batches of process 0, as the trainer makes them.

    Args:
      setting: whose sources are all open.

    Returns:
      The iterator, which has read nothing yet.

    Raises:
      InputError: as the trainer would.
    """
    config = setting.config
    return data.make_train_iterator(
        {**config.data, "text_length": setting.text_length},
        setting.image_size,
        config.batch_size,
        config.seed,
        setting.tokenizer,
        process_count=setting.processes,
        local_devices=max(1, setting.devices // setting.processes)
        * config.micro_batches,
        sources=[setting.sources[name] for name in config.data.sources],
    )


def look_at_mixture(section: Section, setting: Setting) -> None:
    """Rows and epochs of each source, positives, and the time to read a batch.

    Args:
      section: to add to.
      setting: with its batches.
    """
    sampler, steps = setting.batches.sampler, setting.config.total_steps
    epochs = sampler.epochs(steps)
    seconds = 0.0
    for source, share in zip(setting.batches.sources, sampler.shares, strict=True):
        rows = float(share * sampler.batch_size)
        seconds += rows * setting.samples[source.name].seconds
        seen = epochs[source.name]
        text = (
            f"{source.name}: {_rows(rows)} of "
            f"{sampler.batch_size:,}, {seen:,.{0 if seen >= 100 else 1}f} epochs in "
            f"{some(steps, 'step')}"
        )
        if source.kind == "image_text" and seen > MANY_EPOCHS:
            section.warn(
                text,
                f"captions seen over {MANY_EPOCHS} times are learnt by heart: lower "
                "total_steps, or add image-text records",
            )
        elif seen < 1:
            section.note(f"{text}: some records are never seen")
        else:
            section.good(text)
    positives, is_exact = expected_positives(setting.batches)
    if positives:
        least = "" if is_exact else "at least "
        section.note(
            f"positives of a labelled row, itself among them: {least}"
            f"{positives:,.1f} on average"
        )
    here = seconds / setting.processes / cores()
    if here > 1e-3:
        section.note(
            f"reading a batch takes at least {two_digits(1e3 * here)} ms on "
            f"{some(cores(), 'core')} in {some(setting.processes, 'process')}: a step "
            "that is faster waits for data"
        )


def _rows(count):
    return some(int(count), "row") if count.is_integer() else f"{count:,.1f} rows"


def expected_positives(batches: data.TrainIterator) -> tuple[float, bool]:
    """How many rows of a batch have a labelled row's concept, itself among them.

    1 + (sum_c (sum_s n_s q_s(c))^2 - sum_s n_s sum_c q_s(c)^2) / sum_s n_s, n_s being
    the rows of image-label source s, and q_s(c) the share of concept c in it: B times
    the sum of squared shares, but that a row is its own positive once, and that each
    source has its exact count of rows.

    Args:
      batches: of training.

    Returns:
      The mean over labelled rows, 0 if there are none; and whether the labels are
      known: where they are not, all classes of a source count as equally frequent,
      which gives the least.
    """
    rows_of = np.zeros(len(batches.concepts.names))
    rows, own, is_exact = 0.0, 0.0, True
    for source, share in zip(batches.sources, batches.sampler.shares, strict=True):
        if not source.class_names:
            continue
        counts = class_counts(source)
        if counts is None:
            is_exact, counts = False, np.ones(len(source.class_names))
        concepts = batches.concepts.of_source[source.name]
        shares = np.bincount(concepts, counts / counts.sum(), len(rows_of))
        mine = float(share) * batches.sampler.batch_size
        rows, own = rows + mine, own + mine * (shares**2).sum()
        rows_of += mine * shares
    return (1 + ((rows_of**2).sum() - own) / rows, is_exact) if rows else (0.0, True)


def look_at_processes(section: Section, setting: Setting) -> None:
    """How the reading is divided, and what each process reads all the same.

    Args:
      section: to add to.
      setting: with its sources.
    """
    config, count = setting.config, setting.processes
    local = config.batch_size // count
    each = "it" if count == 1 else "each"
    section.good(f"{some(count, 'process')}: {each} reads {some(local, 'row')} a batch")
    for said in setting.batches.said if setting.batches else ():
        section.note(said)
    for name, source in setting.sources.items():
        shards = getattr(getattr(source, "index", None), "shards", ())
        if not shards:
            continue
        text = f"{name}: {some(len(shards), 'shard')}"
        cache = config.data.sources[name].get("index_cache")
        if is_remote(shards[0]) and not cache:
            section.warn(
                f"{text}, which every process reads through once to index them",
                "set the source's `index_cache` to a folder: later starts need not",
            )
        elif len(shards) < count:
            section.warn(
                f"{text} for {count} processes, which all read the same files",
                f"write {count} or more, as `python -m unicl_jax.prepare` does with "
                f"--shards={count}: few files are slow to read from many machines",
            )
        elif count > 1 and not config.data.window:
            section.note(
                f"{text}: records are divided by rows, so that every process opens all "
                "of them; data.window and data.lanes give each process its own"
            )
        else:
            section.note(text)
    if config.data.share_prompts:
        section.note("prompts are shared (data.share_prompts): one process alone can")
