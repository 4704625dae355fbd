"""The synthesise job whole: made, stopped, gone on with, read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffalign import components, config
from diffalign.cli import app
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.reading import open_responses
from diffalign.errors import ConfigError, DataError, DiffalignError
from diffalign.jobs import synthesise as job
from diffalign.synthesis.journal import MadePlan
from tests.responses import random_image
from tests.synthesis.contexts import RESPONSES, folder

CONFIGS = sorted((Path(__file__).parents[2] / "configs/synthesis").glob("*.yaml"))
METHODS = {
    "bdhs": ("synthesis.max_new_tokens=4",),
    "mia_dpo": (
        "synthesis.max_new_tokens=4",
        "synthesis.layer=1",
        "synthesis.keep_below={sequence: {2: 1.0}, pic_in_pic: {2: 1.0}}",
    ),
    "self_sampled": ("synthesis.max_new_tokens=4",),
    "re_align": ("synthesis.max_new_tokens=4", "synthesis.accept_below=2.0"),
}
FORMS = {
    "bdhs": "trl",
    "mia_dpo": "mia_dpo",
    "self_sampled": "trl",
    "re_align": "re_align",
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Five questions about images, one of which is no image."""
    root = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(5):
        random_image(number, size=(20 + 4 * number, 16)).save(root / f"{number}.png")
        response = RESPONSES[number % len(RESPONSES)]
        rows.append({"image": f"{number}.png", "prompt": "What is it?", "answer": response})
    (root / "3.png").write_bytes(b"damaged")
    path = root / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(kind: str, questions: Path, output: Path, *more: str) -> list[str]:
    return [
        "model.kind=vlm",
        f"model.path={folder('llava')}",
        f"questions.path={questions}",
        f"synthesis.kind={kind}",
        f"output={output}",
        "batch_size=2",
        *METHODS[kind],
        *more,
    ]


def make(kind: str, questions: Path, output: Path, *more: str) -> Any:
    arguments = settings(kind, questions, output, *more)
    job.run(config.load(job.SynthesiseConfig, None, arguments))
    return output


@pytest.mark.parametrize("kind", METHODS)
def test_what_a_method_makes_is_read_back_for_training(kind, questions, tmp_path, capsys):
    output = make(kind, questions, tmp_path / "out")
    data = open_responses(ResponseConfig(path=str(output / "pairs.jsonl")))
    assert f"read as {FORMS[kind]}" in data.summary
    assert len(data.rows) == 4
    for number in range(4):
        pair = data.pair(number, 0)
        assert all(image.is_file() for image in pair.images)
        assert pair.responses["chosen"] != pair.responses["rejected"]
    (left_out,) = [json.loads(line) for line in (output / "skipped.jsonl").open()]
    assert (left_out["id"], left_out["reason"]) == ("questions.jsonl:4", "corrupt image")
    said = capsys.readouterr().out
    assert "training" not in said  # nothing trains here
    assert "4 pairs of 5 questions; 1 skipped" in said
    assert f"responses.path={output / 'pairs.jsonl'} responses.kind={FORMS[kind]}" in said
    assert config.load(job.SynthesiseConfig, output / "synthesise.yaml").batch_size == 2


