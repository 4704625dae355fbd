#!/usr/bin/env bash
# Format, lint, types and the whole test suite; no network and no GPU needed.
#   bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" dev
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one per test worker

ruff format --check .
ruff check .
mypy
exec pytest --numprocesses auto --dist loadfile "$@"
