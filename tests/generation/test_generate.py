from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign import blocks, sessions
from diffalign.errors import CacheError, DiffalignError
from diffalign.generation import generate as generation
from diffalign.generation.generate import (
    ImagesPlan,
    ModelEntry,
    plan_batches,
)
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.generation.prompts import Prompt
from diffalign.imaging.image_files import encode_png
from diffalign.seeding import cpu_generator, derive_seed

BASE = ModelEntry("base", "f0", {"steps": 3, "scheduler": None})
PROMPTS = [Prompt(text) for text in ("one", "two", "three")]


class Painter:
    """Colours that depend on prompt, seed, and, like rounding does, on the place in the batch."""

    def __init__(self, *, stop_after: int | None = None, bad: str = "", blank: str = "") -> None:
        self.stop_after, self.bad, self.blank = stop_after, bad, blank
        self.generated: list[str] = []

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if self.stop_after is not None and len(self.generated) >= self.stop_after:
            raise KeyboardInterrupt
        if self.bad in texts and self.bad:
            raise ValueError("cannot be generated")
        self.generated += texts
        images = [
            torch.rand(3, 8, 8, generator=cpu_generator(derive_seed(text, seed, place)))
            for place, (text, seed) in enumerate(zip(texts, seeds, strict=True))
        ]
        for text, image in zip(texts, images, strict=True):
            if text == self.blank:
                image[0, 0, 0] = torch.nan
        return torch.stack(images) * 2 - 1


def generate(
    folder: Path,
    painter: Painter,
    *,
    entry: ModelEntry = BASE,
    prompts: Sequence[Prompt] = PROMPTS,
) -> list[Mapping[str, Any]]:
    """Generate what is missing; gives what failed."""
    batches = plan_batches(prompts, (0, 1, 2), batch_size=4)
    session = sessions.complete(
        lambda: ImagesPlan(folder, [entry], batches, lambda name, device: painter), blocks.here()
    )
    return session.failed


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_whole_plan_is_generated_prompt_by_prompt(tmp_path):
    painter = Painter()
    assert generate(tmp_path, painter) == []
    rows = read_manifest(tmp_path)
    assert painter.generated == ["one"] * 3 + ["two"] * 3 + ["three"] * 3
    assert [row.seed for row in rows] == [0, 1, 2] * 3
    assert rows[0].file == f"images/base/{PROMPTS[0].prompt_id}-0.png"
    with Image.open(tmp_path / rows[0].file) as image:
        assert (image.size, image.mode) == ((8, 8), "RGB")


def test_the_manifest_files_an_image_under_the_categories_of_its_prompt(tmp_path):
    filed = Prompt("one", {"challenge": "Quantity"})
    generate(tmp_path, Painter(), prompts=[filed, Prompt("two")])
    assert [dict(row.categories) for row in read_manifest(tmp_path)][2:4] == [
        {"challenge": "Quantity"},
        {},
    ]


@pytest.mark.parametrize("stop_after", [0, 1, 5, 8])
def test_an_interrupted_run_ends_with_the_files_of_an_uninterrupted_one(tmp_path, stop_after):
    generate(tmp_path / "whole", Painter())
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "resumed", Painter(stop_after=stop_after))
    second = Painter()
    generate(tmp_path / "resumed", second)

    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert len(second.generated) == 9 - -(-stop_after // 4) * 4


@pytest.mark.parametrize("written", [1, 3, 6])
def test_killed_between_two_files_the_run_ends_with_the_same_files(tmp_path, monkeypatch, written):
    generate(tmp_path / "whole", Painter())
    real, count = generation.write_atomically, 0

    def until(path: Path, content: bytes) -> None:
        nonlocal count
        if count == written:
            raise KeyboardInterrupt
        count += 1
        real(path, content)

    monkeypatch.setattr(generation, "write_atomically", until)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "resumed", Painter())
    monkeypatch.undo()
    generate(tmp_path / "resumed", Painter())

    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_a_finished_folder_generates_nothing(tmp_path):
    generate(tmp_path, Painter())
    again = Painter()
    generate(tmp_path, again)
    assert again.generated == []


def test_a_deleted_image_is_generated_again_as_it_was(tmp_path):
    generate(tmp_path, Painter())
    before = contents(tmp_path / "images")
    file = next((tmp_path / "images").rglob("two-*-1.png"))
    file.unlink()
    generate(tmp_path, Painter())
    assert contents(tmp_path / "images") == before


def test_further_prompts_are_added_and_leave_what_is_there_alone(tmp_path):
    generate(tmp_path, Painter())
    before = contents(tmp_path / "images")
    generate(tmp_path, Painter(), prompts=[Prompt("zero"), *PROMPTS])
    assert before.items() <= contents(tmp_path / "images").items()
    assert (tmp_path / MANIFEST).read_text().count("\n") == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": {"steps": 4, "scheduler": None}}, r"with sampler\.steps 3.*asks for 4"),
        ({"sampler": {"steps": 3, "scheduler": "DDIM"}}, r"with sampler\.scheduler None"),
        ({"fingerprint": "f1"}, r"with models\.base of fingerprint f0.*asks for f1"),
    ],
)
def test_a_folder_generated_differently_is_refused_by_the_name_of_the_setting(
    tmp_path, change, message
):
    generate(tmp_path, Painter())
    with pytest.raises(CacheError, match=message):
        generate(tmp_path, Painter(), entry=dataclasses.replace(BASE, **change))


def test_a_prompt_that_cannot_be_generated_costs_only_its_own_images(tmp_path):
    failures = generate(tmp_path, Painter(bad="two"))
    assert [(f["prompt"], f["seed"]) for f in failures] == [("two", s) for s in range(3)]
    assert failures[0]["reason"] == "ValueError: cannot be generated"
    assert {row.prompt for row in read_manifest(tmp_path)} == {"one", "three"}
    assert generate(tmp_path, Painter()) == []
    assert len(read_manifest(tmp_path)) == 9


def test_values_that_are_not_finite_are_no_image(tmp_path):
    failures = generate(tmp_path, Painter(blank="three"))
    assert [failure["reason"] for failure in failures] == [
        "the model generated values that are not finite"
    ] * 3
    assert len(read_manifest(tmp_path)) == 6


def test_a_image_that_cannot_be_written_costs_only_itself(tmp_path, monkeypatch):
    real = generation.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name.startswith("two-") and path.name.endswith("-1.png"):
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(generation, "write_atomically", full)
    (failure,) = generate(tmp_path, Painter())
    assert (failure["prompt"], failure["seed"]) == ("two", 1)
    assert "No space left" in failure["reason"]
    assert len(read_manifest(tmp_path)) == 8


def test_a_run_in_which_everything_fails_stops(tmp_path):
    class Broken(Painter):
        def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            self.generated += texts
            raise RuntimeError("out of memory")

    painter = Broken()
    prompts = [Prompt(str(i)) for i in range(100)]
    with pytest.raises(DiffalignError, match=r"16 images in a row failed.*out of memory"):
        generate(tmp_path, painter, prompts=prompts)
    assert set(painter.generated) <= {str(i) for i in range(6)}


def test_levels_of_a_png_are_rounded_not_cut():
    image = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0]).expand(3, 1, 5)
    with Image.open(io.BytesIO(encode_png(image))) as stored:
        assert [stored.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 128, 255, 255]
