#!/usr/bin/env bash
# The suite without its slow tests, under other versions than those of .venv: in an environment of
# its own in build/, which is removed afterwards. Needs some 7 GB of disk.
#   bash scripts/test_versions.sh oldest|newest|FILE [pytest arguments]
# oldest: the lower bounds of pyproject.toml; newest: today's releases; FILE: of constraints.
#   PYTHON   interpreter, python3 by default      MARKS   of pytest, "not slow" by default
#   WORKERS  processes of pytest, auto by default KEEP=1  leaves the environment there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which="${1:?say oldest, newest or a file of constraints}"
shift
case "$which" in
  oldest) choice=(--resolution lowest-direct) ;;
  newest) choice=(--upgrade) ;;
  *)
    [ -f "$which" ] || { echo "$which: no such file of constraints" >&2; exit 2; }
    choice=(--constraints "$which")
    ;;
esac
name="$(basename "${which%.txt}")"
venv="build/venv-$name"
rm -rf "$venv"
mkdir -p build
trap '[ -n "${KEEP:-}" ] || rm -rf "$venv"' EXIT
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "${choice[@]}" --editable ".[dev]"
"$venv/bin/uv" pip freeze --quiet --exclude-editable --python "$venv/bin/python" \
  >"build/versions-$name.txt"

export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one per test worker
diffalign env
pytest --numprocesses "${WORKERS:-auto}" --dist loadfile -p no:cacheprovider \
  -m "${MARKS-not slow}" "$@"
