#!/usr/bin/env bash
# Trains once for every combination of settings, one after another here, or each as a SLURM job. Called again, it goes on
# with what has not finished.
#
# launch/sweep.sh --output=runs/sweep [OPTIONS] optimizer.learning_rate=1e-4,3e-4 data.seed=0,1 -- --config=CONFIG [FLAGS]
#
#   --output=DIR          each run's workdir is DIR/SETTING=VALUE,... of the settings that vary
#   --slurm='OPTIONS'     submit every run by launch/slurm.sh OPTIONS, e.g. --slurm='--nodes=1 --time=8:00:00'
#   --python=PATH         Python for runs here (default .venv/bin/python)
#   --dry-run             print the commands instead of running them
#
# A run that fails does not keep the others from running; the exit code is then 1.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

out='' slurm='' by_slurm=no python=.venv/bin/python varied=()
while [ $# -gt 0 ]; do
    case $1 in
        --output=*) out=${1#*=} ;;
        --slurm=*) slurm=${1#*=} by_slurm=yes ;;
        --slurm) by_slurm=yes ;;
        --python=*) python=${1#*=} ;;
        --dry-run) dry_run=yes ;;
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        --*) refuse "unknown option $1" ;;
        *[[:space:]/]*) refuse "$1 must be without spaces and /: its values are names of directories" ;;
        ?*.?*=?*) varied+=("$1") ;;
        *) refuse "$1 must be SETTING=VALUE,VALUE,... with the setting's whole name, e.g. optimizer.learning_rate=1e-4,3e-4" ;;
    esac
    shift
done
[ -n "$out" ] || refuse "--output=DIR is missing"
[ ${#varied[@]} -gt 0 ] || refuse "no setting varies"
check_training "$@" --workdir=

# Every combination: a line of SETTING=VALUE words each.
combinations=('')
for setting in "${varied[@]}"; do
    IFS=, read -r -a values <<<"${setting#*=}"
    longer=()
    for combination in "${combinations[@]}"; do
        for value in "${values[@]}"; do
            longer+=("$combination ${setting%%=*}=$value")
        done
    done
    combinations=("${longer[@]}")
done

cd "$here/.."
failed=0
for combination in "${combinations[@]}"; do
    read -r -a words <<<"$combination"
    workdir=$out/$(IFS=,; echo "${words[*]}")
    training=("$@" "--workdir=$workdir" "${words[@]/#/--config.}")
    if [ "$by_slurm" = yes ]; then
        read -r -a slurm_options <<<"$slurm"
        run launch/slurm.sh --python="$python" ${slurm_options[@]+"${slurm_options[@]}"} -- "${training[@]}" || failed=1
    else
        run "$python" -m transxssm_jax.train "${training[@]}" || {
            code=$?
            case $code in 75 | 129 | 130 | 138 | 140 | 143) exit $code ;; esac  # told to stop
            failed=1
        }
    fi
done
exit $failed
