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
# The source is what git has committed here. Run it where it may stay for as long as training does (tmux, say). Training
# itself goes on when the connection breaks or this script is stopped; called again, the script waits for it to end before it
# starts the command anew. The TPUs cost until the script, or gcloud, deletes them.
# --workdir and the data are at gs://BUCKET/DIR, which needs no mount, or in /mnt/BUCKET or another directory that all workers
# share.
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
case $mount in *[!a-z0-9._-]*) refuse "--mount=$mount must be the name of a bucket: a-z, 0-9, . _ -" ;; esac
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
if [ "$slices" -gt 1 ] && ! gives --config.mesh.slices "$@"; then
    set -- "$@" --config.mesh.slices="$slices"
fi

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
everywhere=(--worker=all --node=all)
tpus=(gcloud compute tpus queued-resources)
create=("${tpus[@]}" create "$name" "${where[@]}"
    --accelerator-type="$accelerator" --runtime-version="$runtime")
if [ "$slices" -gt 1 ]; then
    create+=(--node-prefix="$name" --node-count="$slices")
else
    create+=(--node-id="$name")
fi
[ "$spot" = no ] || create+=(--spot)
[ -z "$reservation" ] || create+=(--reservation="$reservation")

setup='rm -rf ~/transxssm ~/exit_code && mkdir ~/transxssm && tar -xzf ~/transxssm.tar.gz -C ~/transxssm'
setup+=' && { [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh; }'
setup+=' && { [ -x ~/venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/venv; }'
setup+=' && cd ~/transxssm && ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e ".[tpu,cloud]"'
if [ -n "$mount" ]; then
    setup+=" && sudo mkdir -p /mnt/$mount && sudo chmod 777 /mnt/$mount"
    setup+=" && { mountpoint -q /mnt/$mount || gcsfuse --implicit-dirs --rename-dir-limit=100000 $mount /mnt/$mount; }"
fi
# Training has the lock on each worker for as long as it runs, whether or not anybody still looks on; until then its source stays.
lock='flock --close ~/transxssm.lock'
setup="flock --nonblock ~/transxssm.lock true || echo 'training still runs here; waiting for its end'; $lock bash -c ${setup@Q}"
# Training writes into a file: a broken connection must not reach it. Its exit code too: ssh to many workers does not pass it on.
job="cd ~/transxssm && ~/venv/bin/python -m transxssm_jax.train $(quoted "$@"); echo \$? > ~/exit_code"
train="setsid nohup $lock bash -c ${job@Q} > ~/train.log 2>&1 < /dev/null & tail -n +1 -F --pid=\$! ~/train.log"
ask="flock ~/transxssm.lock true & tail -n 0 -F --pid=\$! ~/train.log >&2; cat ~/exit_code"

# The archive of the source, and what gcloud says.
if [ "$dry_run" = yes ]; then
    scratch=/tmp/transxssm
else
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
fi

# What the queued resource is; MISSING only where gcloud says that there is none.
state() {
    if ! "${tpus[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>"$scratch/said"; then
        if grep -q NOT_FOUND "$scratch/said"; then
            echo MISSING
        else
            echo "not known: $(tail -n 1 "$scratch/said")"
        fi
    fi
}

delete() {
    run "${tpus[@]}" delete "$name" "${where[@]}" --force --quiet
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
            # What is refused at the first start is wrong; later the service may be at fault.
            MISSING) run "${create[@]}" || [ "$start" -gt 0 ] ;;
            SUSPENDED | FAILED) delete || true ;;
        esac
        sleep 30
    done
}

install() {
    run "${tpus[@]}" scp "$scratch/source.tar.gz" "$name:transxssm.tar.gz" "${where[@]}" "${everywhere[@]}" &&
        run "${tpus[@]}" ssh "$name" "${where[@]}" "${everywhere[@]}" --command="$setup"
}

# Sets code to training's exit code, or to 69 where it cannot be asked for: the workers are gone.
train() {
    code=0
    run "${tpus[@]}" ssh "$name" "${where[@]}" "${everywhere[@]}" --command="$train" || true
    [ "$dry_run" = no ] || return 0
    # Worker 0 answers when its training has ended: the connection may have broken before.
    code=$("${tpus[@]}" ssh "$name" "${where[@]}" --worker=0 --node=0 --command="$ask" | tail -n 1) || true
    case $code in '' | *[!0-9]*) code=69 ;; esac
}

run git -C "$here/.." archive --format=tar.gz --output="$scratch/source.tar.gz" HEAD
failed=0
for ((start = 0; start <= max_restarts; start++)); do
    acquire
    if install; then
        failed=0
        train
    else
        code=69
        sleep 30  # until a pre-emption shows
        [ "$(state)" != ACTIVE ] || failed=$((failed + 1))
        if [ "$failed" -eq 3 ]; then
            echo "error: the TPUs are there, and installing failed 3 times; what the workers said is above" >&2
            code=1
        fi
    fi
    # 69: a process was lost; 75: told to stop, and saved; 137, 255: killed; 129, 138, 140, 143: SIGHUP, SIGUSR1, SIGUSR2 or
    # SIGTERM came before training took them over. All go on from the last checkpoint.
    case $code in
        69 | 75 | 129 | 137 | 138 | 140 | 143 | 255) echo "$(date +%T) training was interrupted (exit code $code); starting again"; sleep 30 ;;
        *) break ;;
    esac
done
if [ "$keep" = no ] && ! delete; then
    echo "error: queued resource $name could not be deleted; it costs until it is" >&2
fi
exit "$code"
