"""Who this process is among the run's, as its cluster tells it.

jax reads some clusters itself, but on Kubernetes only through another package and the
API server, takes one GPU where SLURM starts one process a node, and asks an interactive
shell's tasks to come. What it reads is read here, from the same variables.
"""

import glob
import importlib.util
import math
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from unicl_jax.errors import InputError

_TPU_PORT = (
    8482  # jax's own choice; the others' are the job's, beyond what Linux hands out
)
_FIRST_PORT, _PORTS = 61440, 4096  # of a job; Linux gives them to nobody unasked
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclass(frozen=True)
class Place:
    """One process among a run's."""

    cluster: str  # for messages
    coordinator: str  # "host:port" of process 0
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None  # of this host's GPUs; None: all
    hosts: tuple[str, ...] = ()  # of every process, where that is known


def find(
    environ: Mapping[str, str],
    gpus: int = 0,
    metadata: Callable[[str], str | None] | None = None,
) -> Place | None:
    """Reads a cluster's variables.

    | cluster | what says who we are |
    |---|---|
    | any | JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID |
    | Kubernetes: indexed Job, JobSet | as above; the id is JOB_COMPLETION_INDEX |
    | Kubernetes: Kubeflow | COORDINATOR_ADDRESS and _PORT, NUM_PROCESSES, PROCESS_ID |
    | Cloud TPU on GKE | TPU_WORKER_HOSTNAMES, TPU_WORKER_ID; MEGASCALE_* for slices |
    | Cloud TPU VM | the metadata server's; MEGASCALE_* for slices |
    | SLURM | SLURM_STEP_*, SLURM_PROCID: of srun, not of sbatch or salloc alone |
    | Open MPI | OMPI_COMM_WORLD_*, and where mpirun runs |

    JAX_COORDINATOR_ADDRESS (or JAX_COORDINATOR_PORT) overrides what a cluster says.

    Args:
      environ: the environment.
      gpus: that this process sees; see `visible_gpus`.
      metadata: of a Cloud TPU VM, by key; None off it.

    Returns:
      The place; None for a single process.

    Raises:
      InputError: if a variable cannot be right, or GPUs cannot be shared out.
    """
    place = (
        _told(environ, "JAX_", environ.get("JAX_COORDINATOR_ADDRESS"))
        or _kubeflow(environ)
        or _tpu(environ, metadata)
        or _slurm(environ, gpus)
        or _open_mpi(environ, gpus)
    )
    if place is None or place.count == 1:
        return None
    host, _, port = place.coordinator.rpartition(":")
    port = environ.get("JAX_COORDINATOR_PORT", port)
    address = environ.get("JAX_COORDINATOR_ADDRESS", f"{host}:{port}")
    return check(replace(place, coordinator=address))


def check(place: Place) -> Place:
    """Returns the place, if there can be such a one.

    Args:
      place: as told.

    Raises:
      InputError: if not.
    """
    if not re.fullmatch(r".+:\d+", place.coordinator):
        raise InputError(
            'the coordinator\'s address must be "host:port", as in "10.0.0.2:8476": '
            f'got "{place.coordinator}".'
        )
    if not 0 <= place.index < place.count:
        raise InputError(
            f"processes are counted from 0: process {place.index} of {place.count} "
            f"({place.cluster}) cannot be; give each of them its own number from 0 to "
            f"{place.count - 1}."
        )
    return place


