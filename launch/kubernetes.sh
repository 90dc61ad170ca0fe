#!/usr/bin/env bash
# Trains on Kubernetes, as a JobSet (https://jobset.sigs.k8s.io, v0.6 or newer).
#
#   launch/kubernetes.sh COMMAND [OPTIONS] [-- --config=... --workdir=...]
#
# Commands
#   run      makes the JobSet; its restarts go on from the newest checkpoint
#   status   of the JobSet and its pods
#   logs     of process 0, followed
#   delete   the JobSet and its pods; they save first
# Options
#   --dry-run           prints the YAML and the commands, and does nothing
#   --name=NAME         of the JobSet (unicl)
#   --namespace=NAME    (the context's)
#   --image=IMAGE       with unicl_jax installed; it has to be given
#   --tpu=KIND          a slice of TPUs, as in tpu-v5-lite-podslice
#   --topology=AxB[xC]  of each slice
#   --chips-per-host=N  (4)
#   --slices=N          (1)
#   --gpus=N            GPUs a host, in place of TPUs
#   --hosts=N           hosts with GPUs (1)
#   --volume=CLAIM:DIR  a PersistentVolumeClaim, ReadWriteMany, mounted at DIR: --workdir
#                       and data lie there, unless they are in gs://
#   --spot              on spot nodes of GKE
#   --max-restarts=N    (100)
# LIBTPU_INIT_ARGS, if it is set here, goes to pods with TPUs: flags of the compiler.
# The pods' exit codes decide what comes next; see launch/exit_codes.sh. Wrong input, a
# loss that is not finite, an unforeseen error and a full disk end the JobSet; all else
# restarts it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$here/steps.sh"

name=unicl namespace='' image='' tpu='' topology='' chips=4 slices=1 gpus='' hosts=1
volume='' spot='' max_restarts=100
command=${1:-}
case $command in
run | status | logs | delete) shift ;;
--help | -h | help) usage "$0" && exit ;;
*) refuse "the command must be run, status, logs or delete: got \"$command\";" \
  "see $0 --help." ;;
esac
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
  --help | -h) usage "$0" && exit ;;
  --dry-run) dry_run=yes ;;
  --name=*) name=${1#*=} ;;
  --namespace=*) namespace=${1#*=} ;;
  --image=*) image=${1#*=} ;;
  --tpu=*) tpu=${1#*=} ;;
  --topology=*) topology=${1#*=} ;;
  --chips-per-host=*) chips=${1#*=} ;;
  --slices=*) slices=${1#*=} ;;
  --gpus=*) gpus=${1#*=} ;;
  --hosts=*) hosts=${1#*=} ;;
  --volume=*) volume=${1#*=} ;;
  --spot) spot=yes ;;
  --max-restarts=*) max_restarts=${1#*=} ;;
  *) refuse "options must be known: got $1; see $0 --help. What the trainer takes" \
    "follows --." ;;
  esac
  shift
done
[[ ${1:-} == -- ]] && shift
kubectl=(kubectl)
if [[ -n $namespace ]]; then kubectl+=("--namespace=$namespace"); fi
if [[ ! $name =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]]; then
  refuse "--name must be at most 32 small letters, digits and dashes: got \"$name\";" \
    "name it, say, swin-tiny."
fi
need kubectl "install it, and point it to your cluster."

case $command in
status)
  step "${kubectl[@]}" get jobset "$name" -o wide
  step "${kubectl[@]}" get pods -l "jobset.sigs.k8s.io/jobset-name=$name" -o wide
  exit ;;
logs)
  labels="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0"
  labels+=",batch.kubernetes.io/job-completion-index=0"
  step "${kubectl[@]}" logs --follow --tail=200 -l "$labels"
  exit ;;
delete)
  step "${kubectl[@]}" delete jobset "$name"
  exit ;;
esac