@pytest.mark.parametrize("kind", ["bdhs", "mia_dpo"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(kind, questions, tmp_path, monkeypatch):
    whole = make(kind, questions, tmp_path / "whole")
    write = MadePlan.write

    def killed(plan, block, made):
        write(plan, block, made)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MadePlan, "write", killed)
        make(kind, questions, tmp_path / "parts")
    assert not (tmp_path / "parts/pairs.jsonl").exists()
    parts = make(kind, questions, tmp_path / "parts")
    for name in ("pairs.jsonl", "skipped.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_loads_no_model(questions, tmp_path, monkeypatch):
    output = make("self_sampled", questions, tmp_path)
    before = (output / "pairs.jsonl").read_bytes()
    monkeypatch.setattr(job, "_bench", lambda *_: pytest.fail("the model was loaded"))
    make("self_sampled", questions, tmp_path)
    assert (output / "pairs.jsonl").read_bytes() == before


def test_corrections_come_later_and_cost_no_response(questions, tmp_path, monkeypatch):
    make("self_sampled", questions, tmp_path)
    path = tmp_path / "corrections.jsonl"
    path.write_text('{"id": "questions.jsonl:1", "revised": "A red cat."}\n')
    monkeypatch.setattr(job, "_bench", lambda *_: pytest.fail("the model was loaded"))
    make("self_sampled", questions, tmp_path, f"synthesis.corrections={path}")
    data = open_responses(ResponseConfig(path=str(tmp_path / "pairs.jsonl")))
    assert "read as opa_dpo" in data.summary
    assert data.pair(0, 0).responses["revised"] == "A red cat."


@pytest.mark.parametrize("change", ["seed=1", "synthesis.temperature=0.5", "questions.limit=2"])
def test_other_settings_need_another_folder(questions, tmp_path, change):
    make("self_sampled", questions, tmp_path)
    with pytest.raises(ConfigError, match="give output another folder"):
        make("self_sampled", questions, tmp_path, change)


def test_a_model_that_was_trained_again_in_its_folder_needs_another(questions, tmp_path):
    model = shutil.copytree(folder("llava"), tmp_path / "model")
    make("self_sampled", questions, tmp_path / "out", f"model.path={model}")
    moved = model.rename(tmp_path / "moved")
    make("self_sampled", questions, tmp_path / "out", f"model.path={moved}")
    (weights,) = moved.glob("*.safetensors")
    save_file({k: v + 1 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="give output another folder"):
        make("self_sampled", questions, tmp_path / "out", f"model.path={moved}")


def test_parquet_holds_its_images(questions, tmp_path):
    output = make("mia_dpo", questions, tmp_path, "format=parquet")
    data = open_responses(ResponseConfig(path=str(output / "pairs.parquet")))
    assert "read as mia_dpo" in data.summary
    assert all(isinstance(image, bytes) for image in data.pair(0, 0).images)


def test_a_table_of_questions_is_read_and_its_images_get_files(questions, tmp_path):
    first = make("self_sampled", questions, tmp_path / "first", "format=parquet")
    output = make("self_sampled", first / "pairs.parquet", tmp_path / "second")
    row = json.loads((output / "pairs.jsonl").read_text().splitlines()[0])
    assert row["chosen"] == RESPONSES[0]
    assert (output / row["images"][0]).read_bytes() == questions.with_name("0.png").read_bytes()


def test_if_nothing_can_be_made_it_says_why(questions, tmp_path):
    with pytest.raises(DataError, match="nothing could be made of 5 questions"):
        make("mia_dpo", questions, tmp_path, "synthesis.max_response_characters=1")
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 5


def test_one_question_that_fails_costs_no_other(questions, tmp_path, monkeypatch):
    from diffalign.synthesis.self_sampled import OwnResponses

    own = OwnResponses._requests

    def fragile(method, question, context):
        if question.sample_id.endswith(":2"):
            raise RuntimeError("strange image")
        return own(method, question, context)

    monkeypatch.setattr(OwnResponses, "_requests", fragile)
    output = make("self_sampled", questions, tmp_path)
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").open()]
    assert {row["id"][-1]: row["reason"] for row in skipped} == {
        "2": "failed",
        "4": "corrupt image",
    }
    assert len((output / "pairs.jsonl").read_text().splitlines()) == 3


def test_questions_that_all_fail_stop_the_run(questions, tmp_path, monkeypatch):
    from diffalign.synthesis.self_sampled import OwnResponses

    def broken(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(OwnResponses, "_requests", broken)
    monkeypatch.setattr(MadePlan, "failures_in_a_row", 4)
    with pytest.raises(DiffalignError, match=r"4 questions in a row failed.*no kernel"):
        make("self_sampled", questions, tmp_path)


def test_the_command_line_makes_it_too(questions, tmp_path):
    result = CliRunner().invoke(app, ["synthesise", *settings("bdhs", questions, tmp_path)])
    assert result.exception is None
    assert (tmp_path / "pairs.jsonl").is_file()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("model.kind=sd15", "model.kind must be vlm"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("synthesis.kind=magic", "there is no 'magic'"),
    ],
)
def test_what_cannot_work_is_refused_in_words(questions, tmp_path, change, error):
    with pytest.raises(ConfigError, match=error):
        make("bdhs", questions, tmp_path, change)


def test_there_is_a_config_for_every_method():
    kinds = {components.kind_of(config.load(job.SynthesiseConfig, p).synthesis) for p in CONFIGS}
    assert kinds == set(METHODS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_says_how_it_is_run(path):
    config.load(job.SynthesiseConfig, path)
    assert f"diffalign synthesise configs/synthesis/{path.name}" in path.read_text()
