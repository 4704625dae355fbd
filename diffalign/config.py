"""One YAML file is one whole run: YAML plus `key.path=value` becomes frozen dataclasses.

Nothing is inherited and nothing is looked up with a default: every key is a field of a dataclass, a
field's type is enforced, and `kind` chooses the dataclass of a component. What is wrong is said
with file, key, what is allowed and the nearest spelling, before anything large is loaded.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from diffalign import components, foreign_flags, keys, renames
from diffalign.errors import ConfigError, did_you_mean
from diffalign.files import read_text, write_atomically
from diffalign.parsing import parse_yaml, shortly
from diffalign.ranges import refuse_outside

T = TypeVar("T")

COMMAND_LINE = "command line"
"""Where settings are from that no file gave, in messages."""
SHAPES_RUN = "shapes_run"
"""Key of a field's metadata: whether runs that differ in this setting are different runs. A setting
that says nothing does shape its run."""
MAY_CHANGE: Mapping[str, Any] = types.MappingProxyType({SHAPES_RUN: False})
"""Metadata of a setting that a run may go on with another value of: where a file lies (fingerprints
say what it holds), how many workers read it, how often something is saved."""
MUST_STAY: Mapping[str, Any] = types.MappingProxyType({SHAPES_RUN: True})
"""Metadata of a setting that might seem free to change, such as a path, and shapes its run."""


def load(cls: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build a config dataclass from a file and overrides.

    Args:
        cls: the frozen dataclass to build.
        path: YAML file; None takes the overrides alone.
        overrides: `key.path=value`, the value in YAML, applied in order over the file.

    Raises:
        ConfigError: naming file, key, what was given, what is allowed and what to do.
    """
    place = str(path) if path is not None else COMMAND_LINE
    return _build(cls, tree(path, overrides), place=place, key="")


def tree(path: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a file and overrides give, by key, and nothing that they leave open; see `load`."""
    found = _read(path) if path is not None else {}
    for override in overrides:
        _apply(found, override)
    keys.refuse_credentials(found, str(path) if path is not None else COMMAND_LINE)
    return found


def to_dict(value: Any) -> Any:
    """Plain lists, dictionaries and scalars, with `kind` where a component stood."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return (
            {"kind": components.kind_of(value), **fields} if is_component(type(value)) else fields
        )
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[T], tree: Mapping[str, Any], *, place: str = "settings") -> T:
    """What `to_dict` made plain, of this class or one below it; or what `tree` gave.

    Args:
        cls: the frozen dataclass to build.
        tree: values by key.
        place: where they come from, for messages.

    Raises:
        ConfigError: as `load`.
    """
    return _build(cls, dict(tree), place=place, key="")


def save(value: Any, path: Path) -> None:
    """Write a config, whole or not at all, so that `load` gives an equal one."""
    text = yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)
    write_atomically(path, text)


def is_component(cls: type[Any]) -> bool:
    """Whether `kind` chooses a class: one of several of an abstract one."""
    return any(inspect.isabstract(base) for base in cls.__mro__)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        found = ", ".join(sorted(p.name for p in path.glob("*.yaml"))[:12])
        raise ConfigError(
            f"{path}: is a folder, and a config is a YAML file"
            + (f" (it holds {found})" if found else "")
            + f". A folder is given by its key, for example images={shlex.quote(str(path))}"
        )
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"{path}: there is no such config file.{did_you_mean(str(path), near)} "
            f"Ready-made ones lie in configs/"
        )
    tree = parse_yaml(read_text(path, error=ConfigError), path, error=ConfigError)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {shortly(override)}: write it as key.path=value")
    *parents, last = dotted.split(".")
    for depth, name in enumerate(parents, start=1):
        parent = renames.key_in(tree, name)
        below = tree.get(parent)
        if isinstance(below, list):
            key = ".".join(parents[:depth])
            raise ConfigError(
                f"override {shortly(override)}: {key} is a list, which is given as a whole: "
                f"{key}='[...]'"
            )
        if below is not None and not isinstance(below, dict):
            key = ".".join(parents[:depth])
            raise ConfigError(
                f"override {shortly(override)}: {key} is {shortly(below)} so far, a value without "
                f"keys of its own: give all of it by keys, {key}.KEY=..., or as '{key}={{...}}'"
            )
        tree[parent] = dict(below) if isinstance(below, dict) else {}
        tree = tree[parent]
    value = parse_yaml(text, f"override {shortly(override)}: the value", error=ConfigError)
    keys.name_on_command_line({last: value})
    tree[renames.key_in(tree, last)] = value


