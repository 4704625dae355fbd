"""On a CLIP in small and heads of the three released forms, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from diffalign.errors import ModelError
from diffalign.imaging.image_files import to_images
from diffalign.scorers.aesthetic import Aesthetic
from tests.tiny_rewards import two_images, write_aesthetic

TRANSFORM = Compose(
    [
        Resize(32, interpolation=InterpolationMode.BICUBIC),
        CenterCrop(32),
        ToTensor(),
        Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
)


def scorer(folder: Path, **changes) -> Aesthetic:
    return Aesthetic(path=str(folder / "head.safetensors"), clip=str(folder / "clip"), **changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_aesthetic(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [0, 1])
def test_images_are_prepared_as_by_openais_clip(folder, number):
    (image,) = to_images(two_images()[number][None])
    assert torch.allclose(scorer(folder).prepare(image), TRANSFORM(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["linear", "linearMSE", "reluMSE"])
def test_the_score_is_the_head_of_a_normalised_embedding(tmp_path, form):
    tower, head = write_aesthetic(tmp_path, form)
    found, expected = [], []
    for image in two_images():
        pixels = TRANSFORM(to_images(image[None])[0])[None]
        with torch.no_grad():
            embedding = normalize(tower(pixel_values=pixels).image_embeds, dim=-1)
            expected.append(head(embedding).item())
        found += scorer(tmp_path).score(image[None], ["whatever"]).tolist()
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-4  # the comparison would also hold for a constant


def test_prompts_do_not_matter_and_batches_neither(folder):
    images = torch.stack([two_images()[0], two_images()[0].flip(0), -two_images()[0]])
    together = scorer(folder).score(images, ["a", "b", "c"])
    apart = scorer(folder, images_per_batch=1).score(images, ["c", "c", "c"])
    assert together.tolist() == pytest.approx(apart.tolist(), abs=1e-5)


def test_a_vision_tower_alone_serves_as_well(folder):
    tower, _ = write_aesthetic(folder)
    expected = scorer(folder).score(two_images()[0][None], ["a"])
    tower.save_pretrained(folder / "tower")
    alone = Aesthetic(path=str(folder / "head.safetensors"), clip=str(folder / "tower"))
    assert alone.score(two_images()[0][None], ["a"]).item() == pytest.approx(expected.item())


def test_other_weights_are_refused_by_their_names(folder):
    head = folder / "head.safetensors"
    state = load_file(head)
    save_file({name: v for name, v in state.items() if name != "layers.7.bias"}, head)
    with pytest.raises(ModelError, match=r"lacks weights of this network: layers\.7\.bias"):
        scorer(folder).score(two_images()[0][None], ["a"])
    save_file({**state, "logit_scale": torch.ones(())}, head)
    with pytest.raises(ModelError, match="holds weights that this network has not: logit_scale"):
        scorer(folder).score(two_images()[0][None], ["a"])
    save_file({**state, "layers.0.weight": torch.zeros(1024, 512)}, head)
    with pytest.raises(ModelError, match=r"of another size.*layers\.0\.weight \(1024, 512\) there"):
        scorer(folder).score(two_images()[0][None], ["a"])
    tower = folder / "clip/model.safetensors"
    save_file(
        {n: v for n, v in load_file(tower).items() if n != "visual_projection.weight"},
        tower,
        metadata={"format": "pt"},
    )
    save_file(state, head)
    with pytest.raises(ModelError, match="lacks weights of this network: visual_projection"):
        scorer(folder).score(two_images()[0][None], ["a"])


def test_the_fingerprint_is_that_of_head_and_tower(folder):
    first = scorer(folder).fingerprint
    head = folder / "head.safetensors"
    save_file({name: value + 1 for name, value in load_file(head).items()}, head)
    second = scorer(folder).fingerprint
    write_aesthetic(folder / "other")
    tower = Aesthetic(path=str(head), clip=str(folder / "other/clip"))
    assert len({first, second}) == 2 and tower.fingerprint == second


def test_a_pickle_is_refused_with_the_command_that_converts_it(folder):
    file = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(load_file(folder / "head.safetensors"), file)
    with pytest.raises(ModelError, match=r"diffalign convert \S*linearMSE\.pth output=\S*tensors$"):
        _ = Aesthetic(path=str(file), clip=str(folder / "clip")).fingerprint
