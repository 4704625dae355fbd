"""Low-rank adapters on a network of diffusers or transformers, through peft.

Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); Liu et al. 2024, arXiv:2402.09353 (DoRA);
Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.config import MAY_CHANGE
from diffalign.errors import ModelError
from diffalign.models.adapter_files import AdapterFile, locate_adapter, read_adapter
from diffalign.ranges import AtLeast, Between, Ranged

ADAPTER_SHAPE = ("rank", "alpha", "dora", "rslora", "targets")
"""The settings which an adapter has to be opened with again."""
_FIRST_FACTOR = ".lora_A.weight"
"""How the names of first factors end; they are of shape [rank, ...]."""


@dataclass(frozen=True)
class Scope:
    """Which layers of a network an adapter may change."""

    usual: tuple[str, ...]
    """The last parts of their names, where the settings name none."""
    part: str = ""
    """Dotted name of the only module that is touched; empty for the network as a whole."""

    def pattern(self, targets: tuple[str, ...] | None) -> str:
        """Regular expression of the whole names of layers that get an adapter."""
        endings = "|".join(map(re.escape, targets or self.usual))
        inside = rf"{re.escape(self.part)}\." if self.part else ""
        return rf"{inside}(?:.*\.)?(?:{endings})"


DENOISER = Scope(("to_q", "to_k", "to_v", "to_out.0"))
"""The attention layers of a denoiser."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Ranged):
    """A low-rank adapter; the base stays frozen."""

    rank: Annotated[int, AtLeast(1)] = 16
    """Inner dimension of every pair of factors."""
    alpha: Annotated[int, AtLeast(1)] | None = None
    """The update is scaled by alpha / rank; null means equal to `rank`, a scale of one."""
    targets: tuple[str, ...] | None = None
    """Layers that get an adapter: the last parts of their names in the network. Null takes the
    usual ones: `to_q`, `to_k`, `to_v`, `to_out.0` of a denoiser; the projections of attention and
    of the MLP (`q_proj` to `down_proj`) in the language tower of a vision-language model."""
    dropout: Annotated[float, Between(0, 1, without=[1])] = 0.0
    """Probability of dropping an input of the adapter while the policy trains; the reference has no
    adapter and hence no dropout."""
    dora: bool = False
    """Learn the length of each weight column apart from its direction."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps large ranks learning."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Distribution of the first factor; the second is zero, so training starts at the base. It
    does not matter where `start` is given."""
    seed: int = 0
    """Of the first factor."""
    start: Path | None = field(default=None, metadata=MAY_CHANGE)
    """An adapter to go on from, of the same rank and targets: its file, or the folder of the run
    that trained it. The policy that it makes of the base is then the reference as well, unless
    `reference` says otherwise. Null starts at the base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets == ():
            raise ValueError(
                "targets is empty: name at least one layer, for example to_q, or give null"
            )

    def continuing(self, run: Path | None) -> dict[str, Any]:
        """Settings that open the adapter of a run which had these, as a config writes them."""
        return {**{n: v for n in ADAPTER_SHAPE if (v := getattr(self, n))}, "start": run}

    @property
    def scale(self) -> float:
        """The factor of the product of the low-rank matrices."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def check_targets(network: nn.Module, settings: LoraSettings, *, scope: Scope = DENOISER) -> None:
    """Raise ModelError if a target names no layer within the scope; works on the meta device."""
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.startswith(scope.part)
    ]
    for target in settings.targets or scope.usual:
        if any(re.fullmatch(scope.pattern((target,)), name) for name in layers):
            continue
        endings = sorted({_ending(name) for name in layers})
        nearest = difflib.get_close_matches(target, endings, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ModelError(
            f"lora.targets names {target!r}, which ends the name of no linear or convolution "
            f"layer of {scope.part or type(network).__name__} (there are: {', '.join(endings)})."
            f"{hint}"
        )


def _ending(name: str) -> str:
    """The part of a layer's name that says what it does: `to_out.0`, not `0`."""
    parts = name.split(".")
    first = next(i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit())
    return ".".join(parts[first:])


def check_start(
    network: Any, settings: LoraSettings, *, component: str, scope: Scope = DENOISER
) -> None:
    """Raise ModelError if the adapter at `settings.start` has another shape than these settings.

    Args:
        network: on the meta device; it gets an adapter.
        settings: of the adapter.
        component: what the names of tensors in such a file begin with; see `attach`.
        scope: which layers may get one.
    """
    if settings.start is not None:
        _add(network, settings, scope)
        _starting_values(network, settings, settings.start, component)
        _whole_modules(network, settings.start, component)


def attach(
    network: Any, settings: LoraSettings, *, component: str = "unet", scope: Scope = DENOISER
) -> None:
    """Add an adapter to a frozen network of diffusers or transformers, in float32 on its device.

    The initial values depend on `settings.seed`, or on the file at `settings.start`, alone; the
    global generator is left as it was.

    Args:
        network: gets the adapter.
        settings: of the adapter.
        component: what the names of tensors in a file at `settings.start` begin with: the name of
            the network within its pipeline for diffusers, `PEFT_PREFIX` for peft.
        scope: which layers may get one.

    Raises:
        ModelError: there is no such file, or its adapter has another shape.
    """
    _add(network, settings, scope)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    if settings.start is not None:
        values = _starting_values(network, settings, settings.start, component)
        set_peft_model_state_dict(network, values)
        # What was trained whole next to the adapter is part of the policy that is continued.
        network.load_state_dict(_whole_modules(network, settings.start, component), strict=False)


def _add(network: Any, settings: LoraSettings, scope: Scope) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(settings.seed)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
            target_modules=scope.pattern(settings.targets),
            lora_dropout=settings.dropout,
            use_dora=settings.dora,
            use_rslora=settings.rslora,
            init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        )
        # Not `network.add_adapter`: transformers 5.24 refuses there every peft that exists.
        inject_adapter_in_model(config, network)


