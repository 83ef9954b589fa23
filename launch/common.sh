# shellcheck shell=bash
# What the launch scripts share; sourced by them.

dry_run=no

# Wrong input: one line, exit code 2.
refuse() {
    echo "error: $*; see ${0##*/} --help" >&2
    exit 2
}

# Prints the comment at the head of the script, which is its help.
usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
}

# A command line, quoted so that it can be pasted.
quoted() {
    local word line=''
    for word; do
        case $word in '' | *[!A-Za-z0-9_./:=@%+,-]*) word=${word@Q} ;; esac
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# Runs a command, or prints it under --dry-run.
run() {
    if [ "$dry_run" = yes ]; then
        quoted "$@"
    else
        "$@"
    fi
}

# The arguments after `--`, which go to python -m transxssm_jax.train, must name a config and a workdir.
check_training() {
    case " $* " in *" --config="*) ;; *) refuse "--config=PATH is missing after --" ;; esac
    case " $* " in *" --workdir="*) ;; *) refuse "--workdir=DIR is missing after --" ;; esac
}

# Whether the arguments after the first set the flag that is the first.
gives() {
    local flag=$1
    shift
    case " $* " in *" $flag="* | *" $flag "*) return 0 ;; esac
    return 1
}

# A value that must be a whole number of at least 1.
check_count() {
    case $2 in '' | *[!0-9]* | 0) refuse "$1=$2 must be a whole number, at least 1" ;; esac
}
