"""The run, read from top to bottom. It owns no maths: see `step` and `losses`."""

import contextlib
import math
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from unicl_jax import (
    data,
    encoders,
    evaluation,
    init_from,
    objectives,
    processes,
    sharding,
    validation,
)
from unicl_jax.analysis import end_of_run
from unicl_jax.checkpoint import Checkpoints, NotSaved
from unicl_jax.metrics import ConsoleProgress, Metrics, StepTimer
from unicl_jax.nonfinite import NonFiniteSteps
from unicl_jax.optimizer import make_optimizer
from unicl_jax.program import make_program
from unicl_jax.save_clock import SaveClock
from unicl_jax.signals import Interrupted, Stopped, StopRequest
from unicl_jax.step import averaged, start_ema
from unicl_jax.watchdog import COMPILING, Watchdog
from unicl_jax.workdir import has_saved, keep_concepts, keep_records, prepare_workdir


class NonFiniteLoss(RuntimeError):
    """Too many losses or gradients were not finite; the last good state is saved."""


def run(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains until `total_steps`, going on where `workdir` stopped.

    Args:
      config: the resolved config of a recipe.
      workdir: of this run: config, checkpoints, metrics and pictures.

    Returns:
      The last evaluation, by metric key.

    Raises:
      InputError: what must be mended before training can start.
      NonFiniteLoss: naming the step; the last good state is saved.
      Stopped: after saving.
      NotSaved: if a checkpoint could not be written.
    """
    # 1. All that can be wrong with the config itself, before anything costs time.
    is_first = jax.process_index() == 0
    validation.validate(config, jax.device_count(), jax.process_count())
    objectives.check(config)
    model = encoders.from_config(config.model)
    text = encoders.options("text", config.model.text)
    text_length = config.data.text_length
    if "text" in objectives.OBJECTIVES[config.objective].unused:
        text_length = "full"  # one shape: each is a program to compile, for nothing
    slots = data.make_text_length(text_length, text)
    make_optimizer(config.optimizer, config.total_steps)  # refuses what it cannot make
    workdir = prepare_workdir(workdir, config, write=is_first)
    starts = []
    if not has_saved(workdir):
        starts = init_from.read(config, model)

    # 2. Data: this process's rows of every batch, and the sets to be scored on.
    config = data.with_made_up_records(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    image_size = config.model.image.image_size
    tokenize = data.Tokenizer(text["context_length"], text["vocab_size"])
    batches = data.make_train_iterator(
        {**config.data, "text_length": text_length},
        config.data.image_size or image_size,
        config.batch_size,
        config.seed,
        tokenize,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        # Each device's rows, and of those each micro-batch's: packed by themselves.
        local_devices=jax.local_device_count()
        // config.mesh.tensor
        * config.micro_batches,
    )
    concepts = batches.concepts
    keep_concepts(workdir, concepts, write=is_first)
    found = {s.name: (len(s), s.fingerprint()) for s in batches.sources}
    others_now = keep_records(workdir, found, write=is_first)
    processes.agree(found, workdir)
    program = make_program(config, model, mesh, len(concepts.names))
    compiled_encoders = evaluation.make_encoders(
        model,
        mesh,
        program.objective,
        concepts.index,
        config.model.normalization,
        text,
    )
    tasks = [
        evaluation.make_task(name, task, image_size, tokenize, compiled_encoders)
        for name, task in config.evaluations.items()
        # "" until it is set on the command line, say.
        if task.get("path") or task.get("task")
    ]

    # 3. State: read from the newest whole checkpoint, or made, on the devices it lives
    #    on.
    checkpoints = Checkpoints(
        workdir, config.checkpoints_kept, config.checkpoints_keep_every
    )
    started_from = []
    if found := checkpoints.restore(program.state, started_from.append):
        state, data_state = found
        batches.restore(data_state)
    else:
        state = program.init()
    batches.keep_skipped(workdir)
    is_replaced = bool(starts)
    while starts:  # whose weights the host need not hold any longer
        state, said = init_from.apply(starts.pop(0), state)
        started_from.append(said)
    if is_replaced:
        if config.classes_from_prompts:
            state, said = init_from.classes_from_prompts(
                *(state, concepts.names, data.load_templates(config.data.templates)),
                *(tokenize, compiled_encoders),
            )
            started_from.append(said)
        state = start_ema(state)
    first_step = int(state.step)

    # 4. The loop. Step n is dispatched, then step n - 1 is written: the host's work
    #    hides behind the device's.
    progress = ConsoleProgress(config.total_steps, first_step, active=is_first)
    metrics = Metrics(workdir, first_step, is_first, progress.say)
    nonfinite = NonFiniteSteps(
        workdir, first_step, is_first, config.max_nonfinite, progress.say
    )
    linger = 5 if jax.process_count() > 1 else 0
    watchdog = Watchdog(workdir, config.hang_minutes, jax.process_index(), linger)
    clock, stop = SaveClock(config.checkpoint_every_minutes), StopRequest()
    timer = StepTimer(first_step)
    ready = data.in_equal_shapes(timer.timed(batches), slots, mesh)
    compiled = set()  # shapes of texts that there is a program for
    scores: dict[str, evaluation.Scores] = {}
    pending = None  # the step before: its number, its scalars still on the device

    def write_pending():
        """Looks at the step before; writes it if its turn has come."""
        nonlocal pending
        if pending is None:
            return
        (step, scalars), pending = pending, None
        watchdog.at(f"step {step}, on the devices")
        scalars = jax.device_get(scalars)
        if not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"])):
            nonfinite.add(step, scalars, batches.records)
        if scalars.pop("halted"):
            save()
            kept = " The state before that step is saved." if step > 1 else ""
            raise NonFiniteLoss(
                f"loss and gradients must be finite: step {step} gave loss "
                f"{scalars['loss']} and gradient norm {scalars['grad_norm']}, and so "
                f"did the {config.max_nonfinite} before it (max_nonfinite).{kept} Look "
                "at its records, in nonfinite.jsonl; or start anew, in another "
                "workdir, with a lower optimizer.learning_rate or with "
                "optimizer.clip_norm."
            )
        if step % config.log_every_steps == 0 or step == config.total_steps:
            scalars = {k: float(v) for k, v in scalars.items()}
            scalars |= timer.lap(step, config.batch_size)
            scalars |= {f"skipped/{k}": v for k, v in batches.skipped(step).items()}
            scalars |= batches.figures(step)
            metrics.write(step, scalars)
            if "step_seconds" in scalars:
                progress.update(step, scalars)

    def save():
        if (step := int(state.step)) > first_step:  # else there is nothing new
            watchdog.at(f"saving step {step}")
            metrics.sync()
            batches.sync_skipped()
            checkpoints.save(state, {"step": step})
            clock.restart()

    def evaluate(step):
        def between_batches():
            watchdog.at(f"evaluating step {step}")
            if stop.requested(step):
                raise Interrupted

        watchdog.at(f"evaluating step {step}", COMPILING)
        for task in tasks:
            if step < config.total_steps and config.evaluations[task.name].get(
                "at_end"
            ):
                continue
            progress.status(f"evaluating {task.name}")
            scores[task.name] = task(
                averaged(state), state.model_state, between_batches
            )
        keyed = _by_metric_key(scores, config.ema_decay)
        if keyed:
            metrics.write(step, keyed)
            tops = ", ".join(
                f"{name} " + "/".join(f"{100 * x:.1f}" for x in s.metrics.values())
                for name, s in scores.items()
            )
            progress.say(f"step {step}: {tops}")

    try:
        if first_step >= config.total_steps:
            progress.say(f"finished before, at step {first_step}; evaluating it again")
        elif first_step:
            progress.say(f"going on from step {first_step} of {config.total_steps}")
        for said in started_from:
            progress.say(said)
        for said in (*others_now, *batches.said, *concepts.describe()):
            progress.say(said)
        if 0 < first_step < config.total_steps:
            # A stop or a kill comes between a checkpoint and its evaluation.
            if first_step % config.evaluate_every_steps == 0:
                evaluate(first_step)
        for step in range(first_step + 1, config.total_steps + 1):
            watchdog.at(f"the data of step {step}")
            with stop.waiting():
                batch = next(ready)
            watchdog.at(f"the dispatch of step {step}")
            batch = sharding.global_batch(mesh, batch)
            shape = jax.tree.leaves(batch["tokens"])[0].shape
            if is_new := shape not in compiled:
                compiled.add(shape)
                write_pending()  # its time is without this compilation
                progress.status("compiling")
                watchdog.at(f"compiling step {step}", COMPILING)
            start = time.perf_counter()
            state, scalars = program.train_step(state, batch, np.int32(step - 1))
            if is_new:
                jax.block_until_ready(scalars)
                said = f"compiled in {time.perf_counter() - start:.1f} s"
                if text_length != "full":
                    said += f", for texts of {shape[0]} x {shape[1]} slots"
                progress.say(said)
                progress.status("training")
                timer.restart(step)
            write_pending()
            pending = (step, scalars)
            if stop.requested(step):
                raise Interrupted
            saving = clock.due(step) or _is_due(step, config)
            evaluating = step % config.evaluate_every_steps == 0
            if saving or evaluating:
                write_pending()
                if saving:
                    save()
                if evaluating and step < config.total_steps:
                    evaluate(step)
                timer.restart(step)
        # 5. The end: the last evaluation, a table and two pictures.
        evaluate(config.total_steps)
        progress.close()
        if is_first:
            metrics.sync()
            for line in end_of_run(workdir, tasks, scores, config.evaluations):
                progress.say(line)
    except Interrupted:
        write_pending()
        save()
        at = int(state.step)
        raise Stopped(f"stopped at step {at}, saved.", stop.signal) from None
    except (NonFiniteLoss, NotSaved):
        raise
    except Exception:
        # The data failed, say: what was learnt so far is kept. With several processes
        # the others don't know, and a save that waits for them would hang.
        if jax.process_count() == 1 and not state.step.is_deleted():
            save()
            write_pending()
        raise
    finally:
        with contextlib.ExitStack() as last:  # each of them, whatever the others raise
            for close in (
                *(watchdog.close, stop.restore, batches.close),
                *(checkpoints.close, metrics.close, progress.close),
            ):
                last.callback(close)
    return _by_metric_key(scores, config.ema_decay)


def _is_due(step, config) -> bool:
    """Whether a step is one to save at, whatever the clock says."""
    keep_every = config.checkpoints_keep_every
    return (
        step % config.checkpoint_every_steps == 0
        or bool(keep_every and step % keep_every == 0)
        or step == config.total_steps
    )


def _by_metric_key(scores, ema_decay) -> dict[str, float]:
    keyed = {}
    for name, score in scores.items():
        name += "_ema" if ema_decay else ""  # whose parameters it scores
        keyed |= {f"eval/{name}_{metric}": x for metric, x in score.metrics.items()}
    return keyed
