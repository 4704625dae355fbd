"""Open a model that somebody generated or trained with as one in training: to sample its
trajectories.

Weights, adapter and text encoders go through the code that training loads them with, so that the
density of a step is that which training will measure.
"""

from __future__ import annotations

from diffalign import components
from diffalign.errors import ModelError
from diffalign.generation.models import ModelSpec, without_run
from diffalign.models.base import AbstractModel
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.locate import locate
from diffalign.models.lora import settings_of


def diffusion_settings(spec: ModelSpec) -> AbstractDiffusion:
    """Settings under which training would begin with the very model.

    Args:
        spec: a diffusers folder, a hub id, a single checkpoint, one of these with an adapter, or
            the folder of a run that trained an adapter or all weights.

    Raises:
        ModelError: nothing of the kind is there, or no backbone of ours is of its pipeline class.
    """
    spec = without_run(spec)
    location = locate(spec.path, revision=spec.revision, variant=spec.variant, config=spec.config)
    backbone = _backbone(str(location.read_json("model_index.json").get("_class_name")), spec.path)
    model = backbone(
        path=spec.path,
        revision=spec.revision,
        variant=spec.variant,
        config=spec.config,
        unet=spec.unet,
        unet_revision=spec.unet_revision,
        prediction_type=spec.prediction_type,
        zero_terminal_snr=spec.zero_terminal_snr,
        lora=None if spec.lora is None else settings_of(spec.lora, component=backbone.component),
    )
    model.check()
    return model


def _backbone(pipeline: str, path: str) -> type[AbstractDiffusion]:
    found = {}
    for kind in components.kinds(AbstractModel):
        backbone = components.find(AbstractModel, kind)  # type: ignore[type-abstract]
        if issubclass(backbone, AbstractDiffusion):
            found[backbone.pipeline] = backbone
    if pipeline not in found:
        raise ModelError(
            f"{path} holds a {pipeline}, whose trajectories cannot be sampled here (those of "
            f"{', '.join(found)} can)"
        )
    return found[pipeline]
