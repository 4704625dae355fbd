"""`diffalign plan`: what it says, and what it counts of the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.jobs import plan
from diffalign.training.config import RunConfig

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/playground/diffusion_dpo.yaml"
SMALL = ("data.limit=5", "data.flip=false", "data.visits=3", "training.samples_per_device=1")


def counted(capsys, *overrides: str) -> dict:
    plan.run(
        lambda further: config.load(RunConfig, CONFIG, [*SMALL, *overrides, *further]),
        gpu="24gb",
        as_json=True,
    )
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_the_disk_is_counted_before_anything_was_encoded(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = counted(capsys, "model.encoders=cached")
    vae = json.loads((ROOT / "assets/playground/sdxl/vae/config.json").read_text())
    side = 64 // 2 ** (len(vae["block_out_channels"]) - 1)
    image = 2 * vae["latent_channels"] * side * side * 4  # mean and deviation in float32
    disk = found["precompute"]
    assert disk["image"] == image
    assert disk["reference"] == 3 * 5 * 2 * 4
    captions = disk["encodings"] - 5 * 2 * image
    assert captions % disk["caption"] == 0
    assert 2 <= captions // disk["caption"] <= 6  # of five pairs, and the empty one
    assert disk["images"] == 5 * 2 and disk["visits"] == 5 * 2 * 3
    work = disk["images"] * disk["work"]["image"] + disk["visits"] * disk["work"]["reference"]
    work += disk["captions"] * disk["work"]["caption"]
    assert disk["seconds"] == pytest.approx(work / 50e12)
    assert found["fits"] and found["total_bytes"] == sum(found["parts_bytes"].values())


def test_a_card_is_named_by_its_size():
    with pytest.raises(ConfigError, match="--gpu is 'big': give the memory of a card"):
        plan.run(lambda _: config.load(RunConfig, CONFIG), gpu="big")
