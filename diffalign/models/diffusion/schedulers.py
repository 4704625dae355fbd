"""Schedulers of diffusers as latent diffusion models need them: what a configuration says, and the
scheduler that samples by it.

A `scheduler_config.json` holds two things. The noise schedule and the prediction type belong to the
model, which was trained with them: no sampler may differ in them. All else is one sampler's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffalign.errors import ConfigError, ModelError, did_you_mean
from diffalign.models.locations import AbstractLocation

SCHEDULE_FILE = "scheduler/scheduler_config.json"

SCHEDULERS = (
    "DDIM",
    "DDPM",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LCM",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "TCD",
    "UniPCMultistep",
)
"""Samplers of models with a beta schedule, by the names of their classes in diffusers without
`Scheduler`. `DPMSolverSDE` is left out: its noise comes from a generator of its own, so that an
image would depend on its batch."""

_SAME_SCHEDULE = (
    "DDIMInverse",
    "DDIMParallel",
    "DDPMParallel",
    "DPMSolverMultistepInverse",
    "DPMSolverSDE",
)
"""Classes next to these whose configurations describe such noise schedules."""

_SCHEDULE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
MODEL_FIELDS = (*_SCHEDULE_FIELDS, "prediction_type")
"""What a scheduler's configuration says of the model rather than of a sampler."""

_FOR_LATENTS = {"clip_sample": False, "thresholding": False}
"""Latents are not bounded as pixels are: cutting them off at 1 destroys the image. Classes that
have these fields switch the first on where a configuration does not speak of it."""

_SUBSTITUTES = ("DDIM", "DDPM")
"""Stand in for a model's own class that cannot follow its noise schedule."""


