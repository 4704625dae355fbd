"""Mask2Former as GenEval takes it: an instance for each of the surest pairs of query and class.

The score of an instance is that of its class times the mean probability of the pixels of its mask,
as mmdetection computes it, which GenEval's thresholds were chosen for. The post-processing of
transformers cuts at a threshold before that.

Source: Cheng et al. 2022, arXiv:2112.01527; instance_postprocess of mmdetection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.config import MUST_STAY
from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import digest_of, find_weights
from diffalign.ranges import AtLeast
from diffalign.scorers.geneval.detectors.base import (
    AbstractDetector,
    Detected,
    box_of,
    class_name,
)


@dataclass(frozen=True, kw_only=True)
class Mask2Former(AbstractDetector):
    """A Mask2Former that was trained on the instances of COCO."""

    path: str = field(default="facebook/mask2former-swin-small-coco-instance", metadata=MUST_STAY)
    """Folder or hub id in the layout of transformers, with safetensors. The default has the
    backbone of GenEval's; theirs is a file of mmdetection, and scores differ a little."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    instances: Annotated[int, AtLeast(1)] = 100
    """Pairs of query and class that are taken of an image, the surest ones."""

    @cached_property
    def fingerprint(self) -> str:
        weights = find_weights(self.path, revision=self.revision, allow_pickle=False)
        folder = weights.parent
        digest = digest_of(weights, folder / "config.json", folder / "preprocessor_config.json")
        return f"mask2former-{digest}-{self.instances}"

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(map(class_name, self._labels.values()))

    def detect(self, images: Sequence[Image.Image]) -> list[Mapping[str, Sequence[Detected]]]:
        processor, network = self._parts
        found: list[Mapping[str, Sequence[Detected]]] = []
        for image in images:  # one at a time: images of a batch would be padded to one size
            inputs = processor(images=image, return_tensors="pt").to(network.device)
            with torch.no_grad():
                outputs = network(**inputs)
            classes = outputs.class_queries_logits[0].float().softmax(dim=-1)[:, :-1]
            size = tuple(inputs["pixel_values"].shape[-2:])
            mask = inputs["pixel_mask"][0].bool()
            shown = int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())
            logits = outputs.masks_queries_logits.float()
            logits = interpolate(logits, size=size, mode="bilinear", align_corners=False)
            logits = logits[..., : shown[0], : shown[1]]  # without the padding
            logits = interpolate(
                logits, size=(image.height, image.width), mode="bilinear", align_corners=False
            )[0]
            found.append(self._instances(classes.cpu(), logits.cpu()))
        return found

    def _instances(self, classes: Tensor, logits: Tensor) -> dict[str, list[Detected]]:
        """Objects by class.

        Args:
            classes: probabilities, shape [queries, classes].
            logits: of the masks, shape [queries, H, W].
        """
        scores, order = classes.flatten().topk(min(self.instances, classes.numel()))
        found: defaultdict[str, list[Detected]] = defaultdict(list)
        for score, place in zip(scores.tolist(), order.tolist(), strict=True):
            query, label = divmod(place, classes.shape[1])
            inside = logits[query] > 0
            if inside.any():
                sure = float(logits[query][inside].sigmoid().mean())
                mask = inside.numpy()
                found[class_name(self._labels[label])].append(
                    Detected(box=box_of(mask), score=score * sure, mask=mask)
                )
        return dict(found)

    def to(self, device: torch.device | str) -> Mask2Former:
        self._parts[1].to(device)
        return self

    @property
    def _labels(self) -> Mapping[int, str]:
        return self._parts[1].config.id2label

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        weights = find_weights(self.path, revision=self.revision, allow_pickle=False)
        folder = weights.parent
        try:
            processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
            network = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self.path} cannot be read as a Mask2Former: {str(error)[:300]}"
            ) from error
        return processor, network.requires_grad_(False).eval()
