"""The `questions:` section of a config: what is asked, about which images.

Any data set of preferences between responses will do, of which the prompts and the chosen responses
are taken; or plain rows of images, a prompt and perhaps a response.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from diffalign.config import MAY_CHANGE
from diffalign.data.decoding import EncodedImage
from diffalign.data.responses.conversation import Comparison, malformed, turns_of
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.responses.images import conversation_of
from diffalign.data.responses.reading import OpenedResponses, open_responses, renamed
from diffalign.data.responses.records import IMAGE, Turn
from diffalign.data.skipping import UnusableRowError
from diffalign.errors import DataError
from diffalign.ranges import AtLeast, Ranged


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation about images, and perhaps the response that its data set has."""

    sample_id: str
    """Unique within the data set and stable between runs: randomness derives from it."""
    images: tuple[EncodedImage, ...]
    """In reading order: as many as there are `IMAGE` markers in the turns."""
    turns: tuple[Turn, ...]
    """The conversation up to the response; the last turn is the user's."""
    response: str | None
    """The chosen response of the data set."""
    rejected: str | None = None
    """The rejected one, where the data set has pairs."""

    @property
    def text(self) -> str:
        """The last turn of the user, without markers."""
        return self.turns[-1].text.replace(IMAGE, "").strip()


@dataclass(frozen=True, kw_only=True)
class Unmade:
    """A question of which nothing could be made: a line of skipped.jsonl."""

    sample_id: str
    reason: str
    """The kind of reason, by which they are counted."""
    detail: str
    """Details of this case."""


@dataclass(frozen=True, kw_only=True)
class QuestionConfig(Ranged):
    """Where the questions lie."""

    section: ClassVar[str] = "questions"

    path: str = field(metadata=MAY_CHANGE)
    """A .parquet, .arrow, .jsonl or .json file, a folder or a glob pattern of them, or the id of a
    data set on the Hugging Face hub."""
    kind: str = "auto"
    """plain for rows with `image` or `images` and `prompt` or `conversations`, and perhaps
    `response`; otherwise a form of the section `responses` of training; auto tries plain, then the
    others."""
    columns: dict[str, str] = field(default_factory=dict)
    """The form's name for a column -> yours."""
    image_folder: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder that relative names of images start from; null for that of the file that names
    them."""
    split: str = "train"
    """Split of a hub data set, or of a folder whose file names carry one."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    limit: Annotated[int, AtLeast(1)] | None = None
    """Use only the first so many rows."""
    max_pixels: int = 89_478_485
    """Larger images are skipped unread, as in training."""


class Plain(AbstractMapping):
    """`image` or `images`, `prompt` or `conversations`, and perhaps `response`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    responses: ClassVar[tuple[str, ...]] = ("chosen",)
    images_optional: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "prompt from prompt and response from response or answer, or both from conversations"
    )

    def recognises(self, first: Mapping[str, Any]) -> bool:
        others = {"chosen", "rejected", "rejected_conversations", "completions", "chosen_item"}
        return bool({"prompt", "conversations"} & set(first)) and not others & set(first)

    def comparisons(self, values: Mapping[str, Any]) -> Sequence[Comparison]:
        """The first question, and its response if there is one."""
        turns = turns_of(values.get("prompt") or values.get("conversations"))
        asked = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if asked is None:
            raise malformed("the conversation has no turn of the user")
        replies = turns[asked + 1 : asked + 2]
        response = (
            values.get("response") or values.get("answer") or "".join(turn.text for turn in replies)
        )
        responses = {"chosen": str(response)} if response else {}
        return [Comparison(turns=turns[: asked + 1], responses=responses)]


class Questions(Sequence[Question | Unmade]):
    """Questions by number, each read from disk when it is asked for."""

    def __init__(self, data: OpenedResponses, *, limit: int | None) -> None:
        self._data = data
        self._count = len(data.rows) if limit is None else min(limit, len(data.rows))
        self.summary = data.summary.replace(Plain.__module__, "plain")
        self.fingerprint = data.fingerprint

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Question | Unmade]:
        return (self[number] for number in range(self._count))

    def __getitem__(self, number: Any) -> Any:
        """The question of a row, or why it holds none."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(self._count))]
        row = self._data.rows[range(self._count)[number]]
        values = renamed(row.values, self._data.names)
        values = {**dict.fromkeys(self._data.mapping.needs), **values}
        try:
            if row.problem is not None:
                raise malformed(row.problem)
            return self._question(values, row.name, self._data.image_folder or row.folder)
        except UnusableRowError as error:
            return Unmade(sample_id=row.name, reason=error.reason.value, detail=error.detail)

    def _question(self, values: Mapping[str, Any], name: str, folder: Any) -> Question:
        mapping = self._data.mapping
        found = [some for some in mapping.comparisons(values) if isinstance(some, Comparison)]
        if not found:
            raise malformed("the row holds no preference, and so no chosen response")
        column = mapping.image_column(values)
        encoded = values.get(column) if column else None
        shown = encoded if isinstance(encoded, (list, tuple)) else [encoded] if encoded else []
        asked = conversation_of(found[0].turns, shown, folder or self._data.folder)
        turns, images = asked.turns, asked.images
        markers = sum(turn.text.count(IMAGE) for turn in turns)
        if markers != len(images) or None in images:
            raise malformed(
                f"{markers} {IMAGE} in the prompt, and images in the row: {len(images)}"
            )
        return Question(
            sample_id=name,
            images=images,
            turns=turns,
            response=found[0].responses.get("chosen"),
            rejected=found[0].responses.get("rejected"),
        )


def open_questions(config: QuestionConfig) -> Questions:
    """Find the data, recognise its form, and open it.

    Raises:
        DataError: nothing is there, or neither the plain form nor another fits its columns.
        ConfigError: there is no such `questions.kind`, or several would do.
    """
    plain = Plain.__module__  # by which `kind` finds it, outside the folder of the others
    if config.kind == "auto":
        try:
            data = open_responses(replace(config, kind=plain))
        except DataError:
            data = open_responses(config)
    else:
        data = open_responses(replace(config, kind=plain) if config.kind == "plain" else config)
    return Questions(data, limit=config.limit)