def _starting_values(
    network: nn.Module, settings: LoraSettings, start: Path, component: str
) -> dict[str, Tensor]:
    """The adapter at `start` by peft's names, divided by this run's scale."""
    file = locate_adapter(start)
    adapter = read_adapter(file, component=component)
    _refuse_others(adapter, file)
    _refuse_misfit(get_peft_model_state_dict(network), adapter, settings, file)
    ratio = adapter.scale / settings.scale
    return {
        name: value * ratio if ".lora_B." in name else value
        for name, value in adapter.tensors.items()
    }


def _whole_modules(network: nn.Module, start: Path, component: str) -> dict[str, Tensor]:
    file = locate_adapter(start)
    modules = read_adapter(file, component=component).modules
    known = network.state_dict()
    for name, value in modules.items():
        if name not in known or known[name].shape != value.shape:
            raise ModelError(
                f"lora.start: {file} holds {name} of shape {list(value.shape)}, and this model has "
                f"no such weight: the adapter is of another base"
            )
    return modules


def _refuse_others(adapter: AdapterFile, file: Path) -> None:
    """Raise ModelError if training would go on without a part of what the file describes."""
    if adapter.others:
        raise ModelError(
            f"{file}: also changes what no training here does ({adapter.others[0]}, "
            f"{len(adapter.others)} tensors in all): going on without them would start from "
            f"another policy. Merge the adapter into its base (diffalign export form=folder) and "
            f"train from the result"
        )


def _refuse_misfit(
    expected: Mapping[str, Tensor], adapter: AdapterFile, settings: LoraSettings, file: Path
) -> None:
    ranks = {v.shape[0] for name, v in adapter.tensors.items() if name.endswith(_FIRST_FACTOR)}
    if ranks != {settings.rank}:
        raise ModelError(
            f"lora.start: the adapter in {file} has rank {', '.join(map(str, sorted(ranks)))}, and "
            f"lora.rank is {settings.rank}: set lora.rank to that of the file"
        )
    if different := sorted(expected.keys() ^ adapter.tensors.keys()):
        where = "the file" if different[0] in adapter.tensors else "this run"
        raise ModelError(
            f"lora.start: the adapter in {file} and this run's change different layers: only "
            f"{where} has {different[0]} ({len(different)} differ in all). Set lora.targets, and "
            f"lora.dora, to those that it was trained with"
        )
    for name, value in adapter.tensors.items():
        if value.shape != expected[name].shape:
            raise ModelError(
                f"lora.start: {name} is of shape {list(value.shape)} in {file}, and of shape "
                f"{list(expected[name].shape)} in this model: the adapter is of another base"
            )


