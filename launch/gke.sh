#!/usr/bin/env bash
# Trains on a GKE cluster through xpk (pip install xpk): one workload, started again by the cluster when it is evicted,
# pre-empted or loses a host. The command goes on from the last checkpoint.
#
# launch/gke.sh --cluster=CLUSTER --name=NAME --tpu_type=v5litepod-256 [OPTIONS] -- --config=CONFIG --workdir=DIR [FLAGS]
#
#   --cluster=CLUSTER     made by xpk cluster create
#   --name=NAME           of the workload
#   --tpu_type=TYPE       e.g. v5litepod-256, v5p-256 (128 chips), v6e-256, tpu7x-128
#   --slices=N            slices of that type (default 1)
#   --project=PROJECT, --zone=ZONE    default: those of gcloud
#   --image=IMAGE         with this project and jax[tpu] installed; without it, this directory is put on --base_image
#   --base_image=IMAGE    image with Python 3.12 or 3.13 (default python:3.12); the project is installed when it starts
#   --storage=NAME        storage attached to the cluster (xpk storage attach), which holds --workdir and the data;
#                         gs://BUCKET/DIR needs none
#   --priority=LEVEL      very-low, low, medium, high or very-high (default medium)
#   --grace_seconds=N     between SIGTERM and SIGKILL; must cover two more steps and a checkpoint (default 120)
#   --max_restarts=N      how often to start again (default 100)
#   --dry-run             print the command instead of running it
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

cluster='' name='' tpu_type='' slices=1 project='' zone='' image='' base_image=python:3.12 storage='' priority=medium
grace_seconds=120 max_restarts=100
while [ $# -gt 0 ]; do
    case $1 in
        --cluster=*) cluster=${1#*=} ;;
        --name=*) name=${1#*=} ;;
        --tpu_type=*) tpu_type=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --base_image=*) base_image=${1#*=} ;;
        --storage=*) storage=${1#*=} ;;
        --priority=*) priority=${1#*=} ;;
        --grace_seconds=*) grace_seconds=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --dry-run) dry_run=yes ;;
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        *) refuse "unknown option $1" ;;
    esac
    shift
done
[ -n "$cluster" ] || refuse "--cluster=CLUSTER is missing"
[ -n "$name" ] || refuse "--name=NAME is missing"
[ -n "$tpu_type" ] || refuse "--tpu_type=TYPE is missing"
check_count --slices "$slices"
check_count --grace_seconds "$grace_seconds"
check_count --max_restarts "$max_restarts"
check_training "$@"
if [ "$slices" -gt 1 ] && ! gives --config.mesh.slices "$@"; then
    set -- "$@" --config.mesh.slices="$slices"
fi

# exec: SIGTERM of an eviction must reach Python, not the shell.
command="exec python -m transxssm_jax.train $(quoted "$@")"
create=(xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$tpu_type" --num-slices="$slices")
[ -z "$project" ] || create+=(--project="$project")
[ -z "$zone" ] || create+=(--zone="$zone")
if [ -n "$image" ]; then
    create+=(--docker-image="$image")
else
    create+=(--base-docker-image="$base_image" --script-dir="$(cd "$here/.." && pwd)")
    command="pip install --quiet -e .[tpu,cloud] && $command"
fi
[ -z "$storage" ] || create+=(--storage="$storage")
# Of its own accord xpk starts again after 127 to 255 (killed); 69: another process was lost; 75: SIGTERM, after saving.
create+=(--priority="$priority" --max-restarts="$max_restarts" --restart-on-exit-codes="69,75"
    --termination-grace-period-seconds="$grace_seconds" --command="$command")
run "${create[@]}"
