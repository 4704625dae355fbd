"""Where a vision-language model keeps its tower, its projector, its language model and its head.

Architectures differ in how they join the parts, and agree on what the parts are called; a model is
taken apart by those names. Families in `TESTED` are known in detail beyond that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffalign.errors import ModelError
from diffalign.models.lora import Scope
from diffalign.models.vlm.quirks.base import family_of

TESTED = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "internvl",
    "gemma3",
    "idefics3",
    "smolvlm",
    "mistral3",
    "llama4",
    "paligemma",
)
"""Values of `model_type` whose vision tower may run once for several forwards of the rest."""

LANGUAGE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of attention and MLP, which get an adapter unless others are named."""

_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder")
_PROJECTORS = ("multi_modal_projector", "connector", "aligner", "merger")
_LANGUAGE_MODELS = ("language_model", "text_model")


@dataclass(frozen=True)
class ModuleNames:
    """Dotted names of the parts within a model of transformers."""

    tower: str
    """From pixels to vision features."""
    projector: str
    """From vision features to embeddings of tokens."""
    language: str
    """From embeddings of tokens to hidden states."""
    head: str
    """From hidden states to logits: one linear layer."""
    body: str
    """All but the head; empty where the head lies within, and is left out of a forward instead."""
    targets: tuple[str, ...]
    """The last parts of the names of linear layers that get an adapter unless others are named."""

    @property
    def projector_in_tower(self) -> bool:
        """Whether what the tower returns went through the projector already."""
        return self.projector.startswith(f"{self.tower}.")

    @property
    def language_scope(self) -> Scope:
        """Adapters change layers of the language model and no other: their names begin with its."""
        return Scope(usual=self.targets, part=self.language)


def find_modules(model: Any, *, where: str) -> ModuleNames:
    """Find the parts of a model; works on the meta device.

    Args:
        model: of a class for image-text-to-text generation in transformers.
        where: what names the model, for errors.

    Raises:
        ModelError: a part cannot be told, or parts lie within each other.
    """
    names = [name for name, _ in model.named_modules()]
    tower = _find(names, _TOWERS, "vision tower", where)
    projector = _find(names, _PROJECTORS, "projector", where)
    language = _find(names, _LANGUAGE_MODELS, "language model", where)
    if f"{language}.".startswith(f"{tower}.") or f"{tower}.".startswith(f"{language}."):
        raise ModelError(
            f"{where}: {tower} and {language} lie within each other, so that an adapter of the "
            f"language model could not leave the vision tower alone; {_SUPPORTED}"
        )
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), None)
    if head is None or not isinstance(output, nn.Linear):
        raise ModelError(
            f"{where}: {type(model).__name__} has no linear head, to be run on the tokens of a "
            f"response alone; {_SUPPORTED}"
        )
    next_to_model = hasattr(model, "model") and not head.startswith("model.")
    return ModuleNames(
        tower=tower,
        projector=projector,
        language=language,
        head=head,
        body="model" if next_to_model else "",
        targets=_targets(model, language),
    )


def _targets(model: Any, language: str) -> tuple[str, ...]:
    """Those of the usual layers that there are: experts are one parameter for all of them."""
    usual = (*LANGUAGE_LAYERS, *family_of(model.config).further_targets)
    linear = {
        name.rpartition(".")[2]
        for name, module in model.get_submodule(language).named_modules()
        if isinstance(module, nn.Linear)
    }
    return tuple(name for name in usual if name in linear) or LANGUAGE_LAYERS


_SUPPORTED = (
    f"known families are {', '.join(TESTED)}, and others with these parts, in transformers 4.57 or "
    f"later"
)


def _find(names: Sequence[str], wanted: Sequence[str], part: str, where: str) -> str:
    """The outermost module of one of the names, the first of the names before the others."""
    found = [name for name in names if name.rpartition(".")[2] in wanted]
    if not found:
        raise ModelError(
            f"{where}: no {part} can be told in it (none of its modules is called "
            f"{' or '.join(wanted)}); {_SUPPORTED}"
        )
    return min(found, key=lambda name: (name.count("."), wanted.index(name.rpartition(".")[2])))