check_training "$@"
if [[ -z $image ]]; then refuse "--image must be given: one with unicl_jax installed."; fi
for pair in "slices=$slices" "hosts=$hosts" "chips-per-host=$chips" \
  "max-restarts=$max_restarts" "gpus=${gpus:-1}"; do
  if [[ ! ${pair#*=} =~ ^[1-9][0-9]*$ ]]; then
    refuse "--${pair%%=*} must be a whole number above 0: got \"${pair#*=}\"."
  fi
done
if [[ -n $tpu && -n $gpus || -z $tpu$gpus ]]; then
  refuse "one of --tpu=KIND and --gpus=N must be given: got" \
    "${tpu:+--tpu=$tpu }${gpus:+--gpus=$gpus}${tpu:-${gpus:-neither}}."
fi
if [[ -n $tpu ]]; then
  if [[ ! $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
    refuse "--topology must be the slice's, as in 4x4 or 4x4x8: got \"$topology\"."
  fi
  total=$((${topology//x/*}))
  if ((total % chips)); then
    refuse "a slice's $total chips must divide over its hosts: got" \
      "--chips-per-host=$chips; name 1, 4 or 8."
  fi
  hosts=$((total / chips))
fi
if [[ -n $volume && ! $volume =~ ^[^:]+:/.+$ ]]; then
  refuse "--volume must be CLAIM:/DIRECTORY: got \"$volume\"."
fi

# A string of YAML, in JSON's quotes.
quoted() {
  local text=${1//\\/\\\\}
  if [[ $text == *$'\n'* ]]; then refuse "arguments must be of one line: got ${1@Q}."; fi
  echo "\"${text//\"/\\\"}\""
}

render() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
YAML
  if [[ -n $tpu ]]; then
    cat <<YAML
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
YAML
  fi
  cat <<YAML
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules: # a code that says that it would fail again
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0 # one that ends, ends all: they start together
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [1, 2, 3, 4]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 180 # to save
YAML
  if [[ -n $tpu$spot ]]; then
    echo "            nodeSelector:"
    if [[ -n $tpu ]]; then
      echo "              cloud.google.com/gke-tpu-accelerator: $(quoted "$tpu")"
      echo "              cloud.google.com/gke-tpu-topology: $(quoted "$topology")"
    fi
    if [[ -n $spot ]]; then
      echo "              cloud.google.com/gke-spot: \"true\""
    fi
  fi
  if [[ -n $gpus || -n $spot ]]; then
    echo "            tolerations:"
    if [[ -n $gpus ]]; then
      echo "            - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"
    fi
    if [[ -n $spot ]]; then
      echo "            - {key: cloud.google.com/gke-spot, operator: Exists}"
    fi
  fi
  cat <<YAML
            containers:
            - name: train
              image: $(quoted "$image")
              command: [python, -u, -m, unicl_jax.main]
              args:
YAML
  for argument in "$@"; do echo "              - $(quoted "$argument")"; done
  if [[ -n $tpu ]]; then # GKE says who is who
    cat <<YAML
              ports:
              - containerPort: 8471
              - containerPort: 8482
              resources:
                limits: {google.com/tpu: $chips}
YAML
    if [[ -n ${LIBTPU_INIT_ARGS:-} ]]; then
      echo "              env:"
      echo "              - {name: LIBTPU_INIT_ARGS, value: $(quoted "$LIBTPU_INIT_ARGS")}"
    fi
  else
    cat <<YAML
              ports:
              - containerPort: 8476
              env: # the process's number is its pod's JOB_COMPLETION_INDEX
              - {name: JAX_COORDINATOR_ADDRESS, value: "$name-workers-0-0.$name:8476"}
              - {name: JAX_NUM_PROCESSES, value: "$hosts"}
              resources:
                limits: {nvidia.com/gpu: $gpus}
YAML
  fi
  echo "              volumeMounts:"
  echo "              - {name: memory, mountPath: /dev/shm} # NCCL's, and data workers'"
  if [[ -n $volume ]]; then
    echo "              - {name: shared, mountPath: $(quoted "${volume#*:}")}"
  fi
  echo "            volumes:"
  echo "            - {name: memory, emptyDir: {medium: Memory}}"
  if [[ -n $volume ]]; then
    echo "            - name: shared"
    echo "              persistentVolumeClaim: {claimName: $(quoted "${volume%%:*}")}"
  fi
}

if [[ -n $gpus ]] && ((slices > 1)); then
  refuse "--slices is for TPUs: got $slices with --gpus; give the number of --hosts."
fi
yaml=$(render "$@")
if [[ -n $dry_run ]]; then
  echo "$yaml"
  echo "---"
  echo "# given to: ${kubectl[*]} apply -f -"
else
  "${kubectl[@]}" apply -f - <<<"$yaml"
fi
