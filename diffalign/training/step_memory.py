"""The memory of a run's step, found by doing the step without weights, data or device.

The model is loaded as `train` loads it, but blank; then the run's own likelihood, objective,
backward pass and optimiser run on it at the true size, on the meta device (`models.simulation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, cast

import torch

from diffalign.data.batches import ImageBatch, ImageEncodings, TokenBatch
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.index import bucket_sizes
from diffalign.errors import ConfigError
from diffalign.models.base import AbstractBlank
from diffalign.models.devices import DTYPES
from diffalign.models.diffusion.blank import TEXT, VAE, without_weights
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.simulation import META, SimulatedDevice, Simulation, simulated
from diffalign.training.config import RunConfig
from diffalign.training.hooks.weight_average import WeightAverage
from diffalign.training.look_ahead import views_of
from diffalign.training.optimizers.base import parameter_groups
from diffalign.training.reference import resolve_reference
from diffalign.training.response_memory import blank_token_batch

PHASES = ("encode", "reference", "policy", "backward", "update")
ENCODE, REFERENCE, POLICY, BACKWARD, UPDATE = PHASES
"""Phases of a step, by which what is only held for a while is labelled."""

WEIGHTS, TRAINED, COPY = "base weights", "trained weights", "reference copy"
GRADIENTS, STATE, AVERAGE = "gradients", "optimiser state", "weight average"
RESIDENT = (WEIGHTS, TRAINED, COPY, TEXT, VAE, GRADIENTS, STATE, AVERAGE)
"""What has a name of its own, in the order of tables; all else are activations."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on the device."""

    phases: Mapping[str, Mapping[str, int]]
    """Phase of a step -> the parts at its fullest moment, by name; `activations` is all that a
    forward, a backward or an encoder holds for a while."""
    work: Mapping[str, int]
    """Phase -> floating-point operations of matrix products and convolutions, by a micro-batch."""

    @property
    def fullest(self) -> str:
        """The phase in which the peak is."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> Mapping[str, int]:
        """The parts at the peak."""
        return self.phases[self.fullest]

    @property
    def peak(self) -> int:
        """All of them together."""
        return sum(self.parts.values())


def step_memory(run: RunConfig, *, device: SimulatedDevice) -> StepMemory:
    """Simulate a step of a run.

    Args:
        run: on pairs of images or on responses; the configurations of its model must be within
            reach, and neither weights nor data.
        device: whose rules hold.

    Raises:
        ConfigError: no step of it can be simulated; why.
        ModelError: the configurations describe no model.
    """
    refuse_unplannable(run)
    dtype, reference = DTYPES[run.training.precision], resolve_reference(run)
    blank = run.model.blank()
    assert blank is not None, "it can be planned"
    encodings = blank_encodings(run) if run.model.takes_encodings else None
    with _without_values(), simulated(device) as simulation:
        model: Any = blank.settings.load(
            device=META,
            compute_dtype=dtype,
            reference="none" if reference == "cached" else reference,
        )
        model = blank.ready(model)
        _mark_weights(simulation, model, blank)
        batch = blank_token_batch(run) if run.responses else _blank_batch(run, encodings)
        step = _Step(run, model, simulation)
        step.update()
        if run.training.accumulation == 1:
            step.optimizer.zero_grad()
        step.micro_batch(batch)
        fewer, unpacked = blank.saved_by_few_bits(dtype)
        work = {phase: simulation.work[phase] for phase in PHASES}
        return StepMemory(phases=_phases(simulation, fewer, unpacked), work=work)


@contextmanager
def _without_values() -> Iterator[None]:
    """Raise ConfigError where a library computes what tensors without values cannot."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"a step of this run cannot be simulated by torch {torch.__version__} and transformers "
            f"{metadata.version('transformers')} ({said:.200}): take newer ones, or start it with "
            f"a small training.samples_per_device"
        ) from error


