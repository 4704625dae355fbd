"""Words of a response and where a model looked: by hand and by differences."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffalign import config
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.reading import open_responses
from diffalign.data.responses.samples import TokenSampleMaker
from diffalign.errors import ConfigError
from diffalign.jobs import diagnose
from diffalign.jobs.demo_responses import opened
from diffalign.likelihoods.token_heat import (
    by_patches,
    patches_looked_at,
    response_log_probs,
    seen_image,
)
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.config import VLM
from diffalign.playground.models import playground_llava_path, playground_responses_path
from diffalign.reports.diagnosis import token_texts, words_of


@pytest.fixture(scope="module")
def sample():
    """The shipped model, and the first shipped pair."""
    model = VLM(path=str(playground_llava_path())).load(
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        reference="none",
        trainable=False,
    )
    settings = ResponseConfig(path=str(playground_responses_path()), kind="trl")
    pair = open_responses(settings).pair(0, 0)
    encoder = ChatEncoder(model.processor, max_length=settings.max_length)
    maker = TokenSampleMaker(
        config=settings, views=frozenset({"chosen", "rejected"}), run_seed=0, encoder=encoder
    )
    made = maker.make(pair, 0)
    return model, pair, made, stack_tokens([made], model.pad_token_id)


def test_words_hold_all_of_a_response_and_all_of_its_probability(sample):
    model, pair, made, batch = sample
    log_probs = response_log_probs(model, batch, "chosen")
    texts = token_texts(pair.responses["chosen"], made.responses["chosen"].offsets.tolist())
    words = words_of(texts, log_probs.tolist(), (log_probs - 0.5).tolist())
    assert "".join(word.text for word in words) == pair.responses["chosen"]
    assert words[-1].text == ""  # the token that ends it
    assert sum(word.policy for word in words) == pytest.approx(float(log_probs.sum()), abs=1e-4)
    assert sum(word.log_ratio for word in words) == pytest.approx(0.5 * len(log_probs), abs=1e-4)


def wide(path: Path) -> Image.Image:
    """Twice as wide as high: grey, a red stripe at the left end and a blue one in the middle."""
    pixels = np.full((64, 128, 3), 200, np.uint8)
    pixels[:, :16], pixels[:, 56:72] = (255, 0, 0), (0, 0, 255)
    image = Image.fromarray(pixels)
    image.save(path)
    return image


def test_a_map_lies_over_what_the_model_saw_of_an_image(sample, tmp_path):
    """LLaVA sees the middle of a wide image; its map says nothing of the ends."""
    model, *_ = sample
    image = wide(tmp_path / "wide.png")
    row = {"image": "wide.png", "prompt": "What is it?", "chosen": "A dog.", "rejected": "A cat."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = ResponseConfig(path=str(tmp_path / "rows.jsonl"), kind="trl")
    maker = TokenSampleMaker(
        config=settings,
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        encoder=ChatEncoder(model.processor),
    )
    batch = stack_tokens([maker.make(open_responses(settings).pair(0, 0), 0)], model.pad_token_id)
    seen = np.asarray(seen_image(model, batch), int)
    assert seen.shape[0] == seen.shape[1] and patches_looked_at(model, batch, "chosen") is not None
    cropped = np.asarray(
        image.crop((32, 0, 96, 64)).resize(seen.shape[:2], Image.Resampling.BICUBIC), int
    )
    assert np.abs(seen - cropped).mean() < 4


def test_dropout_has_no_part_in_a_map(sample):
    _, _, _, batch = sample
    torch.manual_seed(0)
    model = VLM(path=str(playground_llava_path()), lora=LoraSettings(rank=2, dropout=0.5)).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="adapter_off"
    )
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    first, second = (patches_looked_at(model, batch, "chosen") for _ in range(2))
    assert first is not None and torch.equal(first, second)
    assert model.network.training


def test_before_a_run_that_went_on_from_an_adapter_is_that_adapter(tmp_path):
    """Not the base, which a run in two stages started from long before."""
    path, cpu = str(playground_llava_path()), torch.device("cpu")
    rank = LoraSettings(rank=2)
    first = VLM(path=path, lora=rank).load(
        device=cpu, compute_dtype=torch.float32, reference="none"
    )
    for name, parameter in first.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    first.export(tmp_path / "adapter")
    continued = VLM(path=path, lora=dataclasses.replace(rank, start=tmp_path / "adapter"))
    trained = dict(first.trained_parameters())
    found = {
        name: value
        for name, value in opened(continued, None).network.named_parameters()
        if "lora_" in name
    }
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    bare = opened(VLM(path=path, lora=rank), None).network.named_parameters()
    assert not any("lora_" in name for name, _ in bare)


def test_where_the_model_looked_is_the_gradient_times_the_pixels(sample):
    """Held against the change of the log-probability as one patch's contrast is turned up."""
    model, _, _, batch = sample
    looked_at = patches_looked_at(model, batch, "rejected")
    assert looked_at is not None and looked_at.shape == (4, 4) and looked_at.min() >= 0
    pixels = batch.image_inputs[None]["pixel_values"]
    side = pixels.shape[-1] // 4
    found = torch.zeros(4, 4)
    for row in range(4):
        for column in range(4):
            sums = []
            for factor in (0.99, 1.01):
                changed = pixels.clone()
                place = (
                    slice(row * side, (row + 1) * side),
                    slice(column * side, (column + 1) * side),
                )
                changed[..., place[0], place[1]] *= factor
                seen = {None: {**batch.image_inputs[None], "pixel_values": changed}}
                other = dataclasses.replace(batch, image_inputs=seen)
                sums.append(response_log_probs(model, other, "rejected").sum())
            found[row, column] = (sums[1] - sums[0]).abs() / 0.02
    # A patch's own sum is bounded by the sum of magnitudes, so at most as large, and larger where
    # the model looks.
    assert (found <= looked_at * side**2 * 1.05 + 1e-2).all()
    assert torch.corrcoef(torch.stack([found.flatten(), looked_at.flatten()]))[0, 1] > 0.5


def test_rows_of_patches_lie_block_by_block():
    weights = torch.arange(8.0)  # 2 x 4 patches, in blocks of 2 x 2
    grid = torch.tensor([[1, 2, 4]])
    found = by_patches(weights[:, None], {"image_grid_thw": grid}, patch=None, merge=2)
    assert_close(found, torch.tensor([[0.0, 1, 4, 5], [2, 3, 6, 7]]))


def test_pixels_are_put_together_by_patch_and_tiles_give_the_whole_image():
    weights = torch.zeros(1, 3, 4, 4)
    weights[:, :, :2, 2:] = 1.0
    expected = torch.tensor([[0.0, 3], [0, 0]])
    assert_close(by_patches(weights, {}, patch=2, merge=1), expected)
    tiles = torch.stack([weights[0], torch.ones(3, 4, 4)])[None]
    assert_close(by_patches(tiles, {}, patch=2, merge=1), expected)
    assert by_patches(weights[0, 0], {}, patch=2, merge=1) is None


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (None, "is not the folder of a training run"),
        ("playground/diffusion_dpo.yaml", "trained no responses of a vision-language model"),
        ("playground/responses/dpo.yaml", "has no folder named final, so it has not finished"),
    ],
)
def test_folders_without_a_finished_run_on_responses_are_refused(tmp_path, saved, message):
    from diffalign.training.config import RunConfig

    if saved is not None:
        run = config.load(RunConfig, Path("configs") / saved)
        config.save(run, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=message):
        diagnose.run(diagnose.DiagnoseConfig(run=tmp_path))
