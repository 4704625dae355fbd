"""Write docs/api.md: the names of `import diffalign` and the contracts that one implements.

python scripts/list_api.py [--check]

Signatures and docstrings as they are in the code; of a method or a field, the first paragraph.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from list_settings import meanings

import diffalign

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
CONTRACTS = (
    "diffalign.data.source:AbstractSource",
    "diffalign.data.pairs.formats.base:AbstractReader",
    "diffalign.judges.base:AbstractJudge",
    "diffalign.models.base:AbstractModel",
    "diffalign.models.base:AbstractTrainable",
    "diffalign.rollouts.base:AbstractRollouts",
)
"""What is implemented from outside and is not among the names of `import diffalign`."""
HEAD = """# From Python

Written by `python scripts/list_api.py` from the code. `import diffalign` has the names of the first
part and imports what they need when they are asked for; the keys of configs are in
[config.md](config.md).
"""


def page() -> str:
    """The whole page: the names of the package, then the other contracts."""
    parts = [HEAD, "# import diffalign"]
    parts += [_entry(f"diffalign.{name}", getattr(diffalign, name)) for name in diffalign.__all__]
    parts.append("# Other contracts")
    for home in CONTRACTS:
        module, _, name = home.partition(":")
        parts.append(_entry(f"{module}.{name}", getattr(importlib.import_module(module), name)))
    return "\n\n".join(parts).rstrip() + "\n"


def _entry(title: str, item: Any) -> str:
    said = inspect.cleandoc(item.__doc__ or "")
    if said.startswith(f"{title.rpartition('.')[2]}("):
        said = ""  # a dataclass without a docstring
    lines = [f"## {title}", "", *_block(said)]
    if not inspect.isclass(item):
        lines[2:2] = ["```python", f"{title}{_signature(item)}", "```", ""]
        return "\n".join(lines).rstrip()
    rows = _fields(item) if dataclasses.is_dataclass(item) else []
    rows += [row for name, member in vars(item).items() if (row := _member(name, member))]
    return "\n".join([*lines, *([""] if rows else []), *rows]).rstrip()


def _block(said: str) -> list[str]:
    """A docstring: its sections of arguments as they are typed, the rest as prose."""
    found = re.search(r"^(Args|Returns|Yields|Raises):$", said, re.MULTILINE)
    if not found:
        return [said]
    prose, sections = said[: found.start()].strip(), said[found.start() :].rstrip()
    return [prose, "", "```text", sections, "```"]


def _fields(cls: type) -> list[str]:
    """A line of each field; of a config, where its keys are listed."""
    if cls.__name__.endswith("Config"):
        return [f"Its keys: [config.md](config.md#{cls.__name__.lower()}).\n"]
    said = meanings(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    return [
        f"- `{f.name}: {f.type}`{': ' if f.name in said else ''}{said.get(f.name, '')}"
        for f in fields
    ]


def _member(name: str, member: Any) -> str:
    """A line of a public method or property; empty for anything else."""
    plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    if (name.startswith("_") and name != "__call__") or not inspect.isfunction(plain):
        return ""
    abstract = ", to be given" if getattr(plain, "__isabstractmethod__", False) else ""
    called = "" if isinstance(member, property) else _signature(plain)
    first = " ".join(inspect.cleandoc(plain.__doc__ or "").partition("\n\n")[0].split())
    return f"- `{name}{called}`{abstract}{': ' if first else ''}{first}"


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


def main() -> None:
    """Rewrite the page, or say whether it is as the code is."""
    made = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != made:
            sys.exit(f"{PAGE} is not as the code is: python scripts/list_api.py")
        return
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