def refuse_unplannable(run: RunConfig) -> None:
    """Raise ConfigError unless the run trains, whole on each device, a denoiser on image pairs or
    a vision-language model on responses."""
    if run.training.sharding != "none":
        raise ConfigError(
            f"training.sharding is {run.training.sharding}, and so far memory is planned for runs "
            f"that hold the whole network on each device alone: plan it with "
            f"training.sharding=none, and divide weights, gradients and optimiser state by the "
            f"number of processes"
        )
    if run.rollouts is not None or (run.data is None and run.responses is None):
        raise ConfigError(
            "this run samples from its model (rollouts), and so far memory is planned for runs on "
            "pairs of images or on responses alone: start it with a small "
            "training.samples_per_device"
        )
    wanted = "images" if run.responses is None else "responses"
    if run.model.makes != wanted or run.model.blank() is None:
        raise ConfigError(
            "memory is planned for models that denoise images, such as sdxl, and for vlm, and this "
            "run trains another one: start it with a small training.samples_per_device"
        )


def _mark_weights(simulation: Simulation, model: Any, blank: AbstractBlank) -> None:
    """Name all that a loaded model holds."""

    def held(module: Any) -> Iterator[torch.Tensor]:
        if isinstance(module, torch.nn.Module):
            yield from module.parameters()
            yield from module.buffers()

    network = model.network
    simulation.mark((p for p in held(network) if not p.requires_grad), WEIGHTS)
    simulation.mark((p for p in held(network) if p.requires_grad), TRAINED)
    reference = vars(model).get("_reference")
    own = set(map(id, held(network)))  # a copy shares what never trains
    copied = (t for t in held(getattr(reference, "network", None)) if id(t) not in own)
    simulation.mark(copied, COPY)
    simulation.mark(getattr(reference, "_values", {}).values(), COPY)
    for name, modules in blank.frozen_parts().items():
        for module in modules:
            simulation.mark(held(module), name)


class _Step:
    """A step of the loop, its phases labelled."""

    def __init__(self, run: RunConfig, model: Any, simulation: Simulation) -> None:
        self.run, self.model, self.simulation = run, model, simulation
        self.parameters = [parameter for _, parameter in model.trained_parameters()]
        groups = parameter_groups(model.trained_parameters(), model.learning_rates())
        self.optimizer = run.optimizer.blank(groups)
        self.average = None
        if run.training.ema_decay is not None:
            with self._phase(AVERAGE):
                self.average = WeightAverage(
                    model.trained_parameters(), decay=run.training.ema_decay
                )

    @contextmanager
    def _phase(self, label: str) -> Iterator[None]:
        before, self.simulation.label = self.simulation.label, label
        try:
            yield
        finally:
            self.simulation.label = before

    def update(self) -> None:
        """What the optimiser does with gradients, and keeps."""
        with self._phase(GRADIENTS):
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter)
        with self._phase(UPDATE):
            most = self.run.optimizer.max_grad_norm or float("inf")
            torch.nn.utils.clip_grad_norm_(self.parameters, most)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(torch.tensor(True))
        for state in self.optimizer.state.values():
            kept = (value for value in state.values() if isinstance(value, torch.Tensor))
            self.simulation.mark(kept, STATE)

    def micro_batch(self, batch: ImageBatch | TokenBatch) -> None:
        """What `Trainer` does with one, after an optimiser step before it."""
        run, model, likelihood = self.run, self.model, self.run.likelihood
        with self._phase(ENCODE):
            prepared = likelihood.prepare(model, batch)
        reference: Mapping[str, torch.Tensor] = {}
        if run.objective.needs_reference:
            with self._phase(REFERENCE):
                if run.reference == "cached":
                    reference = {
                        view: torch.empty(len(batch), device=META) for view in run.objective.views
                    }
                else:
                    with torch.no_grad(), model.reference():
                        reference = likelihood.evaluate(model, prepared)
        with self._phase(POLICY):
            policy = likelihood.evaluate(model, prepared)
            known = likelihood.row_metadata(prepared)
            views = views_of(policy, reference, known, {}, batch.strength)
            loss = run.objective(views).loss.mean()
        marks = [
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
            for parameter in self.parameters
        ]
        with self._phase(BACKWARD):
            loss.backward()
        for mark in marks:
            mark.remove()

    def _note_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.simulation.mark([parameter.grad], GRADIENTS)


VIEWS = ("chosen", "rejected")


def _largest(data: PairConfig) -> tuple[int, int]:
    """(height, width) of the images of the largest batch."""
    if not data.buckets:
        return data.resolution, data.resolution
    return max(bucket_sizes(data.resolution), key=lambda size: size[0] * size[1])


