"""Asking a model about images, greedily, and keeping its responses.

Questions about an image are asked together: a model of this machine looks at it once for all of
them. A model behind an endpoint is asked several questions at once, each by itself. A rerun asks
only what has no response yet, and loads no model where nothing is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from diffalign import config as configs
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row, here
from diffalign.console import progress
from diffalign.data.decoding import BadImageError, decode
from diffalign.endpoints import announce
from diffalign.errors import ConfigError, DataError
from diffalign.files import add_json_lines, read_json_lines
from diffalign.generation.local_model import (
    WritesResponses,
    choose_responses,
    load_to_answer,
    write_responses,
)
from diffalign.generation.served_model import Ahead, ServedModel
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
    engine: Literal["model", "endpoint"] = "model"
    """Who responds: `model`, loaded on this machine, or the server of `endpoint`."""
    endpoint: ServedModel | None = None
    """Address and name of a served model, for `engine: endpoint`."""
    batch_size: Annotated[int, AtLeast(1)] = 16
    """Questions that a model of this machine is asked at once. Those about one image are together
    where they fit; an image with more of them is still looked at once."""
    workers: Annotated[int, AtLeast(0)] = 2
    """Threads that decode the next images while a model of this machine responds; 0 decodes in
    turn."""
    dtype: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """In which the model computes; auto is bf16 on a GPU and float32 elsewhere."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.engine == "endpoint") != (self.endpoint is not None):
            raise ValueError(
                "a served model is asked with engine=endpoint and its address and name: "
                "asking.engine=endpoint asking.endpoint.address=http://127.0.0.1:8000/v1 "
                "asking.endpoint.model=NAME; give all of them, or none"
            )

    @property
    def figures_depend_on(self) -> dict[str, Any]:
        """The settings that shape responses, for a report."""
        served = self.endpoint
        computed = {"dtype": self.dtype} if served is None else {"endpoint": served.model}
        named = {"max_new_tokens": self.max_new_tokens, **computed}
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


