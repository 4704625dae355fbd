"""The simulated annotator writes what a person who sees only images and prompts would."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from diffalign.files import append_json_lines
from diffalign.playground.scenes import (
    Kind,
    parse_caption,
    place,
    preference_prompts,
    render,
)
from diffalign.rollouts.groups import GROUPS, Group
from diffalign.rollouts.preferences import read_preferences
from tests.runs import run_script

ROOT = Path(__file__).parents[2]
PROMPT = "a red square and a blue circle"


def test_groups_are_ranked_by_what_they_show_with_ties(tmp_path):
    swapped = tuple(reversed(parse_caption(PROMPT)))
    shown = [swapped, parse_caption(PROMPT), (Kind("green", "cross"),), swapped]
    for i, kinds in enumerate(shown):
        render(place(kinds, np.random.default_rng(i))).save(tmp_path / f"{i}.png")
    group = Group(
        group="g",
        prompt=PROMPT,
        prompt_id="p",
        seed=0,
        images=[f"{i}.png" for i in range(4)],
        trajectories="g.safetensors",
    )
    append_json_lines(tmp_path / GROUPS, [asdict(group)])
    run_script("annotate_playground.py", tmp_path)
    path = tmp_path / "preferences.jsonl"
    assert json.loads(path.read_text()) == {"group": "g", "ranking": [[1], [0, 3], [2]]}
    assert len(read_preferences(path, {"g": 4})["g"].decided) == 5


def test_the_prompts_of_methods_that_sample_are_those_of_the_pairs():
    lines = (ROOT / "assets/playground/prompts.txt").read_text().splitlines()
    assert lines == preference_prompts()
