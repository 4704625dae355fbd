"""Training knows no kind of data, model or source: each speaks for itself."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import diffalign
from diffalign import components
from diffalign.data.source import AbstractSource
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel, AbstractTrainable
from diffalign.models.vlm.config import VLM
from diffalign.objectives.base import AbstractObjective
from diffalign.rollouts.base import AbstractRollouts

PACKAGE = Path(diffalign.__file__).parent
TRAINING = sorted((PACKAGE / "training").rglob("*.py"))
FAMILIES = (
    AbstractModel,
    AbstractTrainable,
    AbstractSource,
    AbstractLikelihood,
    AbstractObjective,
    AbstractRollouts,
)
SECTIONS = ("PairConfig", "ResponseConfig", "PairSection", "ResponseSection", "RolloutSection")


def asked_kinds(tree: ast.AST, names: dict[str, object]) -> list[str]:
    """Parts of a run, and sections of its config, of which the code asks whether it has one."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) == 2]
    asked = [
        name.id
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "issubclass")
        for name in ast.walk(call.args[1])
        if isinstance(name, ast.Name)
    ]
    return [name for name in asked if name in SECTIONS or _is_part(names.get(name))]


def _is_part(held: object) -> bool:
    return inspect.isclass(held) and issubclass(held, FAMILIES)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_training_asks_no_part_what_kind_it_is(path):
    dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    names = vars(importlib.import_module(dotted.removesuffix(".__init__")))
    assert not asked_kinds(ast.parse(path.read_text()), names)


def test_a_question_for_a_kind_would_be_found():
    tree = ast.parse("if isinstance(run.model, (str, VLM)) or isinstance(run.data, PairConfig): x")
    assert asked_kinds(tree, {"VLM": VLM, "str": str}) == ["VLM", "PairConfig"]


@pytest.mark.parametrize("name", ["denoising", "scores", "tokens", "transition"])
def test_the_batches_of_a_likelihood_are_those_of_its_type(name):
    kind = components.find(AbstractLikelihood, name)
    (base,) = kind.__orig_bases__
    _, batch, _ = base.__args__
    assert batch is kind.batch_type
