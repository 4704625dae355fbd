"""A vision-language model as a reward model: of images for a prompt, or of responses about images.

Each image is shown by itself, with its prompt, or a conversation with its response, and a head
scores the hidden state of the last token; of a response that is the token which ends it. Of images,
with `answers` training begins with what the model knows already: by how much it would rather say
yes than no.

Sources: Stiennon et al. 2020, arXiv:2009.01325 (a head on the last token); Xu et al. 2023,
arXiv:2304.05977 (ImageReward: images as the candidates, on BLIP); Lin et al. 2024, arXiv:2404.01291
(VQAScore: the probability of yes as a score of an image; here its log-odds against no).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.errors import ModelError
from diffalign.models.base import AbstractModel, ReferenceKind
from diffalign.models.preference.heads.base import Features
from diffalign.models.preference.rewards import AbstractEncoder, AbstractRewardModel, RewardModel
from diffalign.models.sharding import Sharder
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.token_scores import TokenScorer

PROMPT = "{prompt}"
"""What stands for the prompt in a question."""
_MASK = "attention_mask"


class VLMEncoder(AbstractEncoder):
    """A vision-language model up to the hidden state of the last token."""

    def __init__(self, scorer: TokenScorer, answers: tuple[int, int] | None) -> None:
        """Args:
        scorer: the model.
        answers: tokens of yes and of no; None where it has no score of its own.
        """
        super().__init__()
        self.scorer = scorer
        self.answers = answers
        self.has_plain = answers is not None
        self.width = scorer.model.config.get_text_config().hidden_size

    def forward(self, **inputs: Tensor) -> Features:
        """Args:
        inputs: what the processor gave for n right-padded rows, `input_ids` and `attention_mask`
            among them.
        """
        hidden = self.scorer.last_hidden_state(**inputs)
        last = inputs[_MASK].sum(dim=1) - 1
        rows = torch.arange(len(hidden), device=hidden.device)
        joint = hidden[rows, last].float()
        return Features(joint=joint, plain=self._log_odds(joint))

    def _log_odds(self, hidden: Tensor) -> Tensor | None:
        """Logit of yes less that of no, [n]."""
        if self.answers is None:
            return None
        head = self.scorer.model.get_output_embeddings()
        yes, no = (head.weight[token].float() for token in self.answers)
        bias = 0.0 if head.bias is None else head.bias[self.answers[0]] - head.bias[self.answers[1]]
        return hidden @ (yes - no) + bias


@dataclass(frozen=True, kw_only=True)
class VLMReward(AbstractRewardModel):
    """A reward model of images, or of responses, on a vision-language model."""

    candidates: Literal["images", "responses"] = "images"
    """What is scored: images next to a prompt (section `data`, likelihood `rewards`) or responses
    in a conversation about images (section `responses`, likelihood `response_rewards`)."""
    base: AbstractModel
    """The model to start from, `kind: vlm`, with what of it trains: `lora`, `projector`, `tower`.
    Its head over the vocabulary has no part in this."""
    question: str = PROMPT
    """What is said next to the image; {prompt} is its prompt."""
    answers: tuple[str, ...] = ()
    """How the model would go on, for yes and for no, such as `[" Yes", " No"]` (with the space that
    stands before a word, for LLaVA): the score begins with the log-odds of their first tokens.
    Empty: it begins at 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.base, VLM):
            raise ValueError("base is the model that looks at images: set base.kind to vlm")
        if self.question.count(PROMPT) != 1:
            raise ValueError(f"question is {self.question!r}, and must hold {PROMPT} once")
        if len(self.answers) not in (0, 2):
            raise ValueError(f"answers are two, for yes and for no, or none: got {self.answers}")
        if self.of_responses and (self.answers or self.question != PROMPT):
            raise ValueError(
                "question and answers are what a model is asked about an image, and candidates is "
                "responses, which end a conversation of the data: leave both out"
            )
        if self.base.merge_on_export:
            raise ValueError(
                "base.merge_on_export is for models that write responses: leave it out"
            )

    @property
    def vlm(self) -> VLM:
        """The base."""
        assert isinstance(self.base, VLM), "by __post_init__"
        return self.base

    @property
    def of_responses(self) -> bool:
        return self.candidates == "responses"

    @property
    def context(self) -> int | None:
        """Tokens of the longest row that the base has positions for; None for any."""
        return self.vlm.context

    def processor(self) -> Any:
        """The processor of the base; reads no weights."""
        return self.vlm.processor()

    @property
    def own_rates(self) -> Mapping[str, float]:
        return {f"model.base.{k.rpartition('.')[2]}": v for k, v in self.vlm.own_rates.items()}

    @property
    def leaves_weights_idle(self) -> bool:
        return self.vlm.leaves_weights_idle

    def describe(self) -> str:
        of = "of responses " if self.of_responses else ""
        return f"reward model {of}on {self.vlm.describe()} and {self.head.describe()}"

    def check(self) -> None:
        self.vlm.check()
        self._answers(self.vlm.processor())

    def reopened(self, folder: Path) -> VLMReward:
        lora = self.vlm.lora
        if lora is not None:
            return replace(self, base=replace(self.vlm, lora=replace(lora, start=folder)))
        return replace(self, base=replace(self.vlm, path=str(folder), revision=None))

    def load(
        self,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool = True,
        sharder: Sharder | None = None,
    ) -> RewardModel:
        model = self.vlm.load(
            device=device, compute_dtype=compute_dtype, reference="none", trainable=trainable
        )
        scorer = model.network
        assert isinstance(scorer, TokenScorer), "it is not wrapped yet"
        head = scorer.model.get_output_embeddings()
        words = scorer.model.get_input_embeddings()
        if head.weight is not words.weight:  # most of it no loss reaches, and it gives `answers`
            head.requires_grad_(False)
        current = dict(model.trained_parameters())

        def read(images: Sequence[Image], prompts: Sequence[str]) -> dict[str, Tensor]:
            texts = [self._conversation(model.processor, prompt) for prompt in prompts]
            return model.prompt_inputs(texts, [[image] for image in images], padding_side="right")

        def write(folder: Path, values: Mapping[str, Tensor]) -> None:
            known = _named(values)
            model.export(folder, {name: known.get(name, v.detach()) for name, v in current.items()})

        return self.assembled(
            VLMEncoder(scorer, self._answers(model.processor)),
            read=read,
            write_encoder=write if current else None,
            start=model.fingerprint(),
            rates={f"scorer.{name}": rate for name, rate in model.learning_rates().items()},
            device=device,
            compute_dtype=compute_dtype,
            reference=reference,
            trainable=trainable,
        )

    def _answers(self, processor: Any) -> tuple[int, int] | None:
        """The first tokens of yes and of no, after a question.

        Raises:
            ModelError: they are the same, or no token of the answer.
        """
        if not self.answers:
            return None
        asked = self._conversation(processor, "it")
        before: list[int] = processor.tokenizer(asked).input_ids
        found = []
        for answer in self.answers:
            ids = processor.tokenizer(asked + answer).input_ids
            if ids[: len(before)] != before or len(ids) == len(before):
                raise ModelError(
                    f"answers: {answer!r} changes the tokens of the question before it, or has "
                    f"none: write it as the model goes on, with the space before a word or without"
                )
            found.append(ids[len(before)])
        if found[0] == found[1]:
            raise ModelError(f"answers: {self.answers} begin with the same token")
        return found[0], found[1]

    def _conversation(self, processor: Any, prompt: str) -> str:
        said = {"type": "text", "text": self.question.replace(PROMPT, prompt)}
        turn = {"role": "user", "content": [{"type": "image"}, said]}
        text: str = processor.apply_chat_template([turn], add_generation_prompt=True)
        return text


def _named(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of an encoder by the names of the model within it."""
    return {name.removeprefix("scorer."): value for name, value in values.items()}
