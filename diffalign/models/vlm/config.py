"""Vision-language models of transformers: LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, and others
that are made of the same parts.

What is trained: by default an adapter of the language model. The vision tower stays frozen unless
all weights train, and the projector between the two is frozen or trained, as the settings say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, PretrainedConfig

from diffalign.config import MAY_CHANGE
from diffalign.errors import ModelError
from diffalign.models import lora
from diffalign.models.adapter_files import PEFT_PREFIX
from diffalign.models.base import AbstractBlank, AbstractModel, ReferenceKind
from diffalign.models.locations import ITSELF, AbstractLocation
from diffalign.models.lora import LoraSettings, start_digest
from diffalign.models.sharding import Sharder
from diffalign.models.vlm.blank import BlankVLM
from diffalign.models.vlm.block_attention import attend_by_blocks
from diffalign.models.vlm.branches import Prefix, mask_obstacle, packing_obstacle, prefix_obstacle
from diffalign.models.vlm.export import MERGED, write_adapter, write_merged, write_model
from diffalign.models.vlm.families import TESTED, ModuleNames, find_modules
from diffalign.models.vlm.identity import (
    find_model,
    fingerprint,
    read_architecture,
    without_start,
)
from diffalign.models.vlm.loading import (
    Attention,
    build_reference,
    check_attention,
    check_quantization,
    choose_trained,
    mapped_copy,
    quantized,
    share_out,
)
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.precision import Precisions
from diffalign.models.vlm.processor import read_processor
from diffalign.models.vlm.token_scores import TokenScorer
from diffalign.models.vlm.usage import description, next_step, usage
from diffalign.ranges import AtLeast, MoreThan

Training = Literal["frozen", "trained"]


@dataclass(frozen=True, kw_only=True)
class VLM(AbstractModel):
    """A vision-language model that writes responses about images."""

    path: str = field(metadata=MAY_CHANGE)
    """A folder that transformers' `save_pretrained` wrote, or a hub id such as
    `llava-hf/llava-1.5-7b-hf`. The family is told by its config.json."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    lora: LoraSettings | None = None
    """Train a low-rank adapter of the language model, and of no layer outside it; null trains all
    weights of the language model."""
    projector: Training = "frozen"
    """Whether the projector from vision features to tokens trains as a whole as well."""
    projector_lr: Annotated[float, MoreThan(0)] | None = None
    """Peak learning rate of the projector; null takes optimizer.lr."""
    tower: Training = "frozen"
    """Whether the vision tower trains as a whole; only where all weights train."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Keep the frozen language model in so many bits, under an adapter (QLoRA)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    one_vision_pass: bool = True
    """Run a frozen vision tower once per image, for all responses and for policy and reference.
    False runs it with every forward, which gives the same numbers. Without effect where the tower
    or a projector inside it (Qwen) trains, and for families whose tower is not known in detail."""
    attention: Attention = field(default="sdpa", metadata=MAY_CHANGE)
    """How tokens attend to each other: torch's fused attention (a family without it attends
    eagerly), flash attention 2 or 3 (packages of their own, for a CUDA device and half precision),
    or products of whole matrices. The same numbers up to rounding; all but sdpa give every response
    a row of its own. It may change when a run is resumed."""
    prefix: Prefix = field(default="auto", metadata=MAY_CHANGE)
    """Compute image and prompt once for all responses that stand after them (`shared`: they are
    branches of one row) or for each (`repeated`): the same loss up to rounding. `auto` shares where
    family, adapter and likelihood allow it. It may change when a run is resumed."""
    image_pixels: Annotated[int, AtLeast(1)] | None = None
    """Scale larger images down to so many pixels, where the family gives a token to every 28 by
    28 of them (Qwen): 602112 are 768 tokens. Null leaves the model's own bound, which for
    Qwen2.5-VL is 16,384 tokens, more than `responses.max_length`: such pairs are skipped."""
    positions_at_once: Annotated[int, AtLeast(1)] = 256
    """Tokens of responses whose logits exist at the same time: at 152,000 words, 256 are 156 MB in
    float32."""
    merge_on_export: bool = False
    """Write, next to an adapter, the model that it makes of the base: in the folder `merged`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector_lr is not None and self.projector == "frozen":
            raise ValueError(
                f"projector_lr is {self.projector_lr:g}, but projector is frozen: set it to trained"
            )
        if self.tower == "trained" and self.lora is not None:
            raise ValueError(
                "tower is trained, but lora adapts the language model alone: set lora to null to "
                "train all weights, or leave the tower frozen"
            )
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization is {self.quantization}, and weights of so few bits cannot train: "
                f"give lora a rank"
            )
        if self.merge_on_export and self.lora is None:
            raise ValueError("merge_on_export merges an adapter, and lora is null: leave it out")

    @property
    def makes(self) -> Literal["responses"]:
        return "responses"

    def blank(self) -> AbstractBlank:
        return BlankVLM(self)

    @property
    def trains_adapter(self) -> bool:
        return self.lora is not None

    @property
    def continues_adapter(self) -> bool:
        return self.lora is not None and self.lora.start is not None

    @property
    def leaves_weights_idle(self) -> bool:
        return self.tower == "trained"  # LLaVA's projector takes the output of an inner layer

    @property
    def own_rates(self) -> Mapping[str, float]:
        return {} if self.projector_lr is None else {"model.projector_lr": self.projector_lr}

    def describe(self) -> str:
        parts = {"the projector": self.projector, "the vision tower": self.tower}
        also = [part for part, training in parts.items() if training == "trained"]
        return description(self.path, self.lora, bits=self.quantization, also=also)

    @property
    def library(self) -> str:
        return "transformers" if self.lora is None else "peft"

    @property
    def whole_library(self) -> str:
        return "transformers"

    @property
    def task(self) -> str:
        return "image-text-to-text"

    def usage(self, folder: str) -> str:
        return usage(folder, base=self.path, lora=self.lora)

    def next_step(self, run: Path) -> str:
        settings = {
            "model.path": self.path if self.lora else run / "final",
            "model.revision": self.revision if self.lora else None,
            "model.lora": self.lora and self.lora.continuing(run),
            "model.quantization": self.quantization,
            "model.image_pixels": self.image_pixels,
        }
        return next_step(run, settings)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The architecture; raises ModelError as `read_architecture` does."""
        return read_architecture(self._location, where=self.path)

    @property
    def context(self) -> int | None:
        """Tokens of the longest row that the language model has positions for; None for any."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def _location(self) -> AbstractLocation:
        return find_model(self.path, revision=self.revision)

    def processor(self) -> Any:
        """The processor of the model, complete; reads no weights.

        Raises:
            ModelError: it cannot be read, or would count other image tokens than the model returns.
        """
        path, revision = self._location.origin
        return read_processor(path, self.config, revision=revision, image_pixels=self.image_pixels)

    @property
    def prefix_obstacle(self) -> str | None:
        """Why image and prompt are computed for each response; None where once for all."""
        if self.prefix != "repeated" and self.attention != "sdpa":
            return (
                f"model.attention is {self.attention}, which takes no mask that keeps responses of "
                f"one row apart (sdpa does)"
            )
        return prefix_obstacle(self.config, asked=self.prefix, lora=self.lora)

    @property
    def packing_obstacle(self) -> str | None:
        """Why rows do not go one after the other in one sequence; None where they can."""
        return packing_obstacle(self.config, attention=self.attention)

    def check(self) -> None:
        if self.prefix == "shared" and self.prefix_obstacle is not None:
            raise ModelError(f"{self.path}: prefix is shared, but {self.prefix_obstacle}; set auto")
        blank = self._blank()
        modules = find_modules(blank, where=self.path)
        self._location.check_weights(ITSELF)
        self.processor()
        check_attention(self.attention, self.config, where=self.path)
        if self.quantization is not None:
            check_quantization(self.quantization)
        if self.lora is not None:
            scope = modules.language_scope
            lora.check_targets(blank, self.lora, scope=scope)
            lora.check_start(blank, self.lora, component=PEFT_PREFIX, scope=scope)

    def _blank(self) -> Any:
        """The model without values."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config)

    def load(
        self,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool = True,
        sharder: Sharder | None = None,
    ) -> VisionLanguageModel:
        if reference == "adapter_off" and self.lora is None:
            raise ModelError(
                "reference adapter_off needs an adapter, and lora is null: use frozen_copy, or "
                "give lora a rank"
            )
        if reference == "adapter_off" and self.continues_adapter and self.projector == "trained":
            raise ModelError(
                "reference adapter_off is the model before its adapter, but the projector goes on "
                "from the one next to that adapter: use past_policy, the model as this run finds it"
            )
        check_attention(self.attention, self.config, where=self.path, compute_dtype=compute_dtype)
        # Without a word transformers takes sdpa where it can, and what a family has where not.
        attends = {} if self.attention == "sdpa" else {"attn_implementation": self.attention}
        model = self._read(**attends, **self._quantized(device, compute_dtype))
        if mask_obstacle(self.config) is None:
            attend_by_blocks(model)
        modules = find_modules(model, where=self.path)
        precisions = Precisions.of(model.get_submodule(modules.language), compute_dtype)
        choose_trained(
            model,
            modules,
            lora_settings=self.lora,
            tower=trainable and self.tower == "trained",
            projector=trainable and self.projector == "trained",
            quantized=self.quantization is not None,
            precisions=precisions,
            trainable=trainable,
            mapped=sharder is not None,
        )
        network = TokenScorer(model, modules, positions_at_once=self.positions_at_once)
        home, reduced = next(network.parameters()).device, compute_dtype != torch.float32
        with torch.autocast(home.type, dtype=compute_dtype, enabled=reduced):
            # A network without values, of a plan, has no logits to look at.
            if home.type != "meta" and not network.eval().head_is_whole():
                raise ModelError(
                    f"{self.path}: {type(model).__name__} bounds or scales its logits after its "
                    f"head, and log-probabilities are computed from the head alone"
                )
        stand_in = mapped_copy(network) if sharder and reference == "frozen_copy" else None
        if sharder is not None:
            networks = [network] if stand_in is None else [network, stand_in]
            share_out(networks, sharder, device=device, precisions=precisions)
        elif self.quantization is None:  # else it is there, and 8 bits cannot be moved
            model.to(device)
        recomputes = self.gradient_checkpointing and trainable
        if recomputes:
            # transformers 5.24 warns of gradient_..., and 4.57 knows no other.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(model, name) for name in names if hasattr(model, name))
            enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return VisionLanguageModel(
            network=network.train(),
            reference=build_reference(reference, network, precisions, stand_in),
            processor=self.processor(),
            device=device,
            compute_dtype=compute_dtype,
            shares_vision=self._shares_vision(modules),
            shares_prefix=self.prefix_obstacle is None,
            recomputes=recomputes,
            rates=self._rates(network),
            fingerprint=self._fingerprint(),
            export=self._export,
        )

    def check_sharding(self) -> None:
        in_the_way = {
            f"quantization is {self.quantization}": self.quantization is not None,
            "tower is trained, and rows without images would not reach it": self.tower == "trained",
            "projector is trained next to an adapter": self.lora and self.projector == "trained",
        }
        for said, is_so in in_the_way.items():
            if is_so:
                raise ValueError(f"model.{said}, which works with whole weights alone")

    def _quantized(self, device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `_read` for a language model of few bits on a device."""
        if self.quantization is None:
            return {}
        check_quantization(self.quantization)
        modules = find_modules(self._blank(), where=self.path)
        return quantized(self.quantization, modules, device=device, compute_dtype=compute_dtype)

    def _read(self, **options: Any) -> Any:
        """The model as its file has it, on the CPU unless options say otherwise."""
        # Said to every part: transformers 4 reads one by the parts' own configurations, or float32.
        dtype = getattr(self.config, "dtype", None) or "auto"
        try:
            return self._location.load_complete(
                AutoModelForImageTextToText, **{"dtype": dtype, **options}
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{self.path}: cannot be read as a model: {error}") from error

    def _shares_vision(self, modules: ModuleNames) -> bool:
        returned_is_trained = modules.projector_in_tower and self.projector == "trained"
        return (
            self.one_vision_pass
            and type(self.config).model_type in TESTED  # 4.57 gives the text part's on the instance
            and self.tower == "frozen"
            and not returned_is_trained
        )

    def _rates(self, network: TokenScorer) -> dict[str, float]:
        if self.projector_lr is None:
            return {}
        own = {id(parameter) for parameter in network.projector.parameters()}
        return {
            name: self.projector_lr
            for name, parameter in network.named_parameters()
            if id(parameter) in own and parameter.requires_grad
        }

    def policy_fingerprint(self) -> str:
        """Identifies the policy that training begins with, and how it reads its input.

        How it is trained makes no difference: a new adapter is the base, a continued one is the
        policy of the run that it comes from.
        """
        processor = self.processor()
        parts = [
            type(self.config).model_type,
            self._location.identity(ITSELF),
            self.quantization,
            processor.chat_template,
            processor.image_processor.to_json_string(),
            without_start(self.lora) if self.continues_adapter else None,
            start_digest(self.lora),
        ]
        return fingerprint(parts)

    def _fingerprint(self) -> str:
        """Tells base weights and shape of the training from others; reads little of the files."""
        parts = [
            type(self.config).model_type,
            self._location.identity(ITSELF),
            without_start(self.lora),
            self.projector,
            self.tower,
            self.quantization,
        ]
        parts += [start_digest(self.lora)] if self.continues_adapter else []
        return fingerprint(parts)

    def _export(self, folder: Path, network: TokenScorer, values: Mapping[str, Tensor]) -> None:
        """Write `values`, the trained parameters of `network`, with the processor."""
        named = {name.removeprefix("model."): value for name, value in values.items()}
        processor = self.processor()
        if self.lora is None:
            write_model(folder, base=self._read(), values=named, processor=processor)
            return
        whole = (network.module_names.projector,) if self.projector == "trained" else ()
        write_adapter(
            folder,
            model=network.model,
            values=named,
            whole=whole,
            base=self.path,
            revision=self.revision,
            processor=processor,
        )
        if self.merge_on_export:
            write_merged(folder / MERGED, adapter=folder, base=self._read(), processor=processor)

    def write_whole(self, folder: Path, trained: Path, *, dtype: torch.dtype) -> None:
        """Write the model that a run made, an adapter merged into it, as one folder.

        Args:
            folder: replaced as a whole.
            trained: what the run exported: an adapter, or all weights.
            dtype: of the weights.
        """
        if self.lora is not None:
            base, processor = self._read().float(), self.processor()
            write_merged(folder, adapter=trained, base=base, processor=processor, dtype=dtype)
        else:
            whole = replace(self, path=str(trained), revision=None)
            write_model(
                folder, base=whole._read(), values={}, processor=whole.processor(), dtype=dtype
            )
