"""Write docs/config.md: every key of every config, with its type, default and meaning.

python scripts/list_settings.py [--check]

Read from the dataclasses that the command line loads: a field's type, its default, and the string
below it. A family (`kind: x`) is listed once, and each of its kinds.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from diffalign import components

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "config.md"
JOBS = {
    "train": "diffalign:RunConfig",
    "generate": "diffalign:GenerateConfig",
    "score": "diffalign:ScoreConfig",
    "prefer": "diffalign.jobs.prefer:PreferConfig",
    "compare": "diffalign:CompareConfig",
    "best-checkpoint": "diffalign.jobs.best_checkpoint:BestCheckpointConfig",
    "check": "diffalign.jobs.check:CheckConfig",
    "export": "diffalign:ExportConfig",
    "label": "diffalign.jobs.label:LabelConfig",
    "convert": "diffalign.jobs.convert:ConvertConfig",
    "evaluate": "diffalign:AbstractBenchmark",
    "diagnose": "diffalign.jobs.diagnose:DiagnoseConfig",
    "synthesise": "diffalign.jobs.synthesise:SynthesiseConfig",
    "demo": "diffalign.jobs.demo:DemoConfig",
    "demo --vlm": "diffalign.jobs.demo_responses:ResponsesDemoConfig",
}
"""Job of the command line -> the class that its config is loaded into."""
HEAD = """# Every key

Written by `python scripts/list_settings.py` from the code. A key without a default must be given. A
type with a link is a mapping of keys of its own; where it is a family, `kind` chooses among its
kinds. `precompute` takes the config of `train`.
"""
_PLAIN = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "string",
    Path: "path",
    Any: "anything",
    type(None): "null",
}


def page() -> str:
    """The whole page: first the jobs, then everything that their configs hold, by name."""
    roots = {job: _named(home) for job, home in JOBS.items()}
    found = _reachable(list(roots.values()))
    parts = [HEAD, "## Jobs\n\n| job | config |\n|---|---|"]
    parts += [f"| `diffalign {job}` | {_link(cls)} |" for job, cls in roots.items()]
    first = list(dict.fromkeys(roots.values()))
    for cls in [*first, *sorted(found - set(first), key=_title)]:
        parts.append(_family(cls) if inspect.isabstract(cls) else _section(cls))
    return "\n".join(parts).rstrip() + "\n"


def _named(home: str) -> type:
    module, _, name = home.partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _reachable(roots: list[type]) -> set[type]:
    """The classes that a config may hold, families and their kinds included."""
    seen: set[type] = set()
    waiting = list(roots)
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        if inspect.isabstract(cls):
            waiting += _kinds(cls).values()
        else:
            for hint in _hints(cls).values():
                waiting += _classes_in(hint)
    return seen


def _kinds(abstract: type) -> dict[str, type]:
    return {kind: components.find(abstract, kind) for kind in components.kinds(abstract)}


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]


def _classes_in(hint: Any) -> Iterator[type]:
    plain = isinstance(hint, type) and typing.get_origin(hint) is None  # list[int] on Python 3.10
    if plain and (dataclasses.is_dataclass(hint) or inspect.isabstract(hint)):
        yield hint
    for argument in typing.get_args(hint):
        yield from _classes_in(argument)


def _title(cls: type) -> str:
    """Its name; of a kind, of which names may repeat, with its module."""
    is_kind = any(inspect.isabstract(base) for base in cls.__mro__[1:])
    return f"{cls.__name__} ({cls.__module__.partition('.')[2]})" if is_kind else cls.__name__


def _heading(cls: type) -> str:
    return f"\n## {_title(cls)}\n\n{_first_line(cls)}\n"


def _family(cls: type) -> str:
    rows = [
        f"| `{kind}` | {_link(found)} | {_first_line(found)} |"
        for kind, found in _kinds(cls).items()
    ]
    return "\n".join([_heading(cls), "| kind | keys | |", "|---|---|---|", *rows])


def _section(cls: type) -> str:
    hints = _hints(cls)
    if not hints:
        return f"{_heading(cls)}\nIt has no keys."
    said = meanings(cls)
    rows = [
        f"| `{f.name}` | {_spell(hints[f.name])} | {_default(f)} | {said.get(f.name, '')} |"
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.init
    ]
    return "\n".join([_heading(cls), "| key | type | default | |", "|---|---|---|---|", *rows])


def _first_line(cls: type) -> str:
    text = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
    return "" if text.startswith(f"{cls.__name__}(") else _cell(text)


def meanings(cls: type) -> dict[str, str]:
    """The string below each field, those of the classes it inherits from included."""
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                said[field.target.id] = _cell(inspect.cleandoc(str(after.value.value)))
    return said


def _spell(hint: Any) -> str:
    """A type in words; a class of its own keys as a link."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [getattr(item, "allowed", "") for item in hint.__metadata__]
        return ", ".join([_spell(arguments[0]), *filter(None, limits)])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_spell, arguments)))
    if origin is Literal:
        return ", ".join(f"`{_scalar(item)}`" for item in arguments)
    if origin in (tuple, list):
        return f"list of: {_spell(arguments[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"name to: {_spell(arguments[1])}"
    if dataclasses.is_dataclass(hint) or inspect.isabstract(hint):
        return _link(hint)  # type: ignore[arg-type]
    return _PLAIN.get(hint) or f"`{_cell(str(hint))}`"


def _link(cls: type) -> str:
    anchor = re.sub(r"[^\w\- ]", "", _title(cls).lower()).replace(" ", "-")
    return f"[`{cls.__name__}`](#{anchor})"


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "**must be given**"
    if dataclasses.is_dataclass(value):
        return "its own"
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(map(_scalar, value))}]`"
    return "`{}`" if value == {} else f"`{_cell(_scalar(value))}`"


def _scalar(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "''" if value == "" else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Rewrite the page, or say whether it is as the code is."""
    made = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != made:
            sys.exit(f"{PAGE} is not as the code is: python scripts/list_settings.py")
        return
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
