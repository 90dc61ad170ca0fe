"""Who a process is, from the environment of each cluster."""

import pytest

from unicl_jax import processes
from unicl_jax.errors import InputError
from unicl_jax.processes import cluster

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_STEP_NUM_TASKS": "32",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "32",
    "SLURM_GPUS_ON_NODE": "8",
}
# 61440 + 5000 % 4096
PORT = 62344
ONE_A_NODE = {
    **SLURM,
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
GKE = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "1",
    "TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a,a-2.a,a-3.a",
    "TPU_WORKER_ID": "1",
}
SLICES = {
    **GKE,
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run:8080",
}
INDEXED = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:8476",
    "JAX_NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "2",
}
KUBEFLOW = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "COORDINATOR_ADDRESS": "job-worker-0",
    "COORDINATOR_PORT": "6666",
    "NUM_PROCESSES": "3",
    "PROCESS_ID": "1",
}
MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPI_5 = {k: v for k, v in MPI_4.items() if "orte" not in k} | {
    "PMIX_NAMESPACE": "prterun-node-01-9000@1"
}
# What a Cloud TPU VM's metadata server says.
POD = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "0:7:10.0.0.2,1:7:10.0.0.3,2:7:10.0.0.4,3:7:10.0.0.5",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nZONE: 'us-west4-a'\n",
}
POD_SLICES = POD | {
    "worker-network-endpoints": "host-a,host-b,host-c,host-d",
    "tpu-env": "MEGASCALE_NUM_SLICES: '4'\nMEGASCALE_SLICE_ID: '3'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8081'\n",
}


def found(environ, gpus=0, metadata=None):
    place = cluster.find(environ, gpus, metadata and metadata.get)
    return place and (place.coordinator, place.count, place.index, place.local_devices)


