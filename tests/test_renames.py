"""Names from before: each goes on loading, with a sentence that has the new one."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign import components, config, renames
from diffalign.data.responses.config import ResponseConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.training.run_state import refuse_other_run

PACKAGE = Path(__file__).parents[1] / "diffalign"
FIELDS = [(cls, old, now) for cls, names in renames.FIELDS.items() for old, now in names.items()]
KINDS = [
    (family, old, now) for family, names in renames.KINDS.items() for old, now in names.items()
]
REQUIRED: dict[str, dict[str, Any]] = {
    "MMHal": {"items": "a", "judge": {"kind": "local", "path": "b"}, "verdicts": "c"},
    "ObjectHalBench": {"objects": "a", "synonyms": "b"},
    "Pope": {"questions": "a"},
    "ResponseConfig": {"path": "a"},
    "Stepwise": {"prompts": "a", "prompts_per_round": 1, "scorer": {"kind": "jpeg"}},
    "VLM": {"path": "a"},
    "WholeImage": {"prompts": "a", "prompts_per_round": 1, "scorers": [{"kind": "jpeg"}]},
}
"""What a class cannot be without, as YAML has it."""
VALUES = {"responses": "responses.jsonl"}
"""Values of renamed keys; those that are not listed are given their default."""


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(renames, "_said", set())


def class_named(name: str) -> type:
    homes = [
        path
        for path in PACKAGE.rglob("*.py")
        if any(
            isinstance(node, ast.ClassDef) and node.name == name and "dataclass" in ast.dump(node)
            for node in ast.parse(path.read_text()).body
        )
    ]
    assert len(homes) == 1, f"{name} of renames.FIELDS must be one class, and is in {homes}"
    dotted = ".".join(homes[0].relative_to(PACKAGE.parent).with_suffix("").parts)
    return getattr(importlib.import_module(dotted), name)


def write(tmp_path: Path, tree: dict[str, Any]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(("name", "old", "now"), FIELDS)
def test_every_old_key_loads_as_the_new_one(tmp_path, capsys, name, old, now):
    cls = class_named(name)
    field = {field.name: field for field in dataclasses.fields(cls)}
    assert now in field and old not in field
    tree = REQUIRED.get(name, {})
    value = VALUES.get(now, config.to_dict(field[now].default))
    new = config.load(cls, write(tmp_path, {**tree, now: value}))
    assert not capsys.readouterr().err
    for _ in range(2):  # what is said is said once
        assert config.load(cls, write(tmp_path, {**tree, old: value})) == new
    [sentence] = capsys.readouterr().err.splitlines()
    assert f"{old} is called {now} now" in sentence and "run.yaml" in sentence


@pytest.mark.parametrize(("family", "old", "now"), KINDS)
def test_every_old_kind_is_found_by_its_new_name(capsys, family, old, now):
    module = importlib.import_module(f"diffalign.{family}.base")
    abstract = getattr(module, f"Abstract{family.capitalize()}")
    assert old not in components.kinds(abstract)
    cls = config._component_class(abstract, {"kind": old}, place="run.yaml", key=family)
    assert cls is components.find(abstract, now)
    assert f"run.yaml: {family}.kind {old} is called {now} now" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    responses: ResponseConfig


@pytest.mark.parametrize("in_file", ["draws", "visits"])
@pytest.mark.parametrize("override", ["draws", "visits"])
def test_an_override_wins_whichever_name_it_and_the_file_use(tmp_path, capsys, in_file, override):
    path = write(tmp_path, {"responses": {"path": "a", in_file: 8}})
    loaded = config.load(Holder, path, [f"responses.{override}=2"])
    assert loaded.responses.visits == 2
    said = capsys.readouterr().err
    assert ("draws is called visits" in said) == ("draws" in (in_file, override))


def test_a_key_given_by_both_names_is_refused(tmp_path):
    path = write(tmp_path, {"responses": {"path": "a", "draws": 8, "visits": 8}})
    with pytest.raises(
        ConfigError, match=r"responses\.draws is called responses\.visits now, and both"
    ):
        config.load(Holder, path)


def test_ranks_but_the_first_say_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    config.load(Holder, write(tmp_path, {"responses": {"path": "a", "draws": 8}}))
    assert capsys.readouterr().err == ""


BEFORE = {
    "rollouts.kind": "whole_image",
    "rollouts.pictured_images": 8,
    "responses.draws": 4,
    "objective.terms": [{"objective": {"kind": "dpo", "beta": 0.1}}],
    "seed": 0,
}
NOW = {
    "rollouts.kind": "d3po",
    "rollouts.kept_images": 8,
    "responses.visits": 4,
    "objective.terms": [{"objective": {"kind": "dpo", "beta": 0.1}}],
    "seed": 0,
}


def test_a_checkpoint_from_before_is_known_by_its_old_names(tmp_path):
    refuse_other_run(tmp_path, BEFORE, NOW)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rollouts.kind": "stepwise"}, "rollouts.kind was 'stepwise'"),
        ({"rollouts.pictured_images": 9}, "rollouts.kept_images was 9"),
        ({"responses.draws": None}, "responses.visits was None"),
        ({"objective.terms": [{"objective": {"kind": "ipo", "beta": 0.1}}]}, "objective.terms"),
    ],
)
def test_and_refused_where_its_settings_differ(tmp_path, change, key):
    with pytest.raises(CheckpointError, match=key):
        refuse_other_run(tmp_path, {**BEFORE, **change}, NOW)
