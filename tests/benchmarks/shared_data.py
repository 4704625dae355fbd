"""Where the published files of the benchmarks lie, for tests that hold figures against them.

They are not part of this repository. Point DIFFALIGN_SHARED_DATA at a folder with `chair/`,
`pope/`, `amber/` and `prompts/` (`parti_prompts.tsv`, `geneval_metadata.jsonl`), each holding the
files under their published names; without it these tests are skipped, and small made-up files
cover every rule.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "DIFFALIGN_SHARED_DATA"


def shared_folder(name: str) -> Path:
    """A folder of published files; skips the test where there is none."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} names no folder with the published files")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"{VARIABLE} has no folder {name}")
    return folder
