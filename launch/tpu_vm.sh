#!/usr/bin/env bash
# Trains on Cloud TPU VMs that a queued resource asks for: creates it, waits, installs, runs the same command on every
# worker, and does so again after a pre-emption, until training has finished. The command goes on from the last checkpoint.
#
# launch/tpu_vm.sh --name=NAME --zone=ZONE --accelerator=v5litepod-256 [OPTIONS] -- --config=CONFIG --workdir=DIR [FLAGS]
#
#   --name=NAME           of the queued resource and its nodes
#   --zone=ZONE           e.g. us-west4-a
#   --accelerator=TYPE    e.g. v5litepod-256, v5p-256 (128 chips), v6e-256
#   --slices=N            slices of that type, joined over the data centre network (default 1)
#   --project=PROJECT     default: that of gcloud
#   --runtime=VERSION     software of the VMs (default: that of the accelerator)
#   --spot                pre-emptible capacity
#   --reservation=NAME    reserved capacity
#   --mount=BUCKET        Cloud Storage bucket to mount at /mnt/BUCKET on every worker, for --workdir and --config.data.path
#   --max_restarts=N      how often to start again (default 100)
#   --keep                leave the TPUs up at the end; they cost until they are deleted
#   --dry-run             print the commands instead of running them
#
# The source is what git has committed here. Run it where it may stay for as long as training does (tmux, say).
# /mnt/BUCKET or another directory that all workers share must hold --workdir and the data.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

name='' zone='' accelerator='' slices=1 project='' runtime='' spot=no reservation='' mount='' max_restarts=100 keep=no
while [ $# -gt 0 ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --accelerator=*) accelerator=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --spot) spot=yes ;;
        --reservation=*) reservation=${1#*=} ;;
        --mount=*) mount=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --keep) keep=yes ;;
        --dry-run) dry_run=yes ;;
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        *) refuse "unknown option $1" ;;
    esac
    shift
done
[ -n "$name" ] || refuse "--name=NAME is missing"
[ -n "$zone" ] || refuse "--zone=ZONE is missing"
[ -n "$accelerator" ] || refuse "--accelerator=TYPE is missing"
check_count --slices "$slices"
check_count --max_restarts "$max_restarts"
[ "$spot" = no ] || [ -z "$reservation" ] || refuse "--spot and --reservation exclude each other"
check_training "$@"
if [ -z "$runtime" ]; then
    case $accelerator in
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v4-*) runtime=tpu-ubuntu2204-base ;;
        *) refuse "--accelerator=$accelerator: its runtime is not known here; give --runtime=VERSION" ;;
    esac
fi
if [ "$slices" -gt 1 ]; then
    set -- --config.mesh.slices="$slices" "$@"
fi

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
everywhere=(--worker=all --node=all)
create=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
    --accelerator-type="$accelerator" --runtime-version="$runtime")
if [ "$slices" -gt 1 ]; then
    create+=(--node-prefix="$name" --node-count="$slices")
else
    create+=(--node-id="$name")
fi
[ "$spot" = no ] || create+=(--spot)
[ -z "$reservation" ] || create+=(--reservation="$reservation")

setup='rm -rf ~/transxssm && mkdir ~/transxssm && tar -xzf ~/transxssm.tar.gz -C ~/transxssm'
setup+=' && { [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh; }'
setup+=' && { [ -x ~/venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/venv; }'
setup+=' && cd ~/transxssm && ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e ".[tpu]"'
if [ -n "$mount" ]; then
    setup+=" && sudo mkdir -p /mnt/$mount && sudo chmod 777 /mnt/$mount"
    setup+=" && { mountpoint -q /mnt/$mount || gcsfuse --implicit-dirs --rename-dir-limit=100000 $mount /mnt/$mount; }"
fi
# ssh to many workers does not pass on how the command ended; worker 0 writes it down. Training that outlived a broken
# connection has the lock until it ends.
train="cd ~/transxssm; rm -f ~/exit_code; flock ~/transxssm.lock ~/venv/bin/python -m transxssm_jax.train $(quoted "$@"); code=\$?"
train+="; echo \$code > ~/exit_code; exit \$code"

state() {
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo MISSING
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Waits until the TPUs are there; asks for them, again if they were taken away.
acquire() {
    if [ "$dry_run" = yes ]; then
        run "${create[@]}"
        return
    fi
    local now before=''
    while now=$(state) && [ "$now" != ACTIVE ]; do
        [ "$now" = "$before" ] || echo "$(date +%T) queued resource $name: $now"
        before=$now
        case $now in
            MISSING) run "${create[@]}" ;;
            SUSPENDING | DELETING) ;;
            SUSPENDED | FAILED) delete ;;
        esac
        sleep 30
    done
}

install() {
    run git -C "$here/.." archive --format=tar.gz --output=/tmp/transxssm.tar.gz HEAD &&
        run gcloud compute tpus queued-resources scp /tmp/transxssm.tar.gz "$name:transxssm.tar.gz" "${where[@]}" "${everywhere[@]}" &&
        run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" "${everywhere[@]}" --command="$setup"
}

# Ends with training's exit code, or 69 where it cannot be asked for: the workers are gone.
train() {
    if run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" "${everywhere[@]}" --command="$train"; then
        return 0
    fi
    local code
    code=$(gcloud compute tpus queued-resources ssh "$name" "${where[@]}" --worker=0 --node=0 --command='cat ~/exit_code' || true)
    return "${code:-69}"
}

for ((start = 0; start <= max_restarts; start++)); do
    acquire
    # 69: a process was lost; 75: stopped by SIGTERM; both go on from the last checkpoint.
    code=0
    { install || (exit 69); } && train || code=$?
    case $code in
        69 | 75) echo "$(date +%T) training was interrupted (exit code $code); starting again"; sleep 30 ;;
        *) break ;;
    esac
done
[ "$keep" = yes ] || delete
exit "$code"
