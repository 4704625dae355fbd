"""On HPS v3's network in small, with random weights under the names of the released file."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import normalize, pil_to_tensor
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from diffalign.errors import ModelError
from diffalign.imaging.image_files import pixels_of, to_images
from diffalign.scorers.hpsv3 import HPSv3
from tests.tiny_rewards import two_images
from tests.tiny_vlm import WIDTH, tiny_llava, tiny_qwen2_vl

PROMPTS = ["a red circle", "the blue square left of a green cross {and} more"]
TEXT = "\nRate this image of {text_prompt}\n", "\nThe rating: <|Reward|>\n\nEND\n"


SIZES = {
    (64, 64): (128, 128),
    (512, 512): (128, 128),
    (200, 100): (176, 88),  # floor(200 / 1.1049 / 8) * 8, floor(100 / 1.1049 / 8) * 8
    (40, 20): (184, 96),  # ceil(40 * 4.5255 / 8) * 8, ceil(20 * 4.5255 / 8) * 8
}
"""(width, height) of images, and of what becomes of them by the published rule, by hand: 256 tokens
of 8 by 8 pixels or as near as whole tokens come from below (larger images) or above."""


def shown() -> list[Image.Image]:
    one, other = (to_images(image[None])[0] for image in two_images())
    return [one.resize((64, 64)), other.resize((200, 100))]


def old_name(name: str) -> str:
    """As transformers called weights when the released file was written."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tiny_qwen2_vl(tmp_path_factory.mktemp("hpsv3") / "base")
    base = Qwen2VLForConditionalGeneration.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    generator = torch.Generator().manual_seed(3)
    rows = len(processor.tokenizer) + 1  # as the authors resize the embedding
    base.resize_token_embeddings(rows)
    state = {old_name(name): value.clone() for name, value in base.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = 0.3 * torch.randn(state[name].shape, generator=generator)
    for layer, (inner, outer) in {0: (WIDTH, 1024), 3: (1024, 16), 5: (16, 2)}.items():
        weight = torch.randn((outer, inner), generator=generator) / math.sqrt(inner)
        state[f"rm_head.{layer}.weight"] = weight
        state[f"rm_head.{layer}.bias"] = 0.1 * torch.randn(outer, generator=generator)
    save_file(
        {name: v.contiguous() for name, v in state.items()}, path.parent / "HPSv3.safetensors"
    )
    (path.parent / "text.txt").write_text("".join(TEXT))
    return path.parent


def scorer(folder: Path, **changes) -> HPSv3:
    given = {
        "path": str(folder / "HPSv3.safetensors"),
        "base": str(folder / "base"),
        "instruction": folder / "text.txt",
    }
    return HPSv3(**(given | changes))


def by_hand(folder: Path, image: Image.Image, prompt: str) -> list[float]:
    """One row, unpadded: embeddings to the language model alone, running positions, the head."""
    state = load_file(folder / "HPSv3.safetensors")
    processor = AutoProcessor.from_pretrained(folder / "base")
    processor.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "base").eval()
    model.resize_token_embeddings(len(processor.tokenizer))
    model.load_state_dict(
        {n: state[old_name(n)] for n in model.state_dict() if not n.startswith("rm_head")}
    )
    text = f"\nRate this image of {prompt}\n\nThe rating: <|Reward|>\n\nEND\n"
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    width, height = SIZES[image.size]
    rows, columns = height // 8, width // 8  # tokens of 8 by 8 pixels
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    levels = pil_to_tensor(resized).float() / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = normalize(levels, mean, std)
    # Patches of 4 by 4, two frames alike, in blocks of 2 by 2 that become one token.
    grid = pixels.reshape(3, rows, 2, 4, columns, 2, 4).permute(1, 4, 2, 5, 0, 3, 6)
    twice = grid[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
    patches = twice.reshape(4 * rows * columns, -1)
    pads = "<|image_pad|>" * (rows * columns)
    ids = processor.tokenizer(chat.replace("<|image_pad|>", pads)).input_ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        seen = model.model.visual(patches, grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]]))
        seen = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
        embedded = model.get_input_embeddings()(tokens)
        embedded[tokens == model.config.image_token_id] = seen
        running = torch.arange(tokens.shape[1]).expand(3, 1, -1)
        hidden = model.model.language_model(inputs_embeds=embedded, position_ids=running)[0]
        head = nn.Sequential(
            nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        names = ("0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias")
        for own, name in zip(head.parameters(), names, strict=True):
            own.copy_(state[f"rm_head.{name}"])
        (place,) = (tokens[0] == len(processor.tokenizer) - 1).nonzero()[:, 0].tolist()
        found = head(hidden[0, place])
    return [found[0].item(), math.exp(found[1].item())]


def test_mean_and_deviation_are_the_authors_formula_by_transformers_modules(folder):
    images = shown()
    expected = [by_hand(folder, *row) for row in zip(images, PROMPTS, strict=True)]
    found = scorer(folder).distribution(images, PROMPTS)
    for own, hand in zip(found.tolist(), expected, strict=True):
        assert own == pytest.approx(hand, abs=1e-4)
    assert abs(expected[0][0] - expected[1][0]) > 1e-2  # the comparison would hold for a constant
    other = by_hand(folder, images[1], PROMPTS[0])
    assert abs(other[0] - expected[0][0]) > 1e-3  # images matter
    scores = scorer(folder).score(pixels_of(images[0])[None], PROMPTS[:1])
    assert scores.item() == pytest.approx(expected[0][0], abs=1e-4)


def test_a_score_depends_neither_on_its_company_nor_on_the_batch(folder):
    images = shown()
    together = scorer(folder).score_images(images, PROMPTS)
    apart = scorer(folder, images_per_batch=1).score_images(images, PROMPTS)
    assert together.tolist() == pytest.approx(apart.tolist(), abs=1e-5)


@pytest.mark.parametrize(("size", "expected"), SIZES.items())
def test_images_are_scaled_to_256_tokens_with_pil(folder, size, expected):
    image = to_images(two_images()[0][None])[0].resize(size)
    found = scorer(folder).prepare(image)
    assert found.size == expected
    assert found.tobytes() == image.resize(expected, Image.Resampling.BICUBIC).tobytes()


def test_the_image_processor_scales_nothing_again(folder):
    found = scorer(folder).inputs(shown(), PROMPTS)
    assert found["image_grid_thw"].tolist() == [[1, 32, 32], [1, 22, 44]]
    assert found["pixel_values"].shape == (1024 + 968, 3 * 2 * 4 * 4)


def test_the_authors_text_is_read_from_their_file_and_not_run(folder, tmp_path):
    source = tmp_path / "data_collator_qwen.py"
    source.write_text(
        f"import hpsv3\nraise SystemExit\nINSTRUCTION = {TEXT[0]!r}\n"
        f"prompt_with_special_token = {TEXT[1]!r}\n"
    )
    image = to_images(two_images()[0][None])
    plain = scorer(folder)
    read = scorer(folder, instruction=source)
    assert read.fingerprint == plain.fingerprint
    assert read.score_images(image, PROMPTS[:1]) == plain.score_images(image, PROMPTS[:1])
    source.write_text("INSTRUCTION = f'{x}'\n")
    with pytest.raises(ModelError, match="assigns no text to INSTRUCTION and prompt_with_special"):
        _ = scorer(folder, instruction=source).fingerprint
    other = tmp_path / "other.txt"
    other.write_text("Rate {text_prompt}.")
    with pytest.raises(ModelError, match=r"must hold \{text_prompt\} and <\|Reward\|> once each"):
        _ = scorer(folder, instruction=other).fingerprint
    other.write_text("Judge {text_prompt}: <|Reward|>")
    assert scorer(folder, instruction=other).fingerprint != plain.fingerprint


def test_a_prompt_with_the_token_is_refused(folder):
    with pytest.raises(ValueError, match=r"holds <\|Reward\|>, which is HPS v3's own"):
        scorer(folder).score(two_images()[0][None], ["a <|Reward|>"])


def test_other_weights_are_refused_by_their_names(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "HPSv3.safetensors"
    state = load_file(file)
    image = to_images(two_images()[0][None])
    bias = state.pop("rm_head.5.bias")
    norm = state.pop("visual.merger.ln_q.bias")
    save_file(state, file)
    with pytest.raises(ModelError, match=r"lacks .*: model\.visual\.merger\.ln_q\.bias, rm_h"):
        scorer(copy).score_images(image, PROMPTS[:1])
    whole = {**state, "rm_head.5.bias": bias, "visual.merger.ln_q.bias": norm}
    save_file({**whole, "rm_head.7.bias": bias.clone()}, file)
    with pytest.raises(ModelError, match=r"has not: rm_head\.7\.bias"):
        scorer(copy).score_images(image, PROMPTS[:1])
    save_file({**whole, "rm_head.5.bias": bias[:1]}, file)
    with pytest.raises(ModelError, match=r"another size .*rm_head\.5\.bias \(1,\) there and \(2"):
        scorer(copy).score_images(image, PROMPTS[:1])


def test_another_base_and_a_pickle_are_refused(folder, tmp_path):
    llava = str(tiny_llava(tmp_path / "llava"))
    with pytest.raises(ModelError, match=r"is a llava, and HPS v3 was made of a qwen2_vl"):
        scorer(folder, base=llava).score(two_images()[0][None], PROMPTS[:1])
    with pytest.raises(ModelError, match="diffalign convert"):
        _ = scorer(folder, path="MizzenAI/HPSv3/HPSv3.pth").fingerprint
