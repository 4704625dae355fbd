"""A vision-language model that writes responses: from their beginning or from anywhere within them,
with all of its images in sight or with a part of them.

Every request samples from a seed of its own, so that what is written for it does not depend on the
others next to it. What remains between batches of other sizes is float rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList

from diffalign.data.responses.chat import ChatEncoder, EncodedPrompt, EncodedResponse
from diffalign.data.responses.records import Turn
from diffalign.data.skipping import SkipReason, UnusableRowError
from diffalign.errors import ModelError
from diffalign.models.devices import send
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.vision_pass import ImageInputs
from diffalign.seeding import cpu_generator


@dataclass(frozen=True, kw_only=True)
class Request:
    """A conversation, and the beginning of a response to it."""

    input_ids: Tensor
    """Int64 [L]."""
    response_start: int
    """How many of them are the conversation; the others begin the response."""
    further: Mapping[str, Tensor]
    """Further outputs of the processor per token, [L] each."""
    image_inputs: Mapping[str, Tensor]
    """Its outputs for the images."""
    hidden: Tensor | None = None
    """Bool, one an image token: those that no other token sees."""
    seed: int = 0
    """Of its samples, where it is sampled."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """How the model went on."""

    tokens: Tensor
    """Int64 [n]; an end of sequence is the last of them."""
    text: str
    """The same as text, without special tokens; white space at its beginning stays."""
    confidence: Tensor
    """Float32 [n]: log-probability of the most probable token at each of them, in nats."""


class Writer:
    """Writes for several requests at once."""

    def __init__(self, model: VisionLanguageModel, *, batch_size: int) -> None:
        """Args:
        model: loaded; its policy writes.
        batch_size: requests at once.
        """
        self.model = model
        self.network = model.unwrapped
        self.encoder = ChatEncoder(model.processor)
        self.batch_size = batch_size
        config = self.network.model.config
        self._longest = getattr(config.get_text_config(), "max_position_embeddings", None)

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> EncodedPrompt:
        """A conversation with its images, ready to be answered.

        Raises:
            UnusableRowError: markers and images differ in number.
        """
        return self.encoder.prompt(turns, images)

    def ask(self, prompt: EncodedPrompt, *, seed: int = 0) -> Request:
        """For a whole response."""
        return Request(
            input_ids=prompt.input_ids,
            response_start=len(prompt.input_ids),
            further=prompt.further,
            image_inputs=prompt.image_inputs,
            seed=seed,
        )

    def go_on(self, prompt: EncodedPrompt, started: str, *, seed: int = 0) -> Request:
        """For the rest of a response.

        Args:
            prompt: of `prompt`.
            started: how the response begins; white space at its end is left for the model to write.

        Raises:
            UnusableRowError: it contains a marker of images.
        """
        if not started.strip():
            return self.ask(prompt, seed=seed)
        response = self.encoder.response(prompt, started)
        kept = response.start + _written_out(response)
        return Request(
            input_ids=response.input_ids[:kept],
            response_start=response.start,
            further={name: values[:kept] for name, values in response.further.items()},
            image_inputs=prompt.image_inputs,
            seed=seed,
        )

    def image_positions(self, request: Request) -> Tensor:
        """Places of the image tokens in a request: int64 [N], ascending."""
        marked = torch.isin(request.input_ids, torch.tensor(self.model.placeholders))
        return marked.nonzero()[:, 0]

    def check_length(self, request: Request, max_new_tokens: int) -> None:
        """Raise UnusableRowError unless the model's context holds a request and what follows."""
        length = len(request.input_ids) + max_new_tokens
        if self._longest is not None and length > self._longest:
            raise UnusableRowError(
                SkipReason.TOO_LONG,
                f"{len(request.input_ids)} tokens and {max_new_tokens} to be written; the model "
                f"takes {self._longest}. Lower max_new_tokens",
            )

    def write(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        one_sentence: bool = False,
    ) -> list[Written]:
        """Go on with responses.

        Args:
            requests: any number.
            max_new_tokens: a response ends there at the latest.
            temperature: 0 always takes the most probable token; above 0 samples, from all tokens.
            one_sentence: stop after the first token with a full stop in it, too.
        """
        written: list[Written] = []
        for start in range(0, len(requests), self.batch_size):
            written += self._write(
                requests[start : start + self.batch_size],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                one_sentence=one_sentence,
            )
        return written

    def ends(self, tokens: Tensor) -> bool:
        """Whether what was written ended by itself: int64 [n]."""
        return len(tokens) > 0 and int(tokens[-1]) in self._end_tokens()

    def hidden_states(self, texts: Sequence[str]) -> Tensor:
        """Mean of the last hidden states over the tokens of texts without images: [n, width]."""
        tokenizer = self.model.processor.tokenizer
        means = []
        for start in range(0, len(texts), self.batch_size):
            some = [text or " " for text in texts[start : start + self.batch_size]]
            encoded = tokenizer(some, padding=True, padding_side="right", return_tensors="pt")
            inputs = {
                name: send(encoded[name], self.model.device)
                for name in ("input_ids", "attention_mask")
            }
            with self.model.inference() as network:
                hidden = network.last_hidden_state(**inputs)
            mask = inputs["attention_mask"][..., None]
            means.append((hidden.float() * mask).sum(1) / mask.sum(1))
        return torch.cat(means).cpu()

    def inputs(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Inputs of the model for some requests: left-padded, on its device."""
        length = max(len(request.input_ids) for request in requests)
        pad = self.model.pad_token_id

        def padded(values: Sequence[Tensor], fill: int) -> Tensor:
            rows = [torch.nn.functional.pad(v, (length - len(v), 0), value=fill) for v in values]
            return torch.stack(rows)

        further = [
            self.model.family.token_inputs(
                request.further, torch.arange(len(request.input_ids)) >= request.response_start
            )
            for request in requests
        ]
        inputs = {
            "input_ids": padded([request.input_ids for request in requests], pad),
            "attention_mask": padded([torch.ones_like(r.input_ids) for r in requests], 0),
            **{name: padded([of_one[name] for of_one in further], 0) for name in further[0]},
            **ImageInputs.stack(
                [ImageInputs(inputs=request.image_inputs) for request in requests]
            ).inputs,
        }
        return self.model.on_device(inputs)

    def _write(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        temperature: float,
        one_sentence: bool,
    ) -> list[Written]:
        inputs = self.inputs(requests)
        confidence = _Confidence()
        processors: list[Any] = [confidence]
        if temperature > 0:
            processors.append(_OwnSamples([request.seed for request in requests], temperature))
        stops = self._full_stops() if one_sentence else None
        with self._restricted_sight(requests, inputs["input_ids"].shape[1]):
            new = self.model.write(
                inputs,
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([] if stops is None else [_Stops(stops)]),
            ).cpu()
        sure = torch.stack(confidence.values, dim=1).cpu()
        return [
            self._written(request, tokens, values, stops)
            for request, tokens, values in zip(requests, new, sure, strict=True)
        ]

    def _written(
        self, request: Request, tokens: Tensor, confidence: Tensor, stops: Tensor | None
    ) -> Written:
        ends = torch.isin(tokens, torch.tensor(self._end_tokens()))
        if stops is not None:
            ends |= stops[tokens]
        after = ends.nonzero()
        length = int(after[0, 0]) + 1 if len(after) else len(tokens)
        started = request.input_ids[request.response_start :]
        before = self._decode(started)
        whole = self._decode(torch.cat([started, tokens[:length]]))
        own = whole[len(before) :] if whole.startswith(before) else self._decode(tokens[:length])
        return Written(tokens=tokens[:length], text=own, confidence=confidence[:length].float())

    def _decode(self, tokens: Tensor) -> str:
        text: str = self.model.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _end_tokens(self) -> list[int]:
        ends = self.network.model.generation_config.eos_token_id
        own = self.model.processor.tokenizer.eos_token_id
        listed = ends if isinstance(ends, (list, tuple)) else [ends]
        return sorted({int(token) for token in (*listed, own) if token is not None})

    def _full_stops(self) -> Tensor:
        """Bool, one a token: whether its text has a full stop."""
        vocabulary = self.model.processor.tokenizer.get_vocab()
        words = self.network.model.get_output_embeddings().weight.shape[0]
        has = torch.zeros(words, dtype=torch.bool)
        has[[number for token, number in vocabulary.items() if "." in token]] = True
        return has

    @contextmanager
    def _restricted_sight(self, requests: Sequence[Request], length: int) -> Iterator[None]:
        """Within this context no token attends to the hidden image tokens of its request.

        Given to `generate`, a mask with holes would also move all that comes after them: positions
        are counted from it. Here the language model gets the mask with the holes, and the positions
        that were counted without.
        """
        if all(request.hidden is None for request in requests):
            yield
            return
        visible = torch.ones((len(requests), length), dtype=torch.int64)
        for row, request in zip(visible, requests, strict=True):
            if request.hidden is not None:
                first = length - len(request.input_ids)
                row[first + self.image_positions(request)[request.hidden]] = 0
        visible = visible.to(self.model.device)

        read = 0

        def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal read
            read += kwargs["inputs_embeds"].shape[1]
            mask = kwargs.get("attention_mask")
            if mask is None:  # so it is where nothing is padded
                mask = visible.new_ones((len(requests), read))
            if not isinstance(mask, Tensor) or mask.shape != (len(requests), read):
                raise ModelError(
                    f"{type(module).__name__} takes no attention mask of one number a token, by "
                    f"which image tokens could be hidden; use a model of another family"
                )
            mask = mask.clone()
            mask[:, :length] *= visible
            return args, {**kwargs, "attention_mask": mask}

        language = self.network.model.get_submodule(self.network.module_names.language)
        hook = language.register_forward_pre_hook(hide, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def most_probable(logits: Tensor) -> Tensor:
    """Log-probability of the most probable token: [..., vocabulary] to [...], in nats."""
    return logits.log_softmax(dim=-1).amax(dim=-1)


def perplexity(confidence: Tensor) -> float:
    """How unsure a model was: exp(-mean) of `most_probable` over a response, at least 1.

    Source: MIA-DPO (Liu et al. 2024, arXiv:2410.17637), gen_data of the authors' code. It is the
    perplexity of the model's own first choices, not of a given text.
    """
    return float(confidence.double().mean().neg().exp())


def _written_out(response: EncodedResponse) -> int:
    """Tokens of a response without those that end it, which are no characters."""
    return int((response.offsets[:, 1] > response.offsets[:, 0]).sum())


class _Confidence(LogitsProcessor):
    """Changes nothing; remembers how probable the first choice was, [B] a step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.values.append(most_probable(scores.float()))
        return scores


class _OwnSamples(LogitsProcessor):
    """Makes the most probable token a sample, by noise from a generator of each row's own.

    Source: the Gumbel-max trick; Maddison et al. 2014, arXiv:1411.0030.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self._generators = [cpu_generator(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        noise = torch.stack(
            [-torch.empty(width).exponential_(generator=g).log() for g in self._generators]
        )
        return scores.float() / self._temperature + noise.to(scores.device)


class _Stops(StoppingCriteria):
    """Ends a row after one of some tokens."""

    def __init__(self, stops: Tensor) -> None:
        self._stops = stops

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._stops = self._stops.to(input_ids.device)
        return self._stops[input_ids[:, -1]]
