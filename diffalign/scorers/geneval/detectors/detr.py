"""Detectors of boxes in the layout of transformers: DETR, Deformable DETR, RT-DETR, YOLOS.

They find no masks, so a colour is read from the whole box, with what lies around the object in it.

Source: Carion et al. 2020, arXiv:2005.12872.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from diffalign.config import MUST_STAY
from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import digest_of, find_weights
from diffalign.scorers.geneval.detectors.base import AbstractDetector, Detected, class_name


@dataclass(frozen=True, kw_only=True)
class DETR(AbstractDetector):
    """Any model that `AutoModelForObjectDetection` loads and that was trained on COCO."""

    path: str = field(default="facebook/detr-resnet-50", metadata=MUST_STAY)
    """Folder or hub id in the layout of transformers, with safetensors."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""

    @cached_property
    def fingerprint(self) -> str:
        weights = find_weights(self.path, revision=self.revision, allow_pickle=False)
        folder = weights.parent
        digest = digest_of(weights, folder / "config.json", folder / "preprocessor_config.json")
        return f"detr-{digest}"

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(map(class_name, self._parts[1].config.id2label.values()))

    def detect(self, images: Sequence[Image.Image]) -> list[Mapping[str, Sequence[Detected]]]:
        processor, network = self._parts
        found: list[Mapping[str, Sequence[Detected]]] = []
        for image in images:
            inputs = processor(images=image, return_tensors="pt").to(network.device)
            with torch.no_grad():
                outputs = network(**inputs)
            sizes = [(image.height, image.width)]
            (objects,) = processor.post_process_object_detection(
                outputs, threshold=0.0, target_sizes=sizes
            )
            by_class: defaultdict[str, list[Detected]] = defaultdict(list)
            for score, label, box in zip(
                *(objects[name].tolist() for name in ("scores", "labels", "boxes")), strict=True
            ):
                name = class_name(network.config.id2label[label])
                by_class[name].append(Detected(box=tuple(box), score=score))
            found.append(dict(by_class))
        return found

    def to(self, device: torch.device | str) -> DETR:
        self._parts[1].to(device)
        return self

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        weights = find_weights(self.path, revision=self.revision, allow_pickle=False)
        try:
            processor = AutoImageProcessor.from_pretrained(weights.parent)
            network = AutoModelForObjectDetection.from_pretrained(
                weights.parent, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ModelError(
                f"{self.path} cannot be read as a detector of objects: {str(error)[:300]}"
            ) from error
        return processor, network.requires_grad_(False).eval()
