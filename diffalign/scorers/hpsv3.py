"""HPS v3: which of two images people preferred for a prompt, as a Qwen2-VL learnt it.

The score is the mean that the network tells, some -5 to 15; the standard deviation next to it is
how sure the network is, and the authors leave it aside. The text around the prompt is part of what
was learnt, and belongs to the authors: it is read from their file.

Source: Ma et al. 2025, arXiv:2508.03789; MizzenAI/HPSv3, hpsv3/inference.py.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from diffalign.config import MUST_STAY
from diffalign.errors import ModelError
from diffalign.files import read_text
from diffalign.models.devices import DTYPES
from diffalign.models.preference.clip_loading import digest_of, find_weights, read_state
from diffalign.models.preference.hpsv3_reward import HPSv3Reward, filled_hpsv3
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.processor import question_prompt
from diffalign.ranges import AtLeast
from diffalign.scorers.images import AbstractImageScorer

TOKEN = "<|Reward|>"
"""What the head reads; it is added behind the vocabulary of the base."""
PLACE = "{text_prompt}"
"""What stands for the prompt in the authors' text."""
IMAGE_TOKENS = 256
"""To about so many tokens of 28 by 28 pixels images are scaled, larger and smaller ones alike."""
_NAMES = ("INSTRUCTION", "prompt_with_special_token")
"""Constants of the authors' file that make the text."""


@dataclass(frozen=True, kw_only=True)
class HPSv3(AbstractImageScorer):
    """Mean score of an image for its prompt; a difference is about a log-odds."""

    path: str = field(default="MizzenAI/HPSv3/HPSv3.safetensors", metadata=MUST_STAY)
    """The file of the released weights, 16 GB."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Folder or hub id of the Qwen2-VL that it was made of: configuration, tokenizer and image
    processor, no weights."""
    instruction: Path = field(metadata=MUST_STAY)
    """The authors' text around a prompt: their file `hpsv3/dataset/data_collator_qwen.py`, of which
    two constants are read and nothing is run, or a text file that holds {text_prompt} and
    <|Reward|> once each. Any other text gives other scores."""
    images_per_batch: Annotated[int, AtLeast(1)] = 8
    """Images in one pass of the network, which bounds its memory."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """In which the network computes, its head apart; auto is bf16 on a GPU, as the authors', and
    float32 elsewhere."""

    @cached_property
    def fingerprint(self) -> str:
        text = hashlib.blake2b(self._text.encode(), digest_size=4).hexdigest()
        return "-".join(["hpsv3", digest_of(self._weights), text, self.dtype])

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.distribution(images, prompts)[:, 0]

    def distribution(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Mean and standard deviation of the scores of n RGB images, float32 [n, 2].

        Raises:
            ModelError: the weights, the base or the text cannot be read, or are of another model.
            ValueError: a prompt holds the token, or an image is 200 times as long as it is wide.
        """
        if not self._loaded:
            self.to("cpu")
        network = self._loaded["network"]
        device, size, parts = next(network.parameters()).device, self.images_per_batch, []
        for start in range(0, len(images), size):
            some = slice(start, start + size)
            inputs = self.inputs(images[some], prompts[some])
            with torch.no_grad():
                parts.append(network(**{name: value.to(device) for name, value in inputs.items()}))
        found = torch.cat(parts)
        return torch.stack([found[:, 0], found[:, 1].exp()], dim=1)

    def inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Images and prompts as the network takes them, on the CPU."""
        for prompt in prompts:
            if TOKEN in prompt:
                raise ValueError(f"the prompt {prompt!r:.60} holds {TOKEN}, which is HPS v3's own")
        processor = self._processor
        asked = [question_prompt(processor, self._text.replace(PLACE, p)) for p in prompts]
        found = processor(
            text=asked,
            images=[self.prepare(image) for image in images],
            padding=True,
            padding_side="right",
            do_resize=False,
            return_tensors="pt",
        )
        return dict(found)

    def prepare(self, image: Image.Image) -> Image.Image:
        """An RGB image scaled as the authors do it: sides are multiples of a token's."""
        settings = self._processor.image_processor
        factor = int(settings.patch_size) * int(settings.merge_size)
        pixels = IMAGE_TOKENS * factor * factor
        height, width = smart_resize(
            image.height, image.width, factor=factor, min_pixels=pixels, max_pixels=pixels
        )
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def to(self, device: torch.device | str) -> HPSv3:
        """Load the network, or move it; another device may mean another precision."""
        where = torch.device(device)
        usual: Literal["bf16", "float32"] = "bf16" if where.type == "cuda" else "float32"
        dtype = DTYPES[usual if self.dtype == "auto" else self.dtype]
        network = self._loaded.get("network")
        if network is None or network.model.dtype != dtype:
            self._loaded.clear()
            network = self._load(dtype)
        self._loaded["network"] = network.to(where)
        return self

    def _load(self, dtype: torch.dtype) -> HPSv3Reward:
        tokenizer: Any = self._processor.tokenizer
        return filled_hpsv3(
            self._base.config,
            read_state(self._weights),
            vocabulary=len(tokenizer),
            token=tokenizer.convert_tokens_to_ids(TOKEN),
            dtype=dtype,
            source=self.path,
        )

    @cached_property
    def _loaded(self) -> dict[str, HPSv3Reward]:
        return {}

    @cached_property
    def _weights(self) -> Path:
        return find_weights(self.path, revision=self.revision)

    @cached_property
    def _base(self) -> VLM:
        base = VLM(path=self.base)
        kind = type(base.config).model_type  # 4.57 gives the text part's on the instance
        if kind != "qwen2_vl":
            raise ModelError(f"base: {self.base} is a {kind}, and HPS v3 was made of a qwen2_vl")
        return base

    @cached_property
    def _processor(self) -> Any:
        processor = self._base.processor()
        processor.tokenizer.add_tokens([TOKEN], special_tokens=True)
        return processor

    @cached_property
    def _text(self) -> str:
        """What is asked, with `PLACE` in place of the prompt."""
        text = read_text(self.instruction, absent="there is no such file")
        if self.instruction.suffix == ".py":
            text = _constants(text, self.instruction)
        if text.count(PLACE) != 1 or text.count(TOKEN) != 1:
            raise ModelError(
                f"{self.instruction}: the text around a prompt must hold {PLACE} and {TOKEN} once "
                f"each. It is hpsv3/dataset/data_collator_qwen.py of MizzenAI/HPSv3"
            )
        return text


def _constants(source: str, path: Path) -> str:
    """The text of the authors' file: what it assigns to two names, read and not run."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ModelError(f"{path} is no Python file: {error}") from error
    found = {
        target.id: node.value.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    if missing := [name for name in _NAMES if name not in found]:
        raise ModelError(
            f"{path} assigns no text to {' and '.join(missing)}: it is not "
            f"hpsv3/dataset/data_collator_qwen.py of MizzenAI/HPSv3"
        )
    return "".join(found[name] for name in _NAMES)
