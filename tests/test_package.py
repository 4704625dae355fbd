"""What a program that depends on diffalign relies on: its names, its types, its wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import trove_classifiers
import yaml
from packaging.version import Version

import diffalign
from diffalign import renames
from diffalign.objectives.dpo import DPO

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> str:
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return made.stdout.strip()


@pytest.mark.parametrize("name", diffalign.__all__)
def test_a_public_name_is_found_where_the_type_checker_finds_it(name):
    tree = ast.parse(Path(diffalign.__file__).read_text())
    typed = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert diffalign._HOMES[name] == typed[name]
    assert getattr(diffalign, name) is not None
    assert name in dir(diffalign)
    assert set(typed) == set(diffalign.__all__) == set(diffalign._HOMES)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        diffalign.trian  # noqa: B018


def test_importing_the_package_loads_nothing_large_and_takes_no_time():
    code = (
        "import sys, time; start = time.process_time(); import diffalign; dir(diffalign)\n"
        "taken = time.process_time() - start\n"
        "large = {'torch', 'numpy', 'diffusers', 'transformers', 'yaml'} & set(sys.modules)\n"
        "print(sorted(large), taken < 0.3)"
    )
    assert run_python(code) == "[] True"


def test_a_loss_is_computed_by_public_names_alone():
    found = diffalign.find_kind(diffalign.AbstractObjective, "dpo")
    views = {
        "chosen": diffalign.Likelihoods(torch.tensor([-1.0]), torch.tensor([-2.0])),
        "rejected": diffalign.Likelihoods(torch.tensor([-3.0]), torch.tensor([-3.5])),
    }
    out = found(beta=2.0)(views)
    assert found is DPO
    expected = torch.log1p(torch.exp(torch.tensor([-2.0 * (1.0 - 0.5)])))
    torch.testing.assert_close(out.loss, expected)


def test_a_config_is_loaded_by_public_names_alone():
    path = ROOT / "configs/playground/diffusion_dpo.yaml"
    run = diffalign.load_config(diffalign.RunConfig, path, ["seed=7"])
    assert (run.seed, type(run)) == (7, diffalign.RunConfig)


def test_a_wheel_says_that_it_is_typed_and_carries_all_modules(tmp_path):
    code = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / made.stdout.split()[-1]) as wheel:
        names = set(wheel.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        said = wheel.read(metadata).decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffalign").rglob("*.py")}
    assert names >= {*modules, "diffalign/py.typed", "diffalign/constraints.txt"}
    templates = (ROOT / "diffalign").rglob("templates/*.*")
    assert names >= {path.relative_to(ROOT).as_posix() for path in templates}
    stated = set(re.findall(r"^Classifier: (.*)$", said, re.MULTILINE))
    assert "Typing :: Typed" in stated
    assert not stated - trove_classifiers.classifiers
    assert not any(name.startswith(("tests/", "scripts/")) for name in names)


def test_the_citation_names_this_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    assert required <= set(cited)
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert Version(cited["version"]) == Version(diffalign.__version__)
    assert cited["license"] == "Apache-2.0"
    assert all(author.get("name") or author.get("family-names") for author in cited["authors"])


def test_the_changelog_starts_with_what_is_not_released():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "Unreleased"
    sections = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_names_every_old_name_that_still_works():
    text = (ROOT / "CHANGELOG.md").read_text()
    for renamed in (*renames.KINDS.values(), *renames.FIELDS.values()):
        for old, new in renamed.items():
            assert f"`{old}`" in text, old
            assert f"`{new}`" in text, new


def test_the_hooks_of_pre_commit_are_local_programs_of_the_dev_extra():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook for repository in hooks for hook in repository["hooks"]]
    assert {repository["repo"] for repository in hooks} == {"local"}
    assert {hook["language"] for hook in entries} == {"system"}
    programs = {hook["entry"].split()[0] for hook in entries}
    assert programs <= {"ruff", "mypy", "python"}
