"""A model of this machine that is asked about images: loaded, and its responses written or chosen.

torch and the model's code are imported where they are needed: settings alone need neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

from diffalign.console import silence_libraries
from diffalign.errors import DiffalignError, ModelError
from diffalign.models.base import AbstractModel


class WritesResponses(Protocol):
    """Models that write responses; that of `models.vlm` is one."""

    processor: Any
    """Of transformers, with a chat template."""

    def generate(
        self, prompts: Sequence[str], images: Sequence[Sequence[Any]], *, max_new_tokens: int
    ) -> list[str]:
        """Greedy responses to conversations that the chat template wrote."""


def load_to_answer(
    model: AbstractModel,
    *,
    device: str,
    dtype: Literal["auto", "float32", "bf16", "fp16"],
    rows_at_once: int,
) -> WritesResponses:
    """Load a model, its adapter included, to be asked.

    Args:
        model: settings.
        device: as torch names it, or auto.
        dtype: of the weights; auto is bf16 on a GPU and float32 elsewhere.
        rows_at_once: questions in one batch, at most.

    Raises:
        ModelError: it cannot be loaded, or writes no text.
    """
    from diffalign.models.devices import DTYPES, choose_device
    from diffalign.models.vlm.answering import Answerer
    from diffalign.models.vlm.config import VLM
    from diffalign.models.vlm.model import VisionLanguageModel

    place = choose_device(device)
    usual: Literal["bf16", "float32"] = "bf16" if place.type == "cuda" else "float32"
    model.check()
    silence_libraries()
    loaded = model.load(
        device=place,
        compute_dtype=DTYPES[usual if dtype == "auto" else dtype],
        reference="none",
        trainable=False,
    )
    if not hasattr(loaded, "generate"):
        raise ModelError(f"{model.describe()}: writes no text, so it cannot answer; use kind vlm")
    if not isinstance(loaded, VisionLanguageModel):
        return cast(WritesResponses, loaded)
    prefix = model.prefix if isinstance(model, VLM) else "auto"
    return Answerer(loaded, rows_at_once=rows_at_once, prefix=prefix)


def write_responses(
    model: WritesResponses,
    questions: Sequence[str],
    images: Sequence[Sequence[Any]],
    *,
    system: str,
    max_new_tokens: int,
) -> list[str]:
    """Greedy responses to questions.

    Args:
        model: of `load_to_answer`.
        questions: n texts.
        images: n lists of those that stand before a question.
        system: what a system turn says first; empty leaves it to the chat template.
        max_new_tokens: a response ends there at the latest.

    Raises:
        DiffalignError: the GPU's memory does not hold so many.
    """
    import torch

    from diffalign.models.vlm.processor import question_prompt

    try:
        return model.generate(
            [
                question_prompt(model.processor, text, system=system, images=len(shown))
                for text, shown in zip(questions, images, strict=True)
            ],
            images,
            max_new_tokens=max_new_tokens,
        )
    except torch.OutOfMemoryError as error:
        raise DiffalignError(
            f"the memory of the GPU does not hold {len(questions)} questions at once: set "
            f"asking.batch_size lower. What was answered stays, and the same command goes on"
        ) from error


def choose_responses(
    model: WritesResponses,
    questions: Sequence[str],
    images: Sequence[Sequence[Any]],
    choices: Sequence[Sequence[str]],
    *,
    system: str,
) -> list[str]:
    """The choice of each question that is most probably the first word of a response.

    Args:
        model, questions, images, system: see `write_responses`.
        choices: n lists of words.

    Raises:
        ModelError: the model tells no probabilities, or has no token for a word.
    """
    from diffalign.models.vlm.answering import Answerer
    from diffalign.models.vlm.processor import question_prompt

    if not isinstance(model, Answerer):
        raise ModelError("this model tells no probabilities of words: use kind vlm")
    tokenizer = model.processor.tokenizer
    rows: list[str] = []
    for text, shown, words in zip(questions, images, choices, strict=True):  # alone: no padding
        prompt = question_prompt(model.processor, text, system=system, images=len(shown))
        (found,) = model.first_token_probabilities([prompt], [shown])
        probable = {w: float(found[_first_tokens(tokenizer, w)].sum()) for w in words}
        rows.append(max(probable, key=probable.__getitem__))
    return rows


def _first_tokens(tokenizer: Any, word: str) -> list[int]:
    """Rows of the vocabulary with which a word may begin, after a space or not."""
    spelt = (tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}"))
    heads = {ids[0] for ids in spelt if ids}
    found = sorted(i for i in heads if tokenizer.decode([i]).strip())
    if not found:
        raise ModelError(f"the tokenizer has no token with which {word!r} begins")
    return found