def model_schedule(
    location: AbstractLocation,
    *,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> dict[str, Any]:
    """A model's scheduler configuration: what the file says, then what the weights say of
    themselves, then what the settings say.

    Args:
        location: of the model; no weights are read.
        prediction_type: a setting; None takes what the files say.
        zero_terminal_snr: a setting; None takes what the files say.

    Raises:
        ModelError: there is no such file, the weights contradict it or themselves, or settings are
            given for a model that has no such thing.
    """
    config = location.read_json(SCHEDULE_FILE)
    changes = location.marks(prediction_type=prediction_type)
    edm = changes.pop("edm", None)
    if zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = zero_terminal_snr
    own = scheduler_name(config)
    if edm is not None and not own.startswith("EDM"):
        raise ModelError(
            f"{location}: holds {edm}, so it was trained with EDM's preconditioning, and "
            f"{SCHEDULE_FILE} is of {config.get('_class_name')} (supported: epsilon and "
            f"v_prediction on a beta schedule)"
        )
    if changes and own and not has_beta_schedule(config):
        raise ModelError(
            f"{', '.join(changes)} cannot be set for a model whose {SCHEDULE_FILE} is of "
            f"{config['_class_name']}: they belong to models with a beta schedule"
        )
    return {**config, **changes}


def scheduler_name(config: Mapping[str, Any]) -> str:
    """The class that a configuration is of, without `Scheduler`; empty where it does not say."""
    return str(config.get("_class_name") or "").removesuffix("Scheduler")


def has_beta_schedule(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is of a class whose noise schedule is made of betas."""
    return scheduler_name(config) in (*SCHEDULERS, *_SAME_SCHEDULE)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what it leaves out, as its own class fills it in.

    Args:
        config: of a class with a beta schedule.

    Raises:
        ModelError: the installed diffusers lacks that class.
    """
    found = getattr(diffusers, f"{scheduler_name(config)}Scheduler", None)
    if found is None:
        raise ModelError(
            f"scheduler_config.json is of {config.get('_class_name')}, which diffusers "
            f"{diffusers.__version__} lacks: install a newer one"
        )
    defaults = _defaults(found)
    if not defaults:  # diffusers puts an empty class in the place of one that it cannot import
        raise ModelError(
            f"scheduler_config.json is of {config['_class_name']}, which needs a package that is "
            f"not installed (torchsde for DPMSolverSDEScheduler)"
        )
    return {**defaults, **config}


def _defaults(scheduler_class: Any) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(scheduler_class.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """Squared share of the image at each timestep, shape [num_train_timesteps], float64.

    Args:
        config: from `with_defaults`.

    Raises:
        ModelError: it describes no schedule.
    """
    given = {name: config[name] for name in _SCHEDULE_FIELDS if name in config}
    try:
        schedule: Any = DDPMScheduler(**given)
        shares: Tensor = schedule.alphas_cumprod.double()
    except (NotImplementedError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"scheduler_config.json describes no noise schedule "
            f"({', '.join(f'{name} {value!r}' for name, value in given.items())}): {error}"
        ) from error
    if len(shares) != given.get("num_train_timesteps", len(shares)):
        raise ModelError(
            f"scheduler_config.json has num_train_timesteps {given['num_train_timesteps']}, and "
            f"trained_betas of length {len(shares)}: they must be equal"
        )
    betas: Tensor = schedule.betas
    if not len(shares) or not ((betas >= 0) & (betas <= 1)).all():  # NaN is in no range
        raise ModelError(
            "scheduler_config.json describes no noise schedule: there must be at least one "
            "timestep, and every beta must lie from 0 to 1 (see num_train_timesteps, beta_start, "
            "beta_end, trained_betas)"
        )
    return shares


def build_scheduler(config: Mapping[str, Any], name: str | None = None) -> Any:
    """A scheduler that samples latents of the model that a configuration is of.

    It follows the model's noise schedule and prediction type, and neither clips nor thresholds.

    Args:
        config: the model's own.
        name: of another class, with or without `Scheduler`, that is to sample; None keeps the
            model's own. One that cannot follow the model's schedule (PNDM knows no zero terminal
            SNR) is replaced by DDIM where it is the model's own, and refused where it is named.

    Raises:
        ConfigError: the name is not of a sampler for this model.
        ModelError: the model's own configuration makes no scheduler.
    """
    if not has_beta_schedule(config):
        return _build_other(config, name)
    model = with_defaults(config)
    chosen = scheduler_name(config) if name is None else _known(name, SCHEDULERS)
    if chosen not in SCHEDULERS:
        raise ConfigError(
            f"the model's own scheduler is {config['_class_name']}, which does not sample here: "
            f"set sampler.scheduler to one of {', '.join(SCHEDULERS)}"
        )
    for candidate in (chosen, *(_SUBSTITUTES if name is None else ())):
        built = _build(candidate, config, model)
        if built is not None:
            return built
    asked = ", ".join(f"{field} {model[field]!r}" for field in MODEL_FIELDS if field in model)
    able = [other for other in SCHEDULERS if _build(other, config, model) is not None]
    raise ConfigError(
        f"sampler.scheduler: {chosen} cannot follow the noise schedule of this model ({asked}); "
        f"these can: {', '.join(able)}"
    )


def _known(name: str, offered: tuple[str, ...]) -> str:
    short = name.removesuffix("Scheduler")
    if short in offered and hasattr(diffusers, f"{short}Scheduler"):
        return short
    raise ConfigError(
        f"sampler.scheduler: {name!r} is no sampler for this model (there are: "
        f"{', '.join(offered)}).{did_you_mean(short, offered, cutoff=0.4)}"
    )


def _build(name: str, config: Mapping[str, Any], model: Mapping[str, Any]) -> Any | None:
    """A scheduler of that class with the model's noise schedule; None if it has another one."""
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    taken = _defaults(scheduler_class)
    settings = {field: model[field] for field in MODEL_FIELDS if field in model}
    if name == "PNDM" and "skip_prk_steps" not in config:
        settings["skip_prk_steps"] = True  # as all Stable Diffusion models have it
    settings |= _FOR_LATENTS
    settings = {field: value for field, value in settings.items() if field in taken}
    rest = {field: value for field, value in config.items() if field not in _FOR_LATENTS}
    try:
        built = scheduler_class.from_config(rest, **settings)
    except NotImplementedError:  # it knows no such beta schedule
        return None
    wanted = alphas_cumprod(model)
    ours = getattr(built, "alphas_cumprod", None)
    # Some keep the last share a little above 0, to divide by it.
    if ours is None or not torch.allclose(ours.double(), wanted, rtol=1e-4, atol=1e-6):
        return None
    return built


def _build_other(config: Mapping[str, Any], name: str | None) -> Any:
    """A scheduler for a model of another kind: its own class, or one of the same family."""
    own = scheduler_name(config)
    family = next((start for start in ("EDM", "FlowMatch") if own.startswith(start)), own)
    offered = tuple(
        sorted(
            found.removesuffix("Scheduler")
            for found in dir(diffusers)
            if found.endswith("Scheduler") and family and found.startswith(family)
        )
    )
    if not offered:
        raise ModelError(
            f"scheduler_config.json is of {config.get('_class_name')!r}, which diffusers "
            f"{diffusers.__version__} lacks"
        )
    scheduler_class = getattr(
        diffusers, f"{own if name is None else _known(name, offered)}Scheduler"
    )
    taken = _defaults(scheduler_class)
    settings = {field: value for field, value in _FOR_LATENTS.items() if field in taken}
    return scheduler_class.from_config(dict(config), **settings)
