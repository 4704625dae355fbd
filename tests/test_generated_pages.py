"""docs/config.md and docs/api.md are as the code is, and say what a reader looks for."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

import diffalign

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))  # list_api imports list_settings

import list_api  # noqa: E402
import list_settings  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A range next to a type."""

    allowed: str


@dataclass(frozen=True, kw_only=True)
class Inner:
    """What lies within."""

    name: str | None = None
    """Of it | in words."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """What a job loads.

    A second paragraph.
    """

    share: Annotated[float, Limit(allowed="at least 0")]
    """A part of the whole,
    in two lines."""
    form: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    named: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize("module", [list_settings, list_api], ids=lambda module: module.__name__)
def test_a_generated_page_is_as_the_code_is(module):
    written = module.PAGE.read_text()
    assert written == module.page(), f"run: python scripts/{module.__name__}.py"


def test_a_key_has_its_type_default_and_meaning():
    lines = list_settings._section(Outer).splitlines()
    inner = "[`Inner`](#inner)"
    assert lines[1:5] == ["## Outer", "", "What a job loads.", ""]
    assert lines[7:] == [
        "| `share` | number, at least 0 | **must be given** | A part of the whole, in two lines. |",
        "| `form` | `a`, `b` | `a` |  |",
        f"| `inner` | {inner} | its own |  |",
        f"| `many` | list of: {inner} | `[]` |  |",
        "| `named` | name to: whole number | `{}` |  |",
    ]
    assert "| `name` | string or null | `null` | Of it \\| in words. |" in list_settings._section(
        Inner
    )
    assert list_settings._reachable([Outer]) == {Outer, Inner}


def test_every_kind_of_every_family_and_every_job_is_on_the_page():
    page = (ROOT / "docs/config.md").read_text()
    for kind in ("dpo", "spo", "re_align", "sdxl", "vlm", "pope", "crop", "pickscore"):
        assert f"| `{kind}` | [`" in page, kind
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(titles) == len(set(titles)) > 100


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs/api.md").read_text()
    for name in diffalign.__all__:
        assert f"## diffalign.{name}\n" in page
    assert "- `policy: Tensor`" in page
