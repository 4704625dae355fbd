"""Checkpoints of a run next to each other: how often each beats the base, and how far it has moved.

Win rate over drift is a hump: what preferences teach comes first, and what is learnt of their noise
after it (Rafailov et al. 2024, arXiv:2406.02900, there over the square root of a KL divergence).
Drift is the distance of a checkpoint's images from those that the base makes of the same noise, by
the features of the scorer where it has any, and else by pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from diffalign.comparison.compare import Comparison
from diffalign.comparison.diversity import Distance, pixel_distance
from diffalign.comparison.report import percent, percent_interval
from diffalign.generation.manifest import ItemKey, ManifestRow
from diffalign.imaging.grid import INK, LINE, MUTED, PAPER, font_for
from diffalign.imaging.image_files import data_uri, read_image
from diffalign.pages.parts import Html, Section, interval_bar, paragraph, table

_BEST, _OTHERS = (22, 128, 92), (36, 104, 180)
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint against the base."""

    step: int
    checkpoint: Path
    """Its folder."""
    drift: float
    """Distance of its images from those of the base."""
    drift_by: str = "pixels"
    """Whose distance that is: `pixels` in [-1, 1], their root mean square difference; or `features
    of NAME`, 1 - cosine."""
    comparison: Comparison

    @property
    def win_rate(self) -> float:
        """Among all pairs, a tie counted as half a win: early checkpoints decide few pairs."""
        return self.comparison.win_rate_ties_half

    @property
    def interval(self) -> str:
        """The interval of the win rate, for people."""
        return percent_interval(self.comparison.win_rate_ties_half_interval)

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval of the win rate; all that is possible where there is none."""
        interval = self.comparison.win_rate_ties_half_interval
        return (0.0, 1.0) if interval is None else (interval.low, interval.high)


def drift_from(
    folder: Path,
    rows: Iterable[ManifestRow],
    baseline: str,
    distance: Distance = pixel_distance,
) -> dict[str, float]:
    """How far each model's images are from those of the baseline.

    Args:
        folder: of a manifest.
        rows: of it.
        baseline: name of the model that the others are held against.
        distance: between two images: of their pixels, or of a scorer's features.

    Returns:
        Model -> mean over prompts and seeds of the distance, 0 to 2 of either kind; models without
        an image in common with the baseline are absent.
    """
    by_key: Mapping[ItemKey, ManifestRow] = {row.key: row for row in rows}
    found: dict[str, list[float]] = {}
    for (model, prompt, seed), row in by_key.items():
        other = by_key.get((baseline, prompt, seed))
        if model != baseline and other is not None:
            pair = [read_image(folder / each.file) for each in (other, row)]
            found.setdefault(model, []).append(distance(pair))
    return {model: math.fsum(values) / len(values) for model, values in found.items()}


def best_of(measured: Sequence[Measured]) -> Measured:
    """The one of the highest win rate; of equal ones, that which drifted least."""
    return max(measured, key=lambda each: (each.win_rate, -each.drift))


def as_good_as(best: Measured, measured: Sequence[Measured]) -> list[Measured]:
    """Those that the prompts do not tell from the best: their win rates lie in its interval."""
    low, high = best.bounds
    return [each for each in measured if low <= each.win_rate <= high]


def sentences(best: Measured, measured: Sequence[Measured]) -> list[str]:
    """What follows from the figures, in plain words."""
    level = f"{best.comparison.confidence:.0%} interval"
    said = [
        f"Use the checkpoint of step {best.step}: it wins {percent(best.win_rate)} against the "
        f"base, ties as half ({level} {best.interval})."
    ]
    if best.bounds[0] <= 0.5:
        said.append(
            "That may be chance: its interval holds one half, so no checkpoint is better than the "
            "base beyond doubt. Take more prompts or seeds, or train longer."
        )
    alike = [each for each in as_good_as(best, measured) if each is not best]
    if alike:
        steps = ", ".join(str(each.step) for each in alike)
        nearest = min(as_good_as(best, measured), key=lambda each: each.drift)
        nearer = "" if nearest is best else f" Of these, step {nearest.step} drifted least."
        said.append(f"These prompts do not tell it from step {steps}.{nearer}")
    last = measured[-1]
    if last is not best and last.win_rate < best.bounds[0]:
        said.append(
            f"The last one, step {last.step}, wins {percent(last.win_rate)}: the run went on past "
            f"its best, and a shorter one, a lower learning rate or a larger beta would do."
        )
    return said


def warnings_by_others(
    best: Measured, watched: Mapping[str, Mapping[int, Comparison]], *, scorer: str
) -> list[str]:
    """What scorers that did not choose say of the checkpoint that was chosen.

    Args:
        best: by `scorer`.
        watched: name of a scorer -> step -> checkpoint against the base.
        scorer: name of the one that chose.

    Returns:
        A sentence for each of those by which that checkpoint is worse than the base, beyond its
        interval.
    """
    said = []
    for name, by_step in watched.items():
        interval = by_step[best.step].mean_difference_interval
        if interval is None or interval.high >= 0:
            continue
        sound = [
            step
            for step, found in sorted(by_step.items())
            if found.mean_difference_interval and found.mean_difference_interval.high >= 0
        ]
        instead = f" Step {sound[-1]} is the latest that does not." if sound else ""
        said.append(
            f"Step {best.step} scores lower than the base by {name} "
            f"({by_step[best.step].mean_difference:+.3g}), while {scorer} chooses it: where "
            f"{scorer} is what the run was trained on, that is how reward hacking looks, and it is "
            f"harm where {name} measures something that you want. Look at the images.{instead} Or "
            f"train with a larger beta, a lower learning rate, or on both scores."
        )
    return said


def section_of(
    measured: Sequence[Measured],
    best: Measured,
    curve: Image.Image,
    said: Sequence[str],
) -> Section:
    """Curve, figures and what follows from them, for a page."""
    uri = data_uri(curve)
    rows = [
        (
            f"step {each.step}" + (" (use this one)" if each is best else ""),
            f"{each.drift:.4f}",
            f"{percent(each.win_rate)} ({each.interval})",
            interval_bar(each.win_rate, *each.bounds),
            f"{each.comparison.wins} / {each.comparison.ties} / {each.comparison.losses}",
            f"{each.comparison.model_mean:.3f}",
        )
        for each in measured
    ]
    return Section(
        "Win rate over drift",
        *map(paragraph, said),
        Html(f'<img alt="win rate over drift" style="max-width:100%" src="{uri}">'),
        table(
            ("", f"drift ({best.drift_by})", "win rate", "", "won, tied, lost", "mean score"), rows
        ),
    )


def render_curve(measured: Sequence[Measured], best: Measured) -> Image.Image:
    """Win rates over drift, from the base to the last checkpoint, each with its interval."""
    canvas = Image.new("RGB", (_WIDTH + 2 * _MARGIN, _HEIGHT + 2 * _MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    widest = max(each.drift for each in measured) or 1.0
    lows, highs = zip(*(each.bounds for each in measured), strict=True)
    bottom, top = min(0.5, *lows), max(0.5, *highs)
    tall = (top - bottom) or 1.0

    def at(drift: float, share: float) -> tuple[float, float]:
        x = _MARGIN + 0.95 * drift / widest * _WIDTH
        return x, _MARGIN + (top - share) / tall * _HEIGHT

    for tenth in range(11):
        if bottom <= tenth / 10 <= top:
            y = at(0, tenth / 10)[1]
            width = 3 if tenth == 5 else 1
            pen.line((_MARGIN, y, _MARGIN + _WIDTH, y), fill=LINE, width=width)
            pen.text((_MARGIN - 8, y), f"{tenth}0%", fill=MUTED, font=font_for("", 16), anchor="rm")
    places = [at(each.drift, each.win_rate) for each in measured]
    pen.line([at(0, 0.5), *places], fill=_OTHERS, width=2)
    for number, (each, (x, y)) in enumerate(zip(measured, places, strict=True)):
        colour = _BEST if each is best else _OTHERS
        pen.line((*at(each.drift, each.bounds[0]), *at(each.drift, each.bounds[1])), colour, 3)
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
        aside, anchor = (9, "ls") if number % 2 else (-9, "rs")
        pen.text((x + aside, y - 9), str(each.step), fill=INK, font=font_for("", 16), anchor=anchor)
    pen.text(
        (_MARGIN, _MARGIN / 2),
        "win rate against the base, ties as half, by step",
        fill=INK,
        font=font_for("", 18),
        anchor="lm",
    )
    for share in (0.0, 0.5, 1.0):
        x = at(share * widest, bottom)[0]
        label = f"{share * widest:.3f}"
        y = _HEIGHT + _MARGIN + 8
        pen.text((x, y), label, fill=MUTED, font=font_for("", 16), anchor="ma")
    pen.text(
        (_MARGIN + _WIDTH, _HEIGHT + 2 * _MARGIN - 10),
        f"distance from the base's images, by {best.drift_by}",
        fill=MUTED,
        font=font_for("", 16),
        anchor="rs",
    )
    return canvas