def settings_of(file: Path, *, component: str = "unet") -> LoraSettings:
    """Settings under which `attach` makes a network the policy that an adapter file describes.

    Raises:
        ModelError: the file holds no adapter, or one of several ranks.
    """
    adapter = read_adapter(file, component=component)
    _refuse_others(adapter, file)
    tensors = adapter.tensors
    ranks = {v.shape[0] for name, v in tensors.items() if name.endswith(_FIRST_FACTOR)}
    if len(ranks) > 1:
        raise ModelError(
            f"{file}: its layers have ranks {', '.join(map(str, sorted(ranks)))}, and an adapter "
            f"in training has one rank"
        )
    return LoraSettings(
        rank=ranks.pop(),
        targets=tuple(
            name.removesuffix(_FIRST_FACTOR) for name in tensors if name.endswith(_FIRST_FACTOR)
        ),
        dora=any(name.endswith(".lora_magnitude_vector") for name in tensors),
        start=file,
    )


def adapter_layers(network: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a network that carry an adapter."""
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Within this context adapters are part of the weights that they change, which saves their own
    products; afterwards the weights are what they were, bit for bit.

    Only weights in float32 are changed: in fewer bits the sum would be rounded, and small updates
    with it. Layers of DoRA, layers whose adapter is off, and quantised ones stay as they are.
    """
    kept: list[tuple[Any, Tensor]] = []
    layers: list[Any] = adapter_layers(network)
    try:
        for layer in layers:
            base = layer.get_base_layer()
            plain = type(base) is nn.Linear and base.weight.dtype == torch.float32
            off = layer.disable_adapters or layer.merged or layer.lora_magnitude_vector
            if not plain or off:
                continue
            with torch.no_grad():
                delta = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                kept.append((layer, base.weight.data))
                base.weight.data = base.weight.data + delta
            layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, weight in kept:
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()


@contextmanager
def disabled(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Run the base alone, whatever happens inside.

    Only what a layer's forward asks for is switched. peft's `enable_adapters` switches
    `requires_grad` of every parameter as well, and on even where it had been off: that is as much
    work for the host as launching a forward, and what trains must not change anyway.

    Args:
        layers: from `adapter_layers`; to be looked up once, as they are found among all modules.
    """
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def portable_state(
    network: nn.Module, values: Mapping[str, Tensor], settings: LoraSettings
) -> dict[str, Tensor]:
    """The adapter as files hold it, float32 and contiguous on the CPU.

    The scale is multiplied into the second factor. A reader that finds no alpha takes it to be the
    rank, and many readers look for none.

    Args:
        network: carries the adapter.
        values: trained parameters by their names in the network.
        settings: what `attach` was given.
    """
    return {
        name: (value * settings.scale if ".lora_B." in name else value)
        .detach()
        .to("cpu", torch.float32)
        .contiguous()
        for name, value in adapter_state(network, values).items()
    }


def adapter_state(network: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter by peft's names, as it trains: nothing is scaled, and nothing copied.

    Args:
        network: carries the adapter.
        values: trained parameters by their names in the network.
    """
    state: dict[str, Tensor] = get_peft_model_state_dict(network, state_dict=dict(values))
    return state


def start_digest(lora: LoraSettings | None) -> str | None:
    """Identifies the adapter that is continued, wherever it lies; None where none is."""
    if lora is None or lora.start is None:
        return None
    return hashlib.blake2b(locate_adapter(lora.start).read_bytes()).hexdigest()
