"""The processor of a vision-language model: images and text on their way to tokens.

How often an image marker is in the tokens is the processor's arithmetic, and must agree with
what the vision tower returns. Old checkpoints lack the settings that it is computed from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PretrainedConfig

from diffalign import hub
from diffalign.errors import ModelError

_WITH_CLASS_TOKEN = ("clip_vision_model",)
"""Towers that give one feature more than there are patches."""


def read_processor(
    path: str,
    config: PretrainedConfig,
    *,
    revision: str | None = None,
    image_pixels: int | None = None,
) -> Any:
    """The processor of a model, complete.

    Args:
        path: folder or hub id of the model.
        config: of the model.
        revision: branch, tag or commit of a hub id.
        image_pixels: what larger images are scaled down to; None leaves its own bound.

    Raises:
        ModelError: it cannot be read, would count other image tokens than the model returns, or
            has no bound of pixels.
    """
    try:
        where = str(Path(path).expanduser())
        with hub.explained(path, kind="model", error=ModelError, field="model.path"):
            processor = AutoProcessor.from_pretrained(where, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{path}: its processor cannot be read: {error}") from error
    if image_pixels is not None:
        processor.image_processor = _bounded(processor.image_processor, image_pixels, path)
    if hasattr(processor, "num_additional_image_tokens"):  # LLaVA-OneVision counts otherwise
        _complete(processor, config, path)
    return processor


def question_prompt(processor: Any, text: str, *, system: str = "", image: bool = True) -> str:
    """A question about one image as the chat template writes it, up to where a response begins.

    Args:
        processor: of the model.
        text: the question; the image stands before it.
        system: what a system turn says first; empty leaves it to the template.
        image: whether there is one.

    Raises:
        ModelError: there is no chat template, or none that takes this.
    """
    seen = [{"type": "image"}] if image else []
    asked = {"role": "user", "content": [*seen, {"type": "text", "text": text}]}
    told = {"role": "system", "content": [{"type": "text", "text": system}]}
    turns = [told, asked] if system else [asked]
    try:
        return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except ValueError as error:
        raise ModelError(f"the model's processor has no usable chat template: {error}") from error


def _bounded(image_processor: Any, image_pixels: int, path: str) -> Any:
    """The same with another bound: sizes of Qwen's are numbers of pixels, whatever their names."""
    least, bound = (dict(image_processor.size).get(f"{k}_edge") for k in ("shortest", "longest"))
    if not hasattr(image_processor, "merge_size") or least is None or bound is None:
        raise ModelError(
            f"{path}: image_pixels is {image_pixels}, but its processor brings images to a "
            f"size of its own and has no such bound; Qwen2-VL and its successors do. Leave it out"
        )
    if image_pixels < least:
        raise ModelError(
            f"{path}: image_pixels is {image_pixels}, but its processor scales images up to "
            f"{least} pixels at least"
        )
    settings = {**image_processor.to_dict(), "max_pixels": image_pixels}
    return type(image_processor).from_dict(settings)


def _complete(processor: Any, config: PretrainedConfig, path: str) -> None:
    """Fill in what LLaVA's processors count image tokens by, where it is missing."""
    tower = config.vision_config
    class_token = int(tower.model_type in _WITH_CLASS_TOKEN)
    returned = class_token - int(config.vision_feature_select_strategy == "default")
    if processor.patch_size is None:
        processor.patch_size = tower.patch_size
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    dropped = int(processor.vision_feature_select_strategy == "default")
    if processor.num_additional_image_tokens == 0 and returned + dropped == class_token:
        processor.num_additional_image_tokens = class_token  # 0 is also what a missing one reads as
    counted = processor.num_additional_image_tokens - dropped
    if processor.patch_size != tower.patch_size or counted != returned:
        raise ModelError(
            f"{path}: its processor counts other image tokens than its vision tower returns: "
            f"patches of {processor.patch_size} and {counted:+d}, where the model has patches of "
            f"{tower.patch_size} and {returned:+d} (a class token counts as 1, the strategy "
            f"'default' as -1). Correct processor_config.json"
        )
