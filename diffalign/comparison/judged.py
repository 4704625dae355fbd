"""Images of a prompt held against each other by a pair judge: its verdicts, and scores of them.

Verdicts are kept, lines of `judgements/NAME.jsonl`: two images, and what the judge said with either
of them first. The score of an image is its mean over the verdicts on it. Of images that come later
only the new pairs are asked about, and all scores of their prompt are made anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from diffalign.batching import each_or_error
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row
from diffalign.comparison.score import read_column
from diffalign.comparison.scored_images import ImagesByPrompt
from diffalign.data.decoding import BadImageError, decode
from diffalign.data.score_columns import ScoreKey, ScoreRow, read_score_column, write_score_column
from diffalign.errors import CacheError
from diffalign.files import add_json_lines, read_json, read_rows, write_json, write_json_lines
from diffalign.intervals import Bootstrap, ratio
from diffalign.pair_judges.base import AbstractPairJudge, every_pair, in_both_orders, win_rates
from diffalign.parsing import checked
from diffalign.scorers.pairwise import Pairwise
from diffalign.scorers.repeats import Perturbation, identity_of

JUDGEMENTS = "judgements"
"""Folder of the verdicts, next to that of scores."""
_CERTAIN = 1e-6
"""Probabilities nearer to 0 or 1 count as this far from it, where log-odds are made of them."""


Asked = tuple[str, str, str]
"""SHA-256 of the image with the smaller one, that of the other, prompt."""


class Readable(Protocol):
    """An image of a folder or a data set."""

    @property
    def key(self) -> ScoreKey:
        """SHA-256 and prompt."""

    @property
    def read(self) -> Callable[[], bytes]:
        """The content of its file; raises OSError where it is gone."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict on two images, of which the first has the smaller digest."""

    first: str
    """SHA-256."""
    second: str
    prompt: str
    fingerprint: str
    """Of the scorer."""
    forward: float
    """Probability that the first is preferred, where it is shown first."""
    backward: float
    """Probability that the second is preferred, where it is shown first."""

    @property
    def key(self) -> Asked:
        """What it is a verdict on."""
        return self.first, self.second, self.prompt

    @property
    def preference(self) -> float:
        """Probability that the first is preferred: the mean of both orders."""
        return (self.forward + 1 - self.backward) / 2


Verdicts = Mapping[Asked, Judgement]


@dataclass(frozen=True)
class _Pair:
    first: Readable
    second: Readable

    @property
    def key(self) -> Asked:
        return self.first.key[0], *self.second.key

    @property
    def prompt(self) -> str:
        return self.first.key[1]


_Opened = tuple[_Pair, Image.Image, Image.Image]


def read_verdicts(
    path: Path, fingerprint: str | None = None
) -> dict[tuple[str, str, str], Judgement]:
    """The verdicts of a file; an absent one is empty.

    Args:
        path: of the verdicts.
        fingerprint: of the scorer that goes on with the file; None takes whatever made it.

    Raises:
        CacheError: another scorer made it.
    """
    found = read_rows(Judgement, path) if path.is_file() else []
    for row in found:
        if row.fingerprint != (fingerprint or found[0].fingerprint):
            raise CacheError(
                f"{path} holds verdicts by {row.fingerprint}, and this is {fingerprint}. Choose "
                f"another column with name=NAME, or delete the file"
            )
    return {row.key: row for row in found}


