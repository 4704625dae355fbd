"""Ranges next to types: refused by the loader with file and key, and in code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest

from diffalign import config, ranges
from diffalign.errors import ConfigError
from diffalign.ranges import AtLeast, Between, MoreThan, Ranged

PACKAGE = Path(__file__).parents[1] / "diffalign"


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    steps: Annotated[int, AtLeast(1)] = 1
    limit: Annotated[int, AtLeast(1)] | None = None
    share: Annotated[float, Between(0, 1)] = 0.5
    smoothing: Annotated[float, Between(0, 0.5, "half says nothing", without=[0.5])] = 0.0
    beta: Annotated[float, MoreThan(0, "at 0 nothing is learnt")] = 1.0
    betas: tuple[Annotated[float, Between(0, 1, without=[1])], ...] = ()
    seeds: Annotated[int, AtLeast(1)] | tuple[int, ...] = 1
    scales: dict[str, Annotated[float, AtLeast(0)]] = dataclasses.field(default_factory=dict)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"limit": 0}, "limit must be at least 1, got 0"),
    ({"share": 1.5}, "share must be between 0 and 1, got 1.5"),
    ({"share": -0.1}, "share must be between 0 and 1, got -0.1"),
    (
        {"smoothing": 0.5},
        "smoothing must be at least 0 and below 0.5, got 0.5: half says nothing",
    ),
    ({"beta": 0.0}, "beta must be greater than 0, got 0.0: at 0 nothing is learnt"),
    ({"betas": (0.9, 1.0)}, r"betas[1] must be at least 0 and below 1, got 1.0"),
    ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ({"scales": {"a": -1.0}}, "scales.a must be at least 0, got -1.0"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda part: str(part))
def test_a_number_outside_is_refused_in_code_and_by_the_loader(given, said):
    with pytest.raises(ValueError) as in_code:
        Settings(**given)
    assert str(in_code.value) == said
    [(name, value)] = given.items()
    listed = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ConfigError) as loaded:
        config.load(Settings, None, [f"{name}={listed}"])
    assert str(loaded.value) == f"command line: {said}"


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 1, "limit": 1, "share": 0.0, "smoothing": 0.499, "beta": 1e-9},
        {"limit": None, "share": 1.0, "betas": (0.0, 0.999), "seeds": (0, -1), "scales": {"a": 0}},
    ],
)
def test_ends_that_belong_and_other_types_of_a_union_are_taken(given):
    for name, value in given.items():
        assert getattr(Settings(**given), name) == value


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (AtLeast(2), "at least 2"),
        (MoreThan(0), "greater than 0"),
        (Between(0, 1), "between 0 and 1"),
        (Between(0, 1, without=[0]), "above 0 and at most 1"),
        (Between(0, 0.5, without=[0, 0.5]), "above 0 and below 0.5"),
    ],
)
def test_a_range_in_words(allowed, words):
    assert allowed.allowed == words


def test_a_value_of_another_type_keeps_its_own_error():
    with pytest.raises(ConfigError, match=r"steps must be a whole number, got 1\.5"):
        config.load(Settings, None, ["steps=1.5"])


def ranged_fields() -> list[tuple[type, str]]:
    """Every field of the package that has a range, read from its own class."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if "diffalign.ranges" not in text or path.name == "ranges.py":
            continue
        dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        module = importlib.import_module(dotted)
        for node in ast.parse(text).body:
            cls = getattr(module, node.name) if isinstance(node, ast.ClassDef) else None
            if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls):
                hints = get_type_hints(cls, include_extras=True)
                names = [field.name for field in dataclasses.fields(cls)]
                found += [(cls, name) for name in names if any(ranges.ranges_in(hints[name]))]
    return found


@pytest.mark.parametrize(("cls", "name"), ranged_fields(), ids=lambda part: str(part))
def test_every_range_of_the_package_holds_in_code(cls, name):
    """A class with a `__post_init__` of its own must not forget that of `Ranged`."""
    hint = get_type_hints(cls, include_extras=True)[name]
    allowed = next(iter(ranges.ranges_in(hint)))
    outside: Any = allowed.low - 1 if allowed.low > -math.inf else allowed.high + 1
    for candidate in (outside, (outside,), {"some": outside}):
        if _refused(hint, candidate):
            break
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            object.__setattr__(made, field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            object.__setattr__(made, field.name, field.default_factory())
        else:
            object.__setattr__(made, field.name, None)
    object.__setattr__(made, name, candidate)
    with pytest.raises(ValueError, match=f"{name}.* must be {allowed.allowed}"):
        made.__post_init__()


def _refused(hint: Any, value: Any) -> bool:
    try:
        ranges.refuse_outside(hint, value, "value")
    except ValueError:
        return True
    return False
