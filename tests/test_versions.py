from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from diffalign import cli, versions
from diffalign.errors import ModelError
from diffalign.jobs import env

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CAPPED = ("transformers", "diffusers", "peft", "datasets", "pyarrow", "pillow")


def section(start: str) -> list[Requirement]:
    """The requirements in a list of pyproject.toml (Python 3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text()
    body = re.search(rf"^{re.escape(start)} = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
    return [Requirement(item) for item in yaml.safe_load(re.sub(r" +#.*", "", body[1]))]


def environment_of(python: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }


def pins(python: str) -> dict[str, str]:
    text = (ROOT / versions.TESTED_SET).read_text()
    return versions.read_constraints(text, environment_of(python))


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_tested_version_that_it_allows(python):
    tested = pins(python)
    for requirement in (*section("dependencies"), *section("dev")):
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if marker is not None and not marker.evaluate({"extra": "", **environment_of(python)}):
            continue  # of no release for this Python
        assert name in tested, f"{versions.TESTED_SET} lacks {name} on Python {python}"
        assert requirement.specifier.contains(tested[name]), requirement


def test_the_tested_set_names_versions_and_nothing_else():
    text = (ROOT / versions.TESTED_SET).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.\-]+==[0-9a-z.+]+( ; .+)?", line) for line in lines)
    assert not re.search(r"://|@|--|/", text.partition("\n")[2])


def test_libraries_that_break_their_users_are_bounded_above():
    bounds = {item.name: item.specifier for item in section("dependencies")}
    for name in CAPPED:
        tested = pins("3.13")[name]
        beyond = "1.0" if tested.startswith("0.") else f"{int(tested.split('.')[0]) + 1}.0"
        assert bounds[name].contains(tested), name
        assert not bounds[name].contains(beyond), name
    assert all(any(item.operator == ">=" for item in bounds[name]) for name in CAPPED)


def test_known_bad_releases_are_excluded_by_name():
    bounds = {item.name: item.specifier for item in section("dependencies")}
    bad = {"torch": "2.9.0", "transformers": "4.57.2", "diffusers": "0.36.0"}
    assert not any(bounds[name].contains(version) for name, version in bad.items())


def test_every_python_of_the_tested_set_is_promised():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"Python :: (3\.\d+)", text) == list(PYTHONS)


def test_a_wheel_carries_the_tested_set():
    text = (ROOT / "pyproject.toml").read_text()
    inside = f"diffalign/{versions.TESTED_SET}"
    assert f'"{versions.TESTED_SET}" = "{inside}"' in text
    assert (
        versions.tested()["torch"]
        == versions.read_constraints((ROOT / versions.TESTED_SET).read_text())["torch"]
    )


@pytest.fixture
def two_libraries(monkeypatch):
    """peft and transformers are required, and installed as tested until a test says otherwise."""
    there = {"peft": "0.21.2", "transformers": "5.24.0"}
    allowed = {"peft": SpecifierSet(">=0.15,<1"), "transformers": SpecifierSet(">=4.57,<6")}
    monkeypatch.setattr(versions, "installed", there.get)
    monkeypatch.setattr(versions, "required", lambda: allowed)
    monkeypatch.setattr(versions, "tested", lambda: {"peft": "0.21.2", "transformers": "5.24.0"})
    return there


def test_an_error_of_a_library_in_an_untested_version_says_which_version_works(two_libraries):
    two_libraries["transformers"] = "5.30.0"
    error = ImportError("cannot import name 'CLIPTextModel' from 'transformers'")

    said = versions.advice(error)

    assert "transformers 5.30.0 is installed, 5.24.0 was tested" in said
    assert "pip install 'transformers==5.24.0'. `diffalign env`" in said
    assert "peft" not in said


def test_a_version_outside_the_bounds_is_named_with_them(two_libraries):
    two_libraries |= {"transformers": "6.1.0", "peft": None}
    error = ModelError("x: cannot be read as a model")
    error.__cause__ = ValueError("wrong number of dimensions")

    said = versions.advice(error)

    assert "transformers 6.1.0 is installed, transformers<6,>=4.57 is needed" in said
    assert "no peft is installed, peft<1,>=0.15 is needed, 0.21.2 was tested" in said


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'wandb'"), ValueError("version"), KeyError("x")],
)
def test_nothing_is_said_where_all_is_as_tested(two_libraries, error):
    assert versions.advice(error) == ""


def test_an_error_of_ours_is_not_put_down_to_a_library(two_libraries):
    two_libraries["peft"] = "0.22.0"
    assert versions.advice(ImportError("no", name="diffalign.nowhere")) == ""
    assert versions.advice(KeyError("beta")) == ""


@pytest.mark.parametrize(
    ("error", "shows_traceback"),
    [
        (ImportError("peft>=0.22 is required"), False),
        (TypeError("forward() got an unexpected keyword"), True),
    ],
)
def test_the_command_line_says_it_after_the_error(
    two_libraries, monkeypatch, capsys, error, shows_traceback
):
    two_libraries["peft"] = "0.20.0"
    monkeypatch.setattr(sys, "argv", ["diffalign", "env"])

    def fail() -> None:
        raise error

    monkeypatch.setattr(env, "run", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()

    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "peft 0.20.0 is installed, 0.21.2 was tested" in " ".join(said.split())
    assert ("Traceback" in said) is shows_traceback


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "All required libraries are in the tested versions"),
        ({"peft": "0.20.0"}, "In other versions than the tested ones (constraints.txt): peft."),
        ({"peft": "1.2.0"}, "peft<1,>=0.15 is needed"),
    ],
)
def test_env_compares_with_the_tested_set(two_libraries, capsys, change, expected):
    two_libraries |= change
    env.run()
    assert expected in " ".join(capsys.readouterr().out.split())


def test_env_says_that_the_list_is_absent(two_libraries, monkeypatch, capsys):
    monkeypatch.setattr(versions, "tested", dict)
    env.run()
    assert "is not part of this installation" in capsys.readouterr().out