def _build(cls: Any, tree: Any, *, place: str, key: str) -> Any:
    """One dataclass from a mapping; `key` is its own dotted path."""
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{place}: {key or 'the top level'} must be a mapping of keys, got {shortly(tree)}"
        )
    tree = dict(tree)
    if inspect.isabstract(cls):
        cls = _component_class(cls, tree, place=place, key=key)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{key}." if key else ""
    tree = renames.current_fields(cls, tree, place=place, prefix=prefix)
    for name in tree:
        if name not in fields:
            hint = foreign_flags.hint(str(name), key, fields)
            hint = hint or did_you_mean(str(name), fields, prefix=prefix)
            raise ConfigError(
                f"{place}: {prefix}{name!s:.60} is not a field of {cls.__name__} "
                f"(fields: {', '.join(fields)}).{hint}"
            )
    values = {}
    for name, given in tree.items():
        values[name] = _convert(hints[name], given, place=place, key=f"{prefix}{name}")
        try:
            refuse_outside(hints[name], values[name], f"{prefix}{name}")
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from error
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        names = ", ".join(f"{prefix}{name}" for name in missing)
        what = "it" if len(missing) == 1 else "them"
        raise ConfigError(
            f"{place}: {names} must be given: {cls.__name__} has no default for {what}",
            lacking=place == COMMAND_LINE,  # a file shows by itself what else a run needs
        )
    try:
        return cls(**values)
    except (ValueError, TypeError, ArithmeticError) as error:
        where = f"{place}: {key}" if key else place
        raise ConfigError(f"{where}: {error}") from error


def _component_class(abstract: Any, tree: dict[str, Any], *, place: str, key: str) -> Any:
    kind = tree.pop("kind", getattr(abstract, "default_kind", None))
    if not isinstance(kind, str):
        allowed = ", ".join(components.kinds(abstract))
        raise ConfigError(f"{place}: {key}.kind must be given (kinds: {allowed})")
    kind = renames.current_kind(components.family(abstract), kind, place=place, key=key)
    try:
        return components.find(abstract, kind)
    except ConfigError as error:
        raise ConfigError(f"{place}: {key}.kind: {error}") from error


def _convert(hint: Any, value: Any, *, place: str, key: str) -> Any:
    """A YAML value as the type that the field declares, or a ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:  # `_build` looks at ranges, in the whole type
        return _convert(arguments[0], value, place=place, key=key)

    def refuse(allowed: str) -> ConfigError:
        return ConfigError(f"{place}: {key} must be {allowed}, got {shortly(value)}")

    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        if isinstance(value, dict):  # keys can be meant for a dataclass alone: keep its own error
            choices = [choice for choice in choices if dataclasses.is_dataclass(choice)] or choices
        errors = []
        for choice in choices:
            try:
                return _convert(choice, value, place=place, key=key)
            except ConfigError as error:
                errors.append(error)
        raise errors[0] if len(errors) == 1 else refuse(_spell(hint))
    if origin is Literal:
        if value in arguments:
            return value
        allowed = [str(argument) for argument in arguments]
        raise ConfigError(
            f"{place}: {key} must be one of {', '.join(allowed)}, got {shortly(value)}."
            f"{did_you_mean(str(value), allowed)}"
        )
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise refuse("a list")
        return tuple(
            _convert(arguments[0], item, place=place, key=f"{key}[{i}]")
            for i, item in enumerate(value)
        )
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise refuse("a mapping of keys")
        return {
            str(name): _convert(arguments[1], item, place=place, key=f"{key}.{name}")
            for name, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, place=place, key=key)
    if hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        # PyYAML reads 1e-8 as a string: YAML 1.1 wants a dot in a float.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
    elif hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            raise refuse(f"a string; put it in quotes if you mean '{value}'")
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif hint is Any:
        return value
    raise refuse(_spell(hint))


_SPELLING: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    Path: "a path",
    type(None): "null",
}


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        return _spell(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spell(argument) for argument in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list"
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(argument) for argument in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "a mapping of keys"
    return _SPELLING.get(hint, str(hint))
