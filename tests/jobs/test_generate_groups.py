"""Groups for people to rank: on disk, resumed, refused, and drawn by whatever was trained."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffalign import config
from diffalign.errors import CacheError, ConfigError, DiffalignError
from diffalign.jobs import generate
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.lora import LoraSettings
from diffalign.rollouts import groups
from diffalign.rollouts.groups import GROUPS, Group, read_groups
from tests.processes import ended, has_lines, started


@pytest.fixture
def settings(tiny_sd15, tmp_path):
    """Overrides: three groups of three images, two groups at once."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nan owl\n")
    return [
        f"models.base={tiny_sd15}",
        f"prompts={prompts}",
        "trajectories.images_per_group=3",
        "trajectories.process={steps: 2, guidance: 2}",
        "batch_size=6",
    ]


def run(settings: list[str], output: Path, *more: str) -> list[Group]:
    generate.run(config.load(generate.GenerateConfig, None, [*settings, f"output={output}", *more]))
    return read_groups(output)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.suffix and path.suffix != ".yaml"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def latents(folder: Path, group: Group) -> torch.Tensor:
    """Shape [steps + 1, images, channels, h, w]."""
    with safe_open(folder / group.trajectories, framework="pt") as file:
        return file.get_tensor("latents").unflatten(0, (-1, len(group.images)))


def test_a_group_is_images_and_trajectories_from_one_noise(settings, tmp_path, capsys):
    out = tmp_path / "out"
    found = run(settings, out, "seeds=2", "grid=true")
    assert [(group.prompt, group.seed) for group in found] == [
        (prompt, seed) for prompt in ("a cat", "a dog", "an owl") for seed in (0, 1)
    ]
    assert len({group.group for group in found}) == 6
    starts = set()
    for group in found:
        drawn = latents(out, group)
        assert drawn.shape == (3, 3, 4, 4, 4)
        assert torch.equal(drawn[0, 0], drawn[0, 1]) and torch.equal(drawn[0, 0], drawn[0, 2])
        assert not torch.allclose(drawn[1, 0], drawn[1, 1], atol=0.1)
        starts.add(drawn[0, 0].numpy().tobytes())
        pictures = [Image.open(out / file).tobytes() for file in group.images]
        assert len(set(pictures)) == 3
    assert len(starts) == 6
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 3 * 256
    said = capsys.readouterr().out
    assert "6 groups of 3 images (0 already there), 2 steps, guidance 2, eta 1" in said
    assert f'{{"group": "{found[0].group}", "ranking": ' in said
    assert f"rollouts.trajectories={out}" in said


def test_a_file_of_trajectories_says_what_drew_it(settings, tmp_path):
    (first, *_) = run(settings, tmp_path / "out", "seeds=[5]")
    with safe_open(tmp_path / "out" / first.trajectories, framework="pt") as file:
        header = json.loads(file.metadata()["diffalign"])
        assert file.get_tensor("log_likelihoods").shape == (2, 3)
    origin = header["origin"]
    assert (origin["steps"], origin["guidance"], origin["eta"]) == (2, 2.0, 1.0)
    assert (origin["prediction"], origin["timestep_spacing"], origin["steps_offset"]) == (
        "epsilon",
        "leading",
        1,
    )
    assert len(origin["policy"]) == len(origin["schedule"]) == 16
    assert (header["prompt"], header["seed"], header["dtype"]) == ("a cat", 5, "float32")


def test_the_written_config_repeats_the_groups(settings, tmp_path):
    out = tmp_path / "out"
    run(settings, out)
    before = contents(out)
    generate.run(config.load(generate.GenerateConfig, out / "generate.yaml"))
    assert contents(out) == before