def check_one_source(
    saved: object | None, model: AbstractModel | None, asking: Asking | None, *, name: str
) -> None:
    """Raise ValueError unless responses come from a file or from a model with its settings."""
    served = asking is not None and asking.endpoint is not None
    if served and model is not None:
        raise ValueError(
            "asking.engine is endpoint, and the model there is named by asking.endpoint.model: "
            "leave model out"
        )
    if (saved is None) == (model is None and not served):
        raise ValueError(
            f"give either {name}=FILE with saved responses, or a model to ask: "
            "model.kind=vlm model.path=FOLDER asking.images=FOLDER asking.saves=FILE.jsonl"
        )
    if (model is None) != (asking is None) and not served:
        raise ValueError(
            "model and asking go together: asking.images=FOLDER asking.saves=FILE.jsonl say which "
            "images a model is shown and where its responses are kept"
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Who is asked what, and how."""

    model: AbstractModel | None
    """Settings of the model; None where it is behind an endpoint."""
    questions: Sequence[ImageQuestion]
    """With distinct ids."""
    asking: Asking
    """How; its file is read first and added to."""


class ResponsesPlan(AbstractPlan):
    """The responses to questions, as blocks: images with all that is asked about them, as many as a
    batch holds; of a served model single questions, each of which is kept as it comes."""

    title, unit = "ask", "questions"

    def __init__(self, asked: Asked) -> None:
        """See what has a response.

        Raises:
            ConfigError: the file was written by another model or under other settings.
        """
        asking = asked.asking
        self._asked, self.device = asked, asking.device
        self.folder, self.of = asking.saves.parent, asking.saves.name
        model = _identity(asked)
        self._maker = _digest(model, asking.max_new_tokens, asking.system, asking.dtype)
        self._known = {q.question_id: _digest_of(q) for q in asked.questions}
        self._places = {q.question_id: place for place, q in enumerate(asked.questions)}
        kept = _kept(asking.saves, self._maker)
        self.responses = {i: r.answer for i, r in kept.items() if r.asked == self._known.get(i)}
        """By question id, those that are there."""
        self.blocks = [
            Block.of(
                place,
                [self._maker, [(q.question_id, self._known[q.question_id]) for q in batch]],
                len(batch),
                batch,
            )
            for place, batch in enumerate(_together(asked))
        ]

    def is_done(self, block: Block) -> bool:
        return all(q.question_id in self.responses for q in block.work)

    def check(self) -> None:
        """Raise DataError where images of questions that have no response are missing, and
        ConfigError where the key of an endpoint may not be sent there."""
        missing = [q for q in self._asked.questions if q.question_id not in self.responses]
        if self._asked.asking.endpoint is not None and any(q.choices for q in missing):
            raise ConfigError(
                "choices are told apart by the probability of their first word, which a server is "
                "not asked for: give a model of this machine, or read written responses"
            )
        _check_images(missing, self._asked.asking.images)
        if self._asked.asking.endpoint is not None:
            self._asked.asking.endpoint.check()

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        questions = [question for block in upcoming for question in block.work]
        if self._asked.asking.endpoint is not None:
            return self._served(self._asked.asking.endpoint, questions)
        assert self._asked.model is not None
        asking = self._asked.asking
        model = load_to_answer(
            self._asked.model,
            device=device or asking.device,
            dtype=asking.dtype,
            rows_at_once=asking.batch_size,
        )
        said, console = getattr(model, "remarks", list), Console(stderr=True, highlight=False)
        images = Ahead(_images, [q.image for q in questions], threads=asking.workers)

        def do(block: Block) -> list[Row | Failed]:
            batch = block.work  # all of it: the company of a question does not change
            shown = {path: images.take(path) for path in dict.fromkeys(q.image for q in batch)}
            texts = _respond(model, batch, [shown[q.image] for q in batch], asking)
            for remark in said():
                console.print(remark, markup=False, soft_wrap=True)
            told = zip(batch, texts, strict=True)
            return [self._row(q, text) for q, text in told if q.question_id not in self.responses]

        return do

    def _served(self, endpoint: ServedModel, questions: Sequence[ImageQuestion]) -> Do:
        """Ask questions ahead, so that as many are under way as the settings say."""
        from diffalign.imaging.image_files import whole_uri  # which loads torch

        announce(endpoint.variable, endpoint.address, f"the model {endpoint.model}")
        asking = self._asked.asking
        uris = functools.lru_cache(endpoint.parallel)(
            lambda path: [whole_uri(image) for image in _images(path)]
        )

        def reply(question: ImageQuestion) -> str:
            return endpoint.reply(
                question.text,
                uris(question.image),
                name=f"{question.question_id} (image {question.image_name or 'none'})",
                system=asking.system,
                max_new_tokens=asking.max_new_tokens,
            )

        replies = Ahead(reply, questions, threads=endpoint.parallel)
        blocks = {question: block for block in self.blocks for question in block.work}

        def do(block: Block) -> list[Row | Failed]:
            try:
                return [self._row(q, replies.take(q)) for q in block.work]
            except BaseException as error:
                replies.stop()
                if isinstance(error, Exception):  # what comes meanwhile is kept
                    for question, text in replies.finished():
                        self.write(blocks[question], [self._row(question, text)])
                raise

        return do

    def _row(self, question: ImageQuestion, text: str) -> Row:
        kept = _Kept(
            question_id=question.question_id,
            image=question.image_name,
            question=question.text,
            answer=text,
            asked=self._known[question.question_id],
            made_by=self._maker,
        )
        return Row(asdict(kept))

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        last = len(self._places)
        ordered = sorted(rows, key=lambda row: self._places.get(row["question_id"], last))
        add_json_lines(self._asked.asking.saves, ordered)


def _together(asked: Asked) -> list[Sequence[ImageQuestion]]:
    """Questions as they are asked together: see `ResponsesPlan`."""
    by_image: dict[Path | None, list[ImageQuestion]] = {}
    for question in asked.questions:
        by_image.setdefault(question.image, []).append(question)
    if asked.asking.endpoint is not None:
        return [[question] for of_image in by_image.values() for question in of_image]
    batches: list[list[ImageQuestion]] = []
    for of_image in by_image.values():
        if batches and len(batches[-1]) + len(of_image) <= asked.asking.batch_size:
            batches[-1] += of_image
        else:
            batches.append(of_image)
    return [*batches]


def ask(
    model: AbstractModel | None, questions: Sequence[ImageQuestion], asking: Asking
) -> dict[str, str]:
    """Responses by question id, in the order of the questions; what is missing is asked here.

    Args:
        model: settings of what is asked; None where it is behind `asking.endpoint`.
        questions: with distinct ids.
        asking: how; its file is read first and added to.

    Raises:
        ConfigError: the file was written by another model or under other settings.
        DataError: an image is missing, or cannot be read.
        ModelError: the model cannot be loaded, writes no text, or has no chat template.
        EndpointError: the endpoint does not answer; what came before is kept.
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


def _respond(
    model: WritesResponses,
    questions: Sequence[ImageQuestion],
    images: Sequence[Sequence[Any]],
    asking: Asking,
) -> list[str]:
    texts = [question.text for question in questions]
    if any(question.choices for question in questions):
        choices = [question.choices for question in questions]
        return choose_responses(model, texts, images, choices, system=asking.system)
    return write_responses(
        model, texts, images, system=asking.system, max_new_tokens=asking.max_new_tokens
    )


def _identity(asked: Asked) -> Any:
    """Tells a model from others, also from one that lay in the same folder before."""
    from diffalign.models.vlm.config import VLM

    if asked.asking.endpoint is not None:
        return {"endpoint": asked.asking.endpoint.model, **asked.asking.endpoint.fields}
    model = asked.model
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


def _images(path: Path | None) -> list[Any]:
    """The image of a question, decoded; none where there is none."""
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
