"""The run's processes: how they find each other, agree, and end together."""

import atexit
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from unicl_jax import exit_codes, storage
from unicl_jax.errors import InputError
from unicl_jax.processes import agreement, cluster
from unicl_jax.processes.cluster import Place
from unicl_jax.processes.other import Other
from unicl_jax.processes.roll_call import LAST, First, Missing

__all__ = ["Missing", "agree", "find_place", "leave", "start"]

_TOKEN_FILE = "processes.json"
_SHARED_FOR = 60.0  # seconds until a file is seen by all hosts: NFS caches so long
_line: First | Other | None = None  # as jax.distributed's own: a process has one


def find_place(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Place | None:
    """Who this process is: as it is told, or as its cluster says.

    Args:
      coordinator_address: "host:port" of process 0; None where a cluster tells it
        (see `cluster.find`), or for a single process.
      num_processes: of the run; with `coordinator_address`.
      process_id: of this one; with `coordinator_address`.
      environ: default this process's.

    Returns:
      The place; None for a single process.

    Raises:
      InputError: if only some of the three are given, or they cannot be.
    """
    environ = os.environ if environ is None else environ
    given = [coordinator_address, num_processes, process_id]
    if all(x is not None for x in given):
        return cluster.check(Place("flags", *given))
    if any(x is not None for x in given):
        raise InputError(
            "--coordinator_address, --num_processes and --process_id must be given "
            f"together: got {given}."
        )
    gpus = cluster.visible_gpus(environ)
    place = cluster.find(environ, gpus, cluster.tpu_metadata(environ))
    if place is None and (said := cluster.hint(environ)):
        print(said, file=sys.stderr)
    return place


def start(
    place: Place | None,
    config: Mapping[str, Any],
    start_timeout: float = 300.0,
    heartbeat_timeout: float = 100.0,
) -> None:
    """Joins the run's processes; must come before any use of a device.

    Before jax starts, every process tells process 0 what it runs: all of them come and
    agree, or each says who is missing, or what differs.

    Args:
      place: of this process; None does nothing.
      config: the resolved one, flat.
      start_timeout: seconds to wait for all of them.
      heartbeat_timeout: seconds without a word after which a host is taken for gone. A
        process that ends is noticed at once.

    Raises:
      Missing: naming who did not come.
      InputError: naming what differs.
    """
    global _line
    if place is None:
        return
    line = (First if place.index == 0 else Other)(place, heartbeat_timeout)
    facts = agreement.of_this_process(config)
    warnings = line.roll_call(facts, start_timeout)
    if place.index == 0:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    _line = line
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(start_timeout) + 30,
        heartbeat_timeout_seconds=int(heartbeat_timeout),
    )
    # Runs before jax's own, which waits for all.
    atexit.register(line.finish)


def agree(records: Mapping[str, tuple[int, str]], workdir: str | Path) -> None:
    """Makes sure that all have the same records, as many devices and one workdir.

    Args:
      records: by source, how many and their fingerprint.
      workdir: of the run; process 0 leaves `processes.json` there, which the others
        must see.

    Raises:
      InputError: on all processes: what differs, and who has what.
    """
    if _line is None:
        return
    path, is_first = storage.path(workdir) / _TOKEN_FILE, isinstance(_line, First)
    token = secrets.token_hex(8)
    if is_first:
        hosts = '", "'.join(_line.hosts)
        try:
            said = f'{{"token": "{token}", "hosts": ["{hosts}"]}}\n'
            storage.write_text(path, said)
        except OSError as error:
            raise InputError(
                f'--workdir must be a directory that can be written: "{path}" gave '
                f"{error.strerror}; {storage.advice(path.parent)}."
            ) from error
    kind = jax.local_devices()[0].device_kind
    facts = agreement.of_data(records, jax.local_device_count(), kind)
    _, token = _line.agree("data", facts, token)
    seen = is_first or _sees(path, token)
    said = "the same" if seen else f"{path.parent}, without what process 0 wrote there,"
    _line.agree("workdir", {"workdir": {"its directory": said}})


def _sees(path, token):
    deadline = time.monotonic() + _SHARED_FOR
    while time.monotonic() < deadline:
        try:
            if not storage.is_bucket(path):
                os.listdir(path.parent.parent)  # NFS then forgets that it was not there
            if token in storage.read_text(path):
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def leave(code: int, why: str = "") -> int:
    """Tells the others how this process ends, before it does.

    Args:
      code: its exit code.
      why: one line, if it failed.

    Returns:
      The code to end with: another's, if this failure is only that one's echo (a
      collective fails when a process is gone).
    """
    if _line is None:
        return code
    if code in (exit_codes.OK, exit_codes.STOPPED_BY_SIGNAL + 15):  # all of them do
        _line.finish()
        return code
    if code == exit_codes.FAILED and (news := _line.wait_for_news(2.0)):
        if isinstance(_line, First):
            time.sleep(LAST)
        return news[0]
    _line.tell(code, why.splitlines()[0] if why else f"exit code {code}")
    return code
