from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffalign.comparison.score import (
    find_images,
    read_column,
    score_images,
    scores_by_item,
)
from diffalign.errors import CacheError, DataError
from diffalign.generation.manifest import ManifestRow, append_rows, file_digest
from tests.comparison.brightness import Brightness


def fill(folder, levels: dict[str, int], *, prompts: dict[str, str] | None = None):
    """Grey images with caption files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, level in levels.items():
        Image.new("RGB", (4, 4), (level,) * 3).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text((prompts or {}).get(name, f"prompt {name}"))
    return folder


def run_scorer(folder, scorer=None, batch_size=4):
    images, problems = find_images(folder)
    column = folder / "scores" / "brightness.jsonl"
    problems += score_images(images, scorer or Brightness(), column, batch_size=batch_size)
    return {prompt: score for (_, prompt), score in read_column(column).items()}, problems


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_images_reach_the_scorer_in_its_own_range(tmp_path, batch_size):
    fill(tmp_path, {"black": 0, "grey": 51, "white": 255})
    scores, problems = run_scorer(tmp_path, batch_size=batch_size)
    assert scores == pytest.approx({"prompt black": 0.0, "prompt grey": 0.2, "prompt white": 1.0})
    assert problems == []


def test_images_of_different_sizes_are_scored_in_one_run(tmp_path):
    fill(tmp_path, {"a": 0, "b": 255})
    Image.new("RGB", (9, 5), (255,) * 3).save(tmp_path / "b.png")
    scores, problems = run_scorer(tmp_path)
    assert scores == {"prompt a": 0.0, "prompt b": 1.0}
    assert problems == []


def test_only_what_has_no_score_is_scored(tmp_path, monkeypatch):
    fill(tmp_path, {"a": 0, "b": 255})
    run_scorer(tmp_path)
    fill(tmp_path, {"c": 51})
    scored = []
    real = Brightness.score

    def counted(self, images, prompts, t=None):
        scored.extend(prompts)
        return real(self, images, prompts, t)

    monkeypatch.setattr(Brightness, "score", counted)
    scores, _ = run_scorer(tmp_path)
    assert scored == ["prompt c"]
    assert len(scores) == 3


def test_one_image_under_two_prompts_has_two_scores(tmp_path):
    fill(tmp_path, {"a": 10, "b": 10})
    scores, _ = run_scorer(tmp_path)
    assert set(scores) == {"prompt a", "prompt b"}


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("nan", "its score is nan"), ("raise", "ValueError: this prompt cannot be scored")],
)
def test_a_image_without_a_score_is_listed_and_the_others_keep_theirs(tmp_path, prompt, reason):
    fill(tmp_path, {"a": 0, "b": 255, "c": 51}, prompts={"b": prompt})
    scores, problems = run_scorer(tmp_path)
    assert set(scores) == {"prompt a", "prompt c"}
    assert [(problem.path.name, problem.reason) for problem in problems] == [("b.png", reason)]


def test_unreadable_and_uncaptioned_images_are_listed(tmp_path):
    fill(tmp_path, {"a": 0, "b": 255, "c": 51})
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "b.txt").unlink()
    scores, problems = run_scorer(tmp_path)
    reasons = {problem.path.name: problem.reason for problem in problems}
    assert set(scores) == {"prompt c"}
    assert "cannot be read" in reasons["a.png"]
    assert "there is no b.txt" in reasons["b.png"]


def test_a_scorer_of_the_wrong_shape_is_not_believed(tmp_path, monkeypatch):
    fill(tmp_path, {"a": 0, "b": 255})
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts, t=None: torch.zeros(3))
    scores, problems = run_scorer(tmp_path)
    assert scores == {}
    assert "must return 1 numbers, got shape (3,)" in problems[0].reason


def test_a_column_of_another_scorer_is_refused(tmp_path):
    fill(tmp_path, {"a": 0})
    run_scorer(tmp_path)
    with pytest.raises(CacheError, match=r"fingerprint brightness-1\.0, and this one has.*2\.0"):
        run_scorer(tmp_path, Brightness(scale=2.0))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds neither manifest\.jsonl nor an image"):
        find_images(tmp_path)


def manifest(folder, names, digest=None):
    rows = [
        ManifestRow(
            model=name,
            prompt=f"prompt {name}",
            prompt_id="p",
            seed=0,
            file=f"{name}.png",
            sha256=digest or file_digest((folder / f"{name}.png").read_bytes()),
            fingerprint="f",
            sampler={},
        )
        for name in names
    ]
    append_rows(folder, rows)


def test_a_manifest_names_images_and_prompts(tmp_path):
    fill(tmp_path, {"a": 0, "b": 255})
    manifest(tmp_path, "ab")
    run_scorer(tmp_path)
    column = tmp_path / "scores" / "brightness.jsonl"
    assert scores_by_item(tmp_path, column) == {("a", "p", 0): 0.0, ("b", "p", 0): 1.0}


def test_a_image_that_changed_since_it_was_listed_is_not_scored(tmp_path):
    fill(tmp_path, {"a": 0})
    manifest(tmp_path, "a", digest="0" * 64)
    scores, problems = run_scorer(tmp_path)
    assert scores == {}
    assert "not the image that the manifest lists" in problems[0].reason
