"""Few and full modules: how long files are, apart from those that are one kind of a family."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "diffalign"

LONGEST = 450
SHORT = 60
MOST_SHORT = 20
MEDIAN = (140, 220)


def is_kind(tree: ast.Module) -> bool:
    """Whether a module holds one kind of a family: a concrete class made from an abstract one."""
    return any(
        isinstance(node, ast.ClassDef)
        and not node.name.startswith(("Abstract", "_"))
        and any(ast.unparse(base).startswith("Abstract") for base in node.bases)
        for node in tree.body
    )


def lines_by_module() -> tuple[dict[str, int], dict[str, int]]:
    """Lines of each module: of kinds, and of all others."""
    kinds: dict[str, int] = {}
    others: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.stem.startswith("__"):
            text = path.read_text(encoding="utf-8")
            of = kinds if is_kind(ast.parse(text)) else others
            of[path.relative_to(PACKAGE).as_posix()] = len(text.splitlines())
    return kinds, others


KINDS, OTHERS = lines_by_module()


def listed(lines: dict[str, int]) -> str:
    return "".join(f"\n{lines[name]:5} {name}" for name in sorted(lines, key=lines.__getitem__))


def test_no_module_is_long():
    all_lines = {**KINDS, **OTHERS}
    long = {n: count for n, count in all_lines.items() if count > LONGEST}
    assert not long, f"modules above {LONGEST} lines, to be split by topic:{listed(long)}"


def test_few_modules_are_short():
    short = {name: count for name, count in OTHERS.items() if count < SHORT}
    assert len(short) <= MOST_SHORT, (
        f"{len(short)} modules that are no kind have under {SHORT} lines, and at most {MOST_SHORT} "
        f"may: merge those that one other module uses into it:{listed(short)}"
    )


def test_modules_are_full():
    median = statistics.median(OTHERS.values())
    assert MEDIAN[0] <= median <= MEDIAN[1], f"median of {len(OTHERS)} modules: {median} lines"


def test_kinds_are_told_from_helpers():
    assert {"objectives/dpo.py", "scorers/jpeg.py", "benchmarks/pope/config.py"} <= set(KINDS)
    assert {"files.py", "benchmarks/pope/rules.py", "objectives/base.py"} <= set(OTHERS)
