"""Goes through a suite: each task by each protocol, once; what is done is kept."""

import contextlib
import datetime
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np

import unicl_jax
from unicl_jax.errors import InputError, choose
from unicl_jax.evaluation import results
from unicl_jax.evaluation.context import Context, Options, Outcome, Progress
from unicl_jax.evaluation.embedder import Embedder
from unicl_jax.evaluation.features import thumbnails, write_arrays
from unicl_jax.evaluation.protocols import PROTOCOLS
from unicl_jax.evaluation.suites import Suite
from unicl_jax.evaluation.tasks import Missing


def evaluate(
    embedder: Embedder,
    suite: Suite,
    out: Path,
    *,
    model: Mapping[str, Any],
    data_dir: str | None = None,
    tasks: Sequence[str] = (),
    protocols: Sequence[str] = (),
    options: Options | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judges a model on the tasks of a suite.

    What was found before, of the same model, data and options, is not done again.

    Args:
      embedder: the model.
      suite: of tasks.
      out: folder of the results: `results.json` and `results.csv`, and below `tasks/`
        what each task and protocol found.
      model: what the results say of the model: where it is from, say.
      data_dir: where the suites' data lies.
      tasks: names of those wanted; (): all.
      protocols: keys of PROTOCOLS; (): all that fit a task and are not slow; ("all",):
        the slow ones, too.
      options: of the protocols.
      progress: what is told meanwhile.

    Returns:
      What `results.json` holds. A task whose data is missing, or of which a protocol
      failed with an InputError, has the reason there, and stops no other.

    Raises:
      InputError: if a name is unknown, or the folder holds another model's results.
    """
    options, progress = options or Options(), progress or Progress()
    known = {task.name: task for task in suite.tasks}
    for name in tasks:
        choose(known, name, f'--task: suite "{suite.name}"')
    quick = [name for name, chosen in PROTOCOLS.items() if not chosen.is_slow]
    protocols = (*PROTOCOLS,) if protocols == ("all",) else protocols or quick
    for name in protocols:
        choose(PROTOCOLS, name, "--protocol")
    with results.held(out):
        found = _start(out, embedder, suite, model)
        for name in tasks or known:
            task = known[name]
            context = Context(
                embedder, task, out / "tasks" / name, data_dir, options, progress
            )
            said = {
                "title": task.title,
                "kind": task.kind,
                "classes": task.num_classes,
                "class_names": list(task.class_names),
                "metric": task.metric,
                "records": context.records,
                "missing": None,
                "skipped": {},
                "protocols": found["tasks"].get(name, {}).get("protocols", {}),
            }
            found["tasks"][name] = said
            try:
                task.find("test", data_dir)
                for protocol in {*said["protocols"]} - {*protocols}:
                    if not _holds(context, protocol):
                        del said["protocols"][protocol]
                for protocol in protocols:
                    if why := PROTOCOLS[protocol].unfit(context):
                        said["skipped"][protocol] = why
                        continue
                    said["protocols"][protocol] = _one(context, protocol)
                    results.write_json(out / "results.json", found)
            except Missing as missing:
                said["missing"] = {"why": missing.why, "how": missing.how}
                progress.say(f"{name}: {missing.why}")
            results.write_json(out / "results.json", found)
        results.write_csv(out / "results.csv", found)
        return found


def _start(out, embedder, suite, model):
    """What was found before, and of what."""
    before = results.read_results(out)
    if before and before.get("model", {}).get("digest") != embedder.digest:
        source = before.get("model", {}).get("source", "an unknown one")
        raise InputError(
            f'"{out}" holds the results of another model, {source}, or of other '
            "weights of it: name another folder with --out, or delete that one."
        )
    return {
        "format": 1,
        "model": {**model, "digest": embedder.digest},
        "suite": suite.name,
        "provisional": suite.provisional,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"unicl_jax": unicl_jax.__version__, "jax": jax.__version__},
        "tasks": before.get("tasks", {}),
    }


def _one(context: Context, protocol: str) -> dict[str, Any]:
    """What one protocol finds, or found before; or the error that it ended with."""
    path, task = context.folder / f"{protocol}.json", context.task
    try:
        key = _key(context, protocol)
        if before := _kept(path, key):
            context.records.update(before["split_records"])
            return before["summary"]
        start = time.perf_counter()
        context.progress.start(f"{task.name}: {protocol.replace('_', ' ')}")
        outcome = PROTOCOLS[protocol].run(context)
    except Missing:
        raise
    except InputError as error:
        context.progress.say(f"{task.name}, {protocol}: {error}")
        return {"score": None, "metrics": {}, "error": str(error)}
    summary = _summary(outcome, time.perf_counter() - start)
    summary["details"] = f"tasks/{task.name}/{protocol}.json"
    if outcome.arrays:
        write_arrays(context.folder / f"{protocol}.npz", **outcome.arrays)
        summary["arrays"] = f"tasks/{task.name}/{protocol}.npz"
    _keep_thumbnails(context, outcome)
    written = {
        "protocol": protocol,
        "key": key,
        "of": _key(context, protocol, with_options=False),
        **summary,
        **outcome.details,
        "summary": summary,
        "split_records": context.records,
    }
    results.write_json(path, written)
    return summary


def _kept(path, key):
    try:
        before = json.loads(path.read_text("utf-8"))
        if before["key"] == key and "summary" in before and "split_records" in before:
            return before
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _holds(context, protocol):
    """Whether a result that is not asked for now is of the same data and task."""
    try:
        path = context.folder / f"{protocol}.json"
        of = json.loads(path.read_text("utf-8"))["of"]
        return of == _key(context, protocol, with_options=False)
    except InputError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True  # an error, or of an older version


def _summary(outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "score": outcome.score,
        "interval": outcome.interval,
        "metrics": outcome.metrics,
        "intervals": outcome.intervals,
        "records": outcome.records,
        "said": outcome.said,
        "seconds": round(seconds, 2),
    }


def _key(context, protocol, with_options=True):
    """What a result is of: model, data, task, and the options that it heeds."""
    task, chosen = context.task, PROTOCOLS[protocol]
    parts = [
        protocol,
        context.embedder.digest,
        repr((task.kind, task.metric, task.templates, task.class_names, task.squash)),
        *[context.fingerprint(s) for s in chosen.splits(context)],
    ]
    for name in chosen.options if with_options else ():
        parts.append(f"{name}={getattr(context.options, name)!r}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()


def _keep_thumbnails(context, outcome):
    """Adds pictures of the records that a report shows."""
    if not outcome.examples:
        return
    path, index = context.folder / "thumbnails.npz", np.unique(outcome.examples)
    kept, key = [], context.fingerprint("test")
    # None, or damaged, or of other pictures: they are drawn anew.
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, BadZipFile):
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as before:
            if str(before["key"]) == key:
                kept = [(before["images"], before["index"])]
                index = np.setdiff1d(index, before["index"])
    if len(index):
        kept.append((thumbnails(context.source("test"), index), index))
        images, index = map(np.concatenate, zip(*kept, strict=True))
        write_arrays(path, images=images, index=index, key=np.array(key))
