"""Adapters for whole pipelines of diffusers: read in any published layout, put in through peft.

Neither diffusers' nor transformers' own loading of adapters is called: both refuse versions of peft
that work, and each adapts another part of a pipeline.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, LoraModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from diffalign.errors import ModelError
from diffalign.files import open_tensors
from diffalign.models.adapter_files import METADATA, read_adapter
from diffalign.models.runs import checkpoint_of
from diffalign.parsing import parse_json

_FIRST, _SECOND = ".lora_A.weight", ".lora_B.weight"
_LENGTHS = ".lora_magnitude_vector"
_OLDER = re.compile(
    r"(?:\.processor)?\.(?:to_(?P<projection>q|k|v|out)_lora|lora|lora_linear_layer)"
    r"\.(?P<which>down|up)\.weight$"
)


def add_adapter(pipeline: Any, file: Path, *, merge: bool) -> None:
    """Make a pipeline the one that an adapter describes, its text encoders included.

    Args:
        pipeline: in float32; each network that the file changes is changed in place.
        file: a `.safetensors` file with the names of diffusers, of peft below a component's name,
            or of kohya-ss (which A1111 and ComfyUI read).
        merge: add the change to the weights; else the layers of peft stay.

    Raises:
        ModelError: the file is damaged, of another model, or holds what is no LoRA.
    """
    put_adapters(pipeline, read_adapters(pipeline, file), where=str(file), merge=merge)


def put_adapters(
    pipeline: Any, adapters: Mapping[str, Mapping[str, Tensor]], *, where: str, merge: bool
) -> None:
    """Adapt networks of a pipeline.

    Args:
        pipeline: see `add_adapter`.
        adapters: tensors by component and peft's names, at a scale of one.
        where: what they were read from, for messages.
        merge: see `add_adapter`.

    Raises:
        ModelError: they are of another model.
    """
    for component, named in adapters.items():
        network = getattr(pipeline, component)
        tensors = _by_names_of(network, named)
        try:
            tuner = LoraModel(network, _config(tensors), "default")
        except ValueError as error:
            raise ModelError(f"{where}: {component} cannot be adapted: {error}") from error
        expected = get_peft_model_state_dict(network)
        _refuse_other_layers(expected, tensors, f"{where}: {component}")
        set_peft_model_state_dict(
            network, {name: value.reshape(expected[name].shape) for name, value in tensors.items()}
        )
        network.requires_grad_(False)
        if merge:
            tuner.merge_and_unload()


def read_adapters(
    pipeline: Any, file: Path, *, unet_config: Any = None
) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter by component and peft's names, at a scale of one.

    Args:
        pipeline: that it is for, or the class of such a pipeline.
        file: see `add_adapter`.
        unet_config: of the UNet, where a class is given.

    Raises:
        ModelError: the file is damaged, changes no part of this pipeline, or holds what is no LoRA.
    """
    if checkpoint_of(file) is not None:
        component = "unet" if hasattr(pipeline, "unet") else "transformer"
        adapter = read_adapter(file, component=component)
        return {
            component: {
                name: value.float() * (adapter.scale if name.endswith(_SECOND) else 1.0)
                for name, value in adapter.tensors.items()
            }
        }
    tensors, header = _read(file)
    if kind := next((name for name in tensors if "dora_scale" in name), None):
        raise ModelError(
            f"{file}: holds {kind}, a DoRA in the layout of kohya-ss, which is not read here. Give "
            f"the same adapter in the layout of diffusers or peft (lora_magnitude_vector)"
        )
    try:
        found_state = pipeline.lora_state_dict(
            _without_alphas(tensors), unet_config=unet_config or _unet(pipeline)
        )
    except (ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{file}: its names are of no known layout: {error}") from error
    # Pipelines with a UNet also return alphas.
    named = found_state[0] if isinstance(found_state, tuple) else found_state
    found = {}
    for component in pipeline._lora_loadable_modules:
        prefix = f"{component}."
        ours = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
        if not ours:
            continue
        if not inspect.isclass(pipeline) and getattr(pipeline, component, None) is None:
            raise ModelError(f"{file}: changes {component}, which this base has not")
        ours = {_by_name_of_peft(name, component): value for name, value in ours.items()}
        found[component] = _at_scale_one(ours, _Scales.read(header, prefix))
        if other := next((k for k in ours if ".lora_" not in k), None):
            raise ModelError(f"{file}: {prefix}{other} is no part of a LoRA, and only LoRA is read")
    if len(named) > sum(map(len, found.values())):
        left = next(k for k in named if not k.startswith(tuple(f"{name}." for name in found)))
        raise ModelError(
            f"{file}: changes no layer of this base with {left}: it was made for another model"
        )
    if not found:
        raise ModelError(f"{file}: holds no tensors")
    return found


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        with open_tensors(file, error=ModelError) as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
            text = (opened.metadata() or {}).get(METADATA, "{}")
        header = parse_json(text, METADATA, error=ModelError)
    except ModelError as error:
        raise ModelError(f"{file}: cannot be read as an adapter: {error}") from error
    return tensors, header if isinstance(header, dict) else {}


def _unet(pipeline: Any) -> Any:
    return pipeline.unet.config if hasattr(pipeline, "unet") else None


def _without_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Second factors times alpha / rank, in the layout of kohya-ss; others are left as they are."""
    plain = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    for name in tensors.keys() - plain.keys():
        layer = name.removesuffix(".alpha")
        up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
        if up in plain and down in plain:
            plain[up] = plain[up] * (tensors[name].item() / plain[down].shape[0])
        else:
            plain[name] = tensors[name]  # of another kind of adapter: refused by its name
    return plain


def _by_name_of_peft(name: str, component: str) -> str:
    """A tensor's name, whichever of the three ways of diffusers before peft it is in."""
    found = _OLDER.search(name)
    if found is None:
        return name
    layer, which = name[: found.start()], {"down": _FIRST, "up": _SECOND}[found["which"]]
    if projection := found["projection"]:
        in_encoder = component.startswith("text_encoder")
        ours = f"{projection}_proj" if in_encoder else f"to_{projection}"
        layer = f"{layer}.{ours.replace('to_out', 'to_out.0')}"
    return f"{layer}{which}"


@dataclass(frozen=True)
class _Scales:
    """What a file's header says of the strength of its layers."""

    alpha: float | None
    alphas: Mapping[str, float]
    """Of single layers: a regular expression for the end of their names, as peft has it."""
    rslora: bool

    @classmethod
    def read(cls, header: Mapping[str, Any], prefix: str) -> _Scales:
        alphas = header.get(f"{prefix}alpha_pattern")
        return cls(
            alpha=header.get(f"{prefix}lora_alpha"),
            alphas=alphas if isinstance(alphas, dict) else {},
            rslora=bool(header.get(f"{prefix}use_rslora")),
        )

    def of(self, layer: str, rank: int) -> float:
        """What the product of the layer's factors is multiplied by."""
        own = (v for key, v in self.alphas.items() if re.match(rf"(?:.*\.)?({key})$", layer))
        alpha = next(own, self.alpha)
        if not isinstance(alpha, (int, float)):
            return 1.0
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _at_scale_one(tensors: Mapping[str, Tensor], scales: _Scales) -> dict[str, Tensor]:
    found = dict(tensors)
    for layer, rank in _ranks(tensors):
        name = f"{layer}{_SECOND}"
        if name in found:
            found[name] = found[name] * scales.of(layer, rank)
    return found


def _ranks(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    for name, value in tensors.items():
        if name.endswith(_FIRST):
            yield name.removesuffix(_FIRST), value.shape[0]


def _by_names_of(network: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors by this network's names: transformers 5 has no `text_model` in CLIPTextModel."""
    outer = "text_model."
    has = any(name.startswith(outer) for name, _ in network.named_modules())
    given = any(name.startswith(outer) for name in tensors)
    if given and not has:
        return {name.removeprefix(outer): value for name, value in tensors.items()}
    if has and not given:
        return {f"{outer}{name}": value for name, value in tensors.items()}
    return tensors


def _config(tensors: Mapping[str, Tensor]) -> LoraConfig:
    """Layers with the ranks of the tensors, each at a scale of one."""
    ranks = dict(_ranks(tensors))
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {re.escape(layer): rank for layer, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=f"(?:{'|'.join(map(re.escape, ranks))})",
        use_dora=any(name.endswith(_LENGTHS) for name in tensors),
        lora_bias=any(name.endswith(".lora_B.bias") for name in tensors),
    )


def _refuse_other_layers(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str
) -> None:
    if different := sorted(expected.keys() ^ tensors.keys()):
        where_it_is = "in the file" if different[0] in tensors else "in this base"
        raise ModelError(
            f"{where} has {different[0]} only {where_it_is} ({len(different)} tensors differ in "
            f"all): the adapter was made for another model"
        )
    for name, value in tensors.items():
        if _shape(value) != _shape(expected[name]):
            raise ModelError(
                f"{where}: {name} is of shape {list(value.shape)}, and this base needs "
                f"{list(expected[name].shape)}: the adapter was made for another model"
            )


def _shape(tensor: Tensor) -> list[int]:
    """Without the ones at the end: a convolution of one pixel is a linear layer."""
    shape = list(tensor.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return shape
