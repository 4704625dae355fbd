"""The diffs of docs/adding.md: each is new files alone, and its tests pass where it is applied."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding.md"
LINES_OF_A_PAGE = 100
COLLECTED = {"tests/objectives/test_family.py": "dpop"}
"""Tests that are there already and collect a new part unasked -> its name among them."""


def diffs() -> dict[str, str]:
    """Title of the part -> its diff."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    blocks = {
        section.partition("\n")[0]: re.findall(r"^```diff\n(.*?)^```", section, re.DOTALL | re.M)
        for section in sections
    }
    return {title: block for title, (block,) in blocks.items()}


DIFFS = diffs()
every_part = pytest.mark.parametrize("title", DIFFS)


def new_files(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)


@every_part
def test_a_part_is_new_files_alone_on_a_page(title):
    assert re.findall(r"^--- (.*)$", DIFFS[title], re.MULTILINE) == ["/dev/null"] * len(
        new_files(DIFFS[title])
    )
    assert not [name for name in new_files(DIFFS[title]) if (ROOT / name).exists()]
    assert len(DIFFS[title].splitlines()) <= LINES_OF_A_PAGE
    assert any(name.startswith("tests/") for name in new_files(DIFFS[title]))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as it is, without what no part needs."""
    folder = tmp_path_factory.mktemp("adding") / "repository"
    shutil.copytree(
        ROOT / "diffalign", folder / "diffalign", ignore=shutil.ignore_patterns("__py*")
    )
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__py*"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("assets", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for diff in DIFFS.values():
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def results(copy) -> str:
    """What pytest says of the new tests and of those that collect the new parts, a line a test."""
    tests = [n for diff in DIFFS.values() for n in new_files(diff) if n.startswith("tests/")]
    chosen = " or ".join([*(Path(name).stem for name in tests), *COLLECTED.values()])
    arguments = ["-v", "-p", "no:cacheprovider", *tests, *COLLECTED, "-k", chosen]
    made = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-1000:]
    return made.stdout


@pytest.mark.slow
@every_part
def test_its_tests_pass_where_it_is_applied(title, results):
    for name in new_files(DIFFS[title]):
        if name.startswith("tests/"):
            assert re.search(rf"^{re.escape(name)}::\S+ PASSED", results, re.MULTILINE), name


@pytest.mark.slow
@pytest.mark.parametrize("path", COLLECTED)
def test_tests_of_its_family_collect_it_unasked(path, results):
    name = COLLECTED[path]
    assert len(re.findall(rf"^{re.escape(path)}::\S*{name}\S* PASSED", results, re.MULTILINE)) >= 5


@pytest.mark.slow
def test_every_part_is_listed_with_the_kinds_of_its_family(copy):
    code = "import runpy; runpy.run_path('scripts/list_modules.py')['main']()"
    (copy / "scripts").mkdir()
    (copy / "docs").mkdir()
    shutil.copy(ROOT / "scripts/list_modules.py", copy / "scripts")
    shutil.copy(ROOT / "docs/architecture.md", copy / "docs")
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    listing = (copy / "docs/architecture.md").read_text()
    for diff in DIFFS.values():
        module = next(name for name in new_files(diff) if name.startswith("diffalign/"))
        stem = Path(module).parent.name if "/benchmarks/" in module else Path(module).stem
        assert re.search(rf"^    .*\b{stem}\b", listing, re.MULTILINE), stem
