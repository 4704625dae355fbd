#!/usr/bin/env bash
# Write constraints.txt anew: the newest releases that pyproject.toml allows, for Python 3.10 to
# 3.13, after the whole suite has passed under them.
#   bash scripts/update_constraints.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh dev # for uv

mkdir -p build
new=build/constraints.txt
{
  echo "# The versions that diffalign was tested with, written by scripts/update_constraints.sh."
  uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev --no-annotate \
    --no-header --no-emit-index-url --no-emit-find-links pyproject.toml
} >"$new"
MARKS="" bash scripts/test_versions.sh "$new"
mv "$new" constraints.txt
git --no-pager diff --stat constraints.txt
