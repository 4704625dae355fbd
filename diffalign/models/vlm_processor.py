"""The processor of a vision-language model: pictures and text on their way to tokens.

How often an image marker stands in the tokens is the processor's arithmetic, and must agree with
what the vision tower returns. Old checkpoints lack the settings that it is computed from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PretrainedConfig

from diffalign.errors import ModelError

_WITH_CLASS_TOKEN = ("clip_vision_model",)
"""Towers that give one feature more than there are patches."""


def read_processor(path: str, config: PretrainedConfig, *, revision: str | None = None) -> Any:
    """The processor of a model, complete.

    Args:
        path: folder or hub id of the model.
        config: of the model.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelError: it cannot be read, or would count other image tokens than the model returns.
    """
    try:
        where = str(Path(path).expanduser())
        processor = AutoProcessor.from_pretrained(where, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{path}: its processor cannot be read: {error}") from error
    if hasattr(processor, "num_additional_image_tokens"):  # LLaVA-OneVision counts otherwise
        _complete(processor, config, path)
    return processor


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
