"""What checks found, for the console, for programs, and as a page with the images in question."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffalign.checking.checks.base import Figure, Finding, Outcome, Share
from diffalign.checking.rows import CheckedRow, Examined, SeenAt
from diffalign.data.decoding import BadImageError, EncodedImage, decode
from diffalign.imaging.grid import GridCell, GridRow
from diffalign.pages.parts import (
    Html,
    Section,
    Tile,
    bars,
    command,
    interval_bar,
    mixed_cards,
    notes,
    paragraph,
    settings_list,
    table,
    tiles,
    write_report,
)

FailOn = Literal["any", "harmful", "never"]

_IMAGES_AT_MOST = 4
"""Of one example."""
_LONGEST_CAPTION = 240

ReadsAgain = Callable[[CheckedRow], Mapping[str, EncodedImage]]
Texts = Callable[[CheckedRow], Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found in a data set."""

    data: Examined
    outcomes: Mapping[str, Outcome]
    """By kind of the check."""
    titles: Mapping[str, str]
    """Kind -> heading."""

    @property
    def findings(self) -> list[Finding]:
        """The harmful ones first."""
        found = [finding for outcome in self.outcomes.values() for finding in outcome.findings]
        return sorted(found, key=lambda finding: finding.severity != "harmful")

    def fails(self, on: FailOn) -> bool:
        """Whether there is a finding that a program should stop at."""
        if on == "never":
            return False
        return any(on == "any" or finding.severity == on for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence about all of it."""
        found = self.findings
        harmful = sum(finding.severity == "harmful" for finding in found)
        if not found:
            return f"Nothing was found in {len(self.data.rows):,} {self.data.noun}."
        doubtful = len(found) - harmful
        parts = [f"{harmful} harmful"] * bool(harmful) + [f"{doubtful} doubtful"] * bool(doubtful)
        s = "s" * (len(found) > 1)
        return f"{' and '.join(parts)} finding{s} in {len(self.data.rows):,} {self.data.noun}."


def as_json(report: Report, *, listed: int) -> dict[str, Any]:
    """Plain values; of the rows of a finding the first so many."""
    return {
        "data": report.data.summary,
        "kind": report.data.kind,
        "verdict": report.verdict,
        "findings": [
            {
                "name": finding.name,
                "severity": finding.severity,
                "count": finding.count,
                "sentence": finding.sentence,
                "rows": list(finding.rows[:listed]),
            }
            for finding in report.findings
        ],
        "checks": {
            kind: {
                "figures": {name: _plain(value) for name, value in outcome.figures.items()},
                "counts": {title: dict(counts) for title, counts in outcome.counts.items()},
                "passed_over": outcome.passed_over,
            }
            for kind, outcome in report.outcomes.items()
        },
    }


def _plain(value: Figure) -> Any:
    if isinstance(value, Share):
        return {**dataclasses.asdict(value), "value": value.value if value.of else None}
    return value


def in_words(value: Figure) -> str:
    """A figure for people."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_report(report: Report, console: Console) -> None:
    """Figures of every check, then the findings, one sentence each."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("check", "figure", "value"):
        shown.add_column(heading)
    for kind, outcome in report.outcomes.items():
        if not outcome.figures:
            continue
        name = kind
        for figure, value in outcome.figures.items():
            shown.add_row(escape(name), escape(figure), escape(in_words(value)))
            name = ""
    console.print(shown)
    for kind, outcome in report.outcomes.items():
        if outcome.passed_over and not outcome.figures:
            said = f"{kind}: {outcome.passed_over}"
            console.print(f"[dim]{escape(said)}", soft_wrap=True)
    for finding in report.findings:
        colour = "red" if finding.severity == "harmful" else "yellow"
        console.print(
            f"[{colour} bold]{finding.severity}[/] {escape(finding.sentence)}", soft_wrap=True
        )
    console.print(f"[bold]{escape(report.verdict)}", soft_wrap=True)


def write_page(
    report: Report,
    path: Path,
    *,
    again: ReadsAgain,
    texts: Texts | None,
    examples: int,
    max_pixels: int,
    settings: Mapping[str, object],
    repeated_by: str,
) -> None:
    """Write the page, whole or not at all.

    Args:
        report: what was found.
        path: of the file.
        again: reads the images of a row once more.
        texts: reads the texts of a row of responses once more.
        examples: of a finding.
        max_pixels: images above are not decoded.
        settings: of the checks.
        repeated_by: the command that gives the page once more.
    """
    images = _Images(report.data, again, max_pixels)
    harmful = sum(finding.severity == "harmful" for finding in report.findings)
    first = tiles(
        [
            Tile(report.data.noun, f"{len(report.data.rows):,}"),
            Tile("with a preference", f"{len(report.data.pairs):,}"),
            Tile("harmful findings", f"{harmful}"),
            Tile("doubtful findings", f"{len(report.findings) - harmful}"),
        ]
    )
    write_report(
        path,
        "Check of a data set",
        Section(report.verdict.rstrip("."), first),
        *(_finding_section(finding, images, texts, examples) for finding in report.findings),
        *_figure_sections(report),
        Section("Settings", settings_list(settings)),
        Section("How to repeat it", command(repeated_by)),
        lead=report.data.summary,
    )


def _finding_section(
    finding: Finding, images: _Images, texts: Texts | None, examples: int
) -> Section:
    shown = [example for example in finding.examples if example][:examples]
    parts = [
        notes([finding.sentence]) if finding.severity == "harmful" else paragraph(finding.sentence),
    ]
    if (share := finding.share) is not None:
        parts.append(interval_bar(share.value, share.low, share.high))
    if shown:
        parts.append(mixed_cards([images.example(example) for example in shown]))
    if texts is not None:
        parts.append(_texts_of(finding, images.data, texts, examples))
    if len(finding.examples) > len(shown) and shown:
        parts.append(paragraph(f"{len(shown)} of {len(finding.examples):,} are shown."))
    title = finding.name.replace("_", " ").capitalize()
    return Section(f"{title} ({finding.severity})", *parts)


def _texts_of(finding: Finding, data: Examined, texts: Texts, examples: int) -> Html:
    """The prompts and responses of the first rows of a finding."""
    named = dict.fromkeys(finding.rows[:examples])
    rows = [row for row in data.rows if row.name in named][:examples]
    found = [(row.name, texts(row)) for row in rows]
    held = [(name, said) for name, said in found if said]
    if not held:
        return Html("")
    heads = list(dict.fromkeys(head for _, said in held for head in said))
    return table(
        ["row", *heads], [[name, *(said.get(head, "") for head in heads)] for name, said in held]
    )


def _figure_sections(report: Report) -> list[Section]:
    sections = []
    for kind, outcome in report.outcomes.items():
        parts = []
        if outcome.figures:
            named = {name: in_words(value) for name, value in outcome.figures.items()}
            parts.append(settings_list(named))
        for title, counts in outcome.counts.items():
            parts.append(paragraph(title))
            parts.append(bars(counts))
        if outcome.passed_over:
            parts.append(paragraph(f"Passed over: {outcome.passed_over}."))
        if parts:
            sections.append(Section(report.titles[kind], *parts))
    return sections


class _Images:
    """The images of examples, read once more; several may be of one row."""

    def __init__(self, data: Examined, again: ReadsAgain, max_pixels: int) -> None:
        self.data = data
        self._again = again
        self._max_pixels = max_pixels
        self._known: dict[int, Mapping[str, EncodedImage]] = {}

    def example(self, places: Sequence[SeenAt]) -> tuple[GridRow, list[str]]:
        """A card, and the titles of its images."""
        places = places[:_IMAGES_AT_MOST]
        several = len({place.row for place in places}) > 1
        names = [self.data.rows[place.row].name for place in places]
        prompts = dict.fromkeys(self.data.rows[place.row].prompt for place in places)
        caption = " / ".join(_cut(prompt) for prompt in prompts if prompt)
        row = GridRow(
            caption=caption or "(no prompt)",
            note=", ".join(dict.fromkeys(names)),
            cells=[self._cell(place) for place in places],
        )
        titles = [
            f"{place.side}, {name}" if several else place.side
            for place, name in zip(places, names, strict=True)
        ]
        return row, titles

    def _cell(self, place: SeenAt) -> GridCell | None:
        if place.row not in self._known:
            self._known[place.row] = self._again(self.data.rows[place.row])
        try:
            image = decode(self._known[place.row].get(place.side), max_pixels=self._max_pixels)
        except BadImageError:
            return None
        return GridCell(image=_small(image))


def _small(image: Image.Image) -> Image.Image:
    """At most as large as a page shows it."""
    if max(image.size) > _PAGE_PIXELS:
        image.thumbnail((_PAGE_PIXELS, _PAGE_PIXELS), Image.Resampling.LANCZOS)
    return image


_PAGE_PIXELS = 256


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_CAPTION else text[: _LONGEST_CAPTION - 4] + " ..."
