"""Write the listing of docs/architecture.md from the package: folders, what they are, modules.

python scripts/list_modules.py [--check]
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffalign"
PAGE = ROOT / "docs" / "architecture.md"
_FEW = 2
"""A folder of so many modules is in the line of the folder above it."""
BEGIN, END = "<!-- listing: scripts/list_modules.py -->\n```\n", "```\n<!-- end of listing -->"


def listing() -> str:
    """One paragraph a folder: its path, the first sentence of its docstring, its modules, and its
    folders of few modules with them in brackets."""
    folders = [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))]
    return "".join(_folder(folder) for folder in folders if not _is_small(folder))


def _is_small(folder: Path) -> bool:
    return folder != PACKAGE and len(_modules(folder)) <= _FEW and folder.parent != PACKAGE


def _modules(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))


def _folder(folder: Path) -> str:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    title = f"{folder.relative_to(ROOT)}/  {said.partition(chr(10))[0]}"
    modules = _modules(folder)
    for inside in sorted(path.parent for path in folder.glob("*/__init__.py")):
        if _is_small(inside):
            modules.append(f"{inside.name}/({','.join(_modules(inside))})")
    names = textwrap.fill(
        " ".join(modules),
        118,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
    return f"{title.rstrip()}\n" + (f"{names}\n" if modules else "")


def main() -> None:
    """Rewrite the page, or say whether it is as the package is."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}{listing()}{END}{after}"
    if "--check" in sys.argv[1:]:
        if made != text:
            sys.exit(f"{PAGE} is not as the package is: python scripts/list_modules.py")
        return
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
