"""A vision-language model in training, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffalign.models.base import AbstractTrainable
from diffalign.models.placement import send
from diffalign.models.preparation import evaluation_mode
from diffalign.models.reference import AbstractReference
from diffalign.models.token_scores import ResponseRows, States, TokenScorer, TokenScores
from diffalign.models.vision_pass import Pictures, look

Export = Callable[[Path, TokenScorer, Mapping[str, Tensor]], None]
"""Writes trained values of a network, named as in it, into a folder."""


class VisionLanguageModel(AbstractTrainable):
    """A model of transformers that scores and writes answers about pictures.

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
        rates: Mapping[str, float],
        fingerprint: str,
        export: Export,
    ) -> None:
        """Assemble a model from loaded parts, all on one device.

        Args:
            network: what requires grad in it is what trains.
            reference: what stands in for it within `reference()`.
            processor: of the model.
            device: where the network is.
            compute_dtype: in which the network runs, by autocast unless it is float32.
            shares_vision: whether the vision tower runs once for all forwards on a picture.
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
        self._compute_dtype = compute_dtype
        self._shares_vision = shares_vision
        self._rates = rates
        self._fingerprint = fingerprint
        self._export = export

    def look(self, pictures: Mapping[str, Tensor]) -> Pictures:
        """Bring pictures to the device, and run a frozen vision tower on them; no gradient.

        Args:
            pictures: what the image processor gave for them in reading order; may be empty.
        """
        inputs = {key: send(value, self.device) for key, value in pictures.items()}
        if not self._shares_vision:
            return Pictures(inputs=inputs)
        network = self._unwrapped
        with self._autocast(), evaluation_mode(network.tower):
            return look(network.model.model, network.tower, inputs, layers=network.anatomy.layers)

    def score(
        self,
        groups: Sequence[ResponseRows],
        *,
        reference: Sequence[States] | None = None,
        keep_states: bool = False,
    ) -> list[TokenScores]:
        """What the policy, or within `reference()` the reference, says of the wanted tokens.

        Args:
            groups, reference, keep_states: see `TokenScorer.forward`.
        """
        network = self.network if self._called is None else self._called
        self.evaluations += sum(len(rows) for rows in groups)
        with self._autocast():
            scores: list[TokenScores] = network(
                groups, reference=reference, keep_states=keep_states
            )
        return scores

    @torch.no_grad()
    def log_probs(self, rows: ResponseRows) -> Tensor:
        """What the policy says of the wanted tokens, without gradient or dropout: [P, k]."""
        self.evaluations += len(rows)
        with self._autocast(), evaluation_mode(self._unwrapped):
            scores: list[TokenScores] = self._unwrapped([rows])
        return scores[0].log_probs

    @torch.no_grad()
    def choices(self, rows: ResponseRows) -> Tensor:
        """The policy's most probable token at each wanted position: int64 [P]; no gradient."""
        self.evaluations += len(rows)
        with self._autocast(), evaluation_mode(self._unwrapped):
            return self._unwrapped.choices(rows)

    @property
    def is_reference(self) -> bool:
        """Whether it is the reference that answers at the moment."""
        return self._called is not None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Sequence[Image]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Answer prompts with the policy, or within `reference()` with the reference.

        Args:
            prompts: n conversations as the chat template writes them, up to where answers begin.
            pictures: n lists, one picture per image marker of the prompt.
            max_new_tokens: an answer ends there at the latest.
            temperature: 0 always takes the most probable token; above 0 draws.
            seed: of those draws.

        Returns:
            n answers without special tokens and surrounding white space. An answer holds no image
            marker: its token is never chosen.
        """
        inputs = self._prompt_inputs(prompts, pictures)
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        network = self._bare()
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            evaluation_mode(network),
            self._autocast(),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(seed)
            answers = network.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                suppress_tokens=self._placeholders(),
                pad_token_id=self.pad_token_id,
                repetition_penalty=1.0,  # Qwen2.5-VL's own settings have another one
                **(sampled if temperature > 0 else greedy),
            )
        written = answers[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prompt_inputs(
        self, prompts: Sequence[str], pictures: Sequence[Sequence[Image]]
    ) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        begun = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
        encoded = self.processor(
            text=list(prompts),
            images=[picture for of_prompt in pictures for picture in of_prompt] or None,
            padding=True,
            padding_side="left",  # answers begin at the same column
            add_special_tokens=not begun,
            return_tensors="pt",
        )
        return {key: send(value, self.device) for key, value in encoded.items()}

    def _bare(self) -> TokenScorer:
        """What is called at the moment, without its wrapper for several processes."""
        if isinstance(self._called, TokenScorer):
            return self._called
        return self._unwrapped

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with; hidden by the attention mask."""
        tokenizer = self.processor.tokenizer
        own = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if own is None else own)

    def _placeholders(self) -> list[int]:
        """Tokens that stand for pictures: ordinary rows of the vocabulary, which must not be
        written."""
        config = self._unwrapped.model.config
        names = ("image_token_id", "image_token_index", "video_token_id")
        ids = {getattr(config, name, None) for name in names}
        return sorted(token for token in ids if token is not None)

    def _autocast(self) -> torch.autocast:
        reduced = self._compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self._compute_dtype, enabled=reduced)

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

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = dict(self._unwrapped.named_parameters())
        return ((name, parameters[name]) for name in self._trained)

    def learning_rates(self) -> Mapping[str, float]:
        return self._rates

    def fingerprint(self) -> str:
        return self._fingerprint

    def export(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write an adapter as peft does, or the whole model; its processor lies beside it.

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
