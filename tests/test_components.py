"""The folder is the registry, and kinds from outside: modules and single files."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffalign import components, config
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.errors import ConfigError
from diffalign.models.base import AbstractModel
from diffalign.objectives.base import AbstractObjective
from diffalign.objectives.dpo import DPO


@dataclass(frozen=True, kw_only=True)
class Run:
    objective: AbstractObjective


def test_subfolders_hold_kinds_too():
    sdxl = components.find(AbstractModel, "sdxl")
    pope = components.find(AbstractBenchmark, "pope")
    assert sdxl.__module__ == "diffalign.models.diffusion.sdxl"
    assert pope.__module__ == "diffalign.benchmarks.pope.config"
    assert {"sd15", "sdxl", "vlm", "step_aware"} <= set(components.kinds(AbstractModel))
    for kind in components.kinds(AbstractBenchmark):
        cls = components.find(AbstractBenchmark, kind)
        assert components.kind_of(object.__new__(cls)) == kind


def test_kinds_are_found_by_module_name_and_named_back():
    assert "dpo" in components.kinds(AbstractObjective)
    assert components.find(AbstractObjective, "dpo") is DPO
    assert components.kind_of(DPO(beta=1.0)) == "dpo"


def package_with_a_loss(tmp_path: Path, monkeypatch, name: str, extra: str = "") -> str:
    """An importable module outside diffalign that holds one objective; its dotted path."""
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "loss.py").write_text(
        "from dataclasses import dataclass\n"
        "from diffalign.objectives.base import AbstractObjective\n"
        f"{extra}\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(AbstractObjective):\n"
        "    views = frozenset({'chosen'})\n"
        "    needs_reference = False\n"
        "    def __call__(self, views): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}.loss"


def test_a_kind_from_outside_is_taken_by_its_dotted_path(tmp_path, monkeypatch):
    kind = package_with_a_loss(tmp_path, monkeypatch, "my_package")
    found = components.find(AbstractObjective, kind)
    assert found.__name__ == "Mine"
    assert components.kind_of(found()) == kind


def test_a_kind_from_the_working_folder_is_found_by_the_installed_command_too(
    tmp_path, monkeypatch
):
    kind = package_with_a_loss(tmp_path, monkeypatch, "lies_here")
    elsewhere = [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", list(elsewhere))  # as a console script finds it
    with pytest.raises(ConfigError, match="no module of that name can be imported"):
        components.find(AbstractObjective, kind)
    monkeypatch.chdir(tmp_path)
    assert components.find(AbstractObjective, kind).__name__ == "Mine"
    assert sys.path == [*elsewhere, str(tmp_path)], "behind all others: it shadows no package"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def (:", "SyntaxError"),
        ("raise RuntimeError('no GPU')", r"RuntimeError: no GPU \(.*loss.py, line 3\)"),
        ("from diffalign.objectives.base import Abstract", "ImportError: cannot import name"),
    ],
)
def test_a_module_from_outside_that_fails_says_how_and_where(tmp_path, monkeypatch, text, said):
    kind = package_with_a_loss(tmp_path, monkeypatch, f"broken_{said[:3].lower()}", text)
    with pytest.raises(ConfigError, match=f"cannot be imported: {said}"):
        components.find(AbstractObjective, kind)


def test_a_lone_file_in_the_working_folder_is_told_how_it_is_taken(tmp_path, monkeypatch):
    (tmp_path / "myloss.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"write \./myloss\.py to take it"):
        components.find(AbstractObjective, "myloss")


def test_an_alias_of_a_type_next_to_a_component_is_no_component(tmp_path, monkeypatch):
    kind = package_with_a_loss(tmp_path, monkeypatch, "aliased", "Rows = list[int]")
    assert components.find(AbstractObjective, kind).__name__ == "Mine"


LOSS = """
from dataclasses import dataclass
from diffalign.objectives.base import AbstractObjective
from .shared import NAME

@dataclass(frozen=True, kw_only=True)
class Mine(AbstractObjective):
    views = frozenset({"chosen"})
    needs_reference = False
    weight: float = 1.0
    def __call__(self, views): ...
    def note(self): return NAME
"""


def lone_loss(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "my_loss.py").write_text(LOSS)
    (folder / "shared.py").write_text(f"NAME = {name!r}\n")
    return folder / "my_loss.py"


def test_files_of_one_name_in_two_folders_are_two_kinds(tmp_path, monkeypatch):
    one, other = lone_loss(tmp_path / "one", "first"), lone_loss(tmp_path / "other", "second")
    monkeypatch.chdir(one.parent)
    first = components.find(AbstractObjective, "./my_loss.py")()
    second = components.find(AbstractObjective, str(other))()
    assert (first.note(), second.note()) == ("first", "second")
    assert components.find(AbstractObjective, "my_loss.py") is type(first)
    assert components.find(AbstractObjective, "../one/my_loss.py") is type(first)
    assert components.kind_of(first) == str(one.resolve())


def test_a_run_with_a_file_as_kind_is_saved_and_loads_from_elsewhere(tmp_path, monkeypatch):
    file = lone_loss(tmp_path / "one", "first")
    monkeypatch.chdir(file.parent)
    run = config.load(Run, None, ["objective.kind=./my_loss.py", "objective.weight=2"])
    config.save(run, tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert config.load(Run, tmp_path / "config.yaml") == run


def test_a_process_that_starts_anew_finds_the_file_by_itself(tmp_path):
    file = lone_loss(tmp_path / "one", "first")
    pickled = tmp_path / "objective.pickle"
    pickled.write_bytes(pickle.dumps(components.find(AbstractObjective, str(file))(weight=3.0)))
    code = f"import pickle; o = pickle.load(open({str(pickled)!r}, 'rb')); print(o.note())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "first\n"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("./my_los.py", r"there is no file .*my_los\.py\. Did you mean .*my_loss\.py"),
        ("./my-loss.py", r"my-loss\.py is no name of a module"),
        ("./shared.py", r"must hold exactly one concrete AbstractObjective, and holds none"),
        ("./broken.py", r"needs the package no_such_package, which is not installed"),
    ],
)
def test_a_file_that_cannot_be_taken_is_refused(tmp_path, monkeypatch, kind, said):
    folder = lone_loss(tmp_path / "one", "first").parent
    (folder / "my-loss.py").write_text("")
    (folder / "broken.py").write_text("import no_such_package")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=said):
        components.find(AbstractObjective, kind)
