"""Text, JSON and YAML that anyone may have written: plain values of known types, or a sentence.

Whatever the bytes are, only errors of `diffalign.errors` come out. Files are opened in `files`.
"""

from __future__ import annotations

import codecs
import collections.abc
import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

import yaml

from diffalign.errors import DataError, DiffalignError

T = TypeVar("T")

_DEEPEST = 64
"""Lists and objects within one another; no format of ours or of a data set has a tenth of it."""
_MOST_YAML_NODES = 100_000
"""Aliases in YAML can make a gigabyte of a line: counted as they unfold."""
_INT64 = range(-(2**63), 2**64)


def decode_text(content: bytes, where: object, *, error: type[DiffalignError] = DataError) -> str:
    """The text of a file: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Args:
        content: the bytes.
        where: names them in the message.
        error: the class of the error.

    Raises:
        error: they are neither.
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 text ({problem}); save it as UTF-8") from problem


def parse_json(text: str | bytes, where: object, *, error: type[DiffalignError] = DataError) -> Any:
    """A JSON value: at most 64 deep, and every text of it can be written as UTF-8.

    Args:
        text: also of a byte order mark or UTF-16, as bytes.
        where: names it in the message, which continues with `is not JSON` or the like.
        error: the class of the error.

    Raises:
        error: it is no JSON, or cannot be held.
    """
    if isinstance(text, bytes):
        text = decode_text(text, where, error=error)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"{where} is not JSON: {problem}") from problem
    except RecursionError as problem:
        raise error(f"{where} is not JSON that can be read: it is too deep") from problem
    except ValueError as problem:  # of an integer with more than 4300 digits
        raise error(f"{where} holds a number that is too large: {problem}") from problem
    if text.count("[") + text.count("{") > _DEEPEST:
        _refuse_depth(value, where, error)
    if "\\ud" in text or "\\uD" in text or not _encodable(text):
        _refuse_halves(value, where, error)
    return value


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader with JSON's types; plain YAML takes the last of a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, collections.abc.Hashable):
                break  # the loader has its own words for it
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shortly(key)} is given twice", node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# A date such as 2024-01-31 is a name like any other here.
_PlainLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: object, *, error: type[DiffalignError] = DataError) -> Any:
    """A YAML value of JSON's types, in which no key is given twice.

    Args:
        text: one document.
        where: names it in the message.
        error: the class of the error.

    Raises:
        error: it is no YAML, of another type, or cannot be held.
    """
    try:
        value = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as problem:
        raise error(f"{where}: not valid YAML: {problem}") from problem
    except RecursionError as problem:
        raise error(f"{where}: not YAML that can be read: it is too deep") from problem
    except Exception as problem:  # PyYAML's constructors raise what their code happens to raise
        raise error(f"{where}: not valid YAML: {type(problem).__name__}: {problem}") from problem
    for number, item in enumerate(_walk(value, where, error)):
        if number > _MOST_YAML_NODES:
            raise error(f"{where}: more than {_MOST_YAML_NODES:,} values, aliases unfolded")
        if isinstance(item, int) and item not in _INT64:
            raise error(f"{where}: holds a whole number of more than 64 bits")
        if isinstance(item, str) and not _encodable(item):
            raise error(f"{where}: {_half_of(item)}")
        if not isinstance(item, (str, bool, int, float, list, dict, type(None))):
            raise error(
                f"{where}: holds a {type(item).__name__}; text, numbers, true, false, null, lists "
                f"and mappings are understood"
            )
    return value


def checked(
    hint: type[T], value: Any, where: object, *, error: type[DiffalignError] = DataError
) -> T:
    """A value of a file that a program of ours wrote, as the type that it must have.

    Args:
        hint: a dataclass, whose fields are the keys of an object; or `str`, `int`, `float`, `bool`,
            `list[...]`, `dict[str, ...]`, `tuple[...]`, the like from `collections.abc`, `Literal`,
            unions, and `Any`. Whole numbers have 64 bits, other numbers are finite.
        value: what JSON made of the file.
        where: names the place in the message.
        error: the class of the error.

    Raises:
        error: it is something else; the message names the place, what it must be and what it is.
    """
    return typing.cast(T, _as_type(hint, value, str(where), error))


def shortly(value: Any) -> str:
    """A value for a message, in at most some 60 characters, however large it is.

    What is missing, true or false is written as files have it.
    """
    return _SHORT.repr(value)


class _AsInFiles(reprlib.Repr):
    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


_SHORT = _AsInFiles()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 4, 4


def _as_type(hint: Any, value: Any, where: str, error: type[DiffalignError]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)

    def inner(part: Any, item: Any, place: object) -> Any:
        return _as_type(part, item, f"{where}: {place}", error)

    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _as_dataclass(hint, value, where, error)
    if origin in (Union, types.UnionType):
        problems = []
        for choice in arguments:
            try:
                return _as_type(choice, value, where, error)
            except error as problem:
                problems.append(problem)
        if value is not None and len(arguments) == 2 and types.NoneType in arguments:
            raise problems[0 if arguments[1] is types.NoneType else 1]
    elif origin is Literal:
        if isinstance(value, (str, int, type(None))) and value in arguments:
            return value
    elif origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(inner(arguments[0], item, i) for i, item in enumerate(value))
        if len(arguments) == len(value):
            pairs = zip(arguments, value, strict=True)
            return tuple(inner(part, item, i) for i, (part, item) in enumerate(pairs))
    elif origin in (list, collections.abc.Sequence) and isinstance(value, list):
        return [inner(arguments[0], item, i) for i, item in enumerate(value)]
    elif origin in (dict, collections.abc.Mapping) and isinstance(value, dict):
        return {key: inner(arguments[1], item, key) for key, item in value.items()}
    elif hint in (list, dict, str, bool, types.NoneType) and isinstance(value, hint):
        return value
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        if value in _INT64:
            return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _as_float(value)
        if math.isfinite(number):
            return number
    raise error(f"{where}: must be {_spell(hint)}, got {shortly(value)}")


def _as_dataclass(cls: Any, value: Any, where: str, error: type[DiffalignError]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if not isinstance(value, dict):
        raise error(f"{where}: must be an object with {', '.join(fields)}, got {shortly(value)}")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    wrong = [f"no {name}" for name in fields if name in required and name not in value]
    wrong += [f"also {shortly(name)}" for name in value if name not in fields][:3]
    if wrong:
        raise error(
            f"{where} must have the keys {', '.join(fields)}, and has {', '.join(wrong)}; the file "
            f"was not written by this version"
        )
    hints = typing.get_type_hints(cls)
    values = {
        name: _as_type(hints[name], item, f"{where}: {name}", error) for name, item in value.items()
    }
    try:
        return cls(**values)
    except ValueError as problem:
        raise error(f"{where}: {problem}") from problem


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


_SPELLING: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number of 64 bits",
    float: "a finite number",
    str: "text",
    types.NoneType: "null",
    list: "a list",
    dict: "an object",
    tuple: "a list",
    collections.abc.Sequence: "a list",
    collections.abc.Mapping: "an object",
}


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_spell, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}"
    if dataclasses.is_dataclass(hint):
        return "an object"
    return _SPELLING.get(origin or hint, str(hint))


def _walk(value: Any, where: object, error: type[DiffalignError]) -> Iterator[Any]:
    """All values within one, keys included, without recursion."""
    open_ends = [iter((value,))]
    while open_ends:
        item = next(open_ends[-1], open_ends)
        if item is open_ends:
            open_ends.pop()
            continue
        yield item
        if isinstance(item, dict):
            open_ends.append(iter([part for pair in item.items() for part in pair]))
        elif isinstance(item, list):
            open_ends.append(iter(item))
        if len(open_ends) > _DEEPEST + 1:
            raise error(f"{where}: lists and objects are more than {_DEEPEST} deep")


def _refuse_depth(value: Any, where: object, error: type[DiffalignError]) -> None:
    for _ in _walk(value, where, error):
        pass


def _refuse_halves(value: Any, where: object, error: type[DiffalignError]) -> None:
    for item in _walk(value, where, error):
        if isinstance(item, str) and not _encodable(item):
            raise error(f"{where}: {_half_of(item)}")


def _half_of(text: str) -> str:
    return (
        f"the text {shortly(text)} holds half a character (a surrogate without its other half), as "
        f"is left where text was cut: take it out"
    )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
