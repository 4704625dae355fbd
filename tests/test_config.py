from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from diffalign import components, config
from diffalign.errors import ConfigError
from diffalign.objectives.base import AbstractObjective
from diffalign.objectives.dpo import DPO


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    steps: int | None = None
    mode: Literal["slow", "fast"] = "slow"


@dataclass(frozen=True, kw_only=True)
class Named:
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: Path
    objective: AbstractObjective
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    flag: bool = False
    place: Named | str = ""


GOOD = """
path: somewhere
objective: {kind: dpo, beta: 5000}
inner: {lr: 1e-8, steps: 3, mode: fast}
names: [a, b]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_a_file_becomes_the_dataclasses_it_names(tmp_path):
    loaded = config.load(Outer, written(tmp_path, GOOD))
    assert loaded == Outer(
        path=Path("somewhere"),
        objective=DPO(beta=5000.0),
        inner=Inner(lr=1e-8, steps=3, mode="fast"),
        names=("a", "b"),
    )


def test_overrides_win_and_reach_any_depth(tmp_path):
    loaded = config.load(
        Outer,
        written(tmp_path, GOOD),
        ["objective.beta=1e3", "inner.steps=null", "flag=true", "names=[c]"],
    )
    assert loaded.objective == DPO(beta=1000.0)
    assert (loaded.inner.steps, loaded.flag, loaded.names) == (None, True, ("c",))


def test_what_is_saved_loads_back_equal(tmp_path):
    loaded = config.load(Outer, written(tmp_path, GOOD))
    config.save(loaded, tmp_path / "again.yaml")
    assert config.load(Outer, tmp_path / "again.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.lrr=1", r"run\.yaml: inner\.lrr is not a field of Inner.*Did you mean inner\.lr\?"),
        ("objective.betta=1", r"objective\.betta is not a field of DPO \(fields: beta\)"),
        ("objective.beta=fast", r"run\.yaml: objective\.beta must be a finite number, got 'fast'"),
        ("objective.beta=.nan", r"objective\.beta must be a finite number, got nan"),
        ("inner.lr=.inf", r"inner\.lr must be a finite number, got inf"),
        ("place={nam: x}", r"place\.nam is not a field of Named.*Did you mean place\.name\?"),
        ("objective.kind=dop", r"objective\.kind: there is no 'dop'.*Did you mean dpo\?"),
        ("objective.beta=0", r"run\.yaml: objective\.beta must be greater than 0, got 0"),
        (
            "inner.mode=fats",
            r"inner\.mode must be one of slow, fast, got 'fats'. Did you mean fast",
        ),
        ("inner.steps=1.5", r"inner\.steps must be a whole number, got 1\.5"),
        ("inner=3", r"inner must be a mapping of keys, got 3"),
        ("flag=1", r"flag must be true or false, got 1"),
        ("names=a", r"names must be a list, got 'a'"),
        ("path=[1]", r"path must be a path, got \[1\]"),
        ("nonsense", r"override 'nonsense': write it as key\.path=value"),
        ("path.name=b", r"override 'path\.name=b': path is '.*' so far, a value without keys"),
        ("names.0=b", r"override 'names\.0=b': names is a list.* as a whole: names='\[\.\.\.\]'"),
    ],
)
def test_a_wrong_value_is_refused_with_file_key_and_what_is_allowed(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(Outer, written(tmp_path, GOOD), [override])


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"objective\.beta must be given: DPO has no default"):
        config.load(Outer, written(tmp_path, "path: x\nobjective: {kind: dpo}\n"))


def test_a_key_given_twice_is_refused(tmp_path):
    path = written(tmp_path, GOOD + "inner: {lr: 1}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML.*'inner' is given twice"):
        config.load(Outer, path)


def test_a_missing_file_is_said_with_the_nearest_one(tmp_path):
    written(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"no such config file\. Did you mean .*run\.yaml\?"):
        config.load(Outer, tmp_path / "runs.yaml")


def test_a_folder_in_the_place_of_a_config_is_named_with_what_it_holds(tmp_path):
    written(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"is a folder, .*\(it holds run\.yaml\).*images="):
        config.load(Outer, tmp_path)


def test_a_module_without_a_component_is_refused():
    with pytest.raises(ConfigError, match="must hold exactly one concrete AbstractObjective"):
        components.find(AbstractObjective, "diffalign.seeding")
