"""The launchers: what they would do, and what they do with stand-ins for tools."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from absl import flags

from unicl_jax import exit_codes
from unicl_jax import main as _main  # noqa: F401  its flags
from unicl_jax.processes import cluster

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
# A recipe that is there, and a directory that a shell must not take apart.
TRAINING = ["--config=configs/quickstart.py", "--workdir=/shared/it's $HOME run"]
POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-256"]


def call(script, *arguments, **options):
    options = {"cwd": ROOT, "timeout": 100} | options
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def steps(output):
    """The commands of a dry run."""
    lines = [x for x in output.splitlines() if not x.startswith("#")]
    return [shlex.split(line) for line in lines]


def check_training(arguments):
    """Every flag is one that the trainer takes, and none was taken apart."""
    arguments = [x for x in arguments if x.startswith("--")]
    names = [x.removeprefix("--").split("=")[0] for x in arguments]
    assert {"config", "workdir"} <= {*names}
    for name in names:
        assert name in flags.FLAGS, name
    assert {*TRAINING} <= {*arguments}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(
        ["shellcheck", "-x", script], capture_output=True, text=True, cwd=LAUNCH
    )
    assert found.stdout == ""


@pytest.mark.parametrize(
    "script", ["one_box.sh", "slurm.sh", "kubernetes.sh", "tpu_pod.sh"]
)
def test_help_says_how(script):
    done = call(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout and "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one_box.sh", "two", *TRAINING], 'must come first: got "two"'),
        (["one_box.sh", "2", TRAINING[0]], "--workdir must be given"),
        (["one_box.sh", "--restarts=x", "2", *TRAINING], 'number: got "x"'),
        (["slurm.sh", "--nodes=2", *TRAINING], "must follow --"),
        (["slurm.sh", "--nodes=2", "--", TRAINING[1]], "--config must be given"),
        (["slurm.sh", "--nodes=2", "--", *TRAINING], "sbatch must be on PATH"),
        (["kubernetes.sh", "go"], 'got "go"'),
        (["kubernetes.sh", "run", "--tpus=4", "--", *TRAINING], "got --tpus=4"),
        (["kubernetes.sh", "status"], "kubectl must be on PATH"),
        (["kubernetes.sh", "status", "--name=A_b"], 'dashes: got "A_b"'),
        (["tpu_pod.sh", "status", "--name=x"], "--zone must be given"),
        (["tpu_pod.sh", "status", *POD], "gcloud must be on PATH"),
        (["tpu_pod.sh", "create", *POD[:2], "--type=tpu9-4"], 'got "tpu9-4"'),
        (["tpu_pod.sh", "run", *POD], "--config must be given"),
    ],
)
def test_what_cannot_be_is_answered(arguments, message, tmp_path):
    # A machine without the tools of any cluster, whatever this one has.
    for tool in ("bash", "basename", "dirname", "sed", "cat"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "python").symlink_to(sys.executable)
    before = {*tmp_path.iterdir()}
    done = call(*arguments, env={"PATH": str(tmp_path), "HOME": str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stdout == "" and {*tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus=8"], "--image must be given"),
        (["--image=i"], "one of --tpu=KIND and --gpus=N must be given"),
        (["--image=i", "--tpu=v", "--topology=16"], 'or 4x4x8: got "16"'),
        (["--image=i", "--tpu=v", "--topology=1x2"], "2 chips must divide"),
        (["--image=i", "--gpus=8", "--hosts=0"], '--hosts must be .* got "0"'),
        (["--image=i", "--gpus=8", "--slices=2"], "--slices is for TPUs"),
        (["--image=i", "--gpus=8", "--volume=x"], 'DIRECTORY: got "x"'),
    ],
)
def test_a_job_set_that_cannot_be_is_answered(options, message):
    done = call("kubernetes.sh", "run", "--dry-run", *options, "--", *TRAINING)
    assert done.returncode == 2 and re.search(message, done.stderr)


# --- One box.


def test_one_box_gives_each_process_its_number_and_its_gpus():
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,2,4,6"}
    shares = ["CUDA_VISIBLE_DEVICES=0,2", "CUDA_VISIBLE_DEVICES=4,6"]
    done = call("one_box.sh", "--dry-run", "2", *TRAINING, env=environ)
    commands = steps(done.stdout)
    for i, command in enumerate(commands):
        assert command[:2] == ["env", shares[i]]
        assert command[2:6] == ["python", "-u", "-m", "unicl_jax.main"]
        check_training(command[6:])
        assert f"--process_id={i}" in command and "--num_processes=2" in command
    assert len({command[-3] for command in commands}) == 1
    done = call("one_box.sh", "--dry-run", "3", *TRAINING, env=environ)
    assert "4 GPUs must divide evenly" in done.stderr


@pytest.mark.parametrize("script", ["one_box.sh", "slurm.sh"])
def test_the_logs_of_a_run_in_a_bucket_lie_here(script):
    run = ["--config=configs/swin_tiny.py", "--workdir=gs://bucket/a/run/"]
    first = "2" if script == "one_box.sh" else "--"
    done = call(script, "--dry-run", first, *run)
    assert done.returncode == 0 and run[1] in done.stdout
    assert "gs://bucket/a/run.logs" not in done.stdout
    if script == "slurm.sh":
        assert f"--output={Path.cwd()}/run.logs/%j.log" in done.stdout


def stand_in(folder, name, script):
    """Puts an executable of that name into `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(script))
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path):
    """A folder of stand-ins, and an environment that finds them first."""
    folder = tmp_path / "tools"
    folder.mkdir()
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    home = tmp_path / "home"
    home.mkdir()
    return folder, {
        **os.environ,
        "PATH": path,
        "HOME": str(home),
        "FAKE": str(tmp_path),
    }


# Ends with the next line of $FAKE/codes; notes how it was started.
TRAINER = """
    echo "$@" >>"$FAKE/started"
    [[ $1 == -c ]] && exec %s "$@"
    code=$(head -n 1 "$FAKE/codes"); sed -i 1d "$FAKE/codes"
    sleep 0.3
    exit "$code"
    """


def test_one_box_restarts_after_a_code_that_may_go_on(tools, tmp_path):
    folder, environ = tools
    stand_in(folder, "python", TRAINER % sys.executable)
    (tmp_path / "codes").write_text("143\n6\n2\n0\n")
    done = call(
        *("one_box.sh", "--restarts=5", "1", "--config=c", f"--workdir={tmp_path}/w"),
        env=environ,
    )
    assert done.returncode == 2  # after which nobody tries again
    assert done.stderr.count("starting again") == 2
    (tmp_path / "codes").write_text("137\n137\n0\n")
    done = call(
        *("one_box.sh", "--restarts=1", "1", "--config=c", f"--workdir={tmp_path}/w"),
        env=environ,
    )
    assert done.returncode == 137 and (tmp_path / "codes").read_text() == "0\n"


def test_ctrl_c_asks_all_processes_to_save(tools, tmp_path):
    folder, environ = tools
    script = """
        [[ $1 == -c ]] && exec %s "$@"
        trap 'echo saved >>"$FAKE/saved"; exit 143' TERM
        touch "$FAKE/there_${@: -1}"
        for i in {1..600}; do sleep 0.1; done
        """
    stand_in(folder, "python", script % sys.executable)
    box = subprocess.Popen(
        ["bash", LAUNCH / "one_box.sh", "--restarts=3", "2", "--config=c"]
        + [f"--workdir={tmp_path}/w"],
        env=environ,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 20
        while len([*tmp_path.glob("there_*")]) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        box.send_signal(signal.SIGINT)
        assert box.wait(20) == 143
    finally:
        box.kill()
        box.stderr.close()
    assert (tmp_path / "saved").read_text() == "saved\n" * 2


def test_one_box_ends_with_the_trainers_own_code(tmp_path):
    """Two real processes, for whom one row is too few."""
    workdir = tmp_path / "w"
    done = call(
        *("one_box.sh", 2, "--config=configs/quickstart.py", f"--workdir={workdir}"),
        *("--config.batch_size=1", "--start_timeout=60"),
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == exit_codes.BAD_INPUT, done.stderr
    for i in range(2):
        said = (tmp_path / "w.logs" / f"process_{i}.log").read_text()
        assert "batch_size must be divisible" in said, said
    assert "batch_size must be divisible" in done.stdout  # of process 0


# --- SLURM.


def test_slurm_submits_the_trainer_as_it_was_given():
    done = call("slurm.sh", "--dry-run", "--nodes=2", "--", *TRAINING)
    make, submit = steps(done.stdout)
    assert make == ["mkdir", "-p", "/shared/it's $HOME run.logs"]
    assert submit[0] == "sbatch" and "--requeue" in submit and "--nodes=2" in submit
    script = submit.index(str(LAUNCH / "slurm.sbatch"))
    check_training(submit[script + 1 :])


@pytest.mark.parametrize(
    ("code", "environ", "queued_again"),
    [
        (0, {}, False),
        (2, {}, False),
        (3, {}, False),
        (6, {}, True),
        (137, {}, True),
        (143, {}, False),  # scancel; after a preemption SLURM does it
        (6, {"SLURM_RESTART_COUNT": "3", "UNICL_MAX_RESTARTS": "3"}, False),
    ],
)
def test_a_job_is_queued_again_where_it_may_go_on(
    code, environ, queued_again, tools, tmp_path
):
    folder, base = tools
    stand_in(folder, "srun", f'echo "$@" >>"$FAKE/srun"; exit {code}')
    stand_in(folder, "scontrol", 'echo "$@" >>"$FAKE/scontrol"')
    environ = {**base, "SLURM_JOB_ID": "7", "UNICL_LAUNCH": str(LAUNCH), **environ}
    done = call("slurm.sbatch", *TRAINING, env=environ)
    assert done.returncode == code
    assert (tmp_path / "scontrol").exists() == queued_again
    if queued_again:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert "python -u -m unicl_jax.main --config" in (tmp_path / "srun").read_text()


@pytest.mark.parametrize("ends_first", [False, True])
def test_at_the_time_limit_a_job_saves_and_is_queued_again(tools, tmp_path, ends_first):
    folder, environ = tools
    stand_in(
        folder,
        "srun",
        """
        trap "exit 143" TERM
        echo $$ >"$FAKE/pid.new"; mv "$FAKE/pid.new" "$FAKE/pid"
        while true; do sleep 0.1; done
        """,
    )
    # It comes back when the processes are gone already, or while they save.
    waiting = 'while kill -0 "$pid"; do sleep 0.05; done' if ends_first else ":"
    stand_in(
        folder,
        "scancel",
        f'echo "$@" >"$FAKE/scancel"; pid=$(<"$FAKE/pid"); kill "$pid"; {waiting}',
    )
    stand_in(folder, "scontrol", 'echo "$@" >"$FAKE/scontrol"')
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", *TRAINING],
        env={**environ, "SLURM_JOB_ID": "7", "UNICL_LAUNCH": str(LAUNCH)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 143
    finally:
        job.kill()
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 7\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


# --- Kubernetes.


def job_set(*options):
    done = call(
        "kubernetes.sh", "run", "--dry-run", "--image=i:1", *options, "--", *TRAINING
    )
    assert done.returncode == 0, done.stderr
    [whole] = [x for x in yaml.safe_load_all(done.stdout) if x]
    [replicated] = whole["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    return whole, replicated, job, pod, container


def test_a_job_set_of_gpus_tells_each_pod_who_it_is():
    volume = "--volume=claim:/shared"
    whole, _, job, pod, container = job_set(
        "--gpus=8", "--hosts=4", "--name=run", volume
    )
    assert job["completions"] == job["parallelism"] == 4
    assert container["command"][-1] == "unicl_jax.main"
    check_training(container["args"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    environ = {x["name"]: x["value"] for x in container["env"]}
    place = cluster.find({**environ, "JOB_COMPLETION_INDEX": "3"}, gpus=8)
    # A JobSet's pod is JOBSET-JOB-INDEX-POD, under the JobSet's name.
    assert (place.count, place.index, place.local_devices) == (4, 3, None)
    assert place.coordinator == "run-workers-0-0.run:8476"
    assert whole["metadata"]["name"] == "run"
    assert [x["name"] for x in whole["spec"]["replicatedJobs"]] == ["workers"]
    mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounted["shared"] == "/shared"
    assert {v["name"] for v in pod["volumes"]} == {*mounted}


def test_a_job_set_of_tpus_has_a_pod_for_each_host_of_each_slice():
    whole, replicated, job, pod, container = job_set(
        "--tpu=tpu-v5-lite-podslice", "--topology=16x16", "--slices=2", "--spot"
    )
    assert replicated["replicas"] == 2
    assert job["completions"] == job["parallelism"] == 64
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    chosen = pod["nodeSelector"]
    assert chosen["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert chosen["cloud.google.com/gke-spot"] == "true"
    assert "env" not in container  # GKE tells
    assert "exclusive-topology" in str(whole["metadata"]["annotations"])


def test_a_job_set_of_tpus_gets_flags_of_the_compiler(monkeypatch):
    flags = "--xla_a=true --xla_b=2"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    *_, container = job_set("--tpu=tpu-v5-lite-podslice", "--topology=2x2")
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": flags}]
    *_, container = job_set("--gpus=1")
    assert "LIBTPU_INIT_ARGS" not in {x["name"] for x in container["env"]}


def test_a_job_set_is_restarted_by_the_same_codes_as_elsewhere():
    whole, _, job, pod, _ = job_set("--gpus=8", "--max-restarts=7")
    [rule] = job["podFailurePolicy"]["rules"]
    ends = {*rule["onExitCodes"]["values"]}
    known = {
        value
        for name, value in vars(exit_codes).items()
        if isinstance(value, int) and name not in ("OK", "STOPPED_BY_SIGNAL")
    }
    assert ends == known - {*exit_codes.RESTART}
    assert whole["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def test_kubectl_gets_the_yaml_of_the_dry_run(tools, tmp_path):
    folder, environ = tools
    stand_in(folder, "kubectl", 'echo "$@" >"$FAKE/call"; cat >"$FAKE/yaml"')
    arguments = ["--image=i", "--gpus=1", "--namespace=team", "--", *TRAINING]
    assert call("kubernetes.sh", "run", *arguments, env=environ).returncode == 0
    assert (tmp_path / "call").read_text() == "--namespace=team apply -f -\n"
    dry = call("kubernetes.sh", "run", "--dry-run", *arguments).stdout
    assert (tmp_path / "yaml").read_text() == dry.split("---\n")[0]


# --- Cloud TPU.


def test_a_dry_watch_shows_every_step():
    done = call(
        *("tpu_pod.sh", "watch", "--dry-run", *POD, "--slices=2", "--spot"),
        *("--setup=sudo mount -a", "--", *TRAINING),
    )
    assert done.returncode == 0
    create, pack, copy, install, run, code, delete = steps(done.stdout)
    tpus = ["gcloud", "compute", "tpus", "queued-resources"]
    for command in (create, copy, install, run, code, delete):
        assert command[:4] == tpus and "--zone=us-west4-a" in command
    assert create[4] == "create" and {"--spot", "--node-count=2"} <= {*create}
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert pack[0] == "tar" and copy[4] == "scp" and delete[4] == "delete"
    [remote] = [x.split("=", 1)[1] for x in run if x.startswith("--command=")]
    assert remote.startswith(
        "cd unicl_jax_sources && { sudo mount -a; } && bash launch/"
    )
    check_training(shlex.split(remote.split("start ")[1]))


@pytest.fixture
def cloud(tools, tmp_path):
    """A pod of one host: a folder, where `gcloud ssh` runs its commands.

    Its state is $FAKE/state; a line of $FAKE/taken takes the TPU away at that look.
    """
    folder, environ = tools
    stand_in(
        folder,
        "gcloud",
        """
        shift 3
        echo "$1" >>"$FAKE/calls"
        case $1 in
        describe)
          if [[ ! -s $FAKE/state ]]; then echo "NOT_FOUND: none" >&2; exit 1; fi
          if [[ -e $FAKE/take && -s $FAKE/started ]]; then
            rm -r "$FAKE/take" "$FAKE/home"; mkdir "$FAKE/home"
            echo SUSPENDED >"$FAKE/state"
          fi
          cat "$FAKE/state" ;;
        create) echo ACTIVE >"$FAKE/state" ;;
        delete) rm "$FAKE/state" ;;
        scp) cp "$2" "$HOME/unicl_jax.tar.gz" ;;
        ssh)
          cd "$HOME"
          unset LIBTPU_INIT_ARGS # the hosts are others
          for x in "$@"; do
            if [[ $x == --command=* ]]; then bash -c "${x#--command=}"; fi
          done ;;
        esac
        """,
    )
    stand_in(tmp_path / "python", "python", TRAINER % sys.executable)
    stand_in(
        folder,
        "uv",
        """
        mkdir -p "$HOME/unicl_env/bin"
        cp "$FAKE/python/python" "$HOME/unicl_env/bin/"
        """,
    )
    return environ


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_watch_makes_a_preempted_tpu_anew_and_runs_until_the_end(cloud, tmp_path):
    (tmp_path / "codes").write_text("143\n6\n0\n")
    (tmp_path / "take").touch()  # once, after the first start
    done = call(
        *("tpu_pod.sh", "watch", *POD, "--poll=1", "--spot", "--", *TRAINING),
        env=cloud,
    )
    assert done.returncode == 0, done.stderr
    calls = lines(tmp_path / "calls")
    assert calls.count("create") == 2 and calls.count("delete") == 1
    assert calls.count("scp") == 2  # the new hosts have nothing
    assert "taken away: making it anew" in done.stderr
    assert "ended with 6: starting again" in done.stderr
    started = lines(tmp_path / "started")
    assert started == [f"-u -m unicl_jax.main {' '.join(TRAINING)}"] * 3
    assert lines(tmp_path / "codes") == []


def test_a_pod_gets_flags_of_the_compiler(cloud, tmp_path):
    (tmp_path / "codes").write_text("0\n")
    trainer = tmp_path / "python" / "python"
    note = 'echo "$LIBTPU_INIT_ARGS" >>"$FAKE/flags"\n'
    trainer.write_text(trainer.read_text().replace("code=", note + "code=", 1))
    cloud["LIBTPU_INIT_ARGS"] = flags = "--xla_a=true --xla_b=2"
    done = call(
        *("tpu_pod.sh", "watch", *POD, "--poll=1", "--setup=true", "--", *TRAINING),
        env=cloud,
    )
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "flags") == [flags]


def test_watch_ends_with_a_code_that_would_come_again(cloud, tmp_path):
    (tmp_path / "codes").write_text("2\n0\n")
    done = call("tpu_pod.sh", "watch", *POD, "--poll=1", "--", *TRAINING, env=cloud)
    assert done.returncode == exit_codes.BAD_INPUT
    assert "the trainer ended with 2" in done.stderr
    assert len(lines(tmp_path / "started")) == 1


def test_watch_gives_up_after_as_many_restarts_as_it_was_given(cloud, tmp_path):
    (tmp_path / "codes").write_text("6\n" * 9)
    done = call(
        *("tpu_pod.sh", "watch", *POD, "--poll=1", "--max-restarts=1", "--", *TRAINING),
        env=cloud,
    )
    assert done.returncode == 1 and "given up after 1 restarts" in done.stderr
    assert len(lines(tmp_path / "started")) == 2


def test_a_pod_is_used_step_by_step(cloud, tmp_path):
    (tmp_path / "codes").write_text("0\n")
    for command in ("create", "install", "run"):
        more = ["--", *TRAINING] if command == "run" else []
        done = call("tpu_pod.sh", command, *POD, "--poll=1", *more, env=cloud)
        assert done.returncode == 0, (command, done.stderr)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = call("tpu_pod.sh", "status", *POD, env=cloud).stdout.splitlines()
        if status != ["ACTIVE", "unicl: running"]:
            break
        time.sleep(0.1)
    assert status == ["ACTIVE", "unicl: 0"]
    assert call("tpu_pod.sh", "stop", *POD, env=cloud).returncode == 0
    assert call("tpu_pod.sh", "delete", *POD, env=cloud).returncode == 0
    assert not (tmp_path / "state").exists()
