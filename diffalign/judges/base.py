"""Language models that judge responses: contract, prompts, and verdicts kept in a file."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from diffalign.console import progress
from diffalign.errors import ConfigError, DataError
from diffalign.files import append_json_lines, read_rows, read_text
from diffalign.ranges import Ranged

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AbstractJudge(Ranged, abc.ABC):
    """Settings of a language model that reads a prompt and replies."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name in reports; verdicts of another name are not reused."""

    def check(self) -> None:
        """Raise ConfigError for what can be known to fail before anything is asked."""
        return

    @abc.abstractmethod
    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """The place of every prompt and the reply to it, in any order, as they come.

        Raises:
            ConfigError: the judge cannot be asked, whatever the prompt.
            DiffalignError: it does not answer for the time being.
        """


def read_template(path: Path | None, own: str) -> str:
    """The text of a template, or our own where no file is given."""
    if path is None:
        return own
    return read_text(path, absent="there is no such template")


def fill(template: str, **values: str) -> str:
    """Put values where their names stand in braces.

    A published template with plain `{}` takes them in the order in which they are given here.

    Raises:
        DataError: the template wants something else.
    """
    try:
        return template.format(*values.values(), **values)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"the template of the judge's prompt can be filled with {', '.join(values)} in braces, "
            f"and wants {error}; write braces that are meant as such twice"
        ) from error


def verdicts(
    judge: AbstractJudge,
    prompts: Mapping[str, str],
    parse: Callable[[str], T],
    *,
    saves: Path,
    attempts: int,
) -> dict[str, T]:
    """Verdicts of a judge on every item, read from a file as far as it was asked before.

    Args:
        judge: who is asked.
        prompts: by the id of what is judged.
        parse: makes a verdict of a reply, or raises ValueError; such a reply is asked for again.
        saves: JSON lines of readable replies; appended to as they come.
        attempts: how often an unreadable reply is asked for, all in all.

    Returns:
        Verdicts by id; those that never could be read are missing.

    Raises:
        ConfigError: the file holds something else.
    """
    judge.check()
    keys = {item: _digest(judge.name, prompt) for item, prompt in prompts.items()}
    saved = _saved(saves)
    found: dict[str, T] = {}
    for item, key in keys.items():
        if key in saved:
            with contextlib.suppress(ValueError):  # edited since: it is asked for again
                found[item] = parse(saved[key])
    saves.parent.mkdir(parents=True, exist_ok=True)
    count = len(prompts) - len(found)
    with progress(Console(stderr=True), "judge", count, unit="responses") as advance:
        for _ in range(attempts):
            missing = [item for item in prompts if item not in found]
            if not missing:
                break
            for place, reply in judge.replies([prompts[item] for item in missing]):
                item = missing[place]
                try:
                    found[item] = parse(reply)
                except ValueError:
                    continue
                row = _Verdict(item=item, judge=judge.name, key=keys[item], reply=reply)
                append_json_lines(saves, [asdict(row)])
                advance(1)
    return found


def _saved(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return {row.key: row.reply for row in read_rows(_Verdict, path)}
    except DataError as error:
        raise ConfigError(
            f"{path}: holds no verdicts ({error}); give them a file of their own"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """One line of the file."""

    item: str
    judge: str
    key: str
    """Digest of judge and prompt."""
    reply: str


def _digest(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
