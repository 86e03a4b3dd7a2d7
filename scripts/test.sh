#!/usr/bin/env bash
# All that CI runs: install, lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh dev
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
python -m pytest --numprocesses 2 --dist worksteal "$@"
