"""What makes two runs the same: settings say of themselves whether they shape a run."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign import components, config
from diffalign.config import MAY_CHANGE, SHAPES_RUN
from diffalign.errors import CheckpointError
from diffalign.training.config import RunConfig
from diffalign.training.identity import identity
from diffalign.training.run_state import refuse_other_run

ROOT = Path(__file__).parents[2]
SAVED = json.loads(Path(__file__).with_name("identities.json").read_text())
"""Identities as checkpoints of these configs hold them, written when fields did not yet say
themselves whether they shape a run."""
MOVES = ("path", "file", "folder", "output", "cache")
"""How a setting is called that says where something lies."""


@pytest.mark.parametrize("name", SAVED)
def test_checkpoints_of_shipped_configs_go_on_belonging_to_their_runs(name):
    ours = identity(config.load(RunConfig, ROOT / name))
    refuse_other_run(Path("checkpoint-1"), SAVED[name], ours)
    with pytest.raises(CheckpointError, match="seed was 1 there and is 0 here"):
        refuse_other_run(Path("checkpoint-1"), {**SAVED[name], "seed": 1}, ours)


def parts_of(hint: Any) -> Iterator[Any]:
    """The types that a type is made of, itself included."""
    yield hint
    for argument in typing.get_args(hint):
        yield from parts_of(argument)


def sections(cls: type, seen: set[type]) -> None:
    """All dataclasses that a config of this type can hold, of every kind."""
    if cls in seen or not dataclasses.is_dataclass(cls):
        return
    if getattr(cls, "__abstractmethods__", None):
        for kind in components.kinds(cls):
            sections(components.find(cls, kind), seen)
        return
    seen.add(cls)
    for hint in typing.get_type_hints(cls).values():
        for part in parts_of(hint):
            if isinstance(part, type):
                sections(part, seen)


def unmarked(cls: type) -> list[str]:
    """Settings of a section that say where something lies, and not whether it may move."""
    hints = typing.get_type_hints(cls)
    return [
        f"{cls.__name__}.{field.name}"
        for field in dataclasses.fields(cls)
        if (Path in parts_of(hints[field.name]) or field.name.rpartition("_")[2] in MOVES)
        and SHAPES_RUN not in field.metadata
    ]


def test_every_setting_with_a_path_says_whether_a_run_may_be_moved():
    found: set[type] = set()
    sections(RunConfig, found)
    assert len(found) > 40
    missing = sorted(name for cls in found for name in unmarked(cls))
    assert not missing, "give these fields metadata: config.MAY_CHANGE, or config.MUST_STAY"


def test_a_new_setting_with_a_path_and_no_word_is_found_and_shapes_the_run_until_then(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(RunConfig):
        notes: Path = Path("a")
        prompts_file: str | None = dataclasses.field(default=None, metadata=MAY_CHANGE)

    assert [name for name in unmarked(Longer) if "notes" in name] == ["Longer.notes"]
    assert "Longer.prompts_file" not in unmarked(Longer)
    run = config.load(RunConfig, ROOT / "configs/mdpo/llava15_7b.yaml")
    fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    ours = identity(Longer(**fields, prompts_file="here"))
    assert ours["notes"] == "a" and "prompts_file" not in ours
    assert identity(Longer(**fields, notes=Path("b"))) != ours


def test_what_may_change_in_the_parts_of_a_list_is_no_part_of_the_run():
    def judged_by(endpoint: str) -> dict[str, Any]:
        reward = f"{{kind: judged, endpoint: {{{endpoint}}}}}"
        path = ROOT / "configs/sppo/llava15_7b_judged.yaml"
        return identity(config.load(RunConfig, path, [f"rollouts.rewards=[{reward}]"]))

    ours = judged_by("address: http://127.0.0.1:8000/v1, model: a")
    assert judged_by("address: http://127.0.0.1:8001/v1, model: a, timeout_s: 9") == ours
    assert judged_by("address: http://127.0.0.1:8000/v1, model: b") != ours
