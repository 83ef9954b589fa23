#!/bin/sh
# Trains configs/tiny.py on the sources of Python's own standard library. Run by `make demo`; a second run resumes.
# Usage: launch/demo.sh PYTHON [DIRECTORY]
set -eu
python=$1
directory=${2:-runs/demo}
stdlib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

prepare() {
    split=$1
    shift
    "$python" -m transxssm_jax.data.prepare --output="$directory/data" --tokenizer=byte --split="$split" "$@"
}
# Whole packages are held out, so that evaluation is on files the model has not seen.
prepare train --source="$stdlib/*.py" --source="$stdlib/asyncio" --source="$stdlib/multiprocessing" \
    --source="$stdlib/unittest" --source="$stdlib/concurrent"
prepare validation --source="$stdlib/logging" --source="$stdlib/json" --source="$stdlib/xml" --source="$stdlib/importlib"
exec "$python" -m transxssm_jax.train --config=configs/tiny.py --workdir="$directory/run" \
    --config.data.path="$directory/data"
