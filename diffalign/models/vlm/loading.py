"""How the network of a vision-language model is read: which parts train, in how many bits, and
which network is the reference."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    BitsAndBytesConfig,
    PretrainedConfig,
)

from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.adapter_files import PEFT_PREFIX
from diffalign.models.base import ReferenceKind
from diffalign.models.devices import is_product, materialize, remove_dropout
from diffalign.models.lora import LoraSettings
from diffalign.models.reference import (
    AbstractReference,
    AdapterOff,
    FrozenCopy,
    NoReference,
    PastPolicy,
)
from diffalign.models.sharding import Sharder, cast_shards, is_sharded
from diffalign.models.vlm.families import ModuleNames
from diffalign.models.vlm.precision import Precisions
from diffalign.models.vlm.token_scores import TokenScorer

Attention = Literal["sdpa", "flash_attention_2", "flash_attention_3", "eager"]

_FLASH: dict[Attention, tuple[str, str]] = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": (
        "flash_attn_interface",
        "build it from the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
}
"""The package that has it, and how it gets here. Without one transformers would look for a kernel
on the hub, and run what it finds."""


def silence(model: nn.Module) -> None:
    """Take all dropout out: that of layers, and that which attention applies by itself."""
    remove_dropout(model)
    for module in model.modules():
        for name in ("attention_dropout", "dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def check_quantization(bits: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization is {bits}, which needs bitsandbytes, and it is not installed: "
            f"pip install 'diffalign[bitsandbytes]', or set quantization to null"
        )
    if not torch.cuda.is_available():
        raise ModelError(
            f"quantization is {bits}, which needs a CUDA device, and this machine has none: "
            f"set quantization to null"
        )


def check_attention(
    attention: Attention,
    config: PretrainedConfig,
    *,
    where: str,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Raise ModelError where tokens cannot attend in this way.

    Args:
        attention: the setting.
        config: of the model.
        where: what names the model.
        compute_dtype: of its products; None where it is not known yet.
    """
    if attention not in _FLASH:
        return
    asked = f"attention is {attention}"
    package, install = _FLASH[attention]
    classes: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = classes[0] if isinstance(classes, tuple) else classes
    if not getattr(model, "_supports_flash_attn", False):
        raise ModelError(
            f"{where}: {asked}, which {model.__name__} does not have: set attention to sdpa"
        )
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{asked}, which needs the package {package}, and it is not installed: {install}, or "
            f"set attention to sdpa"
        )
    if not torch.cuda.is_available():
        raise ModelError(
            f"{asked}, which needs a CUDA device, and this machine has none: set attention to sdpa"
        )
    if compute_dtype == torch.float32:
        raise ModelError(
            f"{asked}, which has no float32: set training.precision (asking.dtype where a model "
            f"responds) to bf16, or attention to sdpa"
        )


def build_reference(
    kind: ReferenceKind,
    network: TokenScorer,
    precisions: Precisions,
    stand_in: TokenScorer | None = None,
) -> AbstractReference:
    if stand_in is not None:
        return FrozenCopy(stand_in)
    if kind == "frozen_copy":
        # What never trains is not copied: the copy's tower is the policy's.
        shared = {id(p): p for p in network.parameters() if not p.requires_grad}
        stand_in = copy.deepcopy(network, shared)
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                stand_in.get_parameter(name).requires_grad_(False)
        precisions.store(stand_in, stand_in.language)
        return FrozenCopy(stand_in)
    if kind == "past_policy":
        return PastPolicy(network)
    if kind == "adapter_off":
        next_to = any(p.requires_grad for p in network.projector.parameters())
        return AdapterOff(network, next_to=PastPolicy(network.projector) if next_to else None)
    return NoReference()


def quantized(
    bits: str, modules: ModuleNames, *, device: torch.device, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` for a language model of few bits.

    Args:
        bits: `4bit` (NF4, quantised twice) or `8bit`.
        modules: the vision tower, the projector and the head stay as they are.
        device: where it is read to, since it cannot be moved.
        compute_dtype: of its matrix products.
    """
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=bits == "4bit",
            load_in_8bit=bits == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            # Whole names: transformers 5 matches them from their beginning.
            llm_int8_skip_modules=[modules.tower, modules.projector, modules.head],
        ),
        "device_map": {"": device},
    }


def choose_trained(
    model: Any,
    modules: ModuleNames,
    *,
    lora_settings: LoraSettings | None,
    tower: bool,
    projector: bool,
    quantized: bool,
    precisions: Precisions,
    trainable: bool,
    mapped: bool = False,
) -> None:
    """Freeze what does not train, in the precision of the computation; what trains is float32.

    Args:
        model: of transformers; changed in place.
        modules: where its parts are.
        lora_settings: adapter of the language model, attached here; None trains all its weights.
        tower: whether the vision tower trains.
        projector: whether the projector trains.
        quantized: whether the weights of the language model have few bits.
        precisions: of the model, from its weights as they were read.
        trainable: False freezes everything, for a model that is only asked.
        mapped: leave the weights in their file and in its precision, for `share_out`.
    """
    model.requires_grad_(False)
    silence(model)
    if not (quantized or mapped):
        materialize(model)
    between = model.get_submodule(modules.projector)
    if lora_settings is None:
        model.requires_grad_(trainable)
        model.get_submodule(modules.tower).requires_grad_(tower)
    else:  # which freezes all else
        between.float()  # before values of a start are put into it
        scope = modules.language_scope
        lora.attach(model, lora_settings, component=PEFT_PREFIX, scope=scope)
        layers: list[Any] = [*lora.adapter_layers(model)]
        for layer in layers:  # autocast rounds: no copy in float32 before it
            layer.cast_input_dtype_enabled = False
    between.requires_grad_(projector)
    language = model.get_submodule(modules.language)
    if not mapped:
        precisions.store(model, language)
    precisions.round_stream(language)
    if not trainable:
        model.requires_grad_(False)


def mapped_copy(network: TokenScorer) -> TokenScorer:
    """A frozen network with the same weights, where they are; what every process keeps whole is
    that of `network` itself."""
    same = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    shared = {id(part): part for part in network.whole_parts()}
    return copy.deepcopy(network, {**same, **shared})


def share_out(
    networks: Sequence[TokenScorer],
    sharder: Sharder,
    *,
    device: torch.device,
    precisions: Precisions,
) -> None:
    """Share networks out while their weights are mapped from one file, so that each process reads
    its part of them, in the precisions of `choose_trained`.

    The file is given up before any part is cast: what was read of it counts as memory until then.

    Args:
        networks: from `choose_trained`, mapped, and `mapped_copy`.
        sharder: shares them out.
        device: of what every process keeps whole.
        precisions: of the model.
    """
    for network in networks:
        sharder.shard(network)
        for parameter in network.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.detach().to(device, copy=True)
    for network in networks:
        dtypes = {
            name: torch.float32 for name, p in network.named_parameters() if p.is_floating_point()
        }
        for name, module in network.named_modules():
            if is_product(module) and not module.weight.requires_grad:
                inside = module.named_parameters(prefix=name, recurse=False)
                dtypes.update(dict.fromkeys((inner for inner, _ in inside), precisions.compute))
        frozen = precisions.of_frozen(network.language)
        dtypes.update({n: frozen[id(p)] for n, p in network.named_parameters() if id(p) in frozen})
        cast_shards(network, dtypes)
