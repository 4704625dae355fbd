#!/usr/bin/env bash
# Make .venv if it is missing and install diffalign into it; sourced by demo.sh and test.sh.
#   usage: source scripts/install.sh [EXTRA] [tested|newest]
# Tested, the default, are the versions of constraints.txt; newest are those that pyproject.toml
# allows today. DIFFALIGN_VERSIONS says the same for the scripts that source this one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:+[$1]}"
versions="${2:-${DIFFALIGN_VERSIONS:-tested}}"
case "$versions" in
  tested) choice=(--constraints constraints.txt) ;;
  newest) choice=(--upgrade) ;;
  *)
    echo "versions are 'tested' or 'newest', not '$versions'" >&2
    exit 2
    ;;
esac
stamp=".venv/installed-${1:-core}-$versions"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  started=$SECONDS
  echo "Installing diffalign$extra into .venv, versions: $versions ..."
  python="${PYTHON:-python3}"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -c "import pip" 2>/dev/null || .venv/bin/python -m ensurepip >/dev/null # uv's
  .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
  .venv/bin/uv pip install --quiet --python .venv/bin/python "${choice[@]}" --editable ".$extra"
  rm -f .venv/installed-*
  touch "$stamp"
  echo "Installed in $((SECONDS - started)) s."
fi
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE # images of Docker set it: each start would compile every library anew
