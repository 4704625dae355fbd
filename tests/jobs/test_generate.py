"""The generate job whole: from a config to images, interrupted, resumed, refused."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from diffalign import config
from diffalign.errors import CacheError, ConfigError, DiffalignError
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.jobs import generate
from tests.processes import ended, has_files, started


@pytest.fixture
def settings(tiny_sdxl, tiny_sdxl_v, tmp_path) -> list[str]:
    """Overrides: two models, four prompts, two seeds."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n[bold]an owl[/]\na bat\n")
    return [
        f"models.base={tiny_sdxl}",
        f"models.other.path={tiny_sdxl_v}",
        f"prompts={prompts}",
        "seeds=2",
        "sampler.steps=1",
        "batch_size=3",
    ]


def run(settings: list[str], output: Path, *more: str) -> None:
    generate.run(config.load(generate.GenerateConfig, None, [*settings, f"output={output}", *more]))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.suffix in (".png", ".jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_images_manifest_grid_and_next_command(settings, tmp_path, capsys):
    out = tmp_path / "out[a]"
    run(settings, out, "grid=true", "grid_columns=[other,base]", "grid_rows=3")

    rows = read_manifest(out)
    assert [row.model for row in rows] == ["base"] * 8 + ["other"] * 8
    assert len(list((out / "images").rglob("*.png"))) == 16
    assert all((out / row.file).is_file() for row in rows)
    assert rows[0].sampler["steps"] == 1
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 320
    said = capsys.readouterr().out
    assert "4 prompts x 2 seeds x 2 models" in said
    assert f"diffalign score 'images={out}' scorer.kind=pickscore\n" in said
    assert f"images in {out / 'images'}, list {out / 'manifest.jsonl'}" in said


def test_the_written_config_repeats_the_run(settings, tmp_path):
    out = tmp_path / "out"
    run(settings, out)
    before = contents(out)
    again = config.load(generate.GenerateConfig, out / "generate.yaml", ["sampler.steps=1"])
    generate.run(again)
    assert contents(out) == before


@pytest.mark.multiprocess
def test_killed_and_resumed_equals_uninterrupted(settings, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    slow = [*settings, "batch_size=1", "sampler.steps=2"]
    log = tmp_path / "log"
    moment = partial(has_files, killed / ".blocks", 3)
    with started("generate", *slow, f"output={killed}", log=log, moment=moment) as process:
        assert ended(process, log) == -signal.SIGKILL, log.read_text()
    assert 3 <= len(list((killed / ".blocks").glob("*.jsonl"))) < 16
    assert not (killed / MANIFEST).exists()

    run(slow, killed)
    run(slow, whole)
    assert contents(killed) == contents(whole)


def test_other_settings_in_the_same_folder_are_refused_before_anything_is_loaded(
    settings, tmp_path, monkeypatch
):
    run(settings, tmp_path / "out")
    monkeypatch.setattr(generate.TextToImage, "open", None)
    with pytest.raises(CacheError, match=r"sampler\.guidance 5\.0.*asks for 2\.0"):
        run(settings, tmp_path / "out", "sampler.guidance=2")


def test_a_further_model_joins_a_finished_folder(settings, tmp_path):
    first = [item for item in settings if "other" not in item]
    run(first, tmp_path / "out")
    before = contents(tmp_path / "out" / "images" / "base")
    run(settings, tmp_path / "out")
    assert contents(tmp_path / "out" / "images" / "base") == before
    assert len(read_manifest(tmp_path / "out")) == 16


def test_failed_images_are_named_at_the_end_and_the_others_stay(settings, tmp_path, monkeypatch):
    real = generate.TextToImage.generate

    def fragile(self, texts, seeds):
        if "a dog" in texts:
            raise ValueError("no dogs")
        return real(self, texts, seeds)

    monkeypatch.setattr(generate.TextToImage, "generate", fragile)
    with pytest.raises(DiffalignError, match=r"(?s)4 images failed.*base: 'a dog', seed 0.*no do"):
        run(settings, tmp_path / "out", "grid=true")
    assert len(read_manifest(tmp_path / "out")) == 12
    assert (tmp_path / "out" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models={}", "models must name at least one model"),
        ("models.a/b=x", "the name 'a/b' becomes a folder"),
        ("seeds=0", "seeds must be at least 1"),
        ("seeds=[1,1]", "seeds repeat a seed"),
        ("dtype=float16", "auto, float32, bf16, fp16"),
        ("batch_size=0", "must be at least 1"),
        ("grid_columns=[nobody]", "'nobody', which is none of the models"),
        ("sampler.step=3", "Did you mean sampler.steps"),
    ],
)
def test_impossible_configs_are_refused(settings, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run(settings, tmp_path / "out", override)


def test_seeds_may_be_listed(settings, tmp_path):
    run(settings, tmp_path / "out", "seeds=[7, 3]")
    assert {row.seed for row in read_manifest(tmp_path / "out")} == {3, 7}
