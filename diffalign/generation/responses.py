"""Asking a model about images, greedily, and keeping its responses.

A rerun asks only what has no response yet, and loads no model where nothing is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

from rich.console import Console

from diffalign import config as configs
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row, here
from diffalign.console import progress, silence_libraries
from diffalign.data.decoding import BadImageError, decode
from diffalign.errors import ConfigError, DataError, DiffalignError, ModelError
from diffalign.files import add_json_lines, read_json_lines
from diffalign.models.base import AbstractModel
from diffalign.parsing import checked
from diffalign.ranges import AtLeast, Ranged
from diffalign.sessions import complete


@dataclass(frozen=True, kw_only=True)
class Asking(Ranged):
    """How a model is asked, and where its responses are kept."""

    images: Path
    """Folder of the benchmark's images, under their published names."""
    saves: Path
    """JSON lines of responses; a rerun goes on from there."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 512
    """A response ends there at the latest."""
    system: str = ""
    """What a system turn says before each question; empty leaves it to the chat template. That of
    `llava-1.5-7b-hf` has none, where LLaVA's own scripts begin with Vicuna's sentence."""
    batch_size: Annotated[int, AtLeast(1)] = 8
    """Questions asked at once."""
    dtype: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """In which the model computes; auto is bf16 on a GPU and float32 elsewhere."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""

    @property
    def figures_depend_on(self) -> dict[str, Any]:
        """The settings that shape responses, for a report."""
        named = {"max_new_tokens": self.max_new_tokens, "dtype": self.dtype}
        return {**named, "system": self.system} if self.system else named


@dataclass(frozen=True, kw_only=True)
class ImageQuestion:
    """One question about one image."""

    question_id: str
    image: Path | None
    """None where the question is asked without one."""
    text: str
    choices: tuple[str, ...] = ()
    """Words to choose among: the response is the one that most probably comes first. Empty lets the
    model write."""

    @property
    def image_name(self) -> str:
        """The name of the image's file; empty where there is none."""
        return "" if self.image is None else self.image.name


class WritesResponses(Protocol):
    """Models that write responses; that of `models.vlm` is one."""

    processor: Any
    """Of transformers, with a chat template."""

    def generate(
        self, prompts: Sequence[str], images: Sequence[Sequence[Any]], *, max_new_tokens: int
    ) -> list[str]:
        """Greedy responses to conversations that the chat template wrote."""


