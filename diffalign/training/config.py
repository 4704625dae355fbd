"""What one training run is: the sections of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from diffalign.config import MAY_CHANGE
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.section import PairSection
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.section import ResponseSection
from diffalign.data.section import AbstractSourceSection
from diffalign.errors import ConfigError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel
from diffalign.objectives.base import AbstractObjective
from diffalign.ranges import AtLeast, Between, Ranged
from diffalign.rollouts.base import AbstractRollouts
from diffalign.rollouts.section import RolloutSection
from diffalign.training.hooks.base import AbstractHookSettings
from diffalign.training.hooks.health import HealthAction
from diffalign.training.hooks.held_out import EvaluationConfig
from diffalign.training.hooks.previews import PreviewsConfig
from diffalign.training.optimizers.base import AbstractOptimizer


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Ranged):
    """How long, how large a batch, how precise, and what is kept."""

    optimizer_steps: Annotated[int, AtLeast(1)]
    """Updates of the weights in the whole run."""
    samples_per_device: Annotated[int, AtLeast(1)] = 1
    """Samples (pairs, for pairwise objectives) of one forward pass on one device."""
    accumulation: Annotated[int, AtLeast(1)] = 1
    """Micro-batches per optimiser step and device."""
    tokens_per_device: Annotated[int, AtLeast(1)] | None = field(default=None, metadata=MAY_CHANGE)
    """Tokens of one forward pass on one device at most, padding and those of images included, for
    responses: the `samples_per_device` times `accumulation` samples of a step are sorted by length
    and cut into as many passes as that takes. The step is the same up to rounding. Null cuts them
    as they come, `samples_per_device` at a time."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Autocast of policy and reference; trained weights and reductions stay in float32."""
    checkpoint_every: Annotated[int, AtLeast(1)] = field(default=500, metadata=MAY_CHANGE)
    """Optimiser steps between checkpoints; the end of a run and an interruption save as well."""
    keep_checkpoints: Annotated[int, AtLeast(1)] = field(default=2, metadata=MAY_CHANGE)
    """How many are kept; the oldest go first."""
    log_every: Annotated[int, AtLeast(1)] = field(default=10, metadata=MAY_CHANGE)
    """Optimiser steps over which figures are averaged before they are written."""
    max_bad_steps: Annotated[int, AtLeast(1)] = field(default=20, metadata=MAY_CHANGE)
    """The run stops after this many steps in a row whose loss or gradient was not finite, at the
    end of the logging interval; fp16 starts with a few while its loss scale settles."""
    health: HealthAction = field(default="warn", metadata=MAY_CHANGE)
    """What follows when the figures of a run say that it does harm (docs/health.md): `warn` says so
    once and goes on; `stop` ends it with a checkpoint; `back_off` halves the learning rate where a
    lower one is the remedy, at most four times, and goes on."""
    sharding: Literal["none", "fsdp2", "zero2", "zero3"] = field(
        default="none", metadata=MAY_CHANGE
    )
    """What processes share out: nothing (each holds all, and gradients are averaged), or weights,
    gradients and optimiser state by FSDP2. One process alone holds all in any case."""
    sharding_options: Mapping[str, Any] = field(default_factory=dict, metadata=MAY_CHANGE)
    """Options of accelerate's `FullyShardedDataParallelPlugin`, such as `cpu_offload: true` or
    `reshard_after_forward: false`."""
    shard_adapter: bool = field(default=False, metadata=MAY_CHANGE)
    """Shard a LoRA run as well: frozen weights take less memory, and are sent in every pass."""
    ema_decay: Annotated[float, Between(0, 1, without=[0, 1])] | None = None
    """Decay of the weight average that is exported instead of the last weights; null for none."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where figures go besides the run folder's own `metrics.jsonl`."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = field(
        default=(), metadata=MAY_CHANGE
    )
    """Any of them; each needs its extra. Credentials come from the environment alone."""
    project: str = field(default="diffalign", metadata=MAY_CHANGE)
    """Project name for wandb and trackio."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    output: Path = field(metadata=MAY_CHANGE)
    """The run folder; everything the run writes lies below it."""
    preset: Literal["8gb", "12gb", "16gb", "24gb", "48gb", "80gb"] | None = field(
        default=None, metadata=MAY_CHANGE
    )
    """Memory of the card that the run should fit. What the config leaves open of
    `training.precision`, `training.samples_per_device`, `model.gradient_checkpointing`,
    `model.images_per_encoding`, `model.encoders`, quantization and optimizer is chosen by the count
    of `diffalign plan`: the first of a ladder from the fastest settings to the smallest that fits.
    With `samples_per_device` left open, `training.accumulation` is the samples of a step on a
    device, which the choice splits. It is printed, and saved with the run in place of the preset.
    Null chooses nothing."""
    seed: int = 0
    """All randomness derives from it and from its sample; an adapter starts from `lora.seed`."""
    model: AbstractModel
    """What is trained, and where its weights come from."""
    reference: Literal["auto", "adapter_off", "frozen_copy", "past_policy", "cached", "none"] = (
        "auto"
    )
    """What the policy is compared with: the same network with its adapter off (LoRA), a frozen
    copy (full fine-tuning), an earlier policy (which one, `rollouts.reference` says; without
    rollouts the one that `model.lora.start` makes), or nothing. `auto` takes the cheapest that
    objective, rollouts and model allow. `cached` is what auto would take for image pairs
    or responses of a data set, as `diffalign precompute` wrote it: no reference is run or held."""
    reference_cache: Path | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of those values, which other runs may share; null is `cache/references` below
    `output`."""
    encodings_cache: Path | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of what `diffalign precompute` made of images and captions for `model.encoders:
    cached`, which other runs may share; null is `cache/encodings` below `output`."""
    data: PairConfig | None = None
    """The preference data of images; null where all is sampled, or responses are preferred."""
    responses: ResponseConfig | None = None
    """The preference data of responses about images; null for images."""
    rollouts: AbstractRollouts | None = None
    """How samples of the policy itself become batches; null trains on the data alone."""
    likelihood: AbstractLikelihood
    """How probable the model finds a sample."""
    objective: AbstractObjective
    """What is wanted of those probabilities."""
    optimizer: AbstractOptimizer
    """Optimiser, learning rate and schedule; without a `kind` it is adamw."""
    training: TrainingConfig
    """Length, batch, precision, checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """TensorBoard, wandb, trackio."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How often, and how, the pairs are evaluated that `data.holdout` or `responses.holdout` keeps
    back; without either nothing is."""
    previews: PreviewsConfig | None = None
    """What is made of the policy as it trains, for people to look at; null for nothing."""
    hooks: tuple[AbstractHookSettings, ...] = field(default=(), metadata=MAY_CHANGE)
    """Hooks of your own, each `{kind: my_package.my_module, ...}`: see docs/hooks.md."""

    @property
    def section(self) -> AbstractSourceSection[Any, Any]:
        """The section that batches come from; all that depends on its kind it says itself.

        Raises:
            ConfigError: none is given, or two that exclude each other.
        """
        if self.responses is not None:
            for name, other in (("data", self.data), ("rollouts", self.rollouts)):
                if other is not None:
                    raise ConfigError(
                        f"responses names {self.responses.path}, and there is a section {name} as "
                        f"well: a run trains on responses or on images, remove one of them"
                    )
            return ResponseSection(self.responses)
        pairs = None if self.data is None else PairSection(self.data)
        if self.rollouts is not None and (pairs is not None or not self.rollouts.needs_data):
            return RolloutSection(self.rollouts, pairs)
        if pairs is None:
            raise ConfigError(
                "data is null, and so there is nothing to train on: give data.path, rollouts that "
                "sample everything (d3po, spo), or responses.path for responses"
            )
        return pairs
