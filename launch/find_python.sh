#!/bin/sh
# Prints the path of a Python that can run this project (3.12 or 3.13, with venv), or says what to install.
# PYTHON=/path/to/python decides by itself when it is set.
set -u

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" && { command -v "$PYTHON"; exit 0; }
    echo "error: PYTHON=$PYTHON is not Python 3.12 or 3.13 with the venv module" >&2
    exit 2
fi
# On the PATH first (a pyenv shim answers only for versions that are switched on), then pyenv's and uv's own folders.
for candidate in python3.12 python3.13 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*-3.12*/bin/python3 \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*-3.13*/bin/python3 \
    /usr/local/bin/python3.1[23] /opt/python/*3.1[23]*/bin/python3; do
    if command -v "$candidate" >/dev/null 2>&1 && fits "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done
echo "error: no Python 3.12 or 3.13 with the venv module was found. Install one, e.g. with" >&2
echo "  uv python install 3.12    or    pyenv install 3.12    or    apt-get install python3.12-venv" >&2
echo "or name it: make PYTHON=/path/to/python3.12 demo" >&2
exit 2