def check_one_source(
    saved: object | None, model: AbstractModel | None, asking: Asking | None, *, name: str
) -> None:
    """Raise ValueError unless responses come from a file or from a model with its settings."""
    if (saved is None) == (model is None):
        raise ValueError(
            f"give either {name}=FILE with saved responses, or a model to ask: "
            "model.kind=vlm model.path=FOLDER asking.images=FOLDER asking.saves=FILE.jsonl"
        )
    if (model is None) != (asking is None):
        raise ValueError(
            "model and asking go together: asking.images=FOLDER asking.saves=FILE.jsonl say which "
            "images a model is shown and where its responses are kept"
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Who is asked what, and how."""

    model: AbstractModel
    """Settings of the model."""
    questions: Sequence[ImageQuestion]
    """With distinct ids."""
    asking: Asking
    """How; its file is read first and added to."""


class ResponsesPlan(AbstractPlan):
    """The responses to questions, as blocks: those that are asked at once."""

    title, unit = "ask", "questions"

    def __init__(self, asked: Asked) -> None:
        """See what has a response.

        Raises:
            ConfigError: the file was written by another model or under other settings.
        """
        asking = asked.asking
        self._asked, self.device = asked, asking.device
        self.folder, self.of = asking.saves.parent, asking.saves.name
        model = _identity(asked.model)
        self._maker = _digest(model, asking.max_new_tokens, asking.system, asking.dtype)
        self._known = {q.question_id: _digest_of(q) for q in asked.questions}
        kept = _kept(asking.saves, self._maker)
        self.responses = {i: r.answer for i, r in kept.items() if r.asked == self._known.get(i)}
        """By question id, those that are there."""
        size = asking.batch_size
        batches = [asked.questions[i : i + size] for i in range(0, len(asked.questions), size)]
        self.blocks = [
            Block.of(
                place,
                [self._maker, [(q.question_id, self._known[q.question_id]) for q in batch]],
                len(batch),
                batch,
            )
            for place, batch in enumerate(batches)
        ]

    def is_done(self, block: Block) -> bool:
        return all(q.question_id in self.responses for q in block.work)

    def check(self) -> None:
        """Raise DataError where images of questions that have no response are missing."""
        missing = [q for q in self._asked.questions if q.question_id not in self.responses]
        _check_images(missing, self._asked.asking.images)

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        model = _load(self._asked.model, self._asked.asking, device)
        return lambda block: self._ask(model, block.work)

    def _ask(self, model: WritesResponses, batch: Sequence[ImageQuestion]) -> list[Row | Failed]:
        write = _choose if any(q.choices for q in batch) else _generate
        texts = write(model, batch, self._asked.asking)
        rows = [
            _Kept(
                question_id=q.question_id,
                image=q.image_name,
                question=q.text,
                answer=text,
                asked=self._known[q.question_id],
                made_by=self._maker,
            )
            for q, text in zip(batch, texts, strict=True)
            if q.question_id not in self.responses
        ]
        return [Row(asdict(row)) for row in rows]

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        add_json_lines(self._asked.asking.saves, rows)


def ask(model: AbstractModel, questions: Sequence[ImageQuestion], asking: Asking) -> dict[str, str]:
    """Responses by question id, in the order of the questions; what is missing is asked here.

    Args:
        model: settings of what is asked.
        questions: with distinct ids.
        asking: how; its file is read first and added to.

    Raises:
        ConfigError: the file was written by another model or under other settings.
        DataError: an image is missing, or cannot be read.
        ModelError: the model cannot be loaded, writes no text, or has no chat template.
    """
    asked = Asked(model=model, questions=questions, asking=asking)
    plan = ResponsesPlan(asked)
    if not all(map(plan.is_done, plan.blocks)):
        plan.check()
        unasked = sum(block.size for block in plan.blocks if not plan.is_done(block))
        with progress(Console(stderr=True), plan.title, unasked, unit=plan.unit) as advance:
            complete(lambda: ResponsesPlan(asked), here(advance))
        plan = ResponsesPlan(asked)
    return {q.question_id: plan.responses[q.question_id] for q in questions}


def _generate(
    model: WritesResponses, questions: Sequence[ImageQuestion], asking: Asking
) -> list[str]:
    import torch

    from diffalign.models.vlm.processor import question_prompt

    try:
        return model.generate(
            [
                question_prompt(
                    model.processor,
                    question.text,
                    system=asking.system,
                    image=question.image is not None,
                )
                for question in questions
            ],
            [_images(question) for question in questions],
            max_new_tokens=asking.max_new_tokens,
        )
    except torch.OutOfMemoryError as error:
        raise DiffalignError(
            f"the memory of the GPU does not hold {len(questions)} questions at once: set "
            f"asking.batch_size lower. What was answered stays, and the same command goes on"
        ) from error


def _choose(
    model: WritesResponses, questions: Sequence[ImageQuestion], asking: Asking
) -> list[str]:
    """The choice of each question that is most probably the first word of a response."""
    from diffalign.models.vlm.model import VisionLanguageModel
    from diffalign.models.vlm.processor import question_prompt

    if not isinstance(model, VisionLanguageModel):
        raise ModelError("this model tells no probabilities of words: use kind vlm")
    tokenizer = model.processor.tokenizer
    rows: list[str] = []
    for question in questions:  # one by one: no padding, and letters alone are compared
        image = question.image is not None
        prompt = question_prompt(model.processor, question.text, system=asking.system, image=image)
        (found,) = model.first_token_probabilities([prompt], [_images(question)])
        probable = {w: float(found[_first_tokens(tokenizer, w)].sum()) for w in question.choices}
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


def _identity(model: AbstractModel) -> Any:
    """Tells a model from others, also from one that lay in the same folder before."""
    from diffalign.models.vlm.config import VLM

    return model.policy_fingerprint() if isinstance(model, VLM) else configs.to_dict(model)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """One line of the file of responses."""

    question_id: str
    image: str
    question: str
    answer: str
    """The response; files of earlier versions have this key too."""
    asked: str
    """Digest of image and question."""
    made_by: str
    """Digest of model and settings."""


def _kept(path: Path, maker: str) -> dict[str, _Kept]:
    if not path.is_file():
        return {}
    rows = read_json_lines(path)
    if any(not isinstance(row, dict) or row.get("made_by") != maker for row in rows):
        raise ConfigError(
            f"{path}: holds responses of another model, or under another asking.max_new_tokens, "
            "asking.system or asking.dtype; give asking.saves another file"
        )
    kept = [checked(_Kept, row, f"{path}: line {n}") for n, row in enumerate(rows, start=1)]
    return {row.question_id: row for row in kept}


def _check_images(questions: Sequence[ImageQuestion], folder: Path) -> None:
    absent = sorted({q.image.name for q in questions if q.image and not q.image.is_file()})
    if absent:
        raise DataError(
            f"{folder}: {len(absent)} images of the benchmark are missing, for example "
            f"{', '.join(absent[:5])}; asking.images must hold them under their published names"
        )


def _load(model: AbstractModel, asking: Asking, place: str | None) -> WritesResponses:
    from diffalign.models.devices import DTYPES, choose_device

    device = choose_device(place or asking.device)
    usual: Literal["bf16", "float32"] = "bf16" if device.type == "cuda" else "float32"
    dtype = usual if asking.dtype == "auto" else asking.dtype
    model.check()
    silence_libraries()
    loaded = model.load(
        device=device, compute_dtype=DTYPES[dtype], reference="none", trainable=False
    )
    if not hasattr(loaded, "generate"):
        raise ModelError(f"{model.describe()}: writes no text, so it cannot answer; use kind vlm")
    return cast(WritesResponses, loaded)


def _images(question: ImageQuestion) -> list[Any]:
    path = question.image
    if path is None:
        return []
    try:
        return [decode(path)]
    except BadImageError as error:
        reason = f"{error.reason.value}: {error.detail}"
        raise DataError(f"{path}: cannot be read as an image: {reason}") from error


def _digest_of(question: ImageQuestion) -> str:
    """Tells what was asked; files of earlier versions, which knew no choices, hold the same."""
    choices = [list(question.choices)] if question.choices else []
    return _digest(question.image_name, question.text, *choices)


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
