#!/usr/bin/env bash
# Make .venv if it is missing and install diffalign into it; sourced by demo.sh and test.sh.
#   usage: source scripts/install.sh [EXTRA]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:+[$1]}"
stamp=".venv/installed-${1:-core}"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  started=$SECONDS
  echo "Installing diffalign$extra into .venv ..."
  python="${PYTHON:-python3}"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -c "import pip" 2>/dev/null || .venv/bin/python -m ensurepip >/dev/null # uv's
  .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
  .venv/bin/uv pip install --quiet --python .venv/bin/python --editable ".$extra"
  touch "$stamp"
  echo "Installed in $((SECONDS - started)) s."
fi
export PATH="$PWD/.venv/bin:$PATH"