def blank_encodings(run: RunConfig) -> ImageEncodings:
    """What `precompute` would have made of a batch; the blank encoders run outside of the count."""
    assert run.data is not None
    settings = cast(AbstractDiffusion, run.model)
    n, (height, width) = run.training.samples_per_device, _largest(run.data)
    model = without_weights(settings)
    with simulated("cpu"), torch.no_grad():
        conditioner = model.conditioner(model.parts.read())
        made = conditioner.encode([str(i) for i in range(n)])
    rows = {"hidden_states": made.hidden_states, "pooled": made.pooled}
    dtype = DTYPES[run.training.precision]
    channels, *latent = model.parts.latent_space().shape((height, width))
    channels *= 1 if settings.posterior == "mean" else 2
    posterior = torch.empty(n, channels, *latent, device=META, dtype=DTYPES[settings.vae_dtype])
    return ImageEncodings(
        size=(height, width),
        posteriors={view: posterior for view in VIEWS if view in run.objective.views},
        prompts={name: row.to(dtype) for name, row in rows.items() if row is not None},
        prompt_rows=torch.arange(n),
    )


@dataclass(frozen=True, kw_only=True)
class AdvanceWork:
    """Floating-point operations of what `precompute` does: matrix products and convolutions."""

    image: int
    """Of the autoencoder, for one image."""
    caption: int
    """Of the text encoders, for one caption."""
    reference: int
    """Of the network, for one image at one visit."""


def advance_work(run: RunConfig) -> AdvanceWork:
    """Count what encoders and reference of a run compute for one pair, on the meta device.

    Args:
        run: that can be planned.
    """
    one = replace(run.training, samples_per_device=1)
    model_settings = replace(cast(AbstractDiffusion, run.model), encoders="resident")
    run = replace(run, training=one, model=model_settings)
    settings = without_weights(model_settings)
    with simulated("cpu") as simulation, torch.no_grad():
        model: Any = settings.load(
            device=META,
            compute_dtype=DTYPES[run.training.precision],
            reference="none",
            trainable=False,
        )
        batch = _blank_batch(run)
        simulation.label = "image"
        model.latents(batch)
        simulation.label = "caption"
        model.conditioning(batch)
        simulation.label = "other"
        prepared = run.likelihood.prepare(model, batch)
        simulation.label = "reference"
        run.likelihood.evaluate(model, prepared)
    work, views = simulation.work, len(batch.views)
    return AdvanceWork(
        image=work["image"] // views,
        caption=work["caption"],
        reference=work["reference"] // views,
    )


def _blank_batch(run: RunConfig, encodings: ImageEncodings | None = None) -> ImageBatch:
    """A batch of the run's size without a pixel."""
    assert run.data is not None
    n = run.training.samples_per_device
    views = [view for view in VIEWS if view in run.objective.views]
    height, width = _largest(run.data)
    whole = torch.zeros(n, 2, dtype=torch.int64)
    return ImageBatch(
        sample_ids=tuple(map(str, range(n))),
        prompts=tuple(f"prompt {i}" for i in range(n)),
        captions=tuple(f"prompt {i}" for i in range(n)),
        images={}
        if encodings is not None
        else {view: torch.empty(n, 3, height, width, device=META) for view in views},
        original_sizes=dict.fromkeys(views, whole),
        crop_corners=dict.fromkeys(views, whole),
        timesteps=torch.zeros(n, dtype=torch.float64),
        noise_seeds=tuple(range(n)),
        encoding_seeds={view: tuple(range(n)) for view in views},
        strength={part: torch.empty(n, device=META) for part in run.data.strength.asked},
        encodings=encodings,
    )


def _phases(simulation: Simulation, fewer: int, unpacked: int) -> dict[str, dict[str, int]]:
    """The fullest moments of the phases, what has no name of its own added up; the base weights
    without so many bytes, and what is unpacked of them with the activations."""
    found = {}
    state = simulation.alive(STATE)
    for phase in PHASES:
        peak = simulation.peaks.get(phase)
        if peak is not None:
            named = {part: size for part in RESIDENT if (size := peak.by_label.get(part, 0))}
            if phase == UPDATE:  # where it is made, under the name of the phase
                named[STATE] = state
            rest = peak.total - sum(named.values())
            if fewer:
                named[WEIGHTS] -= fewer
                rest += unpacked if phase in (REFERENCE, POLICY, BACKWARD) else 0
            found[phase] = {**named, "activations": rest}
    return found
