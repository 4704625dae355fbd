"""Preference data out of questions about images: the contract of a method."""

from __future__ import annotations

import abc
import hashlib
import io
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image

from diffalign.data.decoding import BadImageError, EncodedImage, decode, format_of
from diffalign.data.responses.questions import Question, Unmade
from diffalign.data.responses.records import Turn
from diffalign.data.skipping import UnusableRowError
from diffalign.files import write_atomically
from diffalign.generation.writing import Writer
from diffalign.ranges import Ranged

_FOLDER = "images"


class ImageStore:
    """Names images so that rows in a folder can refer to them."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: of the rows; names are relative to it.
        """
        self._folder = folder.absolute()

    def name(self, image: EncodedImage) -> str:
        """The name of an image of the questions; one that lies in a table gets a file of its own.

        Raises:
            ValueError: there is no image.
            UnusableRowError: it is none that can be read.
        """
        if image is None:
            raise ValueError("an image is missing, which its reader should have found")
        if isinstance(image, bytes):
            try:
                return self._written(image, format_of(image))
            except BadImageError as error:
                raise UnusableRowError(error.reason, error.detail) from error
        return Path(os.path.relpath(image.absolute(), self._folder)).as_posix()

    def save(self, image: Image.Image) -> str:
        """The name of a new image, which is written without loss."""
        stream = io.BytesIO()
        image.save(stream, "png")
        return self._written(stream.getvalue(), "png")

    def _written(self, content: bytes, suffix: str) -> str:
        """A file is named by what is in it, so that making it again changes nothing."""
        digest = hashlib.blake2b(content, digest_size=12).hexdigest()
        name = f"{_FOLDER}/{digest}.{suffix}"
        path = self._folder / name
        if not path.is_file():
            own = (
                f"{socket.gethostname()}-{os.getpid()}-{digest}"  # others may write the same image
            )
            write_atomically(path, content, draft=self._folder / ".blocks" / own)
        return name


State = TypeVar("State")

NO_RESPONSE = "the data set has no response"
ONE_IMAGE = "not one question about one image"
SAME_RESPONSE = "the responses are the same"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A row made of one question, as JSON holds it."""

    sample_id: str
    values: Mapping[str, Any]
    """Column -> value. Images are names of files, as `ImageStore` gives them."""


Maker = Callable[[Sequence[Question]], "list[Made | Unmade]"]
"""Makes something of each of a few questions, in their order."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The model, the images and the seed that methods work with."""

    writer: Writer
    """The model."""
    questions: Sequence[Question | Unmade]
    """All of them, for images that take the place of others; may be read from disk one by one."""
    images: ImageStore
    """Where new images go."""
    folder: Path
    """For what is worth keeping between runs."""
    seed: int
    """Of the run."""
    max_pixels: int
    """Larger images are refused unread."""

    def image(self, image: EncodedImage) -> Any:
        """The RGB image.

        Raises:
            UnusableRowError: it is missing, damaged or too large.
        """
        try:
            return decode(image, max_pixels=self.max_pixels)
        except BadImageError as error:
            raise UnusableRowError(error.reason, error.detail) from error


@dataclass(frozen=True, kw_only=True)
class AbstractSynthesis(Ranged, abc.ABC):
    """The settings of a method that makes preference data."""

    later: ClassVar[frozenset[str]] = frozenset()
    """Settings that `pairs` alone reads: changing them costs no response of the model."""

    @property
    @abc.abstractmethod
    def form(self) -> str:
        """The `responses.kind` that reads what it makes."""

    @property
    @abc.abstractmethod
    def image_columns(self) -> tuple[str, ...]:
        """Columns of its rows that hold images."""

    @abc.abstractmethod
    def open(self, context: Context) -> Maker:
        """Get ready.

        Raises:
            ModelError: the model cannot do what the method asks of it.
        """

    def check(self) -> None:
        """Raise ConfigError for what can be known to be missing before weights are read."""

    def tools(self) -> Mapping[str, str]:
        """Part -> which of several ways of doing it is taken here; other ways, other data."""
        return {}

    def pairs(self, made: Sequence[Made], folder: Path) -> list[Made | Unmade]:
        """The rows of the data set, from what was made of all questions.

        Args:
            made: in the order of the questions.
            folder: as in `Context`.
        """
        return list(made)


def prepared(
    questions: Sequence[Question], prepare: Callable[[Question], State]
) -> tuple[dict[str, State], dict[str, Made | Unmade]]:
    """Results of `prepare` by the id of the question; and why other questions cannot be used."""
    states: dict[str, State] = {}
    unusable: dict[str, Made | Unmade] = {}
    for question in questions:
        try:
            states[question.sample_id] = prepare(question)
        except UnusableRowError as error:
            unusable[question.sample_id] = Unmade(
                sample_id=question.sample_id, reason=error.reason.value, detail=error.detail
            )
        except UnsuitedError as error:
            unusable[question.sample_id] = Unmade(
                sample_id=question.sample_id, reason=error.reason, detail=error.detail
            )
    return states, unusable


class UnsuitedError(Exception):
    """A sound question that a method can make nothing of, and why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def response_to(question: Question) -> str:
    """The response of the data set.

    Raises:
        UnsuitedError: there is none.
    """
    if not question.response or not question.response.strip():
        raise UnsuitedError(NO_RESPONSE, repr(question.response))
    return question.response.strip()


def check_one_image(question: Question) -> None:
    """Raise UnsuitedError unless it is one question about one image, besides a system's turn."""
    asked = [turn for turn in question.turns if turn.role != "system"]
    if len(question.images) != 1 or len(asked) != 1:
        raise UnsuitedError(ONE_IMAGE, f"{len(asked)} turns, {len(question.images)} images")


def messages(turns: Sequence[Turn], response: str | None = None) -> list[dict[str, str]]:
    """A conversation as data sets write it, with its response if there is one."""
    written = [{"role": turn.role, "content": turn.text} for turn in turns]
    return written if response is None else [*written, {"role": "assistant", "content": response}]