@pytest.mark.multiprocess
def test_killed_and_resumed_equals_uninterrupted(settings, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    slow = [*settings, "batch_size=3", "seeds=4"]
    log = tmp_path / "log"
    moment = partial(has_lines, killed / GROUPS, 2)
    with started("generate", *slow, f"output={killed}", log=log, moment=moment) as process:
        assert ended(process, log) == -signal.SIGKILL, log.read_text()
    assert len(read_groups(killed)) < 12
    run(slow, killed)
    run(slow, whole)
    unfinished = {name for name in contents(killed) if name.endswith(".part")}
    assert {n: c for n, c in contents(killed).items() if n not in unfinished} == contents(whole)


def test_a_missing_file_of_a_group_is_drawn_again_as_it_was(settings, tmp_path):
    out = tmp_path / "out"
    found = run(settings, out)
    before = contents(out)
    (out / found[1].images[2]).unlink()
    (out / found[2].trajectories).unlink()
    assert {group.group for group in run(settings, out)} == {group.group for group in found}
    after = contents(out)
    lines = before.pop(GROUPS).splitlines()
    assert after.pop(GROUPS).splitlines() == [*lines, *lines[1:]]  # the first one stayed
    assert after == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trajectories.process.guidance=3", r"written with guidance 2\.0, .* asks for 3\.0"),
        ("trajectories.process.steps=3", "written with steps 2, .* asks for 3"),
        ("trajectories.images_per_group=2", "written with images_per_group 3, .* asks for 2"),
        ("trajectories.size=[16,16]", r"written with size None, .* asks for \(16, 16\)"),
        ("dtype=bf16", "written with dtype 'float32', .* asks for 'bf16'"),
    ],
)
def test_groups_drawn_otherwise_are_refused_before_anything_is_loaded(
    settings, tmp_path, monkeypatch, override, message
):
    run(settings, tmp_path / "out")
    monkeypatch.setattr(SD15, "load", None)
    with pytest.raises(CacheError, match=message):
        run(settings, tmp_path / "out", override)


def test_groups_of_another_model_are_refused(settings, tiny_sdxl, tmp_path):
    run(settings, tmp_path / "out")
    with pytest.raises(CacheError, match="was written with policy "):
        run(settings, tmp_path / "out", f"models.base={tiny_sdxl}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trajectories.images_per_group=1", "one image has none to be compared with"),
        ("trajectories.process.eta=0", "trajectories.process: eta must be above 0"),
        ("trajectories.size=[30,32]", "multiples of 8"),
        ("models.other=elsewhere", "models names 2: base, other"),
        ("sampler.steps=3", "sampler and trajectories exclude each other"),
    ],
)
def test_impossible_configs_are_refused(settings, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run(settings, tmp_path / "out", override)


def test_a_group_that_broke_is_named_and_the_others_stay(settings, tmp_path, monkeypatch):
    draw = groups.sample_groups

    def breaking(*arguments, **options):
        trajectories = draw(*arguments, **options)
        if trajectories.latents.shape[1] == 6:  # the first batch: a cat, a dog
            trajectories.latents[1, 4] = torch.nan
        return trajectories

    monkeypatch.setattr(groups, "sample_groups", breaking)
    with pytest.raises(DiffalignError, match=r"(?s)1 groups failed.*'a dog', seed 0: the model dr"):
        run(settings, tmp_path / "out")
    assert [group.prompt for group in read_groups(tmp_path / "out")] == ["a cat", "an owl"]


@pytest.fixture
def trained_run(tiny_sd15, tmp_path):
    """Makes the folder of a finished run whose policy is far from its base."""

    def make(lora: LoraSettings | None) -> Path:
        settings = SD15(path=str(tiny_sd15), lora=lora)
        model = settings.load(
            device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in model.trained_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.export(tmp_path / "run/final")
        (tmp_path / "run/config.yaml").write_text(f"model: {{path: {tiny_sd15}}}\n")
        return tmp_path / "run"

    return make


@pytest.mark.parametrize("lora", [LoraSettings(rank=2, alpha=3), None], ids=["adapter", "full"])
def test_a_finished_run_draws_with_what_it_trained(settings, trained_run, tmp_path, lora):
    base = run(settings, tmp_path / "base")
    ours = run(settings, tmp_path / "ours", f"models.base={trained_run(lora)}")
    assert [group.group for group in ours] == [group.group for group in base]
    before, after = latents(tmp_path / "base", base[0]), latents(tmp_path / "ours", ours[0])
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-2)
