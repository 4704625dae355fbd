"""What a job prints as the next command does, pasted, what it says."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from diffalign import components, config
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.commands import command, override, unused
from diffalign.jobs import generate_groups, label, score
from diffalign.jobs.compare import CompareConfig
from diffalign.jobs.generate import GenerateConfig
from diffalign.jobs.score import ScoreConfig
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.models.preference.step_aware import StepAwarePreference
from diffalign.models.vlm.config import VLM
from diffalign.rollouts.human_feedback import HumanFeedback
from diffalign.training.config import RunConfig

ROOT = Path(__file__).parents[1]
ODD = [
    "plain/name",
    "two words",
    "[1]",
    "{a: b}",
    "2024",
    "1e3",
    "null",
    "yes",
    "a: b # c",
    "it's",
    '"quoted"',
    "$HOME `x` \\",
    "trailing ",
    "ünï/图",
    "*star",
    "a=b",
    "- x",
    "~",
    "2024-01-01",
    "new\nline",
]


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def pasted(text: str) -> list[tuple[str, Path | None, list[str]]]:
    """Job, config and settings of every command in a text, split as a shell splits them."""
    found = []
    for line in text.splitlines():
        if line.strip().startswith("diffalign "):
            _, job, *words = shlex.split(line)
            words = [word for word in words if not word.startswith("--")]
            if job == "evaluate":
                job = words.pop(0)
            path = Path(words.pop(0)) if "=" not in words[0] else None
            found.append((job, path, words))
    return found


@pytest.mark.parametrize("name", ODD)
def test_a_name_arrives_as_it_is(name):
    words = shlex.split(command("score", {"images": Path(name), "scorer.kind": "jpeg"}))
    assert words[:2] == ["diffalign", "score"]
    assert config.load(ScoreConfig, None, words[2:]).images == Path(name)


@pytest.mark.parametrize("name", ODD)
def test_a_name_inside_a_mapping_arrives_as_it_is(name):
    where = {"path": name, "revision": None}
    line = command("generate", {"models.base": where, "prompts.texts": [name], "output": "x"})
    loaded = config.load(GenerateConfig, None, shlex.split(line)[2:])
    assert loaded.models["base"].path == name
    assert loaded.prompts.texts == (name,)


def test_plain_values_are_written_plainly():
    settings = {"a": "runs/x.safetensors", "b": 2, "c": [1, 2.5], "d": {"e": True}, "f": None}
    assert [override(k, v) for k, v in settings.items() if v is not None] == [
        *("a=runs/x.safetensors", "b=2", "c=[1, 2.5]", "d={e: true}")
    ]
    assert command("train", config="a b.yaml", options=["--resume"]) == (
        "diffalign train 'a b.yaml' --resume"
    )


def test_a_place_that_is_taken_gets_a_number(tmp_path):
    """What was measured of fewer steps stays, and the command that a longer run prints works."""
    assert unused(tmp_path / "chair.jsonl") == tmp_path / "chair.jsonl"
    (tmp_path / "chair.jsonl").touch()
    (tmp_path / "chair-2.jsonl").touch()
    assert unused(tmp_path / "chair.jsonl") == tmp_path / "chair-3.jsonl"
    (tmp_path / "compared").mkdir()
    settings = pasted(SDXL(path="base").next_step(tmp_path))[0][2]
    assert config.load(GenerateConfig, None, settings).output == tmp_path / "compared-2"


@pytest.mark.parametrize("run", [Path("runs/mine"), Path("my runs/[new] it's")])
def test_what_follows_image_training_opens_the_very_base(run):
    start = Path("old run/final")
    model = SDXL(
        path="a model.safetensors",
        config="assets/playground/sdxl",
        prediction_type="v_prediction",
        lora=LoraSettings(rank=4, start=start),
    )
    ((job, _, words),) = pasted(model.next_step(run))
    assert job == "generate"
    models = config.load(GenerateConfig, None, words).models
    base = asdict(models["base"])
    assert {key: base[key] for key in ("path", "config", "prediction_type", "lora")} == {
        "path": "a model.safetensors",
        "config": "assets/playground/sdxl",
        "prediction_type": "v_prediction",
        "lora": start,
    }
    assert models["aligned"] == str(run)


def test_what_follows_training_on_responses_opens_the_adapter_as_it_was_trained():
    lora = LoraSettings(rank=4, alpha=8, rslora=True, targets=("q_proj", "v_proj"))
    model = VLM(path="org/name", revision="abc", image_pixels=602112, lora=lora)
    run = Path("my runs/[new] it's")
    commands = pasted(model.next_step(run))
    assert [job for job, _, _ in commands] == ["chair", "pope"]
    for job, _, words in commands:
        cls = components.find(AbstractBenchmark, job)
        opened = config.load(cls, None, words).model
        assert isinstance(opened, VLM)
        assert (opened.path, opened.revision, opened.image_pixels) == ("org/name", "abc", 602112)
        assert opened.lora == LoraSettings(
            rank=4, alpha=8, rslora=True, targets=("q_proj", "v_proj"), start=run
        )
    full = VLM(path="org/name", revision="abc")
    _, _, words = pasted(full.next_step(run))[0]
    opened = config.load(components.find(AbstractBenchmark, "chair"), None, words).model
    assert (opened.path, opened.revision, opened.lora) == (str(run / "final"), None, None)


def test_what_follows_a_preference_model_is_spo_with_it():
    model = StepAwarePreference(path="clip", base=SD15(path="base"))
    ((job, path, words),) = pasted(model.next_step(Path("my run")))
    assert job == "train" and path is not None
    assert config.load(RunConfig, path, words).rollouts.scorer.path == "my run/final"


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_groups_are_trained_on_by_what_sampled_them(kind, tmp_path):
    model: AbstractDiffusion = kind(path="a base", lora=None)
    process = ReverseProcess(steps=7, guidance=3.5)
    folder = tmp_path / "my [groups]"
    folder.mkdir()
    (folder / "groups.jsonl").touch()
    labelling, training = pasted(generate_groups.next_step(folder, model, process))
    job, data, words = labelling
    assert job == "label" and data == folder
    assert label.load(str(data), words).output == folder
    job, path, words = training
    assert job == "train"
    run = config.load(RunConfig, path, words)
    assert isinstance(run.rollouts, HumanFeedback)
    assert run.rollouts.trajectories == folder
    assert run.likelihood.process == process
    assert type(run.model) is kind and run.model.path == "a base" and run.model.lora.rank == 4


def test_what_follows_generating_and_scoring():
    ((job, _, words),) = pasted(score.suggestion(Path("my [images]")))
    assert job == "score"
    assert config.load(ScoreConfig, None, words).images == Path("my [images]")
    ((job, _, words),) = pasted(command("compare", {"images": Path("my [images]")}))
    assert config.load(CompareConfig, None, words).images == Path("my [images]")