class JudgementsPlan(AbstractPlan):
    """The verdicts on all pairs of images of each prompt, as blocks of pairs."""

    failures_in_a_row = None
    unit = "pairs"

    def __init__(
        self,
        images: ImagesByPrompt,
        scorer: Pairwise,
        column: Path,
        *,
        batch_size: int,
        device: str = "auto",
        place: Callable[[str | None], Pairwise] | None = None,
    ) -> None:
        """Look at what is judged.

        Args:
            images: all of them, of any number of prompts.
            scorer: whose judge is asked.
            column: of the scores.
            batch_size: images shown at once, two a pair.
            device: of the settings.
            place: puts the scorer on a worker's device; None takes it as it is.

        Raises:
            CacheError: another scorer made the verdicts, or the column.
        """
        self.folder, self.of, self.title = column.parent, column.stem, column.stem
        self.images, self.device, self._fingerprint = images, device, scorer.fingerprint
        self.file_of_verdicts = verdicts_file(column)
        self._place = place or (lambda device: scorer)
        _refuse_other_scores(column, scorer)
        self.known = read_verdicts(self.file_of_verdicts, self._fingerprint)
        by_prompt: dict[str, list[Readable]] = {}
        for key, image in sorted(images.candidates.items(), key=lambda each: each[0][0]):
            by_prompt.setdefault(key[1], []).append(image)
        self.alone = sum(len(members) == 1 for members in by_prompt.values())
        pairs = [
            _Pair(members[i], members[j])
            for _, members in sorted(by_prompt.items())
            for i, j in every_pair(len(members))
        ]
        self.pairs, each = len(pairs), max(1, batch_size // 2)
        chunks = [pairs[start : start + each] for start in range(0, len(pairs), each)]
        self.blocks = [
            Block.of(number, [self._fingerprint, [pair.key for pair in chunk]], len(chunk), chunk)
            for number, chunk in enumerate(chunks)
        ]

    def is_done(self, block: Block) -> bool:
        return all(pair.key in self.known for pair in block.work)

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        judge = self._place(device).judge
        return lambda block: self._judge(judge, block.work)

    def _judge(self, judge: AbstractPairJudge, pairs: Sequence[_Pair]) -> list[Row | Failed]:
        made: list[Row | Failed] = []
        ready: list[_Opened] = []
        for pair in pairs:
            if pair.key in self.known:
                continue
            try:
                ready.append((pair, decode(pair.first.read()), decode(pair.second.read())))
            except (OSError, BadImageError) as error:
                made.append(_failed(pair, f"cannot be read: {error}"))

        def ask(
            some: Sequence[tuple[_Pair, Image.Image, Image.Image]],
        ) -> list[tuple[float, float]]:
            asked, a, b = zip(*some, strict=True)
            found = in_both_orders(judge, a, b, [pair.prompt for pair in asked])
            return list(zip(found.forward.tolist(), found.backward.tolist(), strict=True))

        for (pair, _, _), found in each_or_error(ask, ready) if ready else ():
            if isinstance(found, Exception):
                made.append(_failed(pair, f"{type(found).__name__}: {found}"))
            elif not all(map(math.isfinite, found)):
                made.append(_failed(pair, f"its probabilities are {found[0]} and {found[1]}"))
            else:
                first, second, prompt = pair.key
                row = Judgement(
                    first=first,
                    second=second,
                    prompt=prompt,
                    fingerprint=self._fingerprint,
                    forward=found[0],
                    backward=found[1],
                )
                made.append(Row(asdict(row)))
        return made

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        there = read_verdicts(self.file_of_verdicts, self._fingerprint)
        new = {row.key: row for row in (Judgement(**values) for values in rows)}
        self.file_of_verdicts.parent.mkdir(parents=True, exist_ok=True)
        add_json_lines(
            self.file_of_verdicts, [asdict(row) for key, row in new.items() if key not in there]
        )


def verdicts_file(column: Path) -> Path:
    """The file of the verdicts of a column: of generated images next to the folder of scores."""
    above = column.parent.parent if column.suffix == ".jsonl" else column.parent
    return above / JUDGEMENTS / f"{column.stem}.jsonl"


def scores_of(verdicts: Verdicts, images: Mapping[ScoreKey, Readable]) -> dict[ScoreKey, float]:
    """Mean preference of each image over the verdicts that hold it against another of `images`."""
    by_prompt: dict[str, list[str]] = {}
    for digest, prompt in images:
        by_prompt.setdefault(prompt, []).append(digest)
    found: dict[ScoreKey, float] = {}
    for prompt, members in by_prompt.items():
        members.sort()
        pairs = [
            (pair, verdicts[key])
            for pair in every_pair(len(members))
            if (key := (members[pair[0]], members[pair[1]], prompt)) in verdicts
        ]
        won = win_rates(len(members), [p for p, _ in pairs], [v.preference for _, v in pairs])
        found.update({(m, prompt): w for m, w in zip(members, won, strict=True) if w is not None})
    return found


def log_odds_of(verdicts: Verdicts, one: ScoreKey, other: ScoreKey) -> float | None:
    """Log-odds, by the verdict on two images of a prompt, that the first is preferred; None where
    there is no verdict on them."""
    swapped = one[0] > other[0]
    first, second = (other, one) if swapped else (one, other)
    verdict = verdicts.get((first[0], second[0], one[1]))
    if verdict is None:
        return None
    p = min(max(verdict.preference, _CERTAIN), 1 - _CERTAIN)
    found = math.log(p / (1 - p))
    return -found if swapped else found


def write_scores(column: Path, scorer: Pairwise, scores: Mapping[ScoreKey, float]) -> None:
    """Write a column anew, whole or not at all.

    Args:
        column: `.jsonl` next to generated images, `.parquet` of a data set.
        scorer: whose scores they are.
        scores: see `scores_of`.

    Raises:
        CacheError: the column is there, and of another scorer.
        DataError: the disk refuses.
    """
    identity = identity_of(scorer, repeats=1, perturbation=Perturbation())
    if column.suffix == ".parquet":
        rows = [ScoreRow(image=image, prompt=p, score=s) for (image, p), s in scores.items()]
        write_score_column(column, identity, rows)
        return
    given = {"fingerprint": identity.fingerprint}
    write_json_lines(
        column, [{"image": i, "prompt": p, **given, "score": s} for (i, p), s in scores.items()]
    )


def _refuse_other_scores(column: Path, scorer: Pairwise) -> None:
    """Raise CacheError where the column of another scorer would be replaced."""
    if column.suffix == ".jsonl":
        read_column(column, scorer.fingerprint)
    elif column.is_file():
        found = read_score_column(column).scorer.whole_fingerprint
        if found != scorer.fingerprint:
            raise CacheError(
                f"{column} holds scores by {found}, and this is {scorer.fingerprint}. Choose "
                f"another file with name=NAME, or delete it"
            )


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """How far the verdicts of a judge depend on which image is shown first."""

    pairs: int
    first_shown: float
    """Mean probability of the image that is shown first, over both orders; 0.5 has no bias."""
    interval: tuple[float, float] | None
    """Of it, at 95 %, by resampling prompts; None for a single prompt."""
    same_winner: float
    """Share of the pairs of which the same image is preferred in both orders."""

    def in_words(self) -> str:
        """One sentence."""
        known = ""
        if self.interval is not None:
            known = f" (95 % interval {self.interval[0]:.3f} to {self.interval[1]:.3f})"
        return (
            f"Position: the image that is shown first is preferred with a mean probability of "
            f"{self.first_shown:.3f}{known}, and 0.5 is no bias; {self.same_winner:.0%} of "
            f"{self.pairs:,} pairs have the same winner in both orders"
        )


def position_bias(verdicts: Sequence[Judgement]) -> PositionBias:
    """The bias of at least one verdict; pairs of which an order is undecided have no winner."""
    prompts, cluster = np.unique([each.prompt for each in verdicts], return_inverse=True)
    shown = np.array([(each.forward + each.backward) / 2 for each in verdicts])
    same = [(each.forward - 0.5) * (each.backward - 0.5) < 0 for each in verdicts]
    tally = {
        "shown": np.bincount(cluster, weights=shown, minlength=len(prompts)),
        "pairs": np.bincount(cluster, minlength=len(prompts)).astype(float),
    }
    found = Bootstrap().intervals(
        tally,
        {"shown": lambda sums: ratio(sums["shown"], sums["pairs"])},
        shares={"shown": 1.0},
    )["shown"]
    return PositionBias(
        pairs=len(verdicts),
        first_shown=float(shown.mean()),
        interval=None if found is None else (float(found[0]), float(found[1])),
        same_winner=float(np.mean(same)),
    )


def bias_file(column: Path) -> Path:
    """The file of the bias next to a column of scores."""
    return column.with_suffix(".position.json")


def write_bias(column: Path, bias: PositionBias) -> None:
    """Keep the bias of a column's judge."""
    write_json(bias_file(column), asdict(bias))


def read_bias(column: Path) -> PositionBias | None:
    """The bias of a column's judge; None where no judge made it.

    Raises:
        DataError: the file is damaged.
    """
    path = bias_file(column)
    return checked(PositionBias, read_json(path), path) if path.is_file() else None


def _failed(pair: _Pair, reason: str) -> Failed:
    names = " and ".join(side.key[0][:12] for side in (pair.first, pair.second))
    return Failed({"path": f"{names}, {pair.prompt!r:.60}", "reason": reason})
