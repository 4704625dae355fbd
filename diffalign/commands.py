"""Commands as jobs print them: they can be pasted into a shell, whatever their names hold."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import DataError
from diffalign.parsing import parse_yaml


def command(
    job: str,
    settings: Mapping[str, Any] | None = None,
    *,
    config: Path | str | None = None,
    options: Sequence[str] = (),
) -> str:
    """A call of diffalign, quoted for a POSIX shell.

    Args:
        job: its name, and a benchmark's behind it, such as `evaluate chair`.
        settings: values by dotted key: strings, paths, numbers, lists and mappings of them. Those
            that are None are left out.
        config: the YAML file that the job reads first.
        options: what follows, such as `--grid`.
    """
    words = ["diffalign", *job.split()]
    if config is not None:
        words.append(str(config))
    words += [override(key, v) for key, v in (settings or {}).items() if v is not None]
    return shlex.join([*words, *options])


def unused(path: Path) -> Path:
    """The path, or where it exists already the first of `NAME-2`, `NAME-3`, ... that does not."""
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def override(key: str, value: Any) -> str:
    """`key=value` for `config.load`, which reads the value as YAML.

    A text is as it is where YAML would read the same text, and in YAML's quotes elsewhere: a
    folder named `[1]` is no list, and one named `2024` no number.
    """
    if isinstance(value, str | Path):
        text = str(value)
        if _read(text) == text:
            return f"{key}={text}"
        value = text
    line = yaml.safe_dump(_plain(value), default_flow_style=True, width=1e9, allow_unicode=True)
    return f"{key}={line.strip().removesuffix('...').strip()}"


def _read(text: str) -> Any:
    """The value as `config.load` reads it; None where it cannot."""
    try:
        return parse_yaml(text, "")
    except DataError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
