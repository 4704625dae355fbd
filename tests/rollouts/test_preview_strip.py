from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.rollouts.preview_strip import PreviewStrip


class Prompts:
    """What a preview strip asks of a collector; other rounds would name other prompts."""

    def __init__(self, *prompts: str) -> None:
        self.prompts = prompts

    def preview_prompts(self):
        return list(self.prompts)

    def preview_process(self):
        return ReverseProcess(steps=2, guidance=1.0)


@pytest.fixture
def model(tiny_sd15):
    return SD15(path=str(tiny_sd15)).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )


def frames(folder):
    return sorted({path.stem.split("-")[1] for path in (folder / "preview_strip").glob("*.png")})


def columns(folder):
    return Image.open(folder / "preview_strip.png").width


def test_the_same_policy_generates_the_same_frames_and_another_one_others(model, tmp_path):
    preview_strip = PreviewStrip(tmp_path, Prompts("a dog", "a cat"), run_seed=0)
    for number in (0, 1):
        preview_strip.add(number, model)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.mul_(1.5)
    preview_strip.add(2, model)
    first, second, third = (
        (tmp_path / f"preview_strip/round-000{number}-0.png").read_bytes() for number in range(3)
    )
    assert first == second != third
    assert (tmp_path / "preview_strip/round-0000-1.png").read_bytes() != first


def test_prompts_are_decided_once_a_run(model, tmp_path):
    PreviewStrip(tmp_path, Prompts("a dog"), run_seed=0).add(0, model)
    PreviewStrip(tmp_path, Prompts("a cat"), run_seed=0).add(1, model)
    first, second = (
        (tmp_path / f"preview_strip/round-000{n}-0.png").read_bytes() for n in range(2)
    )
    assert first == second


def test_late_rounds_are_generated_ever_more_rarely_and_the_last_always(model, tmp_path):
    preview_strip = PreviewStrip(tmp_path, Prompts("a dog"), run_seed=0)
    for number in (7, 8, 9, 15, 16, 17):
        preview_strip.add(number, model)
    assert frames(tmp_path) == ["0007", "0008", "0016"]
    before = columns(tmp_path)
    preview_strip.add(19, model, last=True)
    assert frames(tmp_path)[-1] == "0019"
    assert columns(tmp_path) > before


def test_frames_of_rounds_to_come_are_not_shown(model, tmp_path):
    preview_strip = PreviewStrip(tmp_path, Prompts("a dog"), run_seed=0)
    for number in range(3):
        preview_strip.add(number, model)
    whole = columns(tmp_path)
    preview_strip.add(1, model)  # a run that went back to a checkpoint
    assert columns(tmp_path) < whole


def test_without_prompts_nothing_is_generated(model, tmp_path):
    PreviewStrip(tmp_path, Prompts(), run_seed=0).add(0, model)
    assert not (tmp_path / "preview_strip.png").exists()
