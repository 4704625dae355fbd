"""A vision-language model in training, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.models.base import AbstractTrainable
from diffalign.models.devices import evaluation_mode, send
from diffalign.models.reference import AbstractReference
from diffalign.models.sharding import is_sharded
from diffalign.models.vlm.block_attention import FUSED, Block
from diffalign.models.vlm.branches import (
    ATTENTION_WITH_MASKS,
    Branches,
    disagreement,
    packing_obstacle,
)
from diffalign.models.vlm.quirks.base import AbstractFamily
from diffalign.models.vlm.token_scores import ResponseRows, States, TokenScorer, TokenScores
from diffalign.models.vlm.vision_pass import ImageInputs, look

Export = Callable[[Path, TokenScorer, Mapping[str, Tensor]], None]
"""Writes trained values of a network, named as in it, into a folder."""


class VisionLanguageModel(AbstractTrainable):
    """A model of transformers that scores and writes responses about images.

    There is no dropout in it but that of an adapter, which follows the mode of the network.
    """

    def __init__(
        self,
        *,
        network: TokenScorer,
        reference: AbstractReference,
        processor: Any,
        device: torch.device,
        compute_dtype: torch.dtype,
        shares_vision: bool,
        shares_prefix: bool = False,
        rates: Mapping[str, float],
        fingerprint: str,
        export: Export,
    ) -> None:
        """Assemble a model from loaded parts, all on one device.

        Args:
            network: what requires grad in it is what trains.
            reference: what is in for it within `reference()`.
            processor: of the model.
            device: where the network is.
            compute_dtype: in which the network runs, by autocast unless it is float32.
            shares_vision: whether the vision tower runs once for all forwards on an image.
            shares_prefix: whether responses may be branches of one row.
            rates: see `AbstractTrainable.learning_rates`.
            fingerprint: see `AbstractTrainable`.
            export: how trained values are written.
        """
        self.network: nn.Module = network
        self.processor = processor
        self.device = device
        self.evaluations = 0
        self._unwrapped = network  # `network` itself may be wrapped for several processes
        self._trained = [name for name, p in network.named_parameters() if p.requires_grad]
        self._reference = reference
        self._called: nn.Module | None = None
        self.compute_dtype = compute_dtype
        self._shares_vision = shares_vision
        self._remarks: list[str] = []
        attention = network.model.config.get_text_config()._attn_implementation
        if shares_prefix and attention not in (*FUSED, *ATTENTION_WITH_MASKS):
            shares_prefix = False
            self._remarks.append(
                f"the model attends by {attention}, which takes no mask that keeps responses of "
                f"one row apart ({' and '.join(ATTENTION_WITH_MASKS)} do): image and prompt are "
                f"computed for each response"
            )
        self.shares_prefix = shares_prefix
        self._packs_rows = packing_obstacle(network.model.config, attention=attention) is None
        self._packing_refused = False
        self.prefix_agrees = shares_prefix or self._packs_rows
        self._prefix_checked = False
        self._rates = rates
        self._fingerprint = fingerprint
        self._export = export

    @property
    def family(self) -> AbstractFamily:
        """What the family of the model does otherwise than others."""
        return self._unwrapped.family

    def look(self, image_inputs: Mapping[str, Tensor]) -> ImageInputs:
        """Bring images to the device, and run a frozen vision tower on them; no gradient.

        Args:
            images: what the image processor gave for them in reading order; may be empty.
        """
        inputs = self.on_device(image_inputs)
        if not self._shares_vision:
            return ImageInputs(inputs=inputs)
        network = self._unwrapped
        with self._autocast(), evaluation_mode(network.tower):
            return look(network.model, network.module_names, inputs, family=self.family)

    def score(
        self,
        groups: Sequence[ResponseRows],
        *,
        reference: Sequence[States] | None = None,
        keep_states: bool = False,
        typicality: bool = False,
        logits: bool = False,
        top: bool = False,
    ) -> list[TokenScores]:
        """Statistics of the wanted tokens under the policy, or within `reference()` the reference.

        Args:
            groups, reference, keep_states, typicality, logits, top: see `TokenScorer.forward`.
        """
        network = self.network if self._called is None else self._called
        self.evaluations += sum(len(rows) for rows in groups)
        # Autocast's cache would hold every weight that trains in half precision besides until the
        # forward is over, and each is used once: the backward pass rounds those that it recomputes.
        recomputes = torch.is_grad_enabled() and self._unwrapped.recomputes
        with self._autocast(cache=not recomputes):
            scores: list[TokenScores] = network(
                groups,
                reference=reference,
                keep_states=keep_states,
                typicality=typicality,
                logits=logits,
                top=top,
            )
        return scores

    def log_probs(self, rows: ResponseRows) -> Tensor:
        """Log-probabilities of the wanted tokens by `inference`: [P, k]."""
        self.evaluations += len(rows)
        with self.inference() as network:
            scores: list[TokenScores] = network([rows])
        return scores[0].log_probs

    def branches(
        self,
        segments: Tensor,
        shifts: Tensor,
        inputs: Mapping[str, Tensor],
        parts: tuple[Block, ...] = (),
    ) -> Branches:
        """What the network has to be told of rows with branches: see `Branches.of`."""
        model = self._unwrapped.body
        return Branches.of(model, segments=segments, shifts=shifts, inputs=inputs, parts=parts)

    def packs_up_to(self, tokens: int | None) -> int | None:
        """How many tokens rows that go one after the other may have together; None where each goes
        alone, which is said once where it was not asked for."""
        if tokens is None or self._packs_rows:
            return tokens
        if not self._packing_refused:
            self._packing_refused = True
            self._remarks.append(
                "rows are not packed: the model takes no mask that keeps rows of one sequence "
                "apart (most families do, with the attention sdpa). Each is padded to the longest"
            )
        return None

    def must_check_prefix(self, rows: ResponseRows) -> bool:
        """Whether these are the first rows with branches. Where weights are shared out, the first
        rows: then all processes have to compute together."""
        if self._prefix_checked:
            return False
        return rows.branches is not None or any(map(is_sharded, self._unwrapped.parameters()))

    def check_prefix(
        self, branched: ResponseRows, plain: ResponseRows, counts: Sequence[int]
    ) -> bool:
        """Compare responses of shared or packed rows with the same in plain rows of their own.

        What a family does to its mask or positions and its configuration does not tell shows here;
        a run would train on other numbers in silence.

        Args:
            branched, plain: the same wanted tokens in the same order, laid out both ways.
            counts: how many of the tokens are of each response.

        Returns:
            `prefix_agrees`, from now on False where they differ: in float32 by more than 0.001 at
            any token; where the network computes in half precision, by more than 16 of its
            roundings in the mean over the tokens of a response.
        """
        before, self._prefix_checked = self.evaluations, True
        found, expected = (self.log_probs(rows)[:, 0] for rows in (branched, plain))
        self.evaluations = before
        difference, limit = disagreement(found, expected, counts, self.compute_dtype)
        self.prefix_agrees = difference <= limit  # not for nan
        if not self.prefix_agrees:
            self._remarks.append(
                f"log-probabilities of tokens differ by {difference:.2g} between responses that "
                f"share the row of their prompt, or a sequence with other rows, and responses in "
                f"rows of their own; {limit:.2g} is allowed. Image and prompt are computed for "
                f"each response, as with model.prefix=repeated, and no rows are packed"
            )
        return self.prefix_agrees

    def remarks(self) -> list[str]:
        said, self._remarks = self._remarks, []
        return said

    def choices(self, rows: ResponseRows) -> Tensor:
        """The most probable token of `inference` at each wanted position: int64 [P]."""
        self.evaluations += len(rows)
        with self.inference() as network:
            return network.choices(rows)

    @property
    def unwrapped(self) -> TokenScorer:
        """The network in training, without a wrapper for several processes."""
        return self._unwrapped

    @property
    def is_reference(self) -> bool:
        """Whether it is the reference that computes at the moment."""
        return self._called is not None

    @contextmanager
    def inference(self) -> Iterator[TokenScorer]:
        """Within this context the policy, or within `reference()` the reference, computes without
        gradient or dropout, and without a wrapper for several processes."""
        network = self._called if isinstance(self._called, TokenScorer) else self._unwrapped
        with torch.no_grad(), evaluation_mode(network), self._autocast():
            yield network

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Response prompts with the policy, or within `reference()` with the reference.

        Args:
            prompts: n conversations as the chat template writes them, up to where responses begin.
            images: n lists, one image per image marker of the prompt.
            max_new_tokens: a response ends there at the latest.
            temperature: 0 always takes the most probable token; above 0 samples from all.
            seed: of those samples.

        Returns:
            n responses without special tokens and surrounding white space. A response holds no
            image
            marker: its token is never chosen.
        """
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            written = self.write(
                self.prompt_inputs(prompts, images),
                max_new_tokens=max_new_tokens,
                **(sampled if temperature > 0 else {}),
            )
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def write(
        self, inputs: Mapping[str, Tensor], *, max_new_tokens: int, **options: object
    ) -> Tensor:
        """Go on with rows of tokens, greedily; what a checkpoint's own settings ask for besides,
        such as Qwen2.5-VL's penalty of repetitions, does not count.

        Args:
            inputs: what the model takes, left-padded, on its device.
            max_new_tokens: rows end there at the latest.
            **options: of transformers' `generate`, for what is to be otherwise.

        Returns:
            New tokens alone, int64 [B, n]; no token that represents images is among them.
        """
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        with self.inference() as network:
            rows: Tensor = network.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                suppress_tokens=self.placeholders,
                pad_token_id=self.pad_token_id,
                repetition_penalty=1.0,
                **{**greedy, **options},
            )
        return rows[:, inputs["input_ids"].shape[1] :]

    def first_token_probabilities(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image]]
    ) -> Tensor:
        """Probabilities of the first token of a response, over the whole vocabulary.

        Args:
            prompts, images: see `generate`.

        Returns:
            Shape [n, vocabulary], float32, on the model's device.
        """
        inputs = self.prompt_inputs(prompts, images)
        with self.inference() as network:
            made = network.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                pad_token_id=self.pad_token_id,
                output_logits=True,  # before any penalty of the checkpoint's own settings
                return_dict_in_generate=True,
            )
        probabilities: Tensor = made.logits[0].float().softmax(dim=-1)
        return probabilities

    def prompt_inputs(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
        *,
        padding_side: Literal["left", "right"] = "left",
    ) -> dict[str, Tensor]:
        """Conversations and their images as the model takes them, on its device.

        Args:
            prompts: n of them, as the chat template writes them.
            images: n lists, one image per image marker of the prompt.
            padding_side: left, so that responses begin at the same column, or right.
        """
        encoded = self.processor(
            text=list(prompts),
            images=[image for of_prompt in images for image in of_prompt] or None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=not self._is_started(prompts),
            return_tensors="pt",
        )
        return self.on_device(encoded)

    def on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a processor gave, numbers in full precision: Llama 4's rounds pixels to bfloat16."""
        return {
            key: send(value.float() if value.is_floating_point() else value, self.device)
            for key, value in inputs.items()
        }

    def tokens_of(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of conversations as `prompt_inputs` has them, but one for every image marker."""
        special = not self._is_started(prompts)
        encoded = self.processor.tokenizer(list(prompts), add_special_tokens=special)
        tokens: list[list[int]] = encoded["input_ids"]
        return tokens

    def _is_started(self, prompts: Sequence[str]) -> bool:
        """Whether the chat template wrote the token that sequences begin with."""
        begin = self.processor.tokenizer.bos_token
        return begin is not None and prompts[0].startswith(begin)

    @property
    def pad_token_id(self) -> int:
        """The token that rows are padded with; hidden by the attention mask."""
        tokenizer = self.processor.tokenizer
        own = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if own is None else own)

    @property
    def patch_size(self) -> int | None:
        """Side of a patch of the vision tower in pixels; None where its configuration has none."""
        vision = getattr(self._unwrapped.model.config, "vision_config", None)
        size = getattr(vision, "patch_size", None)
        return int(size) if isinstance(size, int) else None

    @property
    def placeholders(self) -> list[int]:
        """Tokens that represent images: ordinary rows of the vocabulary."""
        config = self._unwrapped.model.config
        names = ("image_token_id", "image_token_index", "video_token_id")
        ids = {getattr(config, name, None) for name in names}
        return sorted(token for token in ids if token is not None)

    def _autocast(self, *, cache: bool = True) -> torch.autocast:
        reduced = self.compute_dtype != torch.float32
        return torch.autocast(
            self.device.type, dtype=self.compute_dtype, enabled=reduced, cache_enabled=cache
        )

    @contextmanager
    def reference(self) -> Iterator[None]:
        before = self._called
        policy = self.network if before is None else before
        with self._reference.instead_of(policy) as network:
            self._called = network
            try:
                yield
            finally:
                self._called = before

    def refer_to(self, values: Mapping[str, Tensor]) -> None:
        self._reference.refer_to(values)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = dict(self._unwrapped.named_parameters())
        return ((name, parameters[name]) for name in self._trained)

    def learning_rates(self) -> Mapping[str, float]:
        return self._rates

    def fingerprint(self) -> str:
        return self._fingerprint

    def export(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write an adapter as peft does, or the whole model; its processor lies next to it.

        Args:
            folder: replaced as a whole.
            state: values for all trained parameters by name; the current ones if None.

        Raises:
            ValueError: `state` lacks a trained parameter or names another.
        """
        values = dict(self.trained_parameters()) if state is None else dict(state)
        if values.keys() != set(self._trained):
            different = sorted(values.keys() ^ set(self._trained))
            raise ValueError(
                f"state must name every trained parameter and no other; differing: "
                f"{', '.join(different[:5])} ({len(different)} in all)"
            )
        self._export(folder, self._unwrapped, values)
