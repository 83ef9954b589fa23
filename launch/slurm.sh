#!/usr/bin/env bash
# Trains as a SLURM job: one process a node, each with all GPUs of its node. The job is put back into the queue before its
# time is up, when it is pre-empted and when a node is lost, and goes on from the last checkpoint.
#
# launch/slurm.sh --nodes=2 [OPTIONS] -- --config=CONFIG --workdir=DIR [FLAGS]
#
#   --nodes=N             (default 1)
#   --gpus=N              GPUs a node (default 8)
#   --name=NAME           of the job (default transxssm)
#   --time=TIME           limit of one stretch, e.g. 4:00:00
#   --partition=NAME, --account=NAME, --qos=NAME
#   --python=PATH         Python with this project installed (default .venv/bin/python)
#   --log=PATH            (default: slurm-JOB.out here)
#   --grace_seconds=N     before the end of the time; must cover two more steps and a checkpoint (default 120)
#   --max_restarts=N      how often to go back into the queue (default 100)
#   --dry-run             print the job and how it would be submitted
#
# --workdir and the data must be on a file system that all nodes share.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

nodes=1 gpus=8 name=transxssm python=.venv/bin/python log=slurm-%j.out grace_seconds=120 max_restarts=100 options=()
while [ $# -gt 0 ]; do
    case $1 in
        --nodes=*) nodes=${1#*=} ;;
        --gpus=*) gpus=${1#*=} ;;
        --name=*) name=${1#*=} ;;
        --time=* | --partition=* | --account=* | --qos=*) options+=("$1") ;;
        --python=*) python=${1#*=} ;;
        --log=*) log=${1#*=} ;;
        --grace_seconds=*) grace_seconds=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --dry-run) dry_run=yes ;;
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        *) refuse "unknown option $1" ;;
    esac
    shift
done
check_count --nodes "$nodes"
check_count --gpus "$gpus"
check_count --grace_seconds "$grace_seconds"
check_count --max_restarts "$max_restarts"
check_training "$@"
if [ "$nodes" -gt 1 ] && ! gives --config.mesh.slices "$@"; then
    # JAX counts the GPUs of a host as a slice.
    set -- "$@" --config.mesh.slices="$nodes"
fi

job=$(cat <<JOB
#!/usr/bin/env bash
# Processes end each other, with the reason, when one fails; srun need not kill them.
srun --kill-on-bad-exit=0 $(quoted "$python" -m transxssm_jax.train "$@")
code=\$?
case \$code in
    # 75: told to stop, and saved; 69: a process was lost; 137: this srun saw the one that was killed;
    # 129, 138, 140, 143: SIGHUP, SIGUSR1, SIGUSR2 or SIGTERM came before training took them over.
    69 | 75 | 129 | 137 | 138 | 140 | 143)
        if [ "\${SLURM_RESTART_COUNT:-0}" -lt $max_restarts ]; then
            scontrol requeue "\$SLURM_JOB_ID"
        fi ;;
esac
exit \$code
JOB
)
submit=(sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus" --exclusive
    --requeue --signal=TERM@"$grace_seconds" --open-mode=append --output="$log" --chdir="$(cd "$here/.." && pwd)"
    ${options[@]+"${options[@]}"})
if [ "$dry_run" = yes ]; then
    echo "$(quoted "${submit[@]}") <<'JOB'"
    echo "$job"
    echo JOB
else
    "${submit[@]}" <<<"$job"
fi