def hint(environ: Mapping[str, str]) -> str | None:
    """What to say to a single process that looks as if it should be one of several."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if environ.get("SLURM_JOB_ID") and tasks != "1" and not _in_srun(environ):
        return (
            f"SLURM gave this job {tasks} tasks, but this process was not started by "
            "srun: it trains alone. Start all of them with srun python -m ..."
        )
    return None


def visible_gpus(environ: Mapping[str, str]) -> int:
    """How many GPUs this process may use; 0 if there are none."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in environ:
            return len([x for x in environ[name].split(",") if x.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def tpu_metadata(environ: Mapping[str, str]) -> Callable[[str], str | None] | None:
    """How to ask a Cloud TPU VM's metadata server; None where there is no TPU."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips or importlib.util.find_spec("libtpu") is None:
        return None
    return None if "TPU_SKIP_MDS_QUERY" in environ else _ask_metadata


def _ask_metadata(key):
    request = urllib.request.Request(
        _METADATA + key, headers={"Metadata-Flavor": "Google"}
    )
    for _ in range(3):
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError:  # there is a server; it has no such key
            return None
        except OSError:
            continue
    return None


def _whole(environ, name):
    text = environ[name]
    if not re.fullmatch(r"\d+", text):
        raise InputError(f'{name} must be a whole number: got "{text}".')
    return int(text)


def _told(environ, prefix, coordinator):
    count, index = f"{prefix}NUM_PROCESSES", f"{prefix}PROCESS_ID"
    if not (coordinator and count in environ):
        return None
    if index not in environ:
        index = "JOB_COMPLETION_INDEX"  # of an indexed Job's pod
    if index not in environ:
        raise InputError(
            f"with {count} every process needs a number: set {prefix}PROCESS_ID, or "
            "let a Job of completionMode Indexed set JOB_COMPLETION_INDEX."
        )
    of = "Kubernetes" if "KUBERNETES_SERVICE_HOST" in environ else "environment"
    return Place(of, coordinator, _whole(environ, count), _whole(environ, index))


def _kubeflow(environ):
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return None
    host, port = environ.get("COORDINATOR_ADDRESS"), environ.get("COORDINATOR_PORT")
    if not (host and port):
        return None
    return _told(environ, "", f"{host}:{port}")


def _tpu(environ, metadata):
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return None
    named = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = {}
    if named and "TPU_WORKER_ID" in environ:  # GKE
        cluster, index = "Cloud TPU on GKE", _whole(environ, "TPU_WORKER_ID")
        hosts = [name.strip().split(":")[0] for name in named.split(",")]
    elif metadata and (worker := metadata("agent-worker-number")):
        cluster, index = "Cloud TPU VM", int(worker)
        # "name" or, formerly, "name:id:address" of each.
        ends = (metadata("worker-network-endpoints") or "").split(",")
        hosts = [end.split(":")[-1] for end in ends if end]
        for line in (metadata("tpu-env") or "").splitlines():
            key, _, value = line.partition(":")
            slices[key.strip()] = value.strip().strip("'")
    else:
        return None
    slices |= {k: v for k, v in environ.items() if k.startswith("MEGASCALE_") and v}
    count = int(slices.get("MEGASCALE_NUM_SLICES") or 1)
    which = int(slices.get("MEGASCALE_SLICE_ID") or 0)
    first = slices.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0]
    if not hosts:
        return None
    return Place(
        cluster + (f", {count} slices" if count > 1 else ""),
        f"{first or hosts[0]}:{_TPU_PORT}",
        count * len(hosts),
        which * len(hosts) + index,
        hosts=tuple(hosts) if count == 1 else (),
    )


def _in_srun(environ):
    # A batch script and salloc's shell have SLURM_NTASKS and SLURM_PROCID, too.
    names = ("STEP_NUM_TASKS", "STEP_NODELIST", "PROCID", "JOB_ID")
    return all(f"SLURM_{name}" in environ for name in names)


def _slurm(environ, gpus):
    if not _in_srun(environ):
        return None
    job, step = _whole(environ, "SLURM_JOB_ID"), environ.get("SLURM_STEP_ID", "0")
    # Two steps of a job on one node need a port each.
    port = _FIRST_PORT + (job + 7 * int(step)) % _PORTS
    per_node = _repeated(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environ.get("SLURM_NODEID", 0))
    return Place(
        "SLURM",
        f"{_first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        _whole(environ, "SLURM_STEP_NUM_TASKS"),
        _whole(environ, "SLURM_PROCID"),
        _share_of_gpus(
            gpus,
            int(environ.get("SLURM_GPUS_ON_NODE", gpus)),
            per_node[node] if node < len(per_node) else 1,
            int(environ.get("SLURM_LOCALID", 0)),
        ),
    )


def _first_host(names):
    """Of SLURM's "node[007-010,12],gpu3": "node007"."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", names)
    return "".join(part or "" for part in match.groups()) if match else names


def _repeated(text):
    """Of SLURM's "8(x2),4": [8, 8, 4]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(n) for n, times in found for _ in range(int(times or 1))]


def _open_mpi(environ, gpus):
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    count = _whole(environ, "OMPI_COMM_WORLD_SIZE")
    here = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    # Open MPI 4 tells mpirun's address; 5 its host's name and process id.
    four = re.match(
        r"(\d+)\.\d+;tcp6?://\[?([^,\]:]+(?::[^,\]]+)*?)[,\]:]",
        environ.get("OMPI_MCA_orte_hnp_uri", ""),
    )
    five = re.match(r"prterun-(.+)-(\d+)@", environ.get("PMIX_NAMESPACE", ""))
    if four:
        job, host = int(four[1]) // 2**12, four[2]
    elif five:
        host, job = five[1], int(five[2])
    else:
        host, job = "", 0
    if here == count:
        host = "127.0.0.1"
    if not host and "JAX_COORDINATOR_ADDRESS" not in environ:
        raise InputError(
            f"Open MPI started {count} processes, and does not tell on which host the "
            "first is: set JAX_COORDINATOR_ADDRESS=host:port (mpirun -x "
            "JAX_COORDINATOR_ADDRESS)."
        )
    host = f"[{host}]" if ":" in host else host
    return Place(
        "Open MPI",
        f"{host}:{_FIRST_PORT + job % _PORTS}",
        count,
        _whole(environ, "OMPI_COMM_WORLD_RANK"),
        _share_of_gpus(
            gpus, gpus, here, int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
        ),
    )


def _share_of_gpus(visible, on_node, tasks, which):
    """This task's GPUs; None for all it sees: it is alone, or was given its own."""
    if tasks == 1 or visible == 0 or visible < on_node or visible == 1:
        return None
    if visible % tasks:
        even = [n for n in range(1, visible + 1) if visible % n == 0]
        raise InputError(
            f"a node's GPUs must divide evenly over its tasks: got {visible} GPUs for "
            f"{tasks} tasks; start {', '.join(map(str, even))} tasks a node."
        )
    each = math.floor(visible / tasks)
    return tuple(range(which * each, (which + 1) * each))
