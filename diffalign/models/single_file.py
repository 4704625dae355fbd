"""Models as one checkpoint file in the original layout, and what such a file says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffalign.errors import ModelError
from diffalign.models.locations import (
    AbstractLocation,
    Folder,
    Hub,
    file_digest,
    in_float32,
)
from diffalign.models.weights import Stored, stored_in


@dataclass(frozen=True)
class SingleFile(AbstractLocation):
    """One checkpoint in the original layout; its configuration comes from elsewhere."""

    path: Path
    config: AbstractLocation
    """A model of the same architecture: configurations, tokenizers and schedule are read there."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def origin(self) -> tuple[str, str | None]:
        return str(self.path), None

    def read_json(self, name: str) -> dict[str, Any]:
        return self.config.read_json(name)

    def marks(self, *, prediction_type: str | None = None) -> dict[str, Any]:
        if self.path.suffix != ".safetensors":
            return super().marks(prediction_type=prediction_type)
        names, metadata = _header(self.path)
        marks: dict[str, Any] = {}
        kind = prediction_type or _predicted(self.path, names, metadata)
        if kind is not None:
            marks["prediction_type"] = kind
        if "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true":
            marks["rescale_betas_zero_snr"] = True
        edm = sorted(n for n in names if n.startswith(("edm_mean", "edm_std", "edm_vpred.")))
        return marks | ({"edm": edm[0]} if edm else {})

    def check_weights(self, component: str) -> None:
        """A single file holds all components; what else it lacks shows when it is read."""
        if component != "unet" or self.path.suffix != ".safetensors":
            return
        found = _input_channels(self.path)
        expected = self.read_json("unet/config.json").get("in_channels", 4)
        if found is not None and found != expected:
            raise ModelError(
                f"{self.path}: its network takes {found} channels, and that of {self.config} takes "
                f"{expected}: config is of another kind of model (9 are those of inpainting, 8 of "
                f"InstructPix2Pix)"
            )

    def load(self, pipeline: Any, **components: Any) -> Any:
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        config, _ = self.config.origin
        options: dict[str, Any] = {"local_files_only": isinstance(self.config, Folder)}
        if isinstance(self.config, Hub) and self.config.revision is not None:
            options["revision"] = self.config.revision
        try:
            return in_float32(
                pipeline.from_single_file(str(self.path), config=config, **options, **components),
                given=components,
            )
        except SingleFileComponentError as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"{self.path}: cannot be read as a {pipeline.__name__}: {reason}"
            ) from error

    def tokenizer(self, name: str) -> Any:
        return self.config.tokenizer(name)

    def stored(self, component: str, config: Mapping[str, Any]) -> dict[str, Stored] | None:
        """Of a UNet in the original layout, and of a file that holds one network as diffusers names
        it; other parts of a whole checkpoint are not there tensor by tensor."""
        if self.path.suffix != ".safetensors":
            return None
        found = stored_in([self.path])
        original = {name.removeprefix(_DENOISER): tensor for name, tensor in found.items()}
        whole = any(name.startswith(_OTHERS) for name in found)
        if "input_blocks.0.0.weight" not in original:
            return None if whole else found
        if component != "unet":
            return None
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        renamed: dict[str, Stored] = convert_ldm_unet_checkpoint(  # it moves values, whatever
            {
                f"{_DENOISER}{name}": tensor
                for name, tensor in original.items()
                if not whole or tensor.name.startswith(_DENOISER)
            },
            dict(config),
        )
        return renamed

    def load_text_encoder(self, name: str, model_class: Any, dtype: torch.dtype) -> Any | None:
        return None

    def identity(self, component: str) -> str:
        return file_digest(self.path)


_DENOISER = "model.diffusion_model."
_OTHERS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.")
"""How the names of what else a whole checkpoint holds begin."""
_INPUT = f"{_DENOISER}input_blocks.0.0.weight"
"""The first convolution of a denoiser in the original layout, of shape [width, channels, 3, 3]."""
_PREDICTION_WORDS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "velocity": "v_prediction",
}


def _header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Names of tensors, and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()), dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as a .safetensors checkpoint: {error}") from error


def _input_channels(path: Path) -> int | None:
    if _INPUT not in _header(path)[0]:
        return None
    with safe_open(path, framework="pt") as file:
        return int(file.get_slice(_INPUT).get_shape()[1])


def _predicted(path: Path, names: set[str], metadata: Mapping[str, str]) -> str | None:
    """The prediction that a checkpoint names: an empty tensor named `v_pred`
    (NoobAI, ComfyUI), `modelspec.*` of the metadata (Stability's model specification), and `ss_*`
    of kohya's scripts."""
    said: dict[str, str] = {"key v_pred": "v"} if "v_pred" in names else {}
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if metadata.get(key):
            said[f"metadata {key}"] = metadata[key].strip().lower()
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        said["metadata ss_v_parameterization"] = "v"
    for origin, word in said.items():
        if word not in _PREDICTION_WORDS:
            raise ModelError(
                f"{path}: {origin} is {word!r} (supported: epsilon and v_prediction). If the file "
                f"is wrong about itself, set prediction_type"
            )
    kinds = {_PREDICTION_WORDS[word] for word in said.values()}
    if len(kinds) > 1:
        raise ModelError(
            f"{path}: contradicts itself about what it predicts "
            f"({', '.join(f'{origin}: {word}' for origin, word in said.items())}): set "
            f"prediction_type to epsilon or v_prediction"
        )
    return kinds.pop() if kinds else None
