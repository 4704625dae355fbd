"""Encodings computed in advance: batches, losses and weights as if the encoders had run."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from diffalign import config
from diffalign.jobs import precompute, train
from diffalign.training import build, encodings
from diffalign.training.config import RunConfig
from tests.layouts import encoded, make_pairs, pickapic_rows, solid_image, write_rows
from tests.runs import figures, forget_accelerate
from tests.tiny_models import write_sd3, write_sd15, write_sdxl

WRITERS = {"sd15": write_sd15, "sdxl": write_sdxl, "sd3": write_sd3}
SIZES = ((40, 32), (32, 48), (64, 32), (32, 32))
RUN = """
output: {output}
model: {{kind: {kind}, path: {model}, lora: {{rank: 2}}}}
data: {{path: {data}, resolution: 32, workers: 0, max_bad_fraction: 0.3}}
likelihood: {{kind: denoising}}
objective: {{kind: dpo, beta: 10}}
optimizer: {{lr: 1.0e-3, eps: 1.0e-2}}
training: {{optimizer_steps: 4, samples_per_device: 2, log_every: 1}}
"""
QUICK = "sdxl", "lora={rank: 2}"
RICH = (
    "data.crop=random",
    "data.crops=2",
    "data.flip=true",
    "data.buckets=true",
    "data.caption_dropout=0.4",
    "data.holdout=0.4",
    "data.visits=2",
)


def write_data(folder: Path) -> Path:
    """Eighteen rows: images of four shapes, three captions that others share, two ties, one image
    that is cut off and one caption that is missing."""
    pairs = [make_pairs(1, size=SIZES[i % 4])[0] for i in range(18)]
    pairs = [
        dataclasses.replace(
            pair,
            caption=f"a thing, number {i // 2 * 2}",
            rejected=encoded(solid_image((i, 9 * i, 200), size=SIZES[i % 3])),
        )
        for i, pair in enumerate(pairs)
    ]
    rows = [row | {"num_example_per_prompt": 2} for row in pickapic_rows(pairs)]
    for tie in (4, 9):
        rows[tie] |= {"label_0": 0.5, "label_1": 0.5}
    rows[7]["jpg_1"] = rows[7]["jpg_1"][:60]
    rows[12]["caption"] = " "
    write_rows(folder / "train-00000-of-00001.parquet", rows)
    return folder


def write_all(folder: Path) -> Path:
    """The data, and a tiny model of each kind."""
    write_data(folder / "data")
    for kind, write in WRITERS.items():
        write(folder / kind)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("encodings"))


def run_of(place: Path, output: Path, *overrides: str, kind: str = "sdxl") -> RunConfig:
    text = RUN.format(output=output, kind=kind, model=place / kind, data=place / "data")
    output.mkdir(parents=True, exist_ok=True)
    (output / "CONFIG.yaml").write_text(text)
    return config.load(RunConfig, output / "CONFIG.yaml", list(overrides))


def cached(run: RunConfig, cache: Path) -> RunConfig:
    model = dataclasses.replace(run.model, encoders="cached")
    return dataclasses.replace(run, model=model, encodings_cache=cache)


def precomputed(run: RunConfig) -> RunConfig:
    """The run as it goes on after its encodings were computed."""
    writer = precompute.run(run)
    forget_accelerate()
    return cached(run, writer.folder)


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def assert_same(live, known, model):
    """Two batches agree in every field, their images by what the model makes of them."""
    assert known.encodings is not None and not known.images
    for field in dataclasses.fields(live):
        if field.name not in ("images", "encodings"):
            assert plain(getattr(live, field.name)) == plain(getattr(known, field.name)), field.name
    assert live.views == known.views and live.size == known.size
    torch.testing.assert_close(model.latents(live), model.latents(known), atol=1e-6, rtol=1e-5)
    ours, theirs = (flat(model.conditioning(batch)) for batch in (live, known))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def rich_of(kind: str) -> tuple[str, ...]:
    """All at once; the patches of sd3 do not divide the buckets of so small images."""
    return tuple(each for each in RICH if kind != "sd3" or each != "data.buckets=true")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sdxl", ("data.flip=false", "data.caption_dropout=0.0")),
        ("sdxl", ("data.flip=true", "data.caption_dropout=0.5", "model.posterior=mean")),
        ("sdxl", ("data.crop=random", "data.crops=3", "data.flip=false", "model.vae_dtype=bf16")),
        ("sdxl", ("data.ties=keep", "data.weighting=per_prompt", "data.flip=true")),
        ("sdxl", ("objective={kind: sft}", "data.limit=9")),
        *((kind, rich_of(kind)) for kind in WRITERS),
    ],
)
def test_batches_from_encodings_are_those_that_the_encoders_would_have_made(
    place, tmp_path, kind, settings, monkeypatch
):
    if "data.ties=keep" in settings:  # no objective of denoising errors takes them so far
        monkeypatch.setattr(precompute, "check", encodings.check_encodable)
    live = run_of(place, tmp_path / "run", *settings, kind=kind)
    known = precomputed(live)
    sources = [build.build_source(run, Console(quiet=True), skipped=None) for run in (live, known)]
    model = live.model.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    batches = zip(*(islice(source, 18) for source in sources), strict=True)
    for ours, theirs in batches:
        assert_same(ours, theirs, model)
    assert sources[0].state_dict() == sources[1].state_dict()
    assert sources[0].skipped_counts == sources[1].skipped_counts != {}
    assert sources[0].fingerprint() == sources[1].fingerprint()
    assert (sources[0].held_out is None) == ("data.holdout=0.4" not in settings)
    if sources[0].held_out is not None:
        kept = [list(s.held_out.share_of_rank(pairs=99, visits=2)) for s in sources]
        assert len(kept[0]) > 1
        for ours, theirs in zip(*kept, strict=True):
            assert_same(ours, theirs, model)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, marks=[] if (kind, shape) == QUICK else pytest.mark.slow)
        for kind in WRITERS
        for shape in ("lora={rank: 2}", "lora=null")
    ],
)
def test_a_run_from_encodings_equals_one_that_encodes(place, tmp_path, kind, shape):
    more = (f"model.{shape}", *rich_of(kind), "evaluation.every=2")
    live = run_of(place, tmp_path / "live", *more, kind=kind)
    known = dataclasses.replace(
        precomputed(dataclasses.replace(live, encodings_cache=tmp_path / "cache")),
        output=tmp_path / "known",
    )
    for run in (live, known):
        train.run(run)
        forget_accelerate()
    rows = list(zip(figures(live.output), figures(known.output), strict=True))
    assert len(rows) >= 4
    for ours, theirs in rows:
        assert ours == pytest.approx(theirs, abs=2e-5, rel=1e-4)  # rewards are 10 errors
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), abs=1e-6)
    ours, theirs = (weights(run.output / "final") for run in (live, known))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{file.name}/{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }
