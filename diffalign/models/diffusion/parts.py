"""The parts of a pipeline where they lie: what their configurations say before weights are read,
and the reading itself."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from diffalign import components
from diffalign.errors import ModelError
from diffalign.models.base import AbstractModel
from diffalign.models.devices import materialize
from diffalign.models.diffusion.agreement import check_channels
from diffalign.models.diffusion.autoencoder import LatentSpace
from diffalign.models.diffusion.noising import AbstractNoising, noising_from_scheduler
from diffalign.models.diffusion.schedulers import SCHEDULE_FILE, build_scheduler, model_schedule
from diffalign.models.locate import locate
from diffalign.models.locations import ITSELF, AbstractLocation
from diffalign.models.weights import cast_blank, copy_into, fill, is_blank

INDEX_FILE = "model_index.json"
_SAMPLE_PROMPT = "An astronaut's 2 photographs of Zürich, 8k; unbelievably detailed!"
"""Holds what tokenizers differ in."""


@dataclass(frozen=True)
class PipelineParts:
    """A pipeline of diffusers on disk or on the hub, of which one network trains."""

    name: str
    """What the settings call it, for messages."""
    pipeline: str
    """Name of the pipeline class that it has to be of."""
    component: str
    """Name of the network within it."""
    same_parts: tuple[str, ...]
    """Names of other pipeline classes with the very same parts."""
    text_encoders: tuple[str, ...]
    """Names of the text encoders that the class has; a folder may lack some."""
    left_out: Mapping[str, Any]
    """Arguments that open the pipeline without what training has no use for."""
    location: AbstractLocation
    vae: str | None = None
    """Folder or hub id of another autoencoder than the pipeline's own."""
    vae_revision: str | None = None
    """Of that hub id."""
    prediction_type: str | None = None
    """In place of what the files say."""
    zero_terminal_snr: bool | None = None
    """In place of what the files say."""

    @cached_property
    def index(self) -> dict[str, Any]:
        return self.location.read_json(INDEX_FILE)

    @cached_property
    def schedule(self) -> dict[str, Any]:
        """The scheduler's configuration: what the files say, and then the settings."""
        return model_schedule(
            self.location,
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
        )

    @cached_property
    def _autoencoder(self) -> AbstractLocation | None:
        return None if self.vae is None else locate(self.vae, revision=self.vae_revision)

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that are there."""
        return tuple(name for name in self.text_encoders if self._is_there(name))

    def absent(self) -> tuple[str, ...]:
        """Parts that the class has and this pipeline lacks: text encoders, and their tokenizers."""
        gone = [name for name in self.text_encoders if name not in self.encoders]
        return (*gone, *(name.replace("text_encoder", "tokenizer") for name in gone))

    def _is_there(self, name: str) -> bool:
        origin = self.index.get(name)
        return not (isinstance(origin, (list, tuple)) and origin[0] is None)

    @property
    def network_config(self) -> dict[str, Any]:
        """Of the network, as diffusers writes it."""
        return self.location.read_json(f"{self.component}/config.json")

    def encoder_configs(self) -> dict[str, dict[str, Any]]:
        """Of every text encoder that is there, by name."""
        return {name: self.location.read_json(f"{name}/config.json") for name in self.encoders}

    def tokenizers(self) -> list[Any]:
        """Of every text encoder that is there, without weights."""
        names = [name.replace("text_encoder", "tokenizer") for name in self.encoders]
        return [self.location.tokenizer(name) for name in names]

    def check_class(self, kind: str) -> None:
        """Raise ModelError if a pipeline of another class lies there.

        Args:
            kind: whose pipeline it has to be.
        """
        given = self.index.get("_class_name")
        if given in (self.pipeline, *self.same_parts):
            return
        advice = "no kind trains that"
        for other in components.kinds(AbstractModel):
            backbone = components.find(AbstractModel, other)  # type: ignore[type-abstract]
            if getattr(backbone, "pipeline", None) == given:
                advice = f"set kind to {other}"
        raise ModelError(
            f"{self.name} holds a {given}, but kind {kind} trains a {self.pipeline}: {advice}"
        )

    def check_autoencoder(self, *, weights: bool = True) -> None:
        """Raise ModelError unless the other autoencoder, if there is one, can be read; without its
        weights where these are not asked for."""
        try:
            if self._autoencoder is not None:
                self._autoencoder.read_json(f"{ITSELF}/config.json")
                if weights:
                    self._autoencoder.check_weights(ITSELF)
        except ModelError as error:
            raise ModelError(f"vae: {error}") from error

    def check_channels(self) -> None:
        """Raise ModelError unless autoencoder and network work on latents of equal channels."""
        network, file = self.whole_network_config(), f"{self.component}/config.json"
        vae_file = "vae/config.json" if self._autoencoder is None else f"{self.vae}/config.json"
        check_channels(network, self.autoencoder_config, file=file, vae_file=vae_file)

    @property
    def autoencoder_config(self) -> dict[str, Any]:
        """Of the autoencoder, as diffusers writes it."""
        if self._autoencoder is None:
            return self.location.read_json("vae/config.json")
        return self._autoencoder.read_json(f"{ITSELF}/config.json")

    def noising(self) -> AbstractNoising:
        """How the model was trained to be corrupted; reads its scheduler's configuration alone.

        Raises:
            ModelError: the configuration is missing or of a kind that is not supported.
        """
        return noising_from_scheduler(self.schedule)

    def latent_space(self) -> LatentSpace:
        """Of what shape latents are."""
        levels = self.autoencoder_config.get("block_out_channels", (64,))
        return LatentSpace.of(self.whole_network_config(), 2 ** (len(levels) - 1))

    def check_weights(self, *, encoders: bool = True) -> None:
        """Raise ModelError if weights are known to be missing or pickled: of the network alone, or
        of the frozen encoders as well."""
        for name in (self.component, *(("vae", *self.encoders) if encoders else ())):
            self.location.check_weights(name)

    def whole_network_config(self) -> dict[str, Any]:
        """The network's configuration, with what it leaves out as its class has it."""
        return _with_defaults(self.network_class(), self.network_config)

    def whole_autoencoder_config(self) -> dict[str, Any]:
        """The same of the autoencoder."""
        return _with_defaults(diffusers.AutoencoderKL, self.autoencoder_config)

    def encoder_identities(self) -> dict[str, str]:
        """Tell autoencoder and text encoders from others, by the settings that choose them; those
        whose weights are not there are left out."""
        vae = (self.location, "vae") if self._autoencoder is None else (self._autoencoder, ITSELF)
        found = {"vae": vae[0].identity(vae[1])}
        found |= {name: self.location.identity(name) for name in self.encoders}
        known = {f"model's {name}": identity for name, identity in found.items() if identity}
        names = ", ".join(self.encoders)
        return known | {"model's text encoders": names, "model's tokenizers": self._reading()}

    def reference_identities(self) -> dict[str, Any]:
        """What a reference's values depend on of what lies there, by what it is called."""
        schedule = repr(sorted(self.schedule.items()))
        return {
            f"model's {self.component}": self.location.identity(self.component),
            **self.encoder_identities(),
            "model.prediction_type": self.schedule.get("prediction_type"),
            "model's noise schedule": hashlib.blake2b(schedule.encode(), digest_size=8).hexdigest(),
        }

    def _reading(self) -> str:
        """Tells how prompts become tokens."""
        digest = hashlib.blake2b(digest_size=8)
        for tokenizer in self.tokenizers():
            ids = tokenizer(_SAMPLE_PROMPT, truncation=False, verbose=False).input_ids
            vocabulary = sorted(tokenizer.get_vocab().items())
            digest.update(repr((vocabulary, ids, tokenizer.model_max_length)).encode())
        return digest.hexdigest()

    def check_export(self) -> None:
        """Raise ModelError unless a whole pipeline can be written when all of the network was
        trained."""
        try:
            self.check_autoencoder()
            self.check_weights()
        except ModelError as error:
            raise ModelError(
                f"model.encoders is cached, so that training can do without autoencoder and text "
                f"encoders, but all weights are trained (model.lora is null), and the pipeline "
                f"that is written in the end needs them: {error}. Put them back, or train a LoRA"
            ) from error

    def network_class(self) -> Any:
        """The class of the network in diffusers."""
        name = self.network_config.get("_class_name")
        network_class = getattr(diffusers, str(name), None)
        if network_class is None:
            raise ModelError(
                f"{self.name}: {self.component}/config.json names the class {name!r}, which "
                f"diffusers {diffusers.__version__} lacks"
            )
        return network_class

    def blank_network(self) -> Any:
        """The network without weights, in evaluation mode: for questions about its layers, and for
        `read`."""
        try:
            with torch.device("meta"):
                return self.network_class().from_config(self.network_config).eval()
        except (TypeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise ModelError(
                f"{self.name}: {self.component}/config.json describes no network: {error}"
            ) from error

    def read(
        self,
        network: Any | None = None,
        *,
        text_dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        vae_device: torch.device | None = None,
        encoders: bool = True,
        denoiser: bool = True,
    ) -> Any:
        """The pipeline, without what training has no use for.

        An export reads no more than training did: what was left out may not be within reach.

        Args:
            network: blank, each weight in the precision in which it is kept: it is filled; or with
                values: then none are read for it. None is a blank one in float32.
            text_dtype: of the text encoders, which stay on the CPU.
            vae_dtype: of the autoencoder.
            device: of the network; None is the CPU.
            vae_device: of the autoencoder; None is that of the network.
            encoders: False leaves autoencoder and text encoders out.
            denoiser: False leaves the network blank.

        Raises:
            ModelError: files are damaged, or do not hold what the configurations say.
        """
        device = torch.device("cpu") if device is None else device
        vae_device = vae_device or device
        network = self.blank_network() if network is None else network
        stored = None
        try:
            # The largest part comes last: what reading the others takes for a while is free again.
            parts = dict.fromkeys(("vae", *self.encoders))
            if encoders:
                parts = self._text_encoders(text_dtype) | self._vae(vae_dtype, vae_device)
            if denoiser and is_blank(network):
                stored = self.location.stored(self.component, network.config)
            if stored is not None or not denoiser or not is_blank(network):
                parts[self.component] = network
            pipeline = self.location.load(
                getattr(diffusers, self.pipeline),
                **self.left_out,
                **dict.fromkeys(self.absent()),
                **parts,
            )
            if encoders:
                for name in self.encoders:
                    getattr(pipeline, name).to(text_dtype)
                if "vae" not in parts:
                    pipeline.vae.to(vae_device, vae_dtype)
            if stored is not None:
                fill(network, stored, device=device)
            elif self.component not in parts:
                copy_into(network, getattr(pipeline, self.component).to(device))
                setattr(pipeline, self.component, network)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{self.name}: cannot be read as a {self.pipeline}: {error}"
            ) from error
        if self.schedule != self.location.read_json(SCHEDULE_FILE):
            pipeline.scheduler = build_scheduler(self.schedule)
        return pipeline

    def _text_encoders(self, dtype: torch.dtype) -> dict[str, Any]:
        """By name; those that only the pipeline can read are left to it."""
        found = {}
        for name in self.encoders:
            model_class = getattr(transformers, str((self.index.get(name) or (None, ""))[1]), None)
            if model_class is not None:
                encoder = self.location.load_text_encoder(name, model_class, dtype)
                if encoder is not None:
                    materialize(encoder)
                    found[name] = encoder
        return found

    def _vae(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """The autoencoder by its name; nothing where only the pipeline can read it."""
        try:
            with torch.device("meta"):
                vae = diffusers.AutoencoderKL.from_config(self.autoencoder_config).eval()
        except (TypeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise ModelError(
                f"{self.vae or self.name}: the config.json of its autoencoder describes none: "
                f"{error}"
            ) from error
        if self._autoencoder is None:
            stored = self.location.stored("vae", vae.config)
        else:
            try:
                stored = self._autoencoder.stored(ITSELF, vae.config)
            except ModelError as error:
                raise ModelError(
                    f"vae: cannot read an autoencoder from {self.vae}: {error}"
                ) from error
            if stored is None:
                raise ModelError(f"vae: cannot read an autoencoder from {self.vae}: no safetensors")
        if stored is None:
            return {}
        where = "" if self.vae is None else "vae: "
        fill(cast_blank(vae, dtype), stored, device=device, where=where)
        return {"vae": vae}

    def identities(self) -> list[str | None]:
        """Tell network, autoencoder and text encoders from others; little is read of the files."""
        inside = (self.component, "vae", *self.encoders)
        other = None if self._autoencoder is None else self._autoencoder.identity(ITSELF)
        return [*map(self.location.identity, inside), other]

    def schedule_identity(self, shape: object) -> list[Any]:
        """What of the schedule, and of the shape of the training, tells a run from others."""
        written = self.location.read_json(SCHEDULE_FILE)
        identity: list[Any] = [sorted(written.items()), self.prediction_type, shape]
        if self.prediction_type is None and self.schedule != written:
            identity.append(sorted(self.schedule.items()))
        return identity

    def image_fingerprint(self, adapter: Path | None) -> str:
        """Identifies what images are made by, weights and their schedule: 16 hexadecimal digits.

        Args:
            adapter: the file of one, put into the pipeline.
        """
        names = [
            name
            for name in self.index
            if isinstance(self.index[name], list)
            and self._is_there(name)
            and name.startswith(("unet", "transformer", "vae", "text_encoder"))
        ]
        parts = [self.location.identity(name) for name in names]
        written = self.location.read_json(SCHEDULE_FILE)
        parts.append(str(sorted(written.items())))
        if self.prediction_type is not None:
            parts.append(self.prediction_type)
        elif self.schedule != written:
            parts.append(str(sorted(self.schedule.items())))
        if adapter is not None:
            parts.append(hashlib.blake2b(adapter.read_bytes()).hexdigest())
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()

    def notes(self) -> list[str]:
        """What a person should know of how the model is read, a line each."""
        written = self.location.read_json(SCHEDULE_FILE)
        changed = {k: v for k, v in self.schedule.items() if written.get(k) != v}
        if not changed:
            return []
        return [
            f"{', '.join(f'{key} is {value}' for key, value in changed.items())}, in place of what "
            f"its {SCHEDULE_FILE} says"
        ]


def _with_defaults(network_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(network_class.__init__).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return {**defaults, **config}