@pytest.mark.parametrize(
    ("environ", "gpus", "metadata", "expected"),
    [
        ({}, 8, None, None),
        # SLURM: a process a GPU, all GPUs of the node in sight; or given its own.
        (SLURM, 8, None, (f"gpu007:{PORT}", 32, 11, (3,))),
        (SLURM, 1, None, (f"gpu007:{PORT}", 32, 11, None)),
        (SLURM, 2, None, (f"gpu007:{PORT}", 32, 11, None)),
        (SLURM, 0, None, (f"gpu007:{PORT}", 32, 11, None)),
        # A process a node takes all of its GPUs (jax alone would take the first).
        (ONE_A_NODE, 8, None, (f"gpu007:{PORT}", 4, 1, None)),
        # Two processes a node, four GPUs each.
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2),2", "SLURM_LOCALID": "1"},
            *(8, None, (f"gpu007:{PORT}", 32, 11, (4, 5, 6, 7))),
        ),
        # Another step of the job at the same time: another port.
        (
            {**SLURM, "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "n1,n2"},
            *(0, None, (f"n1:{PORT + 14}", 32, 11, None)),
        ),
        # A shell of salloc, sbatch's script, srun --pty bash: nobody else will come.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 8, None, None),
        ({k: v for k, v in SLURM.items() if "_STEP_" not in k}, 8, None, None),
        (GKE, 0, None, ("a-0.a:8482", 4, 1, None)),
        ({**GKE, "JAX_PLATFORMS": "cpu"}, 0, None, None),
        (
            {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
            *(0, None, None),
        ),
        (SLICES, 0, None, ("run-slice-0-0.run:8482", 8, 5, None)),
        ({}, 0, POD, ("10.0.0.2:8482", 4, 2, None)),
        ({}, 0, POD_SLICES, ("10.0.0.9:8482", 16, 14, None)),
        # A single host; and a TPU's metadata server that says nothing.
        ({}, 0, POD | {"worker-network-endpoints": "0:7:10.0.0.2"}, None),
        ({}, 0, {"agent-worker-number": None}, None),
        (INDEXED, 8, None, ("run-workers-0-0.run:8476", 4, 2, None)),
        (
            {**INDEXED, "JAX_PROCESS_ID": "3"},
            *(8, None, ("run-workers-0-0.run:8476", 4, 3, None)),
        ),
        (KUBEFLOW, 8, None, ("job-worker-0:6666", 3, 1, None)),
        # An indexed Job of single processes.
        ({"KUBERNETES_SERVICE_HOST": "1", "JOB_COMPLETION_INDEX": "3"}, 8, None, None),
        # 61440 + (1531576320 // 4096) % 4096 = 61440 + 1184
        (MPI_4, 4, None, ("10.96.0.1:62624", 8, 5, (1,))),
        (MPI_5, 0, None, ("node-01:62248", 8, 5, None)),
        (
            {**MPI_5, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
            *(0, None, ("127.0.0.1:62248", 8, 5, None)),
        ),
        # What the user says about the coordinator goes first.
        (
            {**SLURM, "JAX_COORDINATOR_ADDRESS": "gpu007-ib:9"},
            *(0, None, ("gpu007-ib:9", 32, 11, None)),
        ),
        (
            {**SLURM, "JAX_COORDINATOR_PORT": "77"},
            *(0, None, ("gpu007:77", 32, 11, None)),
        ),
    ],
)
def test_each_cluster_tells_a_process_who_it_is(environ, gpus, metadata, expected):
    assert found(environ, gpus, metadata) == expected


@pytest.mark.parametrize(
    ("environ", "gpus", "message"),
    [
        (
            {**INDEXED, "JAX_NUM_PROCESSES": "four"},
            0,
            'must be a whole number: got "fo',
        ),
        ({**INDEXED, "JOB_COMPLETION_INDEX": "4"}, 0, "process 4 of 4 .* cannot be"),
        (
            {k: v for k, v in INDEXED.items() if k != "JOB_COMPLETION_INDEX"},
            *(0, "every process needs a number: set JAX_PROCESS_ID"),
        ),
        ({**INDEXED, "JAX_COORDINATOR_ADDRESS": "host"}, 0, 'must be "host:port"'),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x4)", "SLURM_GPUS_ON_NODE": "8"},
            *(8, "got 8 GPUs for 3 tasks; start 1, 2, 4, 8 tasks a node"),
        ),
        (
            {k: v for k, v in MPI_5.items() if k != "PMIX_NAMESPACE"},
            *(0, "set JAX_COORDINATOR_ADDRESS=host:port"),
        ),
    ],
)
def test_what_cannot_be_is_answered(environ, gpus, message):
    with pytest.raises(InputError, match=message):
        cluster.find(environ, gpus)


def test_hosts_of_a_pod_are_known_by_name():
    assert cluster.find({}, 0, POD.get).hosts == tuple(
        f"10.0.0.{i}" for i in (2, 3, 4, 5)
    )


def test_flags_go_before_any_cluster_and_come_together():
    place = processes.find_place("a:1", 2, 1, SLURM)
    assert (place.coordinator, place.count, place.index) == ("a:1", 2, 1)
    with pytest.raises(InputError, match="must be given together"):
        processes.find_place("a:1", None, None, {})
    with pytest.raises(InputError, match="process 2 of 2"):
        processes.find_place("a:1", 2, 2, {})


def test_a_job_of_many_tasks_that_starts_one_is_told_of_srun(capsys):
    outside = {k: v for k, v in SLURM.items() if "_STEP_" not in k}
    assert processes.find_place(environ=outside) is None
    assert (
        "32 tasks, but this process was not started by srun" in capsys.readouterr().err
    )
    assert cluster.hint(SLURM) is None
    assert cluster.hint({**outside, "SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"ROCR_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}, 3),
    ],
)
def test_visible_gpus_are_those_that_the_environment_names(environ, number):
    assert cluster.visible_gpus(environ) == number
