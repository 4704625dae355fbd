"""Training in which no process holds the whole network: FSDP2 of torch, through accelerate.

Weights, gradients and optimiser state of every block are shared out among the processes, and put
together block by block as the forward and the backward pass come to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from packaging.version import Version
from torch import nn

from diffalign import components, world
from diffalign.errors import ConfigError, ModelError, did_you_mean
from diffalign.models.devices import DTYPES
from diffalign.training.config import RunConfig
from diffalign.training.reference import resolve_reference

_TORCH, _ACCELERATE = "2.9", "1.15"
"""Versions from which on checkpoints of shards are safetensors, and clipping knows shards."""
_OPTIONS = (
    "cpu_offload",
    "reshard_after_forward",
    "transformer_cls_names_to_wrap",
)
"""What of accelerate's plugin means something for FSDP2 and is not decided by other settings."""


def check_sharding(run: RunConfig) -> None:
    """Raise ConfigError unless a run can be sharded as it asks; nothing is loaded."""
    training = run.training
    if training.sharding == "none":
        if training.sharding_options:
            raise ConfigError(
                "training.sharding_options are those of training.sharding fsdp2, which is none: "
                "set it, or leave the options out"
            )
        return
    asked = f"training.sharding is {training.sharding}"
    if training.sharding in ("zero2", "zero3"):
        raise ConfigError(
            f"{asked}, the sharding of DeepSpeed, which this version has not been tested with and "
            f"does not run: fsdp2 shares out the same three things (weights, gradients, optimiser "
            f"state), and sharding_options.reshard_after_forward=false is nearest to zero2"
        )
    _check_versions(asked)
    if run.model.trains_adapter and not training.shard_adapter:
        raise ConfigError(
            f"{asked}, and model.lora is trained: an adapter has little to share out, and the "
            f"frozen weights would be sent in every pass, which replicas do without. Set "
            f"training.sharding to none; where the frozen weights do not fit a device, "
            f"training.shard_adapter=true shares them out nevertheless"
        )
    try:
        run.model.check_sharding()
    except ValueError as error:
        raise ConfigError(f"{asked}: {error}") from error
    if training.precision == "fp16":
        raise ConfigError(f"{asked}, and training.precision is fp16: use bf16 or float32")
    if run.rollouts is not None:
        raise ConfigError(
            f"{asked}, and rollouts sample on each process by itself, which has a part of the "
            f"network alone: train a LoRA on replicas (training.sharding none)"
        )
    if run.likelihood.walks:
        raise ConfigError(
            f"{asked}, and likelihood.inversion runs the network as often as the times of a "
            f"process ask for, where all must run it equally often: set one of them to none"
        )
    if not run.optimizer.shards:
        raise ConfigError(
            f"{asked}, and optimizer.kind {components.kind_of(run.optimizer)} looks at whole "
            f"weights, or has not been tested with parts of them: use adamw"
        )
    if (reference := resolve_reference(run)) == "past_policy":
        raise ConfigError(
            f"{asked}, and reference is {reference}, which exchanges weights in place: train all "
            f"weights against a frozen copy, or precompute the reference"
        )
    plugin_of(run)


def _check_versions(asked: str) -> None:
    for package, least in ((torch, _TORCH), (accelerate, _ACCELERATE)):
        if Version(package.__version__) < Version(least):
            raise ConfigError(
                f"{asked}, which needs {package.__name__} {least} or newer, and "
                f"{package.__version__} is installed: pip install --upgrade {package.__name__}, or "
                f"set it to none"
            )


def plugin_of(run: RunConfig) -> FullyShardedDataParallelPlugin:
    """How accelerate is told to shard: per block, with the options of the config.

    Raises:
        ConfigError: an option is none of accelerate's, or is decided elsewhere.
    """
    options = dict(run.training.sharding_options)
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(
                f"training.sharding_options.{name} is none of the options of accelerate's "
                f"FullyShardedDataParallelPlugin that are open here: {', '.join(_OPTIONS)}; the "
                f"others are FSDP1's, or settings of their own.{did_you_mean(name, _OPTIONS)}"
            )
    try:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,  # no process ever has the whole network
            mixed_precision_policy=_precision(run),
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training.sharding_options: {error}") from error


def _precision(run: RunConfig) -> Any:
    """Weights are put together in the precision of the computation and gradients summed in float32.

    What goes into the network stays as it is: rounding a timestep to bf16 would change it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = DTYPES[run.training.precision]
    if dtype == torch.float32:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def use_plugin(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make an accelerator one of FSDP where it does not do so itself, as on CPUs (gloo)."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


@dataclass(frozen=True)
class FsdpSharder:
    """Shares networks out block by block, as accelerate's plugin says."""

    accelerator: Accelerator

    @property
    def home(self) -> torch.device:
        """Where shards are kept: on the device, or in host memory under `cpu_offload`."""
        from torch.distributed.fsdp import CPUOffloadPolicy

        offloads = isinstance(self.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
        return torch.device("cpu") if offloads else self.accelerator.device

    def shard(self, network: nn.Module) -> None:
        """See `Sharder`.

        Raises:
            ModelError: the plugin finds no blocks in the network.
        """
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
        from torch.distributed.fsdp import register_fsdp_forward_method

        plugin = self.accelerator.state.fsdp_plugin
        plugin.ignored_modules = getattr(network, "whole_parts", list)()
        if not plugin.transformer_cls_names_to_wrap and not getattr(
            network, "_no_split_modules", None
        ):
            raise ModelError(
                f"{type(network).__name__} does not say which of its layers are blocks: name their "
                f"classes in training.sharding_options.transformer_cls_names_to_wrap"
            )
        trained = [name for name, value in network.named_parameters() if value.requires_grad]
        network.requires_grad_(False)  # accelerate brings to float32 what trains, while it is whole
        try:
            fsdp2_prepare_model(self.accelerator, network)
        except ValueError as error:
            raise ModelError(f"training.sharding: {error}") from error
        for name in trained:
            network.get_parameter(name).requires_grad_(True)
        for name in getattr(network, "methods_of_shards", ()):
            register_fsdp_forward_method(network, name)


def sharder_of(run: RunConfig, accelerator: Accelerator) -> FsdpSharder | None:
    """What shares a run's networks out; None where every process holds them whole, as one alone
    does in any case."""
    if run.training.sharding == "none" or world.size() == 1:
        return None
    return FsdpSharder(accelerator)
