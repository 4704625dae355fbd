"""Who may import whom: the order of docs/architecture.md, section 8, read from the syntax trees."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffalign"
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = frozenset(MODULES)
COMMAND_LINE = {"arguments", "cli", "cli_images"}
GROUND = {path.stem for path in PACKAGE.glob("[!_]*.py")} - COMMAND_LINE
SHARED = GROUND | {"data", "imaging", "models"}
ALLOWED = {
    **dict.fromkeys(GROUND, GROUND),
    "engines": GROUND,
    "objectives": {"ranges", "world", "shapes", "views"},
    "data": GROUND,
    "imaging": GROUND | {"data"},
    "pages": GROUND | {"imaging"},
    "models": GROUND | {"data"},
    "pair_judges": SHARED | {"judges"},
    "scorers": SHARED | {"judges", "pair_judges", "generation"},
    "likelihoods": SHARED | {"objectives", "scorers"},
    "cache": SHARED,
    "judges": GROUND | {"imaging", "models"},
    "generation": SHARED,
    "comparison": SHARED | {"pages", "pair_judges", "scorers", "generation", "pair_rules"},
    "pair_rules": GROUND | {"data"},
    "response_rules": GROUND | {"data"},
    "checking": SHARED | {"pages", "comparison"},
    "benchmarks": SHARED | {"generation", "judges", "response_rules"},
    "rollouts": SHARED
    | {"scorers", "cache", "likelihoods", "generation", "objectives", "pair_rules", "rewards"},
    "rewards": SHARED | {"judges", "pair_judges", "response_rules"},
    "synthesis": SHARED | {"generation", "judges"},
}
PLAYGROUND = SHARED | {"scorers", "generation", "comparison", "benchmarks"}
PLAYGROUND |= {"response_rules", "rewards"}
LABELLING = SHARED | {"pages", "generation", "rollouts"}
TRAINING = set(ALLOWED) - {"comparison", "checking", "benchmarks", "engines"}
ALLOWED |= {
    "playground": PLAYGROUND,
    "training": TRAINING,
    "reports": SHARED | {"pages", "generation", "comparison", "training"},
    "labelling": LABELLING,
    "jobs": set(ALLOWED) | {"training", "playground", "reports", "labelling"},
    "__init__": set(ALLOWED) | {"training", "jobs"},  # when a name is asked for: test_package.py
    "arguments": GROUND | {"engines"},
    "cli_images": GROUND | {"arguments", "jobs"},
    "cli": set(ALLOWED) | {"training", "jobs", "arguments", "cli_images"},
    "__main__": {"cli"},
}


@functools.cache
def imported(path: Path) -> set[str]:
    """Dotted names of everything a module imports, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(dotted: str) -> Path | None:
    """The file of the package that a dotted name is, or lies in."""
    base = PACKAGE.parent.joinpath(*dotted.split("."))
    for path in (base.with_suffix(".py"), base.parent.with_suffix(".py")):
        if path in FILES:
            return path
    return None


def circles(edges: dict[Path, set[Path]]) -> list[set[Path]]:
    """Sets of files of which each is reached from each other one."""

    def reached(start: Path) -> set[Path]:
        found, waiting = set(), [start]
        while waiting:
            for path in edges.get(waiting.pop(), set()) - found:
                found.add(path)
                waiting.append(path)
        return found

    reaches = {path: reached(path) for path in edges}
    found = []
    for path in edges:
        circle = {other for other in reaches[path] if path in reaches.get(other, set())}
        if circle and circle not in found:
            found.append(circle)
    return found


def folder_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "diffalign" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path):
    home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    above = {
        name
        for name in imported(path)
        if (folder := folder_of(name)) not in (None, home, "__version__")
        and folder not in ALLOWED[home]
    }
    assert not above, f"{home} must not import {sorted(above)}"


def test_every_module_that_is_imported_is_there():
    """Type checkers are told to pass over what is missing, for libraries' sake."""
    gone = {
        (str(path.relative_to(PACKAGE)), name)
        for path in MODULES
        for name in imported(path)
        if name.startswith("diffalign.") and name.count(".") > 1 and module_of(name) is None
    }
    assert not {(path, name) for path, name in gone if not _is_package(name)}


def _is_package(dotted: str) -> bool:
    """Whether a name is a folder of the package, or what its `__init__` gives."""
    base = PACKAGE.parent.joinpath(*dotted.split("."))
    return (base / "__init__.py").exists()


def test_no_files_import_one_another_in_a_circle():
    """Nor for types alone, nor within a function: what needs the other's name belongs to it, or
    asks for less of it."""
    edges = {
        path: {target for name in imported(path) if (target := module_of(name))} - {path}
        for path in MODULES
    }
    found = [sorted(str(path.relative_to(PACKAGE)) for path in circle) for circle in circles(edges)]
    assert not found


def test_a_circle_would_be_found():
    a, b, c, d = map(Path, "abcd")
    assert circles({a: {b}, b: {c}, c: {a}, d: {a}}) == [{a, b, c}]


def test_only_training_and_jobs_import_accelerate():
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in MODULES
        if any(name.split(".")[0] == "accelerate" for name in imported(path))
    }
    assert importers <= {"training", "jobs"}


def test_importing_objectives_loads_neither_diffusers_nor_transformers():
    code = (
        "import sys, diffalign.objectives.dpo\n"
        "print([m for m in ('diffusers', 'transformers', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
