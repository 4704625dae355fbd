from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from diffalign import cli, config

SMOKE = Path(__file__).parents[1] / "configs/smoke/diffusion_dpo_sdxl.yaml"


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and what was said on both streams, in one line."""
    monkeypatch.setattr(sys, "argv", ["diffalign", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    return exit_info.value.code or 0, " ".join((captured.out + captured.err).split())


def cpu_seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def test_help_is_instant_and_names_every_job():
    before = cpu_seconds_of_children()  # not by the clock: the machine may have other work
    result = subprocess.run(
        [sys.executable, "-m", "diffalign", "--help"], capture_output=True, text=True, check=True
    )
    assert cpu_seconds_of_children() - before < 4.0  # 0.6 measured; with torch 6
    jobs = ("train", "precompute", "generate", "score", "compare", "check", "demo", "env")
    for job in (*jobs, "best-checkpoint", "convert"):
        assert f" {job} " in result.stdout


def test_help_of_every_command_ends_with_an_example_that_is_one(monkeypatch, capsys):
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name in known:
        example = cli.example([name])
        assert example.startswith(f"diffalign {name}"), name
        status, said = run(monkeypatch, capsys, name, "--help")
        assert status == 0 and said.endswith(f"Example: {example}"), name
    assert cli.example([]) == cli.example(["trian"]) == ""


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        (["generate"], "models, prompts, output must be given"),
        (["score", "images=runs/look"], "scorer must be given"),
        (["prefer"], "output must be given"),
        (["evaluate", "chair", "captions=captions.jsonl"], "objects, synonyms must be given"),
        (["train"], "train needs a config file"),
    ],
)
def test_who_leaves_out_what_is_needed_is_shown_an_example(words, lacks, monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, *words)
    assert status == 1 and lacks in said
    assert said.endswith(f"For example: {cli.example(words)}")


def test_who_stops_a_job_is_told_how_it_goes_on(monkeypatch, capsys):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", stopped)
    status, said = run(monkeypatch, capsys, "score")
    assert status == 130 and said.startswith("Stopped by Ctrl-C. What is finished stays;")
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, capsys, "score") == (130, "")  # one of many processes tells it


def test_other_mistakes_are_shown_none(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "generate", "models.base=nothing", "seds=3")
    assert status == 1 and "Did you mean seeds?" in said and "For example" not in said


def test_help_of_evaluate_lists_the_folders_of_benchmarks(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "evaluate", "--help")
    folders = Path(cli.__file__).parent.glob("benchmarks/*/config.py")
    assert status == 0 and all(file.parent.name in said for file in folders)


@pytest.mark.parametrize(
    "job",
    [
        "train",
        "precompute",
        "generate",
        "score",
        "prefer",
        "compare",
        "best-checkpoint",
        "check",
        "convert",
        "evaluate",
        "demo",
        "env",
    ],
)
def test_help_of_a_job_loads_no_library(job):
    code = (
        "import sys\n"
        f"sys.argv = ['diffalign', '{job}', '--help']\n"
        "from diffalign.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().endswith("[]")


def changed(tmp_path: Path, **sections) -> str:
    """The smoke config with keys changed, as a file."""
    tree = yaml.safe_load(SMOKE.read_text())
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_an_unknown_key_is_refused_with_the_nearest_spelling(monkeypatch, capsys, tmp_path):
    status, said = run(monkeypatch, capsys, "train", changed(tmp_path, objective={"betta": 1.0}))
    assert status == 1
    assert "run.yaml: objective.betta is not a field of DPO (fields: beta)" in said
    assert "Did you mean objective.beta?" in said


def test_a_beta_that_is_no_number_is_refused(monkeypatch, capsys, tmp_path):
    status, said = run(monkeypatch, capsys, "train", changed(tmp_path, objective={"beta": "fast"}))
    assert status == 1
    assert "run.yaml: objective.beta must be a finite number, got 'fast'" in said


def test_a_missing_config_is_said(monkeypatch, capsys, tmp_path):
    status, said = run(monkeypatch, capsys, "train", str(tmp_path / "none.yaml"))
    assert status == 1 and "there is no such config file" in said


def test_a_model_folder_without_a_unet_is_refused(monkeypatch, capsys, tmp_path, tiny_sdxl):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_sdxl, model)
    shutil.rmtree(model / "unet")
    config = changed(tmp_path, model={"path": str(model)})
    status, said = run(monkeypatch, capsys, "train", config, "--dry-run")
    assert status == 1
    assert "ModelError" in said and "unet" in said and str(model) in said.replace(" ", "")


def test_missing_data_is_refused(monkeypatch, capsys, tmp_path, tiny_sdxl):
    config = changed(
        tmp_path, model={"path": str(tiny_sdxl)}, data={"path": str(tmp_path / "pairs.parquet")}
    )
    status, said = run(monkeypatch, capsys, "train", config, "--dry-run")
    assert status == 1
    assert "DataError" in said and "pairs.parquet" in said


def test_parquet_without_labels_is_refused_with_what_was_found(
    monkeypatch, capsys, tmp_path, tiny_sdxl
):
    from tests.layouts import make_pairs, pickapic_rows, write_rows

    rows = pickapic_rows(make_pairs(3))
    for row in rows:
        del row["label_0"], row["label_1"]
    file = write_rows(tmp_path / "pairs.parquet", rows)
    config = changed(tmp_path, model={"path": str(tiny_sdxl)}, data={"path": str(file)})
    status, said = run(monkeypatch, capsys, "train", config, "--dry-run")
    assert status == 1
    assert "DataError" in said and "label_0" in said and "jpg_0" in said


def test_train_without_a_config_says_where_to_find_one(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "train")
    assert status == 1 and "train needs a config file; ready-made ones lie in configs/" in said


def test_the_processes_option_is_not_passed_to_the_processes():
    given = ["train", "x.yaml", "--processes", "2", "a=b", "--processes=2", "--resume"]
    assert cli._without_processes(given) == ["train", "x.yaml", "a=b", "--resume"]


def test_env_names_versions_and_devices(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "env")
    assert status == 0
    assert "torch" in said and "devices" in said
