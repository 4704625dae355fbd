"""Who is shown what: the sides of each item, progress, and what may be answered.

It knows neither HTTP nor pages. Names of models, files and items stay inside: what a browser gets
of them are tokens, made with a key that only the folder of the labels has. Every method may be
called from any thread.
"""

from __future__ import annotations

import hashlib
import math
import random
import secrets
import statistics
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffalign.data.decoding import BadImageError
from diffalign.data.responses.records import IMAGE
from diffalign.data.skipping import SkipLog, Skipped, UnusableRowError
from diffalign.errors import DataError
from diffalign.files import read_json, write_json
from diffalign.labelling.answers import Answer, AnswerFile, Choice, check_ranking
from diffalign.labelling.items import AbstractItems, ShownImages
from diffalign.parsing import checked
from diffalign.seeding import derive_seed

SESSION, SKIPPED = "session.json", "skipped.jsonl"
"""Files in the folder of the labels: which data it is of, and what could not be shown."""
LONGEST_NAME = 60
"""Characters of a person's name."""
_AHEAD = 2
"""Items whose images a browser is told of before it needs them."""
_PACE = 30
"""Answers whose median says how long the rest will take."""
_LONGEST_S = 3600.0
"""An answer that took longer was left open: its time says nothing."""


class StaleError(Exception):
    """An answer to an item that is not the one this person is asked about."""


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What a folder of labels is of."""

    data: str
    """Fingerprint of the items."""
    shows: str
    key: str
    """Of tokens, hexadecimal; random, and worth nothing elsewhere."""


class Session:
    """The labelling of some items by several people, kept in one folder."""

    def __init__(
        self,
        items: AbstractItems,
        folder: Path,
        *,
        order: Sequence[int],
        seed: int = 0,
        people: int | None = None,
    ) -> None:
        """Take up what was answered before.

        Args:
            items: what is compared.
            folder: of the labels.
            order: numbers of the items in which they are shown, to everybody alike.
            seed: of the sides.
            people: that answer an item at most; None for all.

        Raises:
            DataError: the answers there are of other data, or damaged.
        """
        self.items, self.folder, self.order = items, folder, order
        self.shown = ShownImages(items)
        self.answers = AnswerFile(folder)
        self._numbers = {item.item_id: number for number, item in enumerate(items.items)}
        self._seed, self._people = seed, people
        self._key = bytes.fromhex(self._identity().key)
        self._refuse_other_items()
        self._skipped = SkipLog(folder / SKIPPED)
        self._unusable: set[int] = set()
        self._decided = Counter(
            self._numbers[answer.item] for answer in self.answers.all() if answer.answer != "skip"
        )
        self._open: dict[str, int] = {}
        self._images: dict[str, tuple[int, int]] = {}
        self._lock = threading.RLock()

    def _identity(self) -> _Identity:
        path = self.folder / SESSION
        now = _Identity(
            data=self.items.fingerprint, shows=self.items.shows, key=secrets.token_hex(16)
        )
        if not path.is_file():
            write_json(path, asdict(now))
            return now
        found = checked(_Identity, read_json(path), path)
        if (found.data, found.shows) != (now.data, now.shows):
            raise self._of_other_data(f"{path} says so")
        return found

    def _refuse_other_items(self) -> None:
        gone = [a.item for a in self.answers.all() if a.item not in self._numbers]
        if gone:
            raise self._of_other_data(
                f"{len(gone)} answers are on items that this data has not, such as {gone[0]!r:.80}"
            )

    def _of_other_data(self, why: str) -> DataError:
        return DataError(
            f"{self.folder}: the labels there are of other data ({why}). Give the data that they "
            f"are of, or another folder with output=..."
        )

    # --- what is shown ---------------------------------------------------------------------------

    def state(self, person: str) -> dict[str, Any]:
        """What a person's page shows now, as JSON: no name of a model, file or item is in it."""
        number = self._current(person)
        with self._lock:
            own = self.answers.by_person.get(person, {})
            left, pace = self._left(person), self._pace(own)
            return {
                "person": person,
                "done": len(own),
                "total": len(own) + left,
                "seconds_left": None if pace is None else pace * left,
                "item": None if number is None else self._view(person, number),
                "ahead": [] if number is None else self._ahead(person, number),
                "not_shown": len(self._unusable),
            }

    def _view(self, person: str, number: int) -> dict[str, Any]:
        content, order = self.shown.content(number), self._sides(person, number)
        by_side = self.items.shows == "images"
        places = order if by_side else range(len(content.images))
        return {
            "token": self._token(person, number, "item"),
            "prompt": content.prompt,
            "turns": [
                {"role": turn.role, "text": turn.text.replace(IMAGE, "").strip()}
                for turn in content.turns
            ],
            "images": [self._image(person, number, place) for place in places],
            "responses": [content.responses[side] for side in order] if not by_side else [],
        }

    def _current(self, person: str) -> int | None:
        """The item that a person is asked about; None where there is none left."""
        while True:
            with self._lock:
                number = self._next(person)
            if number is None:
                return None
            try:
                self.shown.check(number)
                return number
            except (BadImageError, UnusableRowError) as error:
                with self._lock:
                    self._pass_over(number, error)

    def _next(self, person: str) -> int | None:
        if (number := self._open.get(person)) is None:
            number = next(self._waiting(person, reserved=True), None)
            if number is None:
                number = next(self._waiting(person), None)
        if number is not None:
            self._open[person] = number
        return number

    def _waiting(self, person: str, *, reserved: bool = False) -> Iterator[int]:
        """The items that a person may be asked about, in order.

        Args:
            person: their name.
            reserved: whether an item that another one looks at counts as answered by them.
        """
        own = self.answers.by_person.get(person, {})
        others = Counter(n for name, n in self._open.items() if name != person)
        for number in self.order:
            if number in self._unusable or self.items.items[number].item_id in own:
                continue
            taken = self._decided[number] + (others[number] if reserved else 0)
            if self._people is None or taken < self._people or self._open.get(person) == number:
                yield number

    def _left(self, person: str) -> int:
        return sum(1 for _ in self._waiting(person))

    def _pass_over(self, number: int, error: BadImageError | UnusableRowError) -> None:
        self._unusable.add(number)
        self._open = {name: n for name, n in self._open.items() if n != number}
        name = self.items.items[number].item_id
        self._skipped.add(Skipped(sample_id=name, reason=error.reason, detail=error.detail))

    def _ahead(self, person: str, number: int) -> list[str]:
        """Images of the items after this one."""
        tokens = []
        coming = (n for n in self._waiting(person, reserved=True) if n != number)
        for after, _ in zip(coming, range(_AHEAD), strict=False):
            try:
                places = range(len(self.shown.content(after).images))
            except (BadImageError, UnusableRowError):
                continue  # told when it is the one to be shown
            tokens += [self._image(person, after, place) for place in places]
        return tokens

    def _sides(self, person: str, number: int) -> tuple[int, ...]:
        """The sides of an item as a person sees them."""
        item = self.items.items[number]
        order = list(range(item.sides))
        random.Random(derive_seed("sides", self._seed, item.item_id, person)).shuffle(order)
        return tuple(order)

    def _image(self, person: str, number: int, place: int) -> str:
        token = self._token(person, number, f"image {place}")
        self._images[token] = (number, place)
        return token

    def _token(self, person: str, number: int, what: str) -> str:
        text = "\0".join([person, self.items.items[number].item_id, what])
        return hashlib.blake2b(text.encode(), key=self._key, digest_size=16).hexdigest()

    def _pace(self, own: Mapping[str, Answer]) -> float | None:
        """Seconds that an answer of a person takes; None where too few say it."""
        times = [answer.seconds for answer in own.values() if answer.seconds is not None]
        return statistics.median(times[-_PACE:]) if len(times) > 2 else None

    def png(self, token: str) -> bytes | None:
        """An image that was named to a browser; None for any other token."""
        place = self._images.get(token)
        try:
            return None if place is None else self.shown.png(*place)
        except (BadImageError, UnusableRowError):
            return None

    def standing(self) -> list[Answer]:
        """Every answer that stands."""
        with self._lock:
            return list(self.answers.all())

    # --- what is answered ------------------------------------------------------------------------

    def answer(
        self,
        person: str,
        token: str,
        choice: Choice,
        *,
        ranking: Sequence[Sequence[int]] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Put an answer on the disk. The same one a second time changes nothing.

        Args:
            person: their name.
            token: of the item.
            choice: what they say.
            ranking: sides by their places on the page, in classes, best first.
            seconds: for which the item was seen.

        Raises:
            StaleError: it is not the item that this person is asked about.
            ValueError: no such answer goes with the item.
            DataError: the disk refuses; then there is no answer.
        """
        with self._lock:
            number = self._next(person)
            if number is None or token != self._token(person, number, "item"):
                own = self.answers.by_person.get(person, {})
                last = self._numbers[next(reversed(own))] if own else None
                if last is not None and token == self._token(person, last, "item"):
                    return  # the answer arrived, and word of it did not
                raise StaleError
            item, order = self.items.items[number], self._sides(person, number)
            if (choice == "ranking") != (ranking is not None):
                raise ValueError("a ranking, and no other answer, names sides in their order")
            if item.sides > 2 and choice not in ("ranking", "skip"):
                raise ValueError(f"{item.sides} sides are ranked or skipped, got {choice}")
            if ranking is not None:
                check_ranking(ranking, item.sides)
            known = seconds is not None and math.isfinite(seconds) and 0 <= seconds <= _LONGEST_S
            self.answers.add(
                Answer(
                    person=person,
                    item=item.item_id,
                    answer=choice,
                    order=order,
                    ranking=None
                    if ranking is None
                    else tuple(tuple(sorted(order[n] for n in members)) for members in ranking),
                    seconds=round(float(seconds), 3) if seconds is not None and known else None,
                    digests=self.shown.content(number).digests(),
                )
            )
            self._decided[number] += choice != "skip"
            del self._open[person]

    def undo(self, person: str, answered: int) -> None:
        """Take back a person's last answer; its item is what they are asked next.

        Args:
            person: their name.
            answered: how many answers the page knows of; with another number nothing is done, so
                that a request which is sent again takes back nothing more.

        Raises:
            DataError: the disk refuses; then the answer stands.
        """
        with self._lock:
            own = self.answers.by_person.get(person, {})
            if not own or len(own) != answered:
                return
            last = next(reversed(own.values()))
            self.answers.add(Answer(person=person, item=last.item, answer="undo"))
            number = self._numbers[last.item]
            self._decided[number] -= last.answer != "skip"
            self._open[person] = number


def person_of(name: str) -> str:
    """A name as it is kept: blanks made one.

    Raises:
        ValueError: it is empty, too long, or holds characters that cannot be seen.
    """
    plain = " ".join(name.split())
    if not plain or len(plain) > LONGEST_NAME or not plain.isprintable():
        raise ValueError(f"a name has 1 to {LONGEST_NAME} characters that can be read")
    return plain
