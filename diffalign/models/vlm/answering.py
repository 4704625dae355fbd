"""Responses to several questions about the same images, from one pass over images and prompt.

A prompt is what stands up to its last image, system prompt included, and a question after it. The
first part goes through the network once for all questions that share it. Its keys and values are
copied for every question, which goes on from there as a row of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.models import lora
from diffalign.models.vlm.branches import Prefix, disagreement
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.prefix_cache import ContinuedRows, PrefixCache, cache_obstacle
from diffalign.models.vlm.token_scores import ResponseRows, token_log_probs
from diffalign.models.vlm.vision_pass import ImageInputs

T = TypeVar("T")


@dataclass(kw_only=True)
class _Question:
    place: int
    """Among the prompts."""
    tokens: list[int]
    """What stands after its prefix."""


@dataclass(kw_only=True)
class _Group:
    """Questions that share their images and what stands up to the last of them."""

    ids: Tensor
    """Int64 [P], the prefix."""
    further: dict[str, Tensor]
    """Further inputs of the model per token of it, [1, P] each."""
    image_inputs: ImageInputs
    questions: list[_Question]


@dataclass(kw_only=True)
class _Written:
    """What was written in one row."""

    tokens: list[int] = field(default_factory=list)
    """With the one that ended it, if one did."""
    log_probs: list[float] = field(default_factory=list)


class Answerer:
    """A vision-language model that is asked several questions about the same images.

    Its `generate` gives what the model's own gives greedily. The first questions that share images
    are also scored in rows of their own; where that differs, in families that cannot go on from a
    copy, and for images with one question, the model's own `generate` answers.

    An adapter whose weights are in float32 is merged into its base from the first responses to
    `close`, which puts the base back bit for bit.
    """

    def __init__(
        self, model: VisionLanguageModel, *, rows_at_once: int = 8, prefix: Prefix = "auto"
    ) -> None:
        """Args:
        model: not in training meanwhile.
        rows_at_once: questions in one batch, at most.
        prefix: `repeated` computes images for each question.
        """
        self.processor = model.processor
        self._model = model
        self._rows_at_once = rows_at_once
        self._merged, self._is_merged = ExitStack(), False
        self._remarks: list[str] = []
        self._checked = False
        self._shares = prefix != "repeated"
        with model.inference() as network:
            obstacle = cache_obstacle(network.model)
            ends = network.model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        if self._shares and obstacle is not None:
            self._go_plain(obstacle)

    def remarks(self) -> list[str]:
        """Sentences for the user that came up since it was last asked."""
        said, self._remarks = self._remarks, []
        return said

    def close(self) -> None:
        """Give the model back as it was."""
        self._merged.close()
        self._is_merged = False

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def first_token_probabilities(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image]]
    ) -> Tensor:
        """See `VisionLanguageModel.first_token_probabilities`."""
        return self._model.first_token_probabilities(prompts, images)

    def generate(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image]], *, max_new_tokens: int
    ) -> list[str]:
        """Greedy responses, as `VisionLanguageModel.generate` gives them.

        Args:
            prompts: n conversations as the chat template writes them.
            images: n lists; those of the same objects are encoded once.
            max_new_tokens: a response ends there at the latest.
        """
        groups = self._groups(prompts, images)
        responses: dict[int, str] = {}
        for some in _of_equal_length(groups, at_most=self._rows_at_once):
            for place, tokens in self._answered(some, prompts, images, max_new_tokens):
                text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
                responses[place] = text.strip()
        left = [place for place in range(len(prompts)) if place not in responses]
        left.sort(key=lambda place: len(prompts[place]))
        self._merge()
        for batch in _batches(left, at_most=self._rows_at_once):
            texts = self._model.generate(
                [prompts[place] for place in batch],
                [images[place] for place in batch],
                max_new_tokens=max_new_tokens,
            )
            responses.update(zip(batch, texts, strict=True))
        return [responses[place] for place in range(len(prompts))]

    def _go_plain(self, why: str) -> None:
        self._shares = False
        self._remarks.append(f"images are computed for each question: {why}")

    def _merge(self) -> None:
        """Merge adapters for good, once what the first responses are held against is known."""
        if not self._is_merged and (self._checked or not self._shares):
            self._is_merged = True
            with self._model.inference() as network:
                self._merged.enter_context(lora.merged(network))

    def _groups(self, prompts: Sequence[str], images: Sequence[Sequence[Image]]) -> list[_Group]:
        """Questions by what they share; those that share nothing are in none."""
        if not self._shares or not prompts:
            return []
        shared: dict[tuple[int, ...], list[int]] = {}
        for place, shown in enumerate(images):
            shared.setdefault(tuple(map(id, shown)), []).append(place)
        groups: list[_Group] = []
        for seen, places in shared.items():
            if seen and len(places) > 1:
                groups += self._split(places, prompts, images[places[0]])
        tails = [question.tokens for group in groups for question in group.questions]
        common = _common(tails)
        for group in groups:  # what all questions begin with is computed once an image as well
            some = group.questions[0].tokens[:common]
            group.ids = torch.cat([group.ids, group.ids.new_tensor(some)])
            group.further = {
                key: torch.cat([value, value.new_zeros((1, common))], dim=1)
                for key, value in group.further.items()
            }
            for question in group.questions:
                del question.tokens[:common]
        return groups

    def _split(
        self, places: Sequence[int], prompts: Sequence[str], images: Sequence[Image]
    ) -> Iterator[_Group]:
        """Groups of questions about the same images: one, where system prompts are equal."""
        placeholders = set(self._model.placeholders)
        found: dict[tuple[int, ...], list[_Question]] = {}
        texts = [prompts[place] for place in places]
        for place, tokens in zip(places, self._model.tokens_of(texts), strict=True):
            marked = [number for number, token in enumerate(tokens) if token in placeholders]
            if not marked:
                return  # it is the processor that puts images into these
            after = marked[-1] + 1
            question = _Question(place=place, tokens=tokens[after:])
            found.setdefault(tuple(tokens[:after]), []).append(question)
        for questions in found.values():
            if len(questions) > 1:
                first = questions[0]
                inputs = self._model.prompt_inputs([prompts[first.place]], [images])
                ids = inputs.pop("input_ids")
                del inputs["attention_mask"]
                length = ids.shape[1] - len(first.tokens)
                if not first.tokens or ids[0, length:].tolist() != first.tokens:
                    continue  # images change how their question is written
                per_token = {key for key, value in inputs.items() if value.shape == ids.shape}
                yield _Group(
                    ids=ids[0, :length],
                    further={key: inputs.pop(key)[:, :length] for key in per_token},
                    image_inputs=ImageInputs(inputs=inputs),
                    questions=questions,
                )

    def _answered(
        self,
        groups: Sequence[_Group],
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
        max_new_tokens: int,
    ) -> Iterator[tuple[int, list[int]]]:
        """Places of prompts and the tokens of responses to them; none where those would differ."""
        if not self._shares:
            return
        self._merge()
        with self._model.inference() as network, ExitStack() as stack:
            if not self._checked:
                stack.enter_context(lora.merged(network))
            prefixes = self._prefixes(network.body, groups)
            numbered = [(n, q) for n, group in enumerate(groups) for q in group.questions]
            numbered.sort(key=lambda each: len(each[1].tokens))
            for batch in _batches(numbered, at_most=self._rows_at_once):
                written = self._write(network.model, prefixes, batch, max_new_tokens)
                if not self._checked:
                    stack.close()
                    self._check(groups, batch, written)
                    if not self._shares:
                        return
                    self._merge()
                for (_, question), row in zip(batch, written, strict=True):
                    yield question.place, row.tokens

    def _prefixes(self, model: Any, groups: Sequence[_Group]) -> PrefixCache:
        ids = torch.stack([group.ids for group in groups])
        further = {
            **{k: torch.cat([g.further[k] for g in groups]) for k in groups[0].further},
            **ImageInputs.stack([group.image_inputs for group in groups]).inputs,
        }
        none = torch.zeros_like(ids)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **further}
        positions = self._model.branches(none, none, given).positions
        return PrefixCache(model, ids, positions, further)

    def _write(
        self,
        model: Any,
        prefixes: PrefixCache,
        batch: Sequence[tuple[int, _Question]],
        max_new_tokens: int,
    ) -> list[_Written]:
        """Go on greedily with questions; log-probabilities are kept for the first batch alone."""
        head, pad = model.get_output_embeddings(), self._model.pad_token_id
        written = [_Written() for _ in batch]
        rows = ContinuedRows(prefixes, [number for number, _ in batch])
        tails = [question.tokens for _, question in batch]
        device, width = self._model.device, max(map(len, tails))
        ids = torch.tensor([[pad] * (width - len(tail)) + tail for tail in tails], device=device)
        mask = torch.tensor(
            [[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=device
        )
        alive = list(range(len(batch)))
        while True:
            logits = head(rows.feed(ids, mask)[:, -1])
            allowed = logits.float()  # a copy where it is in half precision
            if not self._checked:
                allowed = allowed.clone()
            allowed[:, self._model.placeholders] = -torch.inf
            chosen = allowed.argmax(dim=1, keepdim=True)
            if not self._checked:
                for number, value in zip(alive, token_log_probs(logits, chosen), strict=True):
                    written[number].log_probs.append(float(value))
            tokens = chosen[:, 0].tolist()
            for number, token in zip(alive, tokens, strict=True):
                written[number].tokens.append(token)
            going = [i for i, token in enumerate(tokens) if token not in self._ends]
            if not going or len(written[alive[0]].tokens) == max_new_tokens:
                return written
            if len(going) < len(alive):
                kept = torch.tensor(going, device=device)
                rows.keep(kept)
                chosen, alive = chosen[kept], [alive[i] for i in going]
            ids, mask = chosen, torch.ones_like(chosen)

    def _check(
        self,
        groups: Sequence[_Group],
        batch: Sequence[tuple[int, _Question]],
        written: Sequence[_Written],
    ) -> None:
        """Score what was written in rows of their own, and go plain where that differs."""
        self._checked = True
        before = self._model.evaluations
        rows = [
            (
                groups[number],
                torch.tensor([*question.tokens, *row.tokens], device=self._model.device),
            )
            for (number, question), row in zip(batch, written, strict=True)
        ]
        counts = [len(row.tokens) for row in written]
        expected = self._model.log_probs(self._plain_rows(rows, counts))[:, 0]
        self._model.evaluations = before
        found = expected.new_tensor([value for row in written for value in row.log_probs])
        difference, limit = disagreement(found, expected, counts, self._model.compute_dtype)
        if not difference <= limit:  # also for nan
            self._go_plain(
                f"log-probabilities of tokens differ by {difference:.2g} between responses that go "
                f"on from a copy of their prompt's keys and values and responses in rows of their "
                f"own, and {limit:.2g} is allowed"
            )

    def _plain_rows(
        self, rows: Sequence[tuple[_Group, Tensor]], counts: Sequence[int]
    ) -> ResponseRows:
        """Rows of their own, whose last tokens are wanted.

        Args:
            rows: of each its group, and what stands after the group's prefix.
            counts: how many tokens of each row are wanted.
        """
        wholes = [torch.cat([group.ids, tail]) for group, tail in rows]
        width = max(map(len, wholes))
        ids = wholes[0].new_full((len(rows), width), self._model.pad_token_id)
        mask = torch.zeros_like(ids)
        further = {key: ids.new_zeros(ids.shape) for key in rows[0][0].further}
        for number, ((group, _), whole) in enumerate(zip(rows, wholes, strict=True)):
            ids[number, : len(whole)], mask[number, : len(whole)] = whole, 1
            for key, value in group.further.items():
                further[key][number, : value.shape[1]] = value[0]
        before, targets = [], []
        for number, (whole, count) in enumerate(zip(wholes, counts, strict=True)):
            end = number * width + len(whole)
            before.append(torch.arange(end - count - 1, end - 1, device=ids.device))
            targets.append(whole[len(whole) - count :])
        return ResponseRows(
            input_ids=ids,
            attention_mask=mask,
            further=further,
            image_inputs=ImageInputs.stack([group.image_inputs for group, _ in rows]),
            before=torch.cat(before),
            targets=torch.cat(targets)[:, None],
        )


def _common(tails: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with; one of each is left."""
    if not tails:
        return 0
    columns = zip(*[tail[:-1] for tail in tails], strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _batches(items: Sequence[T], *, at_most: int) -> Iterator[Sequence[T]]:
    """Items in order, in as few parts as may be, and these as equal."""
    if items:
        size = -(-len(items) // -(-len(items) // at_most))
        yield from (items[start : start + size] for start in range(0, len(items), size))


def _of_equal_length(groups: Sequence[_Group], *, at_most: int) -> Iterator[Sequence[_Group]]:
    """Groups whose prefixes go through the network together."""
    by_length: dict[tuple[int, tuple[str, ...]], list[_Group]] = {}
    for group in groups:
        key = (len(group.ids), tuple(sorted(group.image_inputs.inputs)))
        by_length.setdefault(key, []).append(group)
    for same in by_length.values():
        yield from _batches(same, at_most=at_most)
