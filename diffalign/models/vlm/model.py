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
from diffalign.models.vlm.branches import Branches
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
        if shares_prefix and attention != "sdpa":
            shares_prefix = False
            self._remarks.append(
                f"the model attends by {attention}, which takes no mask that keeps responses of "
                f"one row apart (sdpa does): image and prompt are computed for each response"
            )
        self.shares_prefix = self.prefix_agrees = shares_prefix
        self._prefix_checked = False
        self._rates = rates
        self._fingerprint = fingerprint
        self._export = export

    def look(self, image_inputs: Mapping[str, Tensor]) -> ImageInputs:
        """Bring images to the device, and run a frozen vision tower on them; no gradient.

        Args:
            images: what the image processor gave for them in reading order; may be empty.
        """
        inputs = {key: send(value, self.device) for key, value in image_inputs.items()}
        if not self._shares_vision:
            return ImageInputs(inputs=inputs)
        network = self._unwrapped
        with self._autocast(), evaluation_mode(network.tower):
            return look(
                network.model.model, network.tower, inputs, layers=network.module_names.layers
            )

    def score(
        self,
        groups: Sequence[ResponseRows],
        *,
        reference: Sequence[States] | None = None,
        keep_states: bool = False,
        typicality: bool = False,
    ) -> list[TokenScores]:
        """Statistics of the wanted tokens under the policy, or within `reference()` the reference.

        Args:
            groups, reference, keep_states, typicality: see `TokenScorer.forward`.
        """
        network = self.network if self._called is None else self._called
        self.evaluations += sum(len(rows) for rows in groups)
        with self._autocast():
            scores: list[TokenScores] = network(
                groups, reference=reference, keep_states=keep_states, typicality=typicality
            )
        return scores

    def log_probs(self, rows: ResponseRows) -> Tensor:
        """Log-probabilities of the wanted tokens by `inference`: [P, k]."""
        self.evaluations += len(rows)
        with self.inference() as network:
            scores: list[TokenScores] = network([rows])
        return scores[0].log_probs

    def branches(self, segments: Tensor, shifts: Tensor, inputs: Mapping[str, Tensor]) -> Branches:
        """What the network has to be told of rows with branches: see `Branches.of`."""
        model = self._unwrapped.model.model
        return Branches.of(model, segments=segments, shifts=shifts, inputs=inputs)

    def must_check_prefix(self, rows: ResponseRows) -> bool:
        """Whether these are the first rows with branches. Where weights are shared out, the first
        rows: then all processes have to compute together."""
        if self._prefix_checked:
            return False
        return rows.branches is not None or any(map(is_sharded, self._unwrapped.parameters()))

    def check_prefix(
        self, branched: ResponseRows, plain: ResponseRows, counts: Sequence[int]
    ) -> bool:
        """Compare responses that are branches of one row with the same in rows of their own.

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
        difference = (self.log_probs(branched) - self.log_probs(plain)).abs()[:, 0]
        self.evaluations = before
        if self.compute_dtype == torch.float32:
            limit, found = 1e-3, difference.max()
        else:
            limit = 16 * torch.finfo(self.compute_dtype).eps
            found = torch.stack([part.mean() for part in difference.split(list(counts))]).max()
        self.prefix_agrees = bool(found <= limit)  # not for nan
        if not self.prefix_agrees:
            self._remarks.append(
                f"log-probabilities of tokens differ by {float(found):.2g} between responses that "
                f"share the row of their prompt and responses in rows of their own; {limit:.2g} is "
                f"allowed. Image and prompt are computed for each response, as with "
                f"model.prefix=repeated"
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
        tokenizer = self.processor.tokenizer
        started = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
        encoded = self.processor(
            text=list(prompts),
            images=[image for of_prompt in images for image in of_prompt] or None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=not started,
            return_tensors="pt",
        )
        return {key: send(value, self.device) for key, value in encoded.items()}

    @property
    def pad_token_id(self) -> int:
        """The token that rows are padded with; hidden by the attention mask."""
        tokenizer = self.processor.tokenizer
        own = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if own is None else own)

    @property
    def placeholders(self) -> list[int]:
        """Tokens that represent images: ordinary rows of the vocabulary."""
        config = self._unwrapped.model.config
        names = ("image_token_id", "image_token_index", "video_token_id")
        ids = {getattr(config, name, None) for name in names}
        return sorted(token for token in ids if token is not None)

    def _autocast(self) -> torch.autocast:
        reduced = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=reduced)

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
