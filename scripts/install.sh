#!/usr/bin/env bash
# Installs gothic_jax and the versions it was tested with into .venv:
#   scripts/install.sh [EXTRAS]     for example: scripts/install.sh cuda12,tensorboard
# PYTHON names another interpreter than python3; it must be 3.11 or later.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "gothic_jax needs Python 3.11 or later: set PYTHON to one" >&2
    exit 2
}
# Some systems ship venv without the pip that goes into it; their own pip can put it there.
if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    "$python" -m venv --without-pip .venv
    "$python" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check pip
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${1:+[$1]}"
